import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from modeling_nanochat.engine import Engine, Finished, TextDelta, ToolCall, ToolResult
from modeling_nanochat.errors import UserError
from modeling_nanochat.loading import load_model_and_tokenizer

pytest.importorskip("gradio")
ROOT = Path(__file__).parents[1]


def load_app():
    spec = importlib.util.spec_from_file_location("space_app", ROOT / "space" / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


app = load_app()
DONE = Finished([{"role": "assistant", "content": "It is 19."}], "stop")
EVENTS = [TextDelta("Let me see. "), ToolCall("12+7"), ToolResult("19"), TextDelta("It is "), TextDelta("19."), DONE]
CALL = {"type": "function", "function": {"name": "python", "arguments": {"code": "12+7"}}}


class ScriptedEngine(Engine):
    """A toy model's engine that says always the same."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.asked = []

    def stream(self, messages, **settings):
        self.asked.append((messages, settings))
        self.turn(self.codec.prompt(messages), settings["max_new_tokens"])  # refuses what the real one refuses
        yield from EVENTS


@pytest.fixture(scope="module")
def page(toy_model_and_tokenizer):
    from gradio_client import Client

    engine = ScriptedEngine(*toy_model_and_tokenizer)
    demo = app.build_demo(engine, "toy")
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.appearance())
    yield engine, lambda: Client(url, verbose=False)
    demo.close()


def texts(messages):
    return [message["content"] for message in messages]


def test_the_page_streams_text_and_tool_boxes(page):
    engine, connect = page
    job = connect().submit("What is 12+7?", 0.3, 5, 40, api_name="/chat")
    before, box, after = job.result(timeout=30)
    assert (before["content"], after["content"]) == ("Let me see. ", "It is 19.")
    assert box["content"] == "```python\n12+7\n```\n\n```text\n19\n```"
    assert box["metadata"]["status"] == "done" and box["metadata"]["log"] == "12+7 → 19"
    assert len(job.outputs()) > 2
    settings = {"temperature": 0.3, "top_k": 5, "max_new_tokens": 40}
    assert engine.asked[-1] == ([{"role": "user", "content": "What is 12+7?"}], settings)


def test_the_second_question_comes_with_the_whole_first_turn(page):
    engine, connect = page
    client = connect()
    client.predict("What is 12+7?", api_name="/chat")
    client.predict("Really?", api_name="/chat")
    assert engine.asked[-1][0] == [
        {"role": "user", "content": "What is 12+7?"},
        {"role": "assistant", "content": "Let me see. ", "tool_calls": [CALL]},
        {"role": "tool", "name": "python", "content": "19"},
        {"role": "assistant", "content": "It is 19."},
        {"role": "user", "content": "Really?"},
    ]


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (("   ",), "the message is empty"),
        (("a" * 9000,), "at most 8000"),
        (("lamp " * 400,), "the question itself is too long"),
        *[(("hi", x), "temperature must be a number from 0 to 2") for x in (9.0, float("nan"), float("inf"), None, True)],
        *[(("hi", 1.0, x), "top_k must be a whole number from 0 to 200") for x in (-3, 2.5, "3")],
        *[(("hi", 1.0, 3, x), "max_new_tokens must be a whole number from 1 to 1024") for x in (5000, 0, 1.5)],
    ],
)
def test_limits_hold_also_for_those_who_come_without_the_page(toy_model_and_tokenizer, request_, complaint):
    reply = app.replies_of(ScriptedEngine(*toy_model_and_tokenizer))
    message, *options = request_
    ((refusal,),) = list(reply(message, [], *options))
    assert complaint in refusal.metadata["title"]
    assert "\n" not in refusal.metadata["title"]


def test_of_a_question_too_long_by_itself_nothing_is_said_about_older_messages(toy_model_and_tokenizer, monkeypatch):
    told = []
    monkeypatch.setattr(app.gr, "Info", lambda message, **_: told.append(message))
    reply = app.replies_of(ScriptedEngine(*toy_model_and_tokenizer))
    history = [{"role": "user", "content": "lamp"}, {"role": "assistant", "content": "mat " * 60}] * 4
    list(reply("lamp " * 400, history))
    assert told == []
    list(reply("lamp", history))
    assert "oldest messages" in told[0]


def test_the_page_of_a_base_model_says_what_to_expect(toy_model_folder):
    def heading():
        return app.heading(Engine(*load_model_and_tokenizer(toy_model_folder, device="cpu")), "toy")

    assert "never seen a conversation" not in heading()
    (toy_model_folder / "README.md").write_text("---\ntags: [nanochat, base]\n---\n")
    assert "never seen a conversation" in heading()


@pytest.mark.parametrize(
    ("port", "complaint"),
    [("99999", "--port 99999: must be"), ("0", "--port 0: must be"), ("x", "invalid int value: 'x'")],
)
def test_a_port_that_cannot_be_is_told_before_anything_is_loaded(port, complaint):
    with pytest.raises(UserError, match=complaint):
        app.start(["/no/such/folder", "--port", port])


def test_a_refused_question_is_told_and_the_chat_goes_on(page):
    engine, connect = page
    client = connect()
    (refusal,) = client.predict("lamp " * 400, api_name="/chat")
    assert "the question itself is too long" in refusal["metadata"]["title"]
    assert texts(client.predict("And now?", api_name="/chat"))[-1] == "It is 19."
    assert engine.asked[-1][0] == [{"role": "user", "content": "And now?"}]


def test_history_from_the_browser_and_from_the_api_are_one():
    box = app.tool_box("12+7", "19")
    entries = [("user", "12+7?", None), ("assistant", box.content, box.metadata), ("assistant", "It is 19.", {})]
    api = [{"role": role, "content": text, "metadata": metadata} for role, text, metadata in entries]
    browser = [entry | {"content": [{"type": "text", "text": entry["content"]}]} for entry in api]
    assert app.conversation(api) == app.conversation(browser)
    assert app.conversation(api)[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(("code", "output"), [("print('```')", "```"), ("a = 1\n\na", "x\n\n```text\ny"), ("1", "")])
def test_tool_boxes_can_be_read_back_whatever_is_in_them(code, output):
    box = app.tool_box(code, output)
    messages = app.conversation([{"role": "assistant", "content": box.content, "metadata": box.metadata}])
    assert messages[0]["tool_calls"][0]["function"]["arguments"]["code"] == code
    assert messages[1]["content"] == output


def test_a_stopped_call_is_left_out():
    box = app.tool_box("while True: pass")
    assert box.metadata["status"] == "pending"
    assert app.conversation([{"role": "assistant", "content": box.content, "metadata": box.metadata}]) == []


def test_replies_that_say_nothing_are_explained():
    (bubbles,) = list(app.shown(iter([Finished([], "stop")])))
    assert "said nothing" in bubbles[0].content
    *_, bubbles = app.shown(iter([ToolCall("1"), ToolResult("1"), Finished([], "length")]))
    assert "reached the limit" in bubbles[-1].content


def test_heading_is_escaped(toy_model_and_tokenizer):
    assert "<script>" not in app.heading(Engine(*toy_model_and_tokenizer), "<script>alert(1)</script>")


def test_without_a_model_it_says_what_to_do(monkeypatch):
    monkeypatch.delenv("NANOCHAT_MODEL", raising=False)
    with pytest.raises(UserError, match="NANOCHAT_MODEL"):
        app.start([])
    monkeypatch.setenv("NANOCHAT_MODEL", "/no/such/folder")
    with pytest.raises(UserError, match="/no/such/folder: no such folder"):
        app.start([])


def test_a_taken_port_is_one_line(page, toy_model_folder):
    from urllib.parse import urlparse

    _, connect = page
    port = urlparse(connect().src).port
    with pytest.raises(UserError, match=f"port {port}"):
        app.start([str(toy_model_folder), "--port", str(port)])


def test_the_space_names_its_kind_and_its_file():
    front = yaml.safe_load((ROOT / "space" / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio" and (ROOT / "space" / front["app_file"]).is_file()
    assert json.dumps(front["sdk_version"]).startswith('"6.')
