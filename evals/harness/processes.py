"""Several processes with one work: each takes its share, results are gathered, and an error on one ends all at once.

Otherwise the others would wait in a collective that never completes, with NCCL for ten minutes.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from accelerate.utils.environment import parse_flag_from_env

from modeling_nanochat.errors import UserError

Item = TypeVar("Item")

POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0  # for the others to exit before the failed process, which may host the store
FAILED, ENDED = "failed", "ended"
LONGEST_WAIT = timedelta(hours=12)  # for the slowest share; a process that fails does not keep the others waiting


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; by default it is alone. All call `gather`, `sum` and `agree`."""

    index: int = 0
    count: int = 1
    device: torch.device | None = None  # None: to be chosen

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's items: every `count`-th."""
        return items[self.index :: self.count]

    def gather(self, results: Sequence[Item]) -> list[Item]:
        """Return the results of all processes in the order of the items that `share` dealt out."""
        if self.count == 1:
            return list(results)
        shares = gather_object([list(results)])
        gathered: list[Any] = [None] * sum(map(len, shares))
        for index, part in enumerate(shares):
            gathered[index :: self.count] = part
        return gathered

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.count == 1 else reduce(tensor, "sum")

    def agree(self, value: Item) -> Item:
        """Return the first process's value."""
        return value if self.count == 1 else broadcast_object_list([value])[0]


ALONE = Processes()


@contextmanager
def launched_processes(advice: str) -> Iterator[Processes]:
    """Yield the processes that `accelerate launch` or torchrun started; one that was started otherwise is alone.

    Args:
        advice: What to do after one was killed, see `ending_together`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(device=torch.device("cpu") if parse_flag_from_env("ACCELERATE_USE_CPU") else None)
        return
    state = PartialState(cpu=several_on_cpu(), timeout=LONGEST_WAIT)
    with ending_together(advice):
        yield Processes(state.process_index, state.num_processes, state.device)
        state.wait_for_everyone()
    state.destroy_process_group()


def several_on_cpu() -> bool:
    """Whether torchrun started several processes and there is no device with collectives (Apple's GPUs have none).

    Accelerate needs `cpu=True` then; otherwise each process would silently train alone.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = torch.accelerator.current_accelerator(check_available=True)
    return several and (device is None or device.type == "mps")


def shared_store() -> dist.Store:
    """A key-value store of all processes, separate from torch's own keys."""
    return dist.PrefixStore("nanochat", dist.distributed_c10d._get_default_store())


@contextmanager
def ending_together(advice: str = "start it again") -> Iterator[None]:
    """An exception within the block, on any process, ends all processes in seconds; only the first prints its error.

    A single process and signals are not affected. Every process must leave the block before any of them exits.

    Args:
        advice: What to do after one was killed.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    over = threading.Event()
    watch = threading.Thread(target=exit_with_the_others, args=(shared_store(), over, advice), daemon=True)
    watch.start()
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    finally:
        over.set()
        watch.join()
    if failure:
        fail(failure)


def exit_with_the_others(store: dist.Store, over: threading.Event, advice: str) -> None:
    """Run in a thread, until `over`: exit this process as soon as another has failed, whatever it is doing."""
    while not over.wait(POLL_SECONDS):
        try:
            if not store.check([FAILED]):
                continue
            store.add(ENDED, 1)
        except RuntimeError:  # the process that hosts the store is gone; after an exception it would have waited
            write_error(f"error: another process was killed; its launcher may know why; {advice}\n")
        os._exit(1)


def fail(error: Exception) -> None:
    """Print the error, unless another process failed first and may have caused this one; then exit."""
    store = shared_store()
    try:
        first = store.add(FAILED, 1) == 1
    except RuntimeError:  # its host failed, or was killed and could not report it
        first = not isinstance(error, UserError)
    if first:
        expected = isinstance(error, UserError)
        write_error(f"error: {error}\n" if expected else "".join(traceback.format_exception(error)))
        wait_for_the_others(store)
    else:
        with suppress(RuntimeError):
            store.add(ENDED, 1)
    os._exit(1)  # a normal exit would wait for pending collectives


def write_error(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()


def wait_for_the_others(store: dist.Store) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    with suppress(RuntimeError):  # the store is gone, and so is its host
        while store.add(ENDED, 0) < dist.get_world_size() - 1 and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 10)
