"""What one process does for all of them, such as looking at folders on shared storage, and one trainer for each folder."""

import atexit
import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from modeling_nanochat.errors import UserError

from .device import several_on_cpu

Result = TypeVar("Result")


def on_main_process(work: Callable[[], Result]) -> Result:
    """Call `work` in the main process and return its result in every process; it must survive pickling.

    Raises:
        UserError: `work` raised one; in every process, so that none waits for the others.
    """
    answer: list[Any] = [None, None]
    if PartialState(cpu=several_on_cpu()).is_main_process:
        try:
            answer[0] = work()
        except UserError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1]:
        raise UserError(answer[1])
    return answer[0]


def lock_output(output_dir: str | Path) -> None:
    """Hold `output_dir` until this process ends; the kernel lets go of it however that happens.

    A second trainer would write into the first one's log, checkpoints and model.

    The lock is POSIX's, which belongs to a process: a child does not inherit it, so the workers of a killed trainer do not
    keep it, and the same process may take it again. Where the system or the file system has no locks, nothing is held.

    Raises:
        UserError: Another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    path = Path(output_dir).parent / f".{Path(output_dir).name}.lock"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                return
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(
                f"{output_dir} is in use by another trainer (process {holder}); wait for it, or give another --output_dir"
            ) from error
        if is_at(descriptor, path):
            break
        os.close(descriptor)  # its holder has just removed it; another process may already hold a new one
    os.truncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    atexit.register(remove, path, os.getpid())


def is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def remove(path: Path, owner: int) -> None:
    """Remove the lock's file while it is still held. In a forked child, whose parent holds it, do nothing."""
    if os.getpid() == owner:
        with suppress(OSError):
            path.unlink()
