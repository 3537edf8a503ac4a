"""One trainer per output folder: the second would write into the first one's log, checkpoints and model."""

import atexit
import errno
import os
from contextlib import suppress
from pathlib import Path

from modeling_nanochat.errors import UserError


def lock_output(output_dir: str | Path) -> None:
    """Hold `output_dir` until this process ends; the kernel lets go of it however that happens.

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
