"""One running batch for many callers: each reply enters at the next step and leaves when it ends."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Unfinished
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError, one_line
from .engine import Engine
from .python_tool import run_python
from .sampling import SamplingOptions
from .turn import MAX_TOOL_CALLS, Event, Finished, Turn

ROWS = 8
QUICK = 0.02  # seconds that a call of the tool may hold up all rows; most take less than a millisecond


class SharedEngine(Engine):
    """An engine whose `stream` may be called by many threads at once. Closing the iterator frees its row.

    Args:
        rows: Replies generated at a time; others wait in order of arrival.
        others: As for [`Engine`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tool: Callable[[str], str] | None = run_python,
        max_tool_calls: int = MAX_TOOL_CALLS,
        rows: int = ROWS,
    ):
        super().__init__(model, tokenizer, tool, max_tool_calls)
        self.rows = rows
        self.waiting: SimpleQueue[Turn] = SimpleQueue()
        self.first: list[Turn] = []  # taken from `waiting` to start a batch
        self.entered: list[Turn] = []  # those being generated
        self.outboxes: dict[int, SimpleQueue[Event | Exception]] = {}  # by the turn's id
        self.tools = ThreadPoolExecutor(rows, thread_name_prefix="tool")
        self.lock, self.thread = Lock(), Thread(target=self.serve, name="engine", daemon=True)

    def stream(
        self,
        messages: list[dict[str, Any]],
        options: SamplingOptions | None = None,
        *,
        max_new_tokens: int = 256,
        seed: int | None = None,
    ) -> Iterator[Event]:
        turn = self.turn(self.codec.prompt(messages), max_new_tokens, options, live=True)
        turn.generator = self.sampler(seed).generator
        turn.tool = partial(self.quick_or_later, turn) if self.tool else None
        outbox = self.outboxes[id(turn)] = SimpleQueue()
        with self.lock:
            if not self.thread.is_alive():
                self.thread = Thread(target=self.serve, name="engine", daemon=True)
                self.thread.start()
        self.waiting.put(turn)
        try:
            while True:
                event = outbox.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            turn.cancel()
            del self.outboxes[id(turn)]

    def quick_or_later(self, turn: Turn, code: str) -> str | Future[str]:
        """The tool's output, or where it will be: then the turn leaves, so that the others go on, and enters again."""
        assert self.tool is not None
        output = self.tools.submit(self.tool, code)
        try:
            return output.result(QUICK)
        except Unfinished:
            output.add_done_callback(lambda _: self.waiting.put(turn))
            return output

    def serve(self) -> None:
        """The engine's thread: generates all turns that callers have left in `waiting`."""
        while True:
            self.first, self.entered = [self.waiting.get()], []
            try:
                for turn, event in self.run(self.arrivals, self.rows, self.sampler(None)):
                    self.deliver(turn, event)
            except Exception as error:  # out of memory, a broken tool: those who wait are told, the next are served
                for turn in self.entered:
                    self.deliver(turn, UserError(f"the reply could not be generated: {one_line(error)}"))

    def arrivals(self, free: int) -> list[Turn]:
        """Up to `free` waiting turns whose callers have not left."""
        arrived: list[Turn] = []
        while len(arrived) < free:
            try:
                turn = self.first.pop() if self.first else self.waiting.get_nowait()
            except Empty:
                break
            arrived += [turn] if turn.finish_reason is None else []
        self.entered = [turn for turn in self.entered if turn.is_running] + arrived
        return arrived

    def deliver(self, turn: Turn, event: Event | Exception) -> None:
        if outbox := self.outboxes.get(id(turn)):  # the caller may have left
            outbox.put(event)
