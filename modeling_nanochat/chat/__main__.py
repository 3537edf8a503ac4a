"""Chat with a model in the terminal.

python -m modeling_nanochat.chat runs/pocket/sft
python -m modeling_nanochat.chat runs/pocket/sft --prompt "Who are you?" --temperature 0

The model is a folder written by a training stage, or a Hub id; sampling options in its `generation_config.json` are
the defaults. Piped questions, one per line, are answered in order.
"""

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.utils import logging

from ..attention_kernels import without_cudnn_attention
from ..cli import OneLineParser
from ..convert.int8 import quantize_int8
from ..errors import UserError, exit_on_user_error
from ..loading import load_model_and_tokenizer
from .engine import Engine
from .examples import example_questions, stage_note
from .sampling import OPTIONS, SETTINGS, SamplingOptions, check_setting, describe
from .turn import Finished, TextDelta, ToolCall, ToolResult

HELP = """/clear                 start a new conversation
/exit                  quit, as does Ctrl-D; Ctrl-C stops a reply"""
SHOWN_EXAMPLES = 3
DIM, CYAN, RED, RESET = "\033[2m", "\033[36m", "\033[31m", "\033[0m"


@dataclass
class Chat:
    """A conversation in the terminal and the settings it runs with."""

    engine: Engine
    options: SamplingOptions = field(default_factory=SamplingOptions)
    max_new_tokens: int = 256
    seed: int | None = None
    color: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, question: str) -> None:
        """Stream the reply to `question` and keep both in the conversation; Ctrl-C keeps the text so far.

        Raises:
            UserError: The question does not fit the model's context; the conversation is unchanged.
        """
        asked = self.messages + [{"role": "user", "content": question}]
        fitted = self.engine.fit(asked, self.max_new_tokens)
        if len(fitted) < len(asked):
            self.note("[the oldest messages no longer fit into the model's context and were left out]\n")
        said: list[str] = []
        try:
            reply = self.stream(fitted, said)
        except KeyboardInterrupt:
            self.note("\n[stopped]")
            reply = [{"role": "assistant", "content": "".join(said)}]
        print("\n", flush=True)
        self.messages = fitted + reply

    def stream(self, messages: list[dict[str, Any]], said: list[str]) -> list[dict[str, Any]]:
        """Print events as they arrive; texts are appended to `said`, so that they survive an interruption."""
        events = self.engine.stream(messages, self.options, max_new_tokens=self.max_new_tokens, seed=self.seed)
        for event in events:
            if isinstance(event, TextDelta):
                said.append(event.text)
                print(printable(event.text), end="", flush=True)
            elif isinstance(event, ToolCall):
                self.note(f"{new_line(said)}[python] {event.code}\n", CYAN)
            elif isinstance(event, ToolResult):
                self.note(f"[result] {event.output}\n", CYAN)
                said.append("\n")  # the next text begins a line
        assert isinstance(event, Finished), "the last event"
        return self.finish(event, said)

    def finish(self, event: Finished, said: list[str]) -> list[dict[str, Any]]:
        if event.finish_reason == "length":
            self.note(f"{new_line(said)}[the reply reached its limit]")
        elif not "".join(said).strip():
            self.note("[the model said nothing]")
        return event.messages

    def command(self, line: str) -> bool:
        """Run the command `/name value`; False if the user wants to quit."""
        name, _, value = line[1:].partition(" ")
        if name in ("exit", "quit"):
            return False
        if name == "clear":
            self.messages = []
            self.note("[new conversation]\n")
        elif name in OPTIONS:
            self.set(name, value.strip())
        else:
            unknown = "" if name == "help" else f"unknown command /{name}\n"
            self.note(unknown + self.help() + "\n")
        return True

    def help(self) -> str:
        commands = [
            f"/{name + ' X':21} {setting.help}; {describe(name)} (now {getattr(self.options, name)})"
            for name, setting in OPTIONS.items()
        ]
        return "\n".join([*commands, HELP])

    def set(self, name: str, value: str) -> None:
        try:
            if value:
                given: dict[str, Any] = {name: read_number(value)}
                self.options = replace(self.options, **given)
        except UserError as error:
            self.note(f"error: {error}\n", RED)
        else:
            self.note(f"[{name} {getattr(self.options, name)}]\n")

    def note(self, text: str, color: str = DIM) -> None:
        """Print text that is not the model's own."""
        text = printable(text)
        print(f"{color}{text}{RESET}" if self.color else text, end="", flush=True)

    def run(self, lines: Iterator[str]) -> None:
        """Answer questions and run commands until the input ends or asks to quit."""
        for line in lines:
            if line.startswith("/"):
                if not self.command(line):
                    return
            elif line:
                try:
                    self.ask(line)
                except UserError as error:
                    self.note(f"error: {error}\n", RED)


def read_number(text: str) -> int | float | str:
    """`5` as an integer, `0.5` and `nan` as floats, anything else unchanged."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def new_line(said: list[str]) -> str:
    text = "".join(said)
    return "\n" if text and not text.endswith("\n") else ""


def printable(text: str) -> str:
    """`text` without control characters, with which a model could repaint the terminal."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def typed_lines() -> Iterator[str]:
    """Lines typed at the terminal until Ctrl-D; Ctrl-C drops a half-written line."""
    try:
        import readline  # noqa: F401  editing and history for input(); absent on Windows
    except ImportError:
        pass
    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            print("\n[Ctrl-D or /exit quits]")
        except EOFError:
            print()
            return


def piped_lines() -> Iterator[str]:
    for line in sys.stdin or ():  # None after `<&-`
        print(f"> {line.strip()}", flush=True)
        yield line.strip()


def greeting(name: str, engine: Engine, examples: Sequence[str]) -> str:
    """The model's name and size, example questions if its card has any, and how to get help."""
    parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    size = f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"
    lines = [f"{name}, {size} parameters, on {engine.model.device}. /help lists the commands, Ctrl-D quits."]
    if examples:
        lines += ["Ask something, for instance:", *(f"  {example}" for example in examples[:SHOWN_EXAMPLES])]
    return "\n".join(lines) + "\n"


def parse_arguments(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """`model`, `prompt` and the settings that are given."""
    note = "Sampling options in the model folder's generation_config.json replace the defaults shown here."
    parser = OneLineParser(prog="nanochat-chat", description="Chat with a model in the terminal.", epilog=note)
    parser.add_argument("model", help="model folder or Hub id; a checkpoint of the original is converted once")
    parser.add_argument("-p", "--prompt", help="ask this question and exit")
    defaults = vars(SamplingOptions()) | {"max_new_tokens": Chat.max_new_tokens}
    parser.add_argument("--quantize", choices=["int8"], help="weights in int8, a quarter of the memory; on the CPU")
    for name, setting in SETTINGS.items():
        shown = f"; default {defaults[name]}" if name in defaults else ""
        what = f"{setting.help}; {describe(name)}{shown}"
        parser.add_argument(f"--{name}", type=read_number, default=argparse.SUPPRESS, help=what)
    given = vars(parser.parse_args(arguments))
    for name in SETTINGS.keys() & given.keys():
        check_setting(name, given[name])
    return given


@without_cudnn_attention()
def start(arguments: Sequence[str] | None = None) -> None:
    given = parse_arguments(arguments)
    name, prompt, quantized = given.pop("model"), given.pop("prompt"), given.pop("quantize")
    options = {name: given.pop(name) for name in OPTIONS if name in given}
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    logging.disable_progress_bar()
    if quantized:
        model, tokenizer = load_model_and_tokenizer(name, dtype=torch.bfloat16, device="cpu")
        quantize_int8(model)
    else:
        model, tokenizer = load_model_and_tokenizer(name)
    engine = Engine(model, tokenizer)
    chat = Chat(
        engine,
        replace(engine.options, **options),
        **given,
        color=sys.stdout.isatty() and not os.environ.get("NO_COLOR"),
    )
    if note := stage_note(engine.model.name_or_path):
        print(f"note: {note}", file=sys.stderr)
    if prompt is not None:
        chat.ask(prompt)
    elif sys.stdin and sys.stdin.isatty():
        chat.note(greeting(name, engine, example_questions(engine.model.name_or_path)) + "\n")
        chat.run(typed_lines())
    else:
        chat.run(piped_lines())


def main() -> None:
    exit_on_user_error(start)


if __name__ == "__main__":
    main()
