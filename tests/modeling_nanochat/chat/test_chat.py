import io
import subprocess
import sys

import pytest
from transformers import GenerationConfig

from modeling_nanochat.chat import __main__ as chat_module
from modeling_nanochat.chat.__main__ import Chat, greeting, main, printable, start
from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.sampling import SETTINGS, SamplingOptions, describe
from modeling_nanochat.chat.turn import Finished, TextDelta, ToolCall, ToolResult
from modeling_nanochat.errors import UserError

ANSWER = [{"role": "assistant", "content": "It is 19."}]


class ScriptedEngine:
    """Yields the given events whatever it is asked, and remembers the questions."""

    def __init__(self, *events, keep=None):
        self.events, self.keep, self.asked = events, keep, []

    def fit(self, messages, max_new_tokens):
        return messages if self.keep is None else messages[-self.keep :]

    def stream(self, messages, options, **settings):
        self.asked.append((messages, settings | {"options": options}))
        for event in self.events:
            if event is KeyboardInterrupt:
                raise KeyboardInterrupt
            yield event


def test_reply_is_printed_and_kept(capsys):
    engine = ScriptedEngine(TextDelta("It is "), TextDelta("19."), Finished(ANSWER, "stop"))
    options = SamplingOptions(temperature=0.1, top_k=3, top_p=0.9)
    chat = Chat(engine, options, max_new_tokens=7, seed=5)
    chat.ask("12+7?")
    chat.ask("again?")
    assert capsys.readouterr().out == "It is 19.\n\n" * 2
    assert engine.asked[0][1] == {"options": options, "max_new_tokens": 7, "seed": 5}
    assert engine.asked[1][0] == [{"role": "user", "content": "12+7?"}, *ANSWER, {"role": "user", "content": "again?"}]


def test_tool_calls_stand_out(capsys):
    events = [
        TextDelta("I see. "),
        ToolCall("12+7"),
        ToolResult("19"),
        TextDelta("It is 19."),
        Finished(ANSWER, "stop"),
    ]
    Chat(ScriptedEngine(*events)).ask("12+7?")
    assert capsys.readouterr().out == "I see. \n[python] 12+7\n[result] 19\nIt is 19.\n\n"
    Chat(ScriptedEngine(*events), color=True).ask("12+7?")
    assert "\033[36m" in capsys.readouterr().out


def test_ctrl_c_stops_the_reply_and_keeps_the_chat(capsys):
    chat = Chat(ScriptedEngine(TextDelta("Once upon"), KeyboardInterrupt))
    chat.run(iter(["Tell me a story.", "/temperature 1"]))
    out = capsys.readouterr().out
    assert "Once upon\n[stopped]" in out and "[temperature 1]" in out
    assert chat.messages[-1] == {"role": "assistant", "content": "Once upon"}


def test_limits_and_empty_replies_are_told(capsys):
    Chat(ScriptedEngine(TextDelta("abc"), Finished(ANSWER, "length"))).ask("?")
    assert "[the reply reached its limit]" in capsys.readouterr().out
    Chat(ScriptedEngine(Finished([{"role": "assistant", "content": ""}], "stop"))).ask("?")
    assert "[the model said nothing]" in capsys.readouterr().out
    chat = Chat(ScriptedEngine(TextDelta("abc"), Finished(ANSWER, "stop"), keep=1))
    chat.ask("one")
    assert "left out" not in capsys.readouterr().out
    chat.ask("two")
    assert "left out" in capsys.readouterr().out
    assert len(chat.messages) == 2


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/temperature 0", "[temperature 0]"),
        ("/temperature", "[temperature 0.6]"),
        ("/top_k 5", "[top_k 5]"),
        ("/temperature hot", "error: temperature must be a number from 0 to 2, not 'hot'"),
        ("/temperature 3", "temperature must be a number from 0 to 2, not 3"),
        ("/temperature nan", "temperature must be a number from 0 to 2, not nan"),
        ("/top_k 2.5", "top_k must be a whole number of at least 0, not 2.5"),
        ("/top_k " + "9" * 400, "[top_k 999"),
        ("/top_p 0.9", "[top_p 0.9]"),
        ("/min_p", "[min_p 0.0]"),
        ("/repetition_penalty 0", "repetition_penalty must be a number from 0.1 to 10, not 0"),
        ("/stop_strings x", "unknown command /stop_strings"),
        *[("/help", f"/{name} X ") for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")],
        ("/nonsense", "unknown command /nonsense"),
    ],
)
def test_commands_answer(line, answer, capsys):
    assert Chat(ScriptedEngine()).command(line)
    assert answer in capsys.readouterr().out


def test_clear_forgets_and_exit_leaves(capsys):
    engine = ScriptedEngine(TextDelta("Hi."), Finished(ANSWER, "stop"))
    chat = Chat(engine)
    chat.run(iter(["one", "/clear", "two", "", "/exit", "never asked"]))
    assert [len(messages) for messages, _ in engine.asked] == [1, 1]
    assert "never asked" not in str(engine.asked)


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\x9b1m\r\nc\td🦙") == "a[2Jb1m\nc\td🦙"


def test_too_long_a_question_is_told_and_the_chat_goes_on(toy_model_and_tokenizer, capsys):
    chat = Chat(Engine(*toy_model_and_tokenizer), max_new_tokens=3, seed=0)
    chat.run(iter(["Hi", "lamp " * 500, "Who are you?"]))
    out = capsys.readouterr().out
    assert "error: the question itself is too long" in out and "left out" not in out
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["Hi", "Who are you?"]


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        (["--temperature", "nan"], "temperature must be a number from 0 to 2, not nan"),
        (["--temperature", "3"], "temperature must be a number from 0 to 2, not 3"),
        (["--temperature", "hot"], "temperature must be a number from 0 to 2, not 'hot'"),
        (["--top_k", "-1"], "top_k must be a whole number of at least 0, not -1"),
        (["--top_p", "1.5"], "top_p must be a number from 0 to 1, not 1.5"),
        (["--min_p", "-0.1"], "min_p must be a number from 0 to 1, not -0.1"),
        (["--repetition_penalty", "0"], "repetition_penalty must be a number from 0.1 to 10, not 0"),
        (["--max_new_tokens", "0"], "max_new_tokens must be a whole number of at least 1, not 0"),
        (["--seed", "1.5"], "seed must be a whole number from 0 to"),
        (["--hot"], "unrecognized arguments: --hot; run with --help"),
        (["--seed"], "argument --seed: expected one argument"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_is_loaded(option, complaint):
    with pytest.raises(UserError) as error:
        start(["/no/such/folder", *option])
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_the_ranges_in_the_help_are_those_that_hold(capsys):
    with pytest.raises(SystemExit) as end:
        start(["--help"])
    help_ = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert all(f"--{name}" in help_ and describe(name) in help_ for name in SETTINGS)


def test_flags_replace_the_options_of_the_folder_which_replace_the_defaults(toy_model_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(Chat, "ask", lambda self, question: asked.append(self))
    settings = {"do_sample": True, "temperature": 0.3, "top_p": 0.8, "stop_strings": ["END"]}
    GenerationConfig(**settings).save_pretrained(toy_model_folder)
    start([str(toy_model_folder), "--prompt", "hi", "--temperature", "0", "--repetition_penalty", "1.2"])
    start([str(toy_model_folder), "--prompt", "hi", "--seed", "3"])
    assert asked[0].options == SamplingOptions(0, 50, 0.8, 0.0, 1.2, ("END",))
    assert (asked[0].max_new_tokens, asked[0].seed) == (256, None)
    assert asked[1].options == SamplingOptions(0.3, 50, 0.8, 0.0, 1.0, ("END",)) and asked[1].seed == 3


def test_a_base_model_says_what_to_expect_and_a_chat_model_nothing(toy_model_folder, capsys):
    prompt = [str(toy_model_folder), "--prompt", "hi", "--max_new_tokens", "1"]
    for stage, note in [("base", "has never seen a conversation"), ("mid", "answers better"), ("sft", None)]:
        (toy_model_folder / "README.md").write_text(f"---\ntags: [nanochat, {stage}]\n---\n")
        start(prompt)
        told = capsys.readouterr().err
        assert note in told if note else not told


def test_bytes_that_are_no_text_are_answered_like_any_other(toy_model_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Who \xff are you?\nHi\n"), encoding="utf-8"))
    start([str(toy_model_folder), "--max_new_tokens", "1"])
    out = capsys.readouterr().out
    assert "> Who \ufffd are you?" in out and "> Hi" in out


def test_without_an_input_nothing_is_asked(toy_model_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    start([str(toy_model_folder)])
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_first_chat_shows_nothing_but_the_chat(toy_model_folder):
    """No warning of ours or of a library, with the warnings that Python shows to a user."""
    command = [sys.executable, "-m", "modeling_nanochat.chat", str(toy_model_folder), "--max_new_tokens", "3"]
    result = subprocess.run(command, input="Hi\nAgain\n", check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert [line[:2] for line in result.stdout.split("\n") if line.startswith(">")] == ["> ", "> "]
    assert "warning" not in result.stdout.lower()


def test_greeting_names_model_size_help_and_questions(toy_model_and_tokenizer):
    engine = Engine(*toy_model_and_tokenizer)
    first, second, *questions, end = greeting("runs/pocket/sft", engine, ["Who are you?", "你是谁？"]).split("\n")
    assert first.startswith("runs/pocket/sft, 0.0") and "M parameters" in first and "/help" in first
    assert "for instance" in second and questions == ["  Who are you?", "  你是谁？"] and end == ""
    assert greeting("runs/pocket/sft", engine, []) == first + "\n"


def test_the_questions_of_the_greeting_are_those_of_the_model_folder(toy_model_folder, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    asked = [f"Question {number}?" for number in range(5)]
    card = "---\nwidget:\n" + "".join(f"- messages: [{{role: user, content: '{question}'}}]\n" for question in asked)
    (toy_model_folder / "README.md").write_text(card + "---\n")
    monkeypatch.setattr(sys, "stdin", Terminal("/exit\n"))
    monkeypatch.setattr("builtins.input", lambda prompt: "/exit")
    start([str(toy_model_folder)])
    out = capsys.readouterr().out
    assert "for instance:\n  Question 0?\n  Question 1?\n  Question 2?\n\n" in out
    (toy_model_folder / "README.md").unlink()
    start([str(toy_model_folder)])
    assert "for instance" not in capsys.readouterr().out


def test_one_prompt_on_a_real_folder(toy_model_folder, capsys):
    arguments = [str(toy_model_folder), "--prompt", "Who are you?", "--seed", "1", "--max_new_tokens", "5"]
    start(arguments)
    first = capsys.readouterr().out
    start(arguments)
    assert first.strip() and capsys.readouterr().out == first


def test_piped_questions_are_answered_in_turn(toy_model_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n\n/top_k 2\nTell me a story.\n"))
    start([str(toy_model_folder), "--max_new_tokens", "3", "--temperature", "0"])
    out = capsys.readouterr().out
    assert out.index("> Who are you?") < out.index("[top_k 2]") < out.index("> Tell me a story.")


def test_no_color_is_respected(toy_model_folder, capsys, monkeypatch):
    monkeypatch.setattr(chat_module.sys.stdout, "isatty", lambda: True)
    prompt = [str(toy_model_folder), "--prompt", "hi", "--max_new_tokens", "1"]
    start(prompt)
    assert "\033[" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    start(prompt)
    assert "\033[" not in capsys.readouterr().out


def test_a_missing_folder_is_one_line_and_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nanochat-chat", "/no/such/folder"])
    with pytest.raises(SystemExit) as end:
        main()
    err = capsys.readouterr().err
    assert end.value.code == 1
    assert err.startswith("error: /no/such/folder: no such folder") and err.count("\n") == 1
