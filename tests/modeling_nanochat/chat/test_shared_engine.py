"""Many callers, one batch: replies are those of each alone, nobody waits for another's code, callers may leave."""

import threading
import time
from dataclasses import replace

import pytest

from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.sampling import SamplingOptions
from modeling_nanochat.chat.shared_engine import SharedEngine
from modeling_nanochat.chat.turn import Finished, TextDelta, ToolCall, ToolResult
from modeling_nanochat.errors import UserError

WARM = SamplingOptions(temperature=1.0, top_k=20)
QUESTIONS = [[{"role": "user", "content": text}] for text in ("Hi", "Who are you?", "lamp " * 9, "12+7?", "Why?")]


@pytest.fixture
def engine(toy_model_and_tokenizer):
    return SharedEngine(*toy_model_and_tokenizer, rows=3)


def in_threads(calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_replies_of_many_threads_are_those_of_the_same_seeds_alone(engine):
    found = {}
    options = [replace(WARM, top_k=top_k) for top_k in (20, 0, 5, 500, 2)]

    def ask(number):
        events = list(engine.stream(QUESTIONS[number], options[number], max_new_tokens=20 + number, seed=number))
        found[number] = events[-1]
        text = "".join(event.text for event in events if isinstance(event, TextDelta))
        assert text == events[-1].messages[-1]["content"]

    in_threads([lambda number=number: ask(number) for number in range(5)])
    for number in range(5):
        alone = list(engine.stream(QUESTIONS[number], options[number], max_new_tokens=20 + number, seed=number))[-1]
        assert found[number] == alone


def test_a_caller_that_leaves_frees_its_row(engine):
    streams = [engine.stream(QUESTIONS[0], WARM, max_new_tokens=200, seed=i) for i in range(3)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()
    assert engine.outboxes == {}
    started = time.monotonic()
    assert isinstance(list(engine.stream(QUESTIONS[1], WARM, max_new_tokens=2))[-1], Finished)
    assert time.monotonic() - started < 5


class Scripted(SharedEngine):
    """Every reply begins with a call of the tool, with its question as the code."""

    def turn(self, prompt, *args, **kwargs):
        turn = super().turn(prompt, *args, **kwargs)
        text = self.codec.decode(prompt)
        call = [self.codec.python_start, *self.codec.encode(text), self.codec.python_end]
        advance, script = turn.advance, iter(call)
        turn.advance = lambda token: advance(next(script, token) if not turn.forced else token)
        return turn


def test_slow_code_of_one_caller_does_not_hold_up_the_others(toy_model_and_tokenizer):
    release = threading.Event()

    def tool(code):
        if "slow" in code:
            release.wait(30)
        return f"ran {code}"

    engine, order, found = Scripted(*toy_model_and_tokenizer, tool=tool, rows=3), [], {}

    def ask(text):
        events = list(engine.stream([{"role": "user", "content": text}], WARM, max_new_tokens=60, seed=1))
        found[text] = events
        order.append(text)
        if text == "quick":
            release.set()

    in_threads([lambda text=text: ask(text) for text in ("slow", "quick")])
    assert order == ["quick", "slow"]
    for text, events in found.items():
        call, result = (next(e for e in events if isinstance(e, kind)) for kind in (ToolCall, ToolResult))
        assert text in call.code and result.output == f"ran {call.code}"
        assert [message["role"] for message in events[-1].messages] == ["assistant", "tool", "assistant"]


def test_a_failure_is_told_to_those_who_wait_and_the_next_are_served(engine, monkeypatch):
    def fail(engine, arrivals, rows, sampler):
        arrivals(rows)
        raise RuntimeError("out of memory")

    run = Engine.run
    monkeypatch.setattr(Engine, "run", fail)
    with pytest.raises(UserError, match="could not be generated: out of memory$"):
        list(engine.stream(QUESTIONS[0], WARM))
    monkeypatch.setattr(Engine, "run", run)
    assert isinstance(list(engine.stream(QUESTIONS[0], WARM, max_new_tokens=2))[-1], Finished)
