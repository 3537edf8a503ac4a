"""A chat page for a nanochat model, here or as a Hugging Face Space.

python space/app.py runs/pocket/sft
NANOCHAT_MODEL=me/nanochat python space/app.py --port 7861

The model is a folder that a training stage wrote, or a Hub id. Replies are streamed; what the model has computed in Python
is shown in boxes that open on a click.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run: an end without traceback

import argparse
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from html import escape
from typing import Any

try:  # on ZeroGPU hardware this must come before torch touches CUDA
    import spaces
except ImportError:
    spaces = None

import gradio as gr

from modeling_nanochat.cli import OneLineParser
from modeling_nanochat.engine import Engine, Finished, TextDelta, ToolCall, ToolResult
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.loading import load_model_and_tokenizer
from modeling_nanochat.stages import stage_note

EXAMPLES = (
    "Who are you?",
    "Tell me a story about Mira and a kite.",
    "Mira has 12 pears. Then Mira finds 7 more pears. How many pears does Mira have now?",
)
MAX_CHARACTERS, MAX_MESSAGES = 8_000, 500
LIMITS = {"temperature": (0.0, 2.0), "top_k": (0, 200), "max_new_tokens": (1, 1024)}
SECONDS_BETWEEN_UPDATES = 0.05
TOOL_TITLE, REFUSAL = "Python", "⚠️"
TOOL_BOX = re.compile(r"(`{3,})python\n(.*)\n\1\n\n\1text\n(.*)\n\1", re.DOTALL)
FONTS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
CODE_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
CSS = """
.gradio-container { width: 100%; max-width: 52rem !important; margin: 0 auto !important; }
.gradio-container main { width: 100% !important; }
#heading { text-align: center; padding: .25rem 0 0; }
#heading h1 { font-size: 1.5rem; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
#heading p { color: var(--body-text-color-subdued); margin: .2rem 0 0; font-size: .9rem; }
#conversation { border: 1px solid var(--border-color-primary); border-radius: var(--radius-xl); }
#conversation .placeholder { color: var(--body-text-color-subdued); text-align: center; padding: 0 1.5rem; }
#conversation .example { border: 1px solid var(--border-color-primary); background: var(--background-fill-secondary); }
#conversation .examples { grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); }
#conversation .example:hover { border-color: var(--color-accent); }
footer { opacity: .6; }
"""


def build_demo(engine: Engine, title: str, examples: Sequence[str] = EXAMPLES) -> gr.Blocks:
    """The page, not yet launched; its API endpoint is `/chat`.

    Args:
        title: Heading of the page, such as the model's name.
        examples: Questions to click on while the conversation is empty.
    """
    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True) as demo:
        gr.HTML(heading(engine, title), elem_id="heading")
        gr.ChatInterface(
            on_gpu(replies_of(engine)),
            chatbot=chat_window(),
            textbox=question_box(),
            additional_inputs=settings(engine),
            additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
            examples=[[example] for example in examples],
            api_name="chat",
            analytics_enabled=False,
        )
    return demo.queue(max_size=32, default_concurrency_limit=2)


def heading(engine: Engine, title: str) -> str:
    parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    size = f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"
    note = stage_note(engine.model)
    about = f"<p>{size} parameters, {engine.context} tokens of context</p>" + (f"<p>{escape(note)}</p>" if note else "")
    return f"<h1>{escape(title)}</h1>{about}"


def chat_window() -> gr.Chatbot:
    return gr.Chatbot(
        elem_id="conversation",
        show_label=False,
        container=False,
        height="62dvh",
        scale=1,
        buttons=["copy"],
        layout="bubble",
        latex_delimiters=[],  # "$3 and $4" is money here
        allow_tags=False,
        render=False,
        placeholder="A small language model. It was trained from scratch, and it makes mistakes.",
    )


def question_box() -> gr.Textbox:
    return gr.Textbox(
        placeholder="Ask something",
        max_length=MAX_CHARACTERS,
        show_label=False,
        submit_btn=True,
        stop_btn=True,
        autofocus=True,
        render=False,
    )


def settings(engine: Engine) -> list[gr.Slider]:
    (coldest, hottest), (_, most), (_, longest) = LIMITS.values()
    longest = min(longest, engine.context)
    slider = partial(gr.Slider, step=1, render=False)
    return [
        slider(coldest, hottest, 0.6, step=0.05, label="Temperature", info="0: the most likely reply each time"),
        slider(0, most, 50, label="Top-k", info="sample among the k most likely tokens; 0: among all"),
        slider(1, longest, min(256, longest), label="Max tokens", info="limit of a reply"),
    ]


def on_gpu(function: Callable) -> Callable:
    return function if spaces is None else spaces.GPU(duration=60)(function)


def replies_of(engine: Engine) -> Callable:
    """The function behind the page: everything that comes in is checked here, for the browser's checks bind no one."""

    def reply(
        message: str,
        history: list[dict[str, Any]],
        temperature: float = 0.6,
        top_k: int = 50,
        max_new_tokens: int = 256,
    ) -> Iterator[list[gr.ChatMessage]]:
        """Stream the assistant's reply to `message`."""
        try:
            options = {"temperature": temperature, "top_k": top_k, "max_new_tokens": max_new_tokens}
            check_request(message, history, options)
            asked = [*conversation(history), {"role": "user", "content": message}]
            options |= {"top_k": int(top_k), "max_new_tokens": int(max_new_tokens)}
            fitted = engine.fit(asked, options["max_new_tokens"])
            if len(fitted) < len(asked):
                gr.Info("The oldest messages no longer fit into the model's context and were left out.", duration=5)
            yield from shown(engine.stream(fitted, **options))
        except UserError as error:
            # not gr.Error: that would take the question away and leave the stop button standing
            yield [gr.ChatMessage(role="assistant", content="", metadata={"title": f"{REFUSAL} {error}"})]

    return reply


def check_request(message: Any, history: Any, options: dict[str, Any]) -> None:
    """Raise [`UserError`] for what no reply can be given to, or what would keep the machine from others too long."""
    if not isinstance(message, str) or not message.strip():
        raise UserError("the message is empty; write a question")
    if len(message) > MAX_CHARACTERS:
        raise UserError(f"the message has {len(message)} characters; at most {MAX_CHARACTERS} are taken")
    if len(history) > MAX_MESSAGES:
        raise UserError(f"the conversation has more than {MAX_MESSAGES} messages; start a new one")
    for name, (lowest, highest) in LIMITS.items():
        value = options[name]
        kind = "number" if name == "temperature" else "whole number"  # sliders send 50.0
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not lowest <= value <= highest or (kind == "whole number" and value % 1):
            raise UserError(f"{name} must be a {kind} from {lowest:g} to {highest:g}")


def conversation(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What Gradio remembers, as a conversation: tool boxes become the calls they show, and refused questions are left out.

    A message's content is a string when it comes through the API, a list of parts when it comes from the browser.
    """
    messages: list[dict[str, Any]] = []
    for entry in history:
        content = text_of(entry.get("content"))
        title = str((entry.get("metadata") or {}).get("title") or "")
        if entry.get("role") == "user":
            messages.append({"role": "user", "content": content})
        elif title.startswith(REFUSAL):
            del messages[-1:]
        elif title:
            add_call(messages, content)
        else:
            messages.append({"role": "assistant", "content": content})
    return messages


def text_of(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def add_call(messages: list[dict[str, Any]], box: str) -> None:
    """Add the call shown in `box` to the assistant's message before it; one without result was stopped, and is left out."""
    match = TOOL_BOX.search(box)
    if not match:
        return
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    function = {"name": "python", "arguments": {"code": match[2]}}
    messages[-1]["tool_calls"] = [{"type": "function", "function": function}]
    messages.append({"role": "tool", "name": "python", "content": match[3]})


def shown(events: Iterator[Any]) -> Iterator[list[gr.ChatMessage]]:
    """The reply so far, again and again: bubbles of text and a box for each tool call."""
    bubbles: list[gr.ChatMessage] = []
    code, updated = "", 0.0
    for event in events:
        now = time.monotonic()
        if isinstance(event, TextDelta):
            if not bubbles or bubbles[-1].metadata:
                bubbles.append(gr.ChatMessage(role="assistant", content=""))
            bubbles[-1].content += event.text
            if now - updated < SECONDS_BETWEEN_UPDATES:
                continue
        elif isinstance(event, ToolCall):
            code = event.code
            bubbles.append(tool_box(code))
        elif isinstance(event, ToolResult):
            bubbles[-1] = tool_box(code, event.output)
        elif isinstance(event, Finished):
            bubbles += closing(event, bubbles)
        updated = now
        yield bubbles


def closing(event: Finished, bubbles: list[gr.ChatMessage]) -> list[gr.ChatMessage]:
    """A word on replies that end without saying anything."""
    if bubbles and not bubbles[-1].metadata:
        return []
    reason = "its reply reached the limit" if event.finish_reason == "length" else "the model said nothing"
    return [gr.ChatMessage(role="assistant", content=f"*({reason})*")]


def tool_box(code: str, output: str | None = None) -> gr.ChatMessage:
    """A box that folds away; without `output` it is open and turning."""
    runs = [len(run) for run in re.findall("`+", code + (output or ""))]
    fence = "`" * max(3, 1 + max(runs, default=0))
    content = f"{fence}python\n{code}\n{fence}"
    if output is None:
        return gr.ChatMessage(role="assistant", content=content, metadata={"title": TOOL_TITLE, "status": "pending"})
    summary = " ".join(f"{code} → {output}".split())
    log = summary if len(summary) <= 60 else summary[:57] + "..."
    content += f"\n\n{fence}text\n{output}\n{fence}"
    return gr.ChatMessage(
        role="assistant", content=content, metadata={"title": TOOL_TITLE, "status": "done", "log": log}
    )


def appearance() -> dict[str, Any]:
    """Arguments of `launch` that make the page look as it should; fonts and scripts all come from this server."""
    theme = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=CODE_FONTS)
    return {"theme": theme, "css": CSS, "ssr_mode": False, "footer_links": ["api", "gradio"]}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description="A chat page for a nanochat model.")
    parser.add_argument("model", nargs="?", help="model folder or Hub id; default: the variable NANOCHAT_MODEL")
    parser.add_argument("--port", type=int, help="1 to 65535; default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="also open a temporary public address")
    options = parser.parse_args(arguments)
    if options.port is not None and not 1 <= options.port <= 65535:
        raise UserError(f"--port {options.port}: must be from 1 to 65535")
    return options


def start(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    name = options.model or os.environ.get("NANOCHAT_MODEL")
    if not name:
        raise UserError("no model: give a folder or a Hub id, or set NANOCHAT_MODEL")
    engine = Engine(*load_model_and_tokenizer(name))
    demo = build_demo(engine, name)
    try:
        demo.launch(server_port=options.port, share=options.share, **appearance())
    except OSError as error:
        raise UserError(
            f"the page cannot be opened on port {options.port or 7860}: {error}".splitlines()[0]
        ) from error


if __name__ == "__main__":
    exit_on_user_error(start)
