"""Chats in JavaScript, by what transformers.js and the Hub's pages read them with: the same text and ids as in Python.

Needs node and its packages: npm install --prefix .venv/js @huggingface/jinja@0.5.11 @huggingface/tokenizers@0.2.0
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import toy_tokenizer
from hostile import HOSTILE
from transformers import AutoTokenizer

from modeling_nanochat.tokenization_nanochat import ESCAPE, SPECIAL_TOKENS, save_tokenizer

PACKAGES = Path(os.environ.get("NODE_PATH") or Path(__file__).parents[2] / ".venv" / "js" / "node_modules")
PROGRAM = """
const { Template } = require("@huggingface/jinja");
const { Tokenizer } = require("@huggingface/tokenizers");
const { tokenizer, config, chats } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const template = new Template(config.chat_template), encoder = new Tokenizer(tokenizer, config);
console.log(JSON.stringify(chats.map((chat) => {
  try {
    const text = template.render({ bos_token: config.bos_token, ...chat });
    return { text, ids: encoder.encode(text, { add_special_tokens: false }).ids };
  } catch (error) {
    return { error: error.message };
  }
})));
"""


def user(content):
    return {"role": "user", "content": content}


def model(content, *functions):
    calls = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in functions]
    return {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


SYSTEM = {"role": "system", "content": "Be brief."}
RESULT = {"role": "tool", "name": "python", "content": "2"}
ONE_AND_ONE = ("python", {"code": "1+1"})
WEATHER = {"city": 'P"a<|bos|>é', "days": 3, "wet": True, "no": None, "deep": {"k": [1.5, False, []], "items": {}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Of a <|bos|> “city”.", "parameters": {"a": [1, {}]}},
    },
    {"name": "now", "parameters": {}},
    {"type": "function", "function": {"name": "python"}},
]
SHOWN = {
    "a question": [user("Hi")],
    "an answer": [user("Hi"), model("Hello.\n")],
    "two turns": [user("Hi"), model("Hello."), user(" And now? "), model("Bye.")],
    "an empty answer": [user("Hi"), model("")],
    "an answer of nothing": [user("Hi"), {"role": "assistant", "content": None}],
    "an answer without content": [user("Hi"), {"role": "assistant"}],
    "an empty list of calls": [user("Hi"), model("Hello.") | {"tool_calls": []}],
    "calls that are none": [user("Hi"), model("Hello.") | {"tool_calls": None}],
    "a system message": [SYSTEM, user("Hi"), model("Hello.")],
    "a developer's message": [{"role": "developer", "content": "Be brief."}, user("Hi")],
    "a system message of parts": [{"role": "system", "content": parts("Be", " brief.")}, user("Hi")],
    "a call": [user("1+1?"), model("Hm. ", ONE_AND_ONE)],
    "a call without text": [user("1+1?"), {"role": "assistant", "tool_calls": model("", ONE_AND_ONE)["tool_calls"]}],
    "a flat call": [
        user("1+1?"),
        {"role": "assistant", "tool_calls": [{"name": "python", "arguments": {"code": "1+1"}}]},
    ],
    "a call, its result, an answer": [user("1+1?"), model("Hm. ", ONE_AND_ONE), RESULT, model("It is 2.")],
    "two calls, two results": [
        user("?"),
        model("", ONE_AND_ONE, ("python", {"code": ""})),
        RESULT,
        RESULT,
        model("2."),
    ],
    "a call that a question follows": [user("1+1?"), model("", ONE_AND_ONE), user("Well?"), model("2.")],
    "a call without arguments": [user("?"), model("", ("python", {}))],
    "an argument of nothing": [user("?"), model("", ("python", {"code": "1+1", "city": None}))],
    "another function": [
        user("?"),
        model("Hm.", ("weather", WEATHER)),
        {"role": "tool", "content": parts("wet")},
        model("Wet."),
    ],
    "arguments by names of methods": [user("?"), model("", ("keep", {"items": [1], "keys": "a", "get": 2}))],
    "parts": [user(parts("a", "", "<|bos", "|>b")), model(parts("c", "d"))],
    "no parts": [user([]), model([])],
    "control tokens": [
        user("".join(SPECIAL_TOKENS)),
        model("<|assistant_end|>", ("python", {"code": "'<|python_end|>'"})),
    ],
    "escapes": [user(f"<|{ESCAPE}bos|><|{ESCAPE}{ESCAPE}{ESCAPE}|>"), model(f"{ESCAPE}<|<|bos|>bos|>")],
    "template": [user("{{ bos_token }}{% endgeneration %}{# no #}"), model("\\ufdd0 '\"\\n \r\n\t")],
    "scripts": [user("naïve 日本 한국어 👩‍👩‍👧 ٣٣ ½ e\u0301"), model("don't WE'LL 12345  \n\n\n  x")],
}
CHATS = {name: {"messages": messages, "add_generation_prompt": False} for name, messages in SHOWN.items()}
CHATS |= {f"{name}, to be continued": chat | {"add_generation_prompt": True} for name, chat in CHATS.items()}
CHATS |= {f"{name}, with tools": chat | {"tools": TOOLS} for name, chat in CHATS.items()}
CHATS |= {f"hostile {text!r}": {"messages": [user(text), model(text)]} for text in HOSTILE}
REFUSED = {
    "another argument": {"messages": [user("?"), model("", ("python", {"expression": "1+1"}))]},
    "an argument more": {"messages": [user("?"), model("", ("python", {"code": "1", "timeout": 3}))]},
    "code of nothing": {"messages": [user("?"), model("", ("python", {"code": None}))]},
    "code of another type": {"messages": [user("?"), model("", ("python", {"code": 1}))]},
    "arguments as a string": {"messages": [user("?"), model("", ("python", '{"code": "1"}'))]},
    "a call without a name": {"messages": [user("?"), {"role": "assistant", "tool_calls": [{"arguments": {}}]}]},
    "calls as a mapping": {
        "messages": [user("?"), {"role": "assistant", "tool_calls": {"name": "f", "arguments": {}}}]
    },
    "a question that calls": {"messages": [user("?") | {"tool_calls": [{"name": "f", "arguments": {}}]}]},
    "the older form of calls": {"messages": [user("?"), model("") | {"function_call": {"name": "f"}}]},
    "an image": {"messages": [user([{"type": "image", "url": "b"}])]},
    "a number": {"messages": [user(3)]},
    "zero for an answer": {"messages": [user("?"), model(0)]},
    "a mapping": {"messages": [user({"text": "b"})]},
    "no content": {"messages": [{"role": "user"}]},
    "content of nothing": {"messages": [user(None)]},
    "a result without a call": {"messages": [user("?"), RESULT]},
    "a system message alone": {"messages": [SYSTEM]},
    "a system message before an answer": {"messages": [SYSTEM, model("Hi")]},
    "another role": {"messages": [{"role": "stranger", "content": "b"}]},
    "tools without names": {"messages": [user("?")], "tools": [{"type": "function", "function": {"parameters": {}}}]},
    "documents": {"messages": [user("?")], "documents": [{"title": "a", "text": "b"}]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(toy_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def in_javascript(folder):
    """Name of the chat -> {"text", "ids"} or {"error"}; all of them by one process."""
    if not shutil.which("node") or not (PACKAGES / "@huggingface" / "jinja").is_dir():
        pytest.skip(f"needs node and its packages in {PACKAGES}")
    chats = CHATS | REFUSED
    given = {"tokenizer": "tokenizer.json", "config": "tokenizer_config.json"}
    given = {key: json.loads((folder / name).read_text(encoding="utf-8")) for key, name in given.items()}
    done = subprocess.run(
        ["node", "-e", PROGRAM],
        check=False,
        input=json.dumps(given | {"chats": list(chats.values())}),
        env={"NODE_PATH": str(PACKAGES), "PATH": os.environ["PATH"]},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(chats, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_reads_the_same_in_javascript(tokenizer, in_javascript, name):
    chat = CHATS[name]
    text = tokenizer.apply_chat_template(chat["messages"], **without_messages(chat), tokenize=False)
    ids = tokenizer.apply_chat_template(chat["messages"], **without_messages(chat), return_dict=False)
    assert in_javascript[name] == {"text": text, "ids": ids}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_in_javascript_in_the_same_words(tokenizer, in_javascript, name):
    with pytest.raises(Exception) as caught:
        tokenizer.apply_chat_template(REFUSED[name]["messages"], **without_messages(REFUSED[name]), tokenize=False)
    assert in_javascript[name] == {"error": str(caught.value)}


def without_messages(chat):
    return {key: value for key, value in chat.items() if key != "messages"}
