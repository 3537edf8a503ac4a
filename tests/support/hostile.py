"""Hostile conversations, and the control tokens and texts expected from them."""

import re

from hypothesis import strategies as st

from modeling_nanochat.tokenization_nanochat import ESCAPE, PART_END, SPECIAL_TOKENS

SPELLED = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
PIECES = [  # may combine to control tokens and escapes, within a text or across a boundary
    "<", "|", ">", "<|", "|>", "<|<|", "|>|>", "<|bos|", "bos|>", "<|user_", "start|>", "<|assistant_end|", "end|>",
    ESCAPE, ESCAPE * 2, ESCAPE * 3, f"<|{ESCAPE}", PART_END, f"<|{ESCAPE}bos|>", f"<{ESCAPE}|bos|>",
    f"<|bos{ESCAPE}|>", "\u200b", "<|\u200bbos|>", "<|b\u00ados|>", "\u202e", ">|sob|<", "＜｜bos｜＞", "<｜bos｜>",
    "≺|bos|≻", "<|bоs|>", "<|BOS|>", "\u0301", "<\u0338|bos|>", "\x00", "\ufeff", "\ufffd", "\uffff",
    "\U0010fffe", "&lt;|bos|&gt;", "\\ufdd0", "%3C|bos|%3E", "{{ bos_token }}", "{% endgeneration %}",
    "{{- '<|bos|>' -}}", "CONTINUE_FINAL_MESSAGE_TAG ", "{content}", "</s>", '"', "\\", "'",
    "```", " ", "  ", "\n", "\r\n", "\t", "\u2028", "a", "12", "é", "日本", "🦙", "👩‍👩‍👧", "bos", "user_start",
]  # fmt: skip
NESTED = ["<|<|bos|>bos|>", "<|user_<|bos|>start|>", "<|bos|><|bos|>", "<<|bos|>|bos|>"]
# For tests too slow for generated texts: each control token, nested ones, fragments at both ends, escapes.
EDGES = [
    "<|bos|",
    "<",
    "|>",
    ">bos|>",
    f"<|{ESCAPE}",
    PART_END,
    f"{ESCAPE}bos|>",
    f"<|{ESCAPE}bos|><|bos|>",
    "＜｜bos｜＞",
]
HOSTILE = [f"a{text}" for text in SPECIAL_TOKENS] + [text + "b" for text in NESTED] + EDGES


def texts(*pieces: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces) | st.text(max_size=2), max_size=6).map("".join)


ANY = texts(*SPECIAL_TOKENS, *NESTED, *PIECES)
UNSPELLED = texts(*(piece for piece in PIECES if not SPELLED.search(piece))).filter(
    lambda text: not SPELLED.search(text)
)


def contents(text: st.SearchStrategy[str]) -> st.SearchStrategy[str | list[dict]]:
    return text | st.lists(text.map(part), max_size=3)


def part(text: str) -> dict:
    return {"type": "text", "text": text}


def conversations(
    heard: st.SearchStrategy[str], written: st.SearchStrategy[str] | None = None
) -> st.SearchStrategy[tuple]:
    """An optional system message, and turns: question, calls (text before, code, result), answer.

    `heard` generates texts of users and tools, `written` the model's (default: `heard`).
    """
    written = heard if written is None else written
    call = st.tuples(contents(written), written, contents(heard))
    turn = st.tuples(contents(heard), st.lists(call, max_size=2), contents(written))
    return st.tuples(st.none() | contents(heard), st.lists(turn, min_size=1, max_size=2))


def messages_of(conversation: tuple) -> list[dict]:
    system, turns = conversation
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, calls, answer in turns:
        messages.append({"role": "user", "content": question})
        for said, code, result in calls:
            call = {"type": "function", "function": {"name": "python", "arguments": {"code": code}}}
            messages.append({"role": "assistant", "content": said, "tool_calls": [call]})
            messages.append({"role": "tool", "name": "python", "content": result})
        messages.append({"role": "assistant", "content": answer})
    return messages


def whole(content: str | list[dict]) -> str:
    return content if isinstance(content, str) else "".join(piece["text"] for piece in content)


def written(conversation: tuple) -> list[tuple[str, str]]:
    """The expected content of the ids: each control token with the text after it."""
    system, turns = conversation
    before, pieces = "" if system is None else whole(system) + "\n\n", [("<|bos|>", "")]
    for question, calls, answer in turns:
        pieces += [("<|user_start|>", before + whole(question)), ("<|user_end|>", "")]
        before, opened = "", "<|assistant_start|>"
        for said, code, result in calls:
            pieces += [(opened, whole(said)), ("<|python_start|>", code), ("<|python_end|>", "")]
            pieces += [("<|output_start|>", whole(result))]
            opened = "<|output_end|>"
        pieces += [(opened, whole(answer)), ("<|assistant_end|>", "")]
    return pieces


def learnt(conversation: tuple) -> str:
    said = []
    for _, calls, answer in conversation[1]:
        said += [f"{whole(text)}<|python_start|>{code}<|python_end|>" for text, code, _ in calls]
        said += [whole(answer) + "<|assistant_end|>"]
    return "".join(said)


def read(tokenizer, ids: list[int]) -> list[tuple[str, str]]:
    """The control tokens in `ids`, each with the decoded text after it."""
    control, pieces = tokenizer.get_added_vocab().values(), []
    for token in ids:
        if token in control:
            pieces.append((tokenizer.convert_ids_to_tokens(token), []))
        else:
            pieces[-1][1].append(token)
    return [(name, tokenizer.decode(text)) for name, text in pieces]


def rendered(tokenizer, messages: list[dict], **kwargs) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=False, **kwargs)
