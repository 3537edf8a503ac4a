"""Talk to a model in the terminal.

python -m modeling_nanochat.chat runs/pocket/sft
python -m modeling_nanochat.chat runs/pocket/sft --prompt "Who are you?" --temperature 0

The model is a folder that a training stage wrote, or a Hub id. Piped questions, one a line, are answered in turn.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from .engine import Engine, Finished, TextDelta, ToolCall, ToolResult
from .errors import UserError, exit_on_user_error
from .loading import load_model_and_tokenizer

EXAMPLES = (
    "Who are you?",
    "Tell me a story about Mira and a kite.",
    "Mira has 12 pears. Then Mira finds 7 more pears. How many pears does Mira have now?",
)
HELP = """/temperature X   0 is the likeliest reply each time, 1 plain sampling (now {temperature:g})
/top_k N         sample among the N likeliest tokens, 0 among all (now {top_k})
/clear           begin a new conversation
/exit            leave, as does Ctrl-D; Ctrl-C stops a reply"""
DIM, CYAN, RED, RESET = "\033[2m", "\033[36m", "\033[31m", "\033[0m"


@dataclass
class Chat:
    """A conversation in the terminal and the settings it runs with."""

    engine: Engine
    temperature: float = 0.6
    top_k: int = 50
    max_new_tokens: int = 256
    seed: int | None = None
    color: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, question: str) -> None:
        """Stream the reply to `question` and keep both in the conversation; Ctrl-C keeps what was said until then.

        Raises:
            UserError: The question does not fit the model's context; the conversation is as it was before.
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
        """Print events as they come; the texts go into `said`, so that they outlive an interruption."""
        settings = {"temperature": self.temperature, "top_k": self.top_k, "seed": self.seed}
        for event in self.engine.stream(messages, max_new_tokens=self.max_new_tokens, **settings):
            if isinstance(event, TextDelta):
                said.append(event.text)
                print(printable(event.text), end="", flush=True)
            elif isinstance(event, ToolCall):
                self.note(f"{new_line(said)}[python] {event.code}\n", CYAN)
            elif isinstance(event, ToolResult):
                self.note(f"[result] {event.output}\n", CYAN)
                said.append("\n")  # whatever comes next begins a line
        return self.finish(event, said)

    def finish(self, event: Finished, said: list[str]) -> list[dict[str, Any]]:
        if event.finish_reason == "length":
            self.note(f"{new_line(said)}[the reply reached its limit]")
        elif not "".join(said).strip():
            self.note("[the model said nothing]")
        return event.messages

    def command(self, line: str) -> bool:
        """Obey `/name value`; False when the person wants to leave."""
        name, _, value = line[1:].partition(" ")
        if name in ("exit", "quit"):
            return False
        if name == "clear":
            self.messages = []
            self.note("[new conversation]\n")
        elif name in ("temperature", "top_k"):
            self.set(name, value.strip())
        else:
            unknown = "" if name == "help" else f"there is no /{name}\n"
            self.note(unknown + HELP.format(temperature=self.temperature, top_k=self.top_k) + "\n")
        return True

    def set(self, name: str, value: str) -> None:
        kind, highest = (float, 2) if name == "temperature" else (int, 1000)
        try:
            number = kind(value) if value else getattr(self, name)
        except ValueError:
            number = -1
        if 0 <= number <= highest:
            setattr(self, name, number)
            self.note(f"[{name} {number:g}]\n")
        else:
            self.note(f"/{name} takes a number from 0 to {highest}\n", RED)

    def note(self, text: str, color: str = DIM) -> None:
        """Print what is not the model's own text."""
        text = printable(text)
        print(f"{color}{text}{RESET}" if self.color else text, end="", flush=True)

    def run(self, lines: Iterator[str]) -> None:
        """Answer questions and obey commands until they end."""
        for line in lines:
            if line.startswith("/"):
                if not self.command(line):
                    return
            elif line:
                try:
                    self.ask(line)
                except UserError as error:
                    self.note(f"error: {error}\n", RED)


def new_line(said: list[str]) -> str:
    text = "".join(said)
    return "\n" if text and not text.endswith("\n") else ""


def printable(text: str) -> str:
    """`text` without the control characters by which a model could repaint the terminal."""
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
            print("\n[Ctrl-D or /exit leaves]")
        except EOFError:
            print()
            return


def piped_lines() -> Iterator[str]:
    for line in sys.stdin:
        print(f"> {line.strip()}", flush=True)
        yield line.strip()


def greeting(name: str, engine: Engine, examples: Sequence[str] = EXAMPLES) -> str:
    parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    size = f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"
    questions = ", ".join(f'"{example}"' for example in examples)
    return f"{name}, {size} parameters, on {engine.model.device}. Try {questions}; /help lists the commands.\n"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nanochat-chat", description="Talk to a model in the terminal.")
    parser.add_argument("model", help="model folder or Hub id")
    parser.add_argument("--prompt", help="ask this one question and leave")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 to 2; default %(default)s")
    parser.add_argument("--top_k", type=int, default=50, help="0: off; default %(default)s")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="limit of a reply; default %(default)s")
    parser.add_argument("--seed", type=int, help="makes the replies repeatable")
    return parser.parse_args(arguments)


def start(arguments: Sequence[str] | None = None) -> None:
    options = vars(parse_arguments(arguments))
    name, prompt = options.pop("model"), options.pop("prompt")
    sys.stdout.reconfigure(errors="replace")
    logging.disable_progress_bar()
    engine = Engine(*load_model_and_tokenizer(name))
    chat = Chat(engine, **options, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    if prompt is not None:
        chat.ask(prompt)
    elif sys.stdin.isatty():
        chat.note(greeting(name, engine) + "\n")
        chat.run(typed_lines())
    else:
        chat.run(piped_lines())


def main() -> None:
    try:
        exit_on_user_error(start)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
