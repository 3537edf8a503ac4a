"""Conversations from an endpoint: a loopback server that answers well, badly, slowly, too much or not at all."""

import http.server
import json
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from modeling_nanochat.errors import UserError
from recipes import identity
from recipes.identities import endpoint
from recipes.identities.dialogues import write_dialogues
from recipes.identities.persona import read_persona

SHIPPED = Path(__file__).parents[3] / "recipes" / "identity.yaml"
ENGLISH = read_persona(str(SHIPPED))
GOOD = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I'm nanochat."}]


def run(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["identity.py", *words])
    identity.main()


def completion(text: object) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def spoken(*messages: dict) -> bytes:
    return completion(json.dumps({"messages": list(messages)}))


class Server(http.server.ThreadingHTTPServer):
    """Answers each request by the next of `script`: bytes, a status with headers, or a function; then with GOOD."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests = [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        answer = self.server.script.pop(0) if self.server.script else spoken(*GOOD)
        if callable(answer):
            return answer(self)
        status, headers, content = (200, {}, answer) if isinstance(answer, bytes) else answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, count: int, path: Path, **changes):
    settings = {"timeout": 0.3, "retries": 2, "parallel": 1, "backoff": 0.01} | changes
    asked = endpoint.Endpoint(server.url, "toy", **settings)
    request = endpoint.Request(ENGLISH, ["Hello!"], 0)
    return asked, lambda: endpoint.write_with_model(asked, request, count, path)


def test_the_model_is_asked_about_the_persona_and_its_conversations_are_added(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    output = tmp_path / "out.jsonl"
    words = ["--conversations", "20", "--with_model", "toy", "--endpoint", server.url, "--model_conversations", "30"]
    run(monkeypatch, "--persona", str(SHIPPED), "--output_file", str(output), *words)
    rows = [json.loads(line)["messages"] for line in output.read_text().splitlines()]
    assert rows == [*write_dialogues(ENGLISH, 20, 0), *[GOOD] * 30]
    assert "toy wrote 30 of 30 conversations" in capsys.readouterr().out
    paths, keys, bodies = zip(*server.requests, strict=True)
    assert set(paths) == {"/v1/chat/completions"} and set(keys) == {"Bearer secret"}
    prompts = {body["messages"][0]["content"] for body in bodies}
    assert len(prompts) == 30  # each with its own topic, user and dynamic
    assert all(ENGLISH.maker in prompt and "Language" not in prompt and "English" in prompt for prompt in prompts)


def test_a_language_without_phrases_is_left_to_the_model(server, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    words = ["--with_model", "toy", "--endpoint", server.url, "--model_conversations", "3"]
    persona = tmp_path / "persona.yaml"
    persona.write_text(yaml.safe_dump(yaml.safe_load(SHIPPED.read_text()) | {"language": "Elvish"}))
    run(monkeypatch, "--persona", str(persona), "--output_file", str(output), *words)
    assert len(output.read_text().splitlines()) == 3
    assert "Elvish" in server.requests[0][2]["messages"][0]["content"]


ROLE = "roles do not alternate from user to assistant"
BAD = {
    "not JSON": (b"garbage\xff", "not a chat completion"),
    "another API": (b'{"choices": []}', "not a chat completion"),
    "nested": (b"[" * 100_000, "not a chat completion"),
    "nothing": (completion(None), "no JSON with messages"),
    "prose": (completion("Sure! Here it is."), "no JSON with messages"),
    "no messages": (completion('{"dialogue": []}'), "no JSON with messages"),
    "strings": (completion('{"messages": ["a", "b"]}'), "no JSON with messages"),
    "empty": (spoken(), ROLE),
    "assistant first": (spoken(*GOOD[::-1]), ROLE),
    "no answer": (spoken(GOOD[0]), ROLE),
    "two users": (spoken(GOOD[0], *GOOD), ROLE),
    "system": (spoken({"role": "system", "content": "x"}, *GOOD), ROLE),
    "silent": (spoken(GOOD[0], {"role": "assistant", "content": " "}), "an empty message"),
    "surrogate": (spoken(GOOD[0], {"role": "assistant", "content": "\ud800"}), "an empty message"),
    "number": (spoken(GOOD[0], {"role": "assistant", "content": 7}), "an empty message"),
    "endless talk": (spoken(*GOOD * 5), "too long"),
    "long message": (spoken(GOOD[0], {"role": "assistant", "content": "a" * 2001}), "too long"),
    "huge": (completion("a" * 2_000_000), "too long"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_is_counted_and_asked_for_again(kind, server, tmp_path):
    content, reason = BAD[kind]
    server.script += [content]
    asked, answers = ask(server, 2, tmp_path / "replies", timeout=5)
    assert answers() == [GOOD, GOOD]
    assert asked.bad == [reason] and len(server.requests) == 3


def test_a_conversation_is_given_up_after_so_many_bad_replies(server, tmp_path):
    server.script += [b"garbage"] * 3
    asked, answers = ask(server, 2, tmp_path / "replies")
    assert answers() == [GOOD]
    assert len(asked.bad) == 3 and len(server.requests) == 4


def test_json_is_found_among_other_text(server, tmp_path):
    text = json.dumps({"messages": GOOD})
    server.script += [completion(f"<think>{{}}</think>\n```json\n{text}\n```\nDone.")]
    assert ask(server, 1, tmp_path / "replies")[1]() == [GOOD]


def sleepy(handler):
    time.sleep(1)


def dripping(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def breaking(handler):
    handler.close_connection = True  # without a response


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "trouble", [sleepy, dripping, breaking, (429, {"Retry-After": "0"}, b""), (500, {}, b"oh"), (503, {}, b"")]
)
def test_trouble_that_passes_is_waited_out(trouble, server, tmp_path, capfd):
    server.script += [trouble, trouble]
    asked, answers = ask(server, 1, tmp_path / "replies")
    start = time.monotonic()
    assert answers() == [GOOD]
    assert time.monotonic() - start < 2 and len(server.requests) == 3 and asked.bad == []


def test_an_endpoint_that_stays_down_ends_the_run_and_a_later_one_continues(server, tmp_path):
    path = tmp_path / "replies"
    server.script += [spoken(*GOOD)] * 2 + [(429, {}, b"")] * 3
    with pytest.raises(UserError, match=r"status 429, in the last of 3 attempts.*conversations so far are kept"):
        ask(server, 5, path)[1]()
    with open(path, "a") as file:
        file.write('{"number": 4, "mess')  # the process was killed in the middle of a line
    asked_before = len(server.requests)
    assert ask(server, 5, path)[1]() == [GOOD] * 5
    assert len(server.requests) == asked_before + 3
    assert ask(server, 5, path)[1]() == [GOOD] * 5  # nothing is asked for twice
    assert len(server.requests) == asked_before + 3
    with pytest.raises(UserError, match="holds replies for other settings"):
        endpoint.write_with_model(ask(server, 1, path)[0], endpoint.Request(ENGLISH, [], 1), 5, path)


def test_an_endpoint_that_nobody_serves_is_reported(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"refused.*, in the last of 3 attempts"):
        ask(server, 5, tmp_path / "replies")[1]()


@pytest.mark.parametrize("status", [302, 400, 401, 404])
def test_a_refusal_ends_the_run_at_once(status, server, tmp_path, monkeypatch):
    server.script += [(status, {"Location": f"{server.url}/elsewhere"}, b'{"error": "no such\nmodel"}')]
    with pytest.raises(UserError, match=rf"status {status} .*no such.*check URL, model and key") as raised:
        ask(server, 5, tmp_path / "replies")[1]()
    assert len(server.requests) == 1 and "\n" not in str(raised.value)


def test_replies_of_no_use_at_all_are_an_error(server, tmp_path, monkeypatch):
    server.script += [b"garbage"] * 4
    words = ["--with_model", "toy", "--endpoint", server.url, "--model_conversations", "2", "--retries", "1"]
    with pytest.raises(UserError, match="none of its replies can be used"):
        run(
            monkeypatch,
            "--persona",
            str(SHIPPED),
            "--output_file",
            str(tmp_path / "o"),
            "--conversations",
            "0",
            *words,
        )


def test_requests_run_side_by_side(server, tmp_path):
    def slow(handler):
        time.sleep(0.2)
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(spoken(*GOOD))

    server.script += [slow] * 8
    start = time.monotonic()
    assert ask(server, 8, tmp_path / "replies", parallel=8, timeout=10)[1]() == [GOOD] * 8
    assert time.monotonic() - start < 1.2
