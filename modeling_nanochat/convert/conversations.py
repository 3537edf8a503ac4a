"""Conversion of conversations in nanochat's own format to the Hugging Face format.

There, an assistant's content may be a list of parts {"type", "text"}; a part `python` is a tool call and a part
`python_output` its result. Here, a call belongs to a message and its result is a separate message:

| nanochat | here |
| --- | --- |
| `text` | `content` of an assistant message; several in a row become text parts, each encoded separately |
| `python` | one of that message's `tool_calls`: {"name": "python", "arguments": {"code": text}} |
| `python_output` | a message {"role": "tool", "name": "python", "content": text} |
| end of the list | end of the last assistant message, which is empty if the list ends with a result |

Everything else is the same in both. The chat template renders the converted messages to the same ids and mask as
nanochat the original ones.

ShareGPT's turns {"from", "value"} are converted too: only the names of keys and roles differ.
"""

from typing import Any

from ..errors import UserError

CALL, RESULT = "python", "python_output"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}


def has_call_parts(messages: Any) -> bool:
    """Whether these are nanochat's own messages, recognised by a `python` or `python_output` part."""
    found = messages if isinstance(messages, list) else []
    contents = [message.get("content") for message in found if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, dict) and part.get("type") in (CALL, RESULT) for part in parts)


def from_original(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The messages, with every assistant message that has calls among its parts split into several messages.

    Raises:
        UserError: A part is malformed or of an unknown type, text follows a call, or a result follows no call.
    """
    converted: list[dict[str, Any]] = []
    for number, message in enumerate(messages, start=1):
        if has_call_parts([message]):
            if message.get("tool_calls"):
                raise UserError(f"{where}, message {number}: write calls as `{CALL}` parts or `tool_calls`, not both")
            if message.get("role") != "assistant":
                raise UserError(f"{where}, message {number}: only an assistant message can have `{CALL}` parts")
            converted += from_parts(message["content"], f"{where}, message {number}")
        else:
            converted.append(message)
    return converted


def from_parts(parts: list[Any], where: str) -> list[dict[str, Any]]:
    """One assistant turn: [assistant with calls, tool, ..., assistant without]."""
    turn = [assistant()]
    for number, part in enumerate(parts, start=1):
        kind, text = kind_and_text(part, f"{where}, part {number}")
        unanswered = len(turn[-1].get("tool_calls", []))
        if turn[-1]["role"] == "tool" and kind != RESULT:
            turn.append(assistant())
        if kind == CALL:
            call = {"type": "function", "function": {"name": CALL, "arguments": {"code": text}}}
            turn[-1].setdefault("tool_calls", []).append(call)
        elif kind == RESULT:
            if not unanswered and turn[-1]["role"] != "tool":
                raise UserError(f"{where}, part {number}: a `{RESULT}` without a `{CALL}` before it")
            turn.append({"role": "tool", "name": CALL, "content": text})
        elif unanswered:
            raise UserError(f"{where}, part {number}: the `{CALL}` before it has no `{RESULT}`")
        else:
            turn[-1]["content"].append({"type": "text", "text": text})
    if turn[-1].get("tool_calls"):
        raise UserError(f"{where}: the last `{CALL}` has no `{RESULT}`")
    if turn[-1]["role"] == "tool":
        turn.append(assistant())
    return [message | {"content": unwrap_single_text(message["content"])} for message in turn]


def assistant() -> dict[str, Any]:
    return {"role": "assistant", "content": []}


def kind_and_text(part: Any, where: str) -> tuple[str, str]:
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise UserError(f"{where}: expected an object with `type` and `text`")
    if part.get("type") not in ("text", CALL, RESULT):
        raise UserError(f"{where}: unknown type {part.get('type')!r}, expected text, {CALL} or {RESULT}")
    return part["type"], part["text"]


def unwrap_single_text(content: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
    """The content as a string, if it is a list of at most one text part."""
    return "".join(part["text"] for part in content) if isinstance(content, list) and len(content) < 2 else content


def from_sharegpt(turns: Any) -> Any:
    """Turns {"from", "value"} as messages {"role", "content"}; their other keys, and what is no turn, stay."""
    if not isinstance(turns, list):
        return turns
    return [as_message(turn) if isinstance(turn, dict) and "from" in turn else turn for turn in turns]


def as_message(turn: dict[str, Any]) -> dict[str, Any]:
    more = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": SHAREGPT_ROLES.get(str(turn["from"]), turn["from"]), "content": turn.get("value"), **more}
