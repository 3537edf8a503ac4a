"""The Space's app, and an engine for it with scripted replies."""

import importlib.util
from pathlib import Path

import pytest

from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.turn import Finished, TextDelta, ToolCall, ToolResult

pytest.importorskip("gradio")
ROOT = Path(__file__).parents[2]
DONE = Finished([{"role": "assistant", "content": "It is 19."}], "stop")
EVENTS = [TextDelta("Let me see. "), ToolCall("12+7"), ToolResult("19"), TextDelta("It is "), TextDelta("19."), DONE]


def load_app():
    spec = importlib.util.spec_from_file_location("space_app", ROOT / "space" / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


app = load_app()


class ScriptedEngine(Engine):
    """A toy model's engine that streams `events`, by default `EVENTS`."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.asked, self.events = [], None

    def stream(self, messages, options, *, max_new_tokens):
        self.asked.append((messages, options, max_new_tokens))
        self.turn(self.codec.prompt(messages), max_new_tokens)  # rejects what the real engine rejects
        yield from EVENTS if self.events is None else self.events
