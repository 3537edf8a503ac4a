"""Chat templates of other origin, rendered with limits on time, memory and size.

A template is a program: nested loops, `'a' * 10**10` or a macro that calls itself twice stop a process or fill its
memory, in C code that nothing inside the process can interrupt. So any template but this project's own is rendered by
another process, which is kept for the next conversation; its text comes back and is encoded as usual.
"""

import inspect
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema

from ..errors import UserError

SECONDS = 3.0  # for one call; a conversation takes milliseconds
OWN_TEMPLATE = Path(__file__).parents[1] / "chat_template.jinja"
# What the tokenizer renders in place of the folder's template: parts of text, marked where the model writes.
RENDERED = (
    "{%- for part in messages[0].parts -%}"
    "{%- if part.written -%}{%- generation -%}{{- part.text -}}{%- endgeneration -%}"
    "{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}"
)
# Arguments of the library that say what is rendered; others say how the text is encoded.
RENDERING = ("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask")


def limit_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Replace `tokenizer.apply_chat_template` by a limited one, unless the template is this project's own or none.

    Raises:
        UserError: The template is not text; later, from `apply_chat_template`: it exceeds a limit or fails.
    """
    template = tokenizer.chat_template
    if template is None or template == OWN_TEMPLATE.read_text(encoding="utf-8"):
        return
    templates = template.values() if isinstance(template, dict) else [template]
    if not all(isinstance(text, str) for text in templates):
        raise UserError(f"{name}: the chat template is not text; save the tokenizer again")
    tokenizer.apply_chat_template = LimitedTemplate(tokenizer, name)  # type: ignore[assignment, method-assign]


class LimitedTemplate:
    """`apply_chat_template` of `tokenizer`, same arguments and results, rendering in a [`RenderProcess`].

    Raises:
        UserError: The template takes too long, too much memory or too much text, or raises an error.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str):
        self.tokenizer, self.name = tokenizer, name
        self.process = RenderProcess()

    def __call__(
        self,
        conversation: Any,
        tools: Sequence[Any] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> Any:
        if options.get("sanitize_control_tokens"):
            raise ValueError("sanitize_control_tokens needs the text before it is rendered, here it comes afterwards")
        apply: Callable[..., Any] = type(self.tokenizer).apply_chat_template
        takes = inspect.signature(apply).parameters
        batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        request = {name: options.pop(name) for name in list(options) if name not in takes or name in RENDERING}
        request |= {
            "conversations": [without_none(messages) for messages in (conversation if batched else [conversation])],
            "tools": tools and [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools],
            "documents": documents,
            "chat_template": self.tokenizer.get_chat_template(chat_template, tools),  # type: ignore[arg-type]
        }
        rendered = [[{"role": "rendered", "parts": parts}] for parts in self.render(request)]
        mask = {"return_assistant_tokens_mask": request.get("return_assistant_tokens_mask", False)}
        return apply(self.tokenizer, rendered if batched else rendered[0], chat_template=RENDERED, **options, **mask)

    def render(self, request: dict[str, Any]) -> list[list[dict[str, Any]]]:
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        answer = self.process.ask(special | request)
        if "error" in answer:
            raise UserError(
                f"{self.name}: its chat template cannot render a conversation: {answer['error']}; "
                "use the chat template of this project's tokenizers"
            )
        spans = answer["spans"] or [[]] * len(answer["texts"])
        return [parts_of(text, written) for text, written in zip(answer["texts"], spans, strict=True)]


def without_none(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def parts_of(text: str, written: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """`text` cut at the `written` spans (start, end)."""
    parts, end = [], 0
    for start, stop in written:
        parts += [{"text": text[end:start], "written": False}, {"text": text[start:stop], "written": True}]
        end = stop
    return [part for part in [*parts, {"text": text[end:], "written": False}] if part["text"]]


class RenderProcess:
    """A process of `renderer.py`, started when first asked and again after it was killed or this process forked."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.owner = os.getpid()
        self.stop: Callable[[], Any] = lambda: None

    def __reduce__(self) -> tuple[type["RenderProcess"], tuple[()]]:
        return RenderProcess, ()  # copies and other processes start their own

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to `request`, or {"error": ...} after `SECONDS` or if the process died."""
        line = json.dumps(request, default=str) + "\n"
        with self.lock:
            process = self.running()
            deadline = threading.Timer(SECONDS, process.kill)
            deadline.start()
            try:
                answer = exchange(process, line)
            except BaseException:  # Ctrl-C: the answer would be taken for the next one
                self.stop()
                raise
            finally:
                deadline.cancel()
            if answer:
                return json.loads(answer)
            self.stop()
        return {"error": f"it took more than {SECONDS:g} s, or the process that renders it was killed"}

    def running(self) -> subprocess.Popen[str]:
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            self.process, self.owner = start_renderer(), os.getpid()
            self.stop = weakref.finalize(self, stop, self.process, self.owner)
        return self.process


def start_renderer() -> subprocess.Popen[str]:
    """A renderer that is ready: importing its libraries takes seconds, which are not the template's."""
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("renderer.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        env=os.environ | {"USE_TORCH": "0", "PYTHONIOENCODING": "utf-8"},
        start_new_session=True,  # Ctrl-C at the terminal is the parent's
    )
    if exchange(process) != "ready\n":
        raise UserError("the process that renders chat templates cannot start; check the installation of transformers")
    return process


def stop(process: subprocess.Popen[str], owner: int) -> None:
    """End `process` and close its pipes, unless this is a fork of its owner."""
    if owner == os.getpid():
        process.kill()
        with suppress(BrokenPipeError), process:
            pass


def exchange(process: subprocess.Popen[str], line: str = "") -> str:
    """The process's next line of output after `line` was written to it; empty if it died."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return ""
