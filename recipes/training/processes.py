"""Work of the main process for all processes, such as checks of shared folders, and a lock: one trainer per folder."""

import atexit
import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from evals.harness.processes import several_on_cpu, shared_store
from modeling_nanochat.errors import UserError

POLL_SECONDS = 0.05
Result = TypeVar("Result")


def on_main_process(work: Callable[[], Result]) -> Result:
    """Call `work` in the main process and return its result, which must be picklable, in every process.

    Raises:
        UserError: `work` raised one; raised in every process, so that none waits for the others.
    """
    answer: list[Any] = [None, None]
    if is_main := PartialState(cpu=several_on_cpu()).is_main_process:
        try:
            answer[0] = work()
        except UserError as error:
            answer[1] = str(error)
    wait_for_main_process(is_main)
    broadcast_object_list(answer)
    if answer[1]:
        raise UserError(answer[1])
    return answer[0]


def wait_for_main_process(is_main: bool) -> None:
    """Wait without a collective, which NCCL ends after ten minutes: tokenizing gigabytes may take longer."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    store = shared_store()
    done = f"done {store.add(f'calls of process {dist.get_rank()}', 1)}"  # all make the same calls
    if is_main:
        store.set(done, "yes")
    while not store.check([done]):
        time.sleep(POLL_SECONDS)


def lock_output(output_dir: str | Path) -> None:
    """Lock `output_dir` until this process exits; the kernel releases the lock even after a kill.

    A second trainer would write into the log, checkpoints and model of the first.

    POSIX locks belong to a process: children do not inherit them, so the workers of a killed trainer do not keep the
    lock, and the same process can take it again. If the system or the file system has no locks, nothing is locked.

    Raises:
        UserError: Another process holds the lock.
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
                f"{output_dir} is in use by another trainer (process {holder}); "
                "wait for it, or give another --output_dir"
            ) from error
        if is_same_file(descriptor, path):
            break
        os.close(descriptor)  # its holder has just removed it; another process may already hold a new file
    os.truncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    atexit.register(remove, path, os.getpid())


def is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def remove(path: Path, owner: int) -> None:
    """Remove the lock file while still holding the lock. Does nothing in a forked child, whose parent holds it."""
    if os.getpid() == owner:
        with suppress(OSError):
            path.unlink()
