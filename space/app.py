"""A chat page for a nanochat model, local or as a Hugging Face Space.

python space/app.py runs/pocket/sft
NANOCHAT_MODEL=me/nanochat python space/app.py --port 7861

The model is a folder written by a training stage, or a Hub id. Replies are streamed and shown verbatim; Python calls
are in boxes that open on a click. The example questions are those of the model card.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

try:  # on ZeroGPU hardware this must come before torch touches CUDA
    import spaces
except ImportError:
    spaces = None

import gradio as gr

from modeling_nanochat.attention_kernels import without_cudnn_attention
from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.examples import example_questions, stage_note
from modeling_nanochat.chat.sampling import SamplingOptions
from modeling_nanochat.chat.shared_engine import SharedEngine
from modeling_nanochat.chat.turn import Event, Finished, TextDelta, ToolCall, ToolResult
from modeling_nanochat.cli import OneLineParser
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.loading import load_model_and_tokenizer
from modeling_nanochat.text.conversations import call_message

MAX_CHARACTERS, MAX_TURNS = 8_000, 250
LIMITS = {"temperature": (0.0, 2.0), "top_k": (0, 200), "max_new_tokens": (1, 1024)}
REPLIES = 16  # generated at a time, in one batch; other visitors wait
SECONDS_BETWEEN_UPDATES = 0.05
SHOWN_EXAMPLES = 3
GREETING = "A small language model. It was trained from scratch, and it makes mistakes."
CHINESE_FONTS = ["PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "Noto Sans CJK SC"]
FONTS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", *CHINESE_FONTS, "sans-serif"]
CODE_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace", *CHINESE_FONTS]
HERE = Path(__file__).parent


@dataclass
class Turn:
    """A question and its reply so far.

    `parts` are `{"text"}` and `{"code", "output"}`, the latter without output while the code runs; `note` is the
    page's comment on the reply. The browser gets all of this; the messages for the model are built on the server only.
    """

    question: str
    parts: list[dict[str, str]] = field(default_factory=list)
    note: str = ""
    writing: bool = True

    def take(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            if not self.parts or "code" in self.parts[-1]:
                self.parts.append({"text": ""})
            self.parts[-1]["text"] += event.text
        elif isinstance(event, ToolCall):
            self.parts.append({"code": event.code})
        elif isinstance(event, ToolResult):
            self.parts[-1]["output"] = event.output
        elif isinstance(event, Finished):
            self.note = closing(event, self.parts)

    def reply(self) -> list[dict[str, Any]]:
        """Return the assistant's messages; a call that was stopped before its result is omitted."""
        messages: list[dict[str, Any]] = []
        for part in self.parts:
            if "text" in part:
                messages.append({"role": "assistant", "content": part["text"]})
            elif "output" in part:
                said = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else ""
                messages.append(call_message(said, part["code"]))
                messages.append({"role": "tool", "name": "python", "content": part["output"]})
        if messages and messages[-1]["role"] == "tool":
            messages.append({"role": "assistant", "content": ""})
        return messages


def closing(event: Finished, parts: list[dict[str, str]]) -> str:
    """Return a note on replies that are truncated or contain no text."""
    if event.finish_reason == "length":
        return "The reply reached its limit."
    return "" if parts and "text" in parts[-1] else "The model said nothing."


def conversation(turns: Sequence[Turn], question: str) -> list[dict[str, Any]]:
    """Return the messages for the model; questions refused or stopped before any reply are omitted."""
    messages = []
    for turn in turns:
        if reply := turn.reply():
            messages += [{"role": "user", "content": turn.question}, *reply]
    return [*messages, {"role": "user", "content": question}]


def shown(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return the turns as the page draws them."""
    return [asdict(turn) for turn in turns]


def build_demo(engine: Engine, title: str, examples: Sequence[str] = ()) -> gr.Blocks:
    """Return the page, not yet launched; its API endpoint is `/chat`.

    Args:
        title: Heading of the page, for example the model's name.
        examples: Questions to click on while the conversation is empty.
    """
    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True) as demo:
        gr.HTML(heading(engine, title), elem_id="heading")
        view = conversation_view(examples)
        question = question_box()
        with gr.Accordion("Settings", open=False):
            options = settings(engine)
        turns = gr.State([])
        connect(answers_of(engine), view, question, options, turns)
    return demo.queue(max_size=32)


def heading(engine: Engine, title: str) -> str:
    parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    size = f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"
    note = stage_note(engine.model.name_or_path)
    about = f"<p>{size} parameters, {engine.context} tokens of context</p>" + (
        f"<p>{escape(note)}</p>" if note else ""
    )
    return f"<h1>{escape(title)}</h1>{about}"


def conversation_view(examples: Sequence[str]) -> gr.HTML:
    """Return the view that page.js draws: `gr.Chatbot` renders HTML in texts even without Markdown.

    The template contains no values, because Gradio executes them as JavaScript.
    """
    return gr.HTML(
        [],
        html_template='<div class="log" role="log" aria-label="Conversation" tabindex="0"></div>',
        js_on_load=(HERE / "page.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id="conversation",
        greeting=GREETING,
        examples=list(examples[:SHOWN_EXAMPLES]),
    )


def question_box() -> gr.Textbox:
    return gr.Textbox(
        placeholder="Ask a question",
        max_length=MAX_CHARACTERS,
        show_label=False,
        submit_btn=True,
        autofocus=True,
        elem_id="question",
    )


def settings(engine: Engine) -> list[gr.Slider]:
    (coldest, hottest), (_, most), (_, longest) = LIMITS.values()
    longest, temperature, top_k = min(longest, engine.context), engine.options.temperature, engine.options.top_k or 0
    slider = partial(gr.Slider, step=1)
    return [
        slider(coldest, hottest, temperature, step=0.05, label="Temperature", info="0: always the most likely token"),
        slider(0, most, min(top_k, most), label="Top-k", info="sample among the k most likely tokens; 0: among all"),
        slider(1, longest, min(256, longest), label="Max tokens", info="maximum length of a reply"),
    ]


def connect(answers: Callable, view: gr.HTML, question: gr.Textbox, options: list[gr.Slider], turns: gr.State) -> None:
    """Connect the page's events and the API endpoint.

    `turns` is kept on the server: what the browser shows is never read back.
    """

    def ask(text: str, turns: list[Turn], *options: float) -> Iterator[tuple]:
        if not (text or "").strip():
            yield gr.skip(), gr.skip(), gr.skip()
            return
        box = gr.Textbox(value="", interactive=False, submit_btn=False, stop_btn=True)  # one reply at a time
        try:
            for grown in answers(text, turns, *options):
                yield box, shown(grown), grown
                box = gr.skip()
        except UserError as error:  # not gr.Error, so that the question stays for editing
            grown = [*turns, Turn(text, note=f"⚠️ {error}", writing=False)]
            yield gr.Textbox(value=""), shown(grown), grown

    def ask_example(event: gr.EventData, turns: list[Turn], *options: float) -> Iterator[tuple]:
        yield from ask(str(event.text), turns, *options)

    def ask_again(turns: list[Turn], *options: float) -> Iterator[tuple]:
        yield from ask(turns[-1].question if turns else "", turns[:-1], *options)

    def edit(turns: list[Turn]) -> tuple:
        return gr.Textbox(value=turns[-1].question if turns else ""), shown(turns[:-1]), turns[:-1]

    def rest(turns: list[Turn]) -> tuple:
        """Reset the question box after a reply ended, was stopped or failed."""
        for turn in turns[-1:]:
            turn.writing = False
        return gr.Textbox(interactive=True, submit_btn=True, stop_btn=False), shown(turns), turns

    def chat(message: str, turns: list[Turn], temperature: float, top_k: int, max_new_tokens: int) -> Iterator[tuple]:
        """Stream the assistant's messages in reply to `message`; the conversation is the session's."""
        try:
            for grown in answers(message, turns, temperature, top_k, max_new_tokens):
                yield grown[-1].reply(), grown
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    outputs = [question, view, turns]
    together = {"concurrency_id": "reply", "concurrency_limit": REPLIES}  # of all events, or Gradio's limit of 1 holds
    reply = {"outputs": outputs, "show_progress": "hidden", "api_visibility": "private", **together}
    quick = {"outputs": outputs, "show_progress": "hidden", "api_visibility": "private", "queue": False}
    asked = [
        question.submit(ask, [question, turns, *options], **reply),
        view.example_select(ask_example, [turns, *options], **reply),
        view.retry(ask_again, [turns, *options], **reply),
    ]
    for event in asked:
        event.then(rest, [turns], **quick)
    question.stop(None, cancels=asked, api_visibility="private")
    view.undo(edit, [turns], **quick)
    view.clear(lambda: (gr.skip(), [], []), **quick)
    gr.Button(visible=False).click(
        chat,
        [question, turns, *options],
        [gr.JSON(visible=False), turns],
        api_name="chat",
        **together,
    )


def answers_of(engine: Engine) -> Callable:
    """Return the function behind the page, which checks all input, because the browser's checks can be bypassed."""

    @on_gpu
    def stream(messages: list[dict[str, Any]], options: SamplingOptions, max_new_tokens: int) -> Iterator[Event]:
        yield from engine.stream(messages, options, max_new_tokens=max_new_tokens)

    def answers(
        question: str, turns: Sequence[Turn], temperature: float, top_k: int, max_new_tokens: int
    ) -> Iterator[list[Turn]]:
        """Yield the conversation with one more turn, repeatedly while its reply grows."""
        values = {"temperature": temperature, "top_k": top_k, "max_new_tokens": max_new_tokens}
        check_request(question, turns, values)
        options = replace(engine.options, temperature=temperature, top_k=int(top_k))
        messages = conversation(turns, question)
        fitted = engine.fit(messages, int(max_new_tokens))
        if len(fitted) < len(messages):
            gr.Info("The oldest messages no longer fit into the model's context and were omitted.", duration=5)
        turn = Turn(question)
        turns = [*turns, turn]
        yield turns
        updated = time.monotonic()
        for event in stream(fitted, options, int(max_new_tokens)):
            turn.take(event)
            if not isinstance(event, TextDelta) or time.monotonic() - updated >= SECONDS_BETWEEN_UPDATES:
                yield turns
                updated = time.monotonic()

    return answers


def on_gpu(function: Callable) -> Callable:
    return function if spaces is None else spaces.GPU(duration=60)(function)


def check_request(message: Any, turns: Sequence[Turn], values: dict[str, Any]) -> None:
    """Raise [`UserError`] for input that is invalid or would occupy the machine for too long."""
    if not isinstance(message, str) or not message.strip():
        raise UserError("the message is empty; write a question")
    if len(message) > MAX_CHARACTERS:
        raise UserError(f"the message has {len(message)} characters; at most {MAX_CHARACTERS} are allowed")
    if len(turns) >= MAX_TURNS:
        raise UserError(f"the conversation has {MAX_TURNS} questions; start a new one")
    for name, (lowest, highest) in LIMITS.items():
        value = values[name]
        kind = "number" if name == "temperature" else "whole number"  # sliders send 50.0
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not lowest <= value <= highest or (kind == "whole number" and value % 1):
            raise UserError(f"{name} must be a {kind} from {lowest:g} to {highest:g}")


def appearance() -> dict[str, Any]:
    """Return the arguments of `launch` that style the page; fonts and scripts all come from this server."""
    theme = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=CODE_FONTS)
    css = (HERE / "page.css").read_text(encoding="utf-8")
    return {"theme": theme, "css": css, "ssr_mode": False, "footer_links": ["api", "gradio"]}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description="A chat page for a nanochat model.")
    parser.add_argument("model", nargs="?", help="model folder or Hub id; default: the value of NANOCHAT_MODEL")
    parser.add_argument("--port", type=int, help="1 to 65535; default: the first free port from 7860 on")
    parser.add_argument("--share", action="store_true", help="also open a temporary public URL")
    options = parser.parse_args(arguments)
    if options.port is not None and not 1 <= options.port <= 65535:
        raise UserError(f"--port {options.port}: must be from 1 to 65535")
    return options


@without_cudnn_attention()
def start(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    name = options.model or os.environ.get("NANOCHAT_MODEL")
    if not name:
        raise UserError("no model: give a folder or a Hub id, or set NANOCHAT_MODEL")
    engine = SharedEngine(*load_model_and_tokenizer(name), rows=REPLIES)
    demo = build_demo(engine, name, example_questions(engine.model.name_or_path))
    try:
        demo.launch(server_port=options.port, share=options.share, **appearance())
    except OSError as error:
        raise UserError(
            f"the page cannot be opened on port {options.port or 7860}: {error}".splitlines()[0]
        ) from error


if __name__ == "__main__":
    exit_on_user_error(start)
