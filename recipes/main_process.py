"""Work that one process does for all of them, such as looking at folders on shared storage."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from modeling_nanochat.errors import UserError

from .precision import several_on_cpu

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
