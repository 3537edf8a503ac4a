import json
from pathlib import Path

import pytest
import yaml
from page import DONE, EVENTS, ScriptedEngine, app
from torch.backends.cuda import cudnn_sdp_enabled
from transformers import GenerationConfig

from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.sampling import SamplingOptions
from modeling_nanochat.chat.shared_engine import SharedEngine
from modeling_nanochat.chat.turn import Finished, TextDelta, ToolCall, ToolResult
from modeling_nanochat.errors import UserError
from modeling_nanochat.loading import load_model_and_tokenizer

pytest.importorskip("gradio")
ROOT = Path(__file__).parents[2]


CALL = {"type": "function", "function": {"name": "python", "arguments": {"code": "12+7"}}}
REPLY = [
    {"role": "assistant", "content": "Let me see. ", "tool_calls": [CALL]},
    {"role": "tool", "name": "python", "content": "19"},
    {"role": "assistant", "content": "It is 19."},
]
DEFAULTS = (0.6, 50, 256)


@pytest.fixture(scope="module")
def page(toy_model_and_tokenizer):
    from gradio_client import Client

    engine = ScriptedEngine(*toy_model_and_tokenizer)
    demo = app.build_demo(engine, "toy")
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.appearance())
    yield engine, lambda: Client(url, verbose=False)
    demo.close()


def test_the_api_streams_the_messages_of_a_reply(page):
    engine, connect = page
    job = connect().submit("What is 12+7?", 0.3, 5, 40, api_name="/chat")
    assert job.result(timeout=30) == REPLY
    assert len(job.outputs()) > 2
    assert engine.asked[-1] == ([{"role": "user", "content": "What is 12+7?"}], SamplingOptions(0.3, 5), 40)


def test_the_page_starts_with_the_options_of_the_folder_and_keeps_those_it_does_not_show(toy_model_folder):
    GenerationConfig(do_sample=True, temperature=0.3, top_k=400, top_p=0.8).save_pretrained(toy_model_folder)
    engine = ScriptedEngine(*load_model_and_tokenizer(toy_model_folder))
    with app.gr.Blocks():
        assert [slider.value for slider in app.settings(engine)] == [0.3, 200, 256]
    list(app.answers_of(engine)("hi", [], 1.5, 7.0, 20.0))
    assert engine.asked[-1][1:] == (SamplingOptions(1.5, 7, top_p=0.8), 20)


def test_visitors_are_answered_together(toy_model_folder, monkeypatch):
    from gradio_client import Client

    served, launch, together = [], app.gr.Blocks.launch, []

    def look(engine, turn, event):
        together.append(len(engine.entered))
        SharedEngine.deliver(engine, turn, event)

    class Watched(SharedEngine):
        deliver = look

    monkeypatch.setattr(app, "SharedEngine", Watched)
    monkeypatch.setattr(app.gr.Blocks, "launch", lambda demo, **options: served.append((demo, options)))
    app.start([str(toy_model_folder)])
    demo, options = served[0]
    _, url, _ = launch(demo, **options | {"prevent_thread_lock": True, "quiet": True})
    try:
        visitors = [Client(url, verbose=False) for _ in range(6)]
        jobs = [visitor.submit(f"Count to {i}", 1.0, 0, 200, api_name="/chat") for i, visitor in enumerate(visitors)]
        for job in jobs:
            job.result(timeout=60)  # may be nothing: the model is random
    finally:
        demo.close()
    assert max(together) >= 3


def test_the_second_question_comes_with_the_whole_first_turn(page):
    engine, connect = page
    client = connect()
    client.predict("What is 12+7?", api_name="/chat")
    client.predict("Really?", api_name="/chat")
    question, second = ({"role": "user", "content": text} for text in ("What is 12+7?", "Really?"))
    assert engine.asked[-1][0] == [question, *REPLY, second]
    connect().predict("Really?", api_name="/chat")  # another visitor
    assert engine.asked[-1][0] == [second]


def test_the_only_endpoint_is_the_chat(page):
    _, connect = page
    assert list(connect().view_api(return_format="dict")["named_endpoints"]) == ["/chat"]


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (("   ",), "the message is empty"),
        (("a" * 9000,), "at most 8000"),
        (("lamp " * 400,), "the question itself is too long"),
        *[
            (("hi", x), "temperature must be a number from 0 to 2")
            for x in (9.0, float("nan"), float("inf"), None, True)
        ],
        *[(("hi", 1.0, x), "top_k must be a whole number from 0 to 200") for x in (-3, 2.5, "3")],
        *[(("hi", 1.0, 3, x), "max_new_tokens must be a whole number from 1 to 1024") for x in (5000, 0, 1.5)],
    ],
)
def test_limits_hold_also_for_those_who_come_without_the_page(toy_model_and_tokenizer, request_, complaint):
    answers = app.answers_of(ScriptedEngine(*toy_model_and_tokenizer))
    message, *options = request_
    with pytest.raises(UserError) as refusal:
        list(answers(message, [], *options, *DEFAULTS[len(options) :]))
    assert complaint in str(refusal.value) and "\n" not in str(refusal.value)


def test_of_a_question_too_long_by_itself_nothing_is_said_about_older_messages(toy_model_and_tokenizer, monkeypatch):
    told = []
    monkeypatch.setattr(app.gr, "Info", lambda message, **_: told.append(message))
    answers = app.answers_of(ScriptedEngine(*toy_model_and_tokenizer))
    turns = [app.Turn("lamp", [{"text": "mat " * 60}]) for _ in range(6)]
    with pytest.raises(UserError, match="too long"):
        list(answers("lamp " * 400, turns, *DEFAULTS))
    assert told == []
    list(answers("lamp", turns, *DEFAULTS))
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


def test_a_refused_question_is_an_error_of_the_api_and_the_chat_goes_on(page):
    engine, connect = page
    client = connect()
    with pytest.raises(Exception, match="the question itself is too long"):
        client.predict("lamp " * 400, api_name="/chat")
    assert client.predict("And now?", api_name="/chat") == REPLY
    assert engine.asked[-1][0] == [{"role": "user", "content": "And now?"}]


def taken(*events):
    turn = app.Turn("12+7?")
    for event in events:
        turn.take(event)
    return turn


def test_a_turn_is_the_messages_that_the_engine_would_have():
    calls = [ToolCall("12+7"), ToolResult("19")] * 2
    assert taken(*EVENTS).reply() == REPLY
    silent = taken(*calls, Finished([], "length"))
    call, result = {"role": "assistant", "content": "", "tool_calls": [CALL]}, REPLY[1]
    assert silent.reply() == [call, result, call, result, {"role": "assistant", "content": ""}]


def test_a_stopped_call_and_a_turn_without_a_reply_are_left_out():
    assert taken(TextDelta("Let me"), ToolCall("while True: pass")).reply() == [
        {"role": "assistant", "content": "Let me"}
    ]
    turns = [taken(ToolCall("while True: pass")), app.Turn("lamp", note="refused"), taken(TextDelta("Yes."), DONE)]
    asked = app.conversation(turns, "And?")
    assert [message["content"] for message in asked] == ["12+7?", "Yes.", "And?"]


def test_replies_that_say_nothing_or_end_early_are_explained():
    assert "said nothing" in taken(Finished([], "stop")).note
    assert "reached its limit" in taken(ToolCall("1"), ToolResult("1"), Finished([], "length")).note
    assert "reached its limit" in taken(TextDelta("Once upon"), Finished([], "length")).note
    assert taken(*EVENTS).note == ""


def test_endless_conversations_are_refused(toy_model_and_tokenizer):
    answers = app.answers_of(ScriptedEngine(*toy_model_and_tokenizer))
    with pytest.raises(UserError, match="start a new one"):
        list(answers("lamp", [app.Turn("lamp")] * app.MAX_TURNS, *DEFAULTS))


def test_the_page_shows_the_examples_of_the_model_folder(toy_model_folder, monkeypatch):
    (toy_model_folder / "README.md").write_text("---\nwidget:\n- text: Who are you?\n---\n")
    built = []
    monkeypatch.setattr(app, "build_demo", lambda engine, title, examples: built.append(examples) or app.gr.Blocks())
    monkeypatch.setattr(app.gr.Blocks, "launch", lambda *args, **kwargs: None)
    app.start([str(toy_model_folder)])
    (toy_model_folder / "README.md").unlink()
    app.start([str(toy_model_folder)])
    assert built == [["Who are you?"], []]


def test_chinese_text_has_fonts_on_every_system():
    fonts = app.appearance()["theme"].font
    assert "PingFang SC" in fonts and "Microsoft YaHei" in fonts and "Noto Sans CJK SC" in fonts


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


def test_the_page_computes_attention_without_cudnn(monkeypatch):
    found = []

    def look(name):
        found.append(cudnn_sdp_enabled())
        raise UserError("enough")

    monkeypatch.setattr(app, "load_model_and_tokenizer", look)
    with pytest.raises(UserError, match="enough"):
        app.start(["a-model"])
    assert found == [False] and cudnn_sdp_enabled()
