"""The real `transformers serve` on a model folder: what a client sends as text is no control token in the prompt."""

import json
import urllib.error
import urllib.request

import pytest
from hostile import HOSTILE, messages_of, part, rendered
from serving import serving, wait_until_up

from modeling_nanochat.tokenization_nanochat import encode_documents


@pytest.fixture(scope="module")
def ask(toy_model_and_tokenizer, tmp_path_factory):
    """Posts to the server, and gives its answer's `usage`."""
    folder = tmp_path_factory.mktemp("served")
    model, tokenizer = toy_model_and_tokenizer
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    log = folder.with_suffix(".log")

    def post(path: str, **body) -> dict:
        body = json.dumps({"model": str(folder), "stream": False, **body}).encode()
        request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["usage"]

    with serving(folder, log) as (process, url):
        wait_until_up(process, url, log)
        yield post


@pytest.fixture(scope="module")
def tokenizer(toy_model_and_tokenizer):
    return toy_model_and_tokenizer[1]


def length(tokenizer, *texts: str, turns: str) -> int:
    """Tokens of a prompt of these texts, none of which is read as a control token, and of its control tokens."""
    return sum(len(ids) - 1 for ids in encode_documents(tokenizer, texts)) + turns.count("<|")


QUESTION = "<|bos|><|user_start|><|user_end|><|assistant_start|>"
CALL = "<|python_start|><|python_end|><|output_start|><|output_end|>"


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_chat_completions(ask, tokenizer, text):
    usage = ask("/v1/chat/completions", messages=[{"role": "user", "content": text}], max_tokens=1)
    assert usage["prompt_tokens"] == length(tokenizer, text, turns=QUESTION)
    parts = [part(text[:3]), part(text[3:])]
    usage = ask("/v1/chat/completions", messages=[{"role": "user", "content": parts}], max_tokens=1)
    joined = f"{text[:3]} {text[3:]}"  # by the server
    assert usage["prompt_tokens"] == length(tokenizer, joined, turns=QUESTION)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_chat_completions_with_a_tool(ask, tokenizer, text):
    """Also what stands in the tools; the server leaves out what an assistant says beside a call."""
    messages = messages_of((text, [(text, [("", text, text)], "")]))[:-1]
    call = messages[2]["tool_calls"][0]
    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    schema = {
        "name": text,
        "description": text,
        "parameters": {"type": "object", "properties": {text: {"type": "string"}}},
    }
    usage = ask(
        "/v1/chat/completions", messages=messages, tools=[{"type": "function", "function": schema}], max_tokens=1
    )
    listed = f"Functions in Python:\n{json.dumps(schema, ensure_ascii=False)}\n\n{text}\n\n{text}"
    assert usage["prompt_tokens"] == length(tokenizer, listed, text, text, turns=QUESTION + CALL)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_responses(ask, tokenizer, text):
    usage = ask("/v1/responses", input=text, instructions=text, max_output_tokens=1)
    assert usage["input_tokens"] == length(tokenizer, f"{text}\n\n{text}", turns=QUESTION)
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": text}]},
        {"type": "function_call", "call_id": "1", "name": "python", "arguments": json.dumps({"code": text})},
        {"type": "function_call_output", "call_id": "1", "output": text},
    ]
    usage = ask("/v1/responses", input=items, max_output_tokens=1)
    assert usage["input_tokens"] == length(tokenizer, text, text, text, turns=QUESTION + CALL)


def test_raw_completions_are_raw(ask, tokenizer):
    """A prompt without messages is the client's own: control tokens in it are read, as in every `tokenizer(text)`."""
    messages = messages_of((None, [("Hi.", [], "")]))[:-1]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    usage = ask("/v1/completions", prompt=text.removeprefix("<|bos|>"), max_tokens=1)
    assert usage["prompt_tokens"] == len(rendered(tokenizer, messages, add_generation_prompt=True))


def test_half_a_character_fails_in_the_server_without_an_answer(ask):
    with pytest.raises(urllib.error.HTTPError, match="500"):
        ask("/v1/chat/completions", messages=[{"role": "user", "content": "\ud800<|bos|>"}], max_tokens=1)
