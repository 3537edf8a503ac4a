"""Validation of conversations: `{"messages": [{"role", "content", "tool_calls"?}], "tools"?}`."""

from keyword import iskeyword
from typing import Any

from ..errors import UserError

# Roles that may follow each state. A tool result must answer a call, and the assistant continues after the result. A
# conversation may also end with a call or its result: then the turn's end is not trained on.
FOLLOWERS = {
    "start": {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user"},
    "call": {"tool"},
    "tool": {"tool", "assistant"},
}
INSTRUCTIONS = ("system", "developer")  # two names for one role
READ_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id"}  # of a message; an assistant's also `weight`


def call_message(text: str, code: str) -> dict[str, Any]:
    """An assistant's message that calls the python tool after `text`."""
    call = {"type": "function", "function": {"name": "python", "arguments": {"code": code}}}
    return {"role": "assistant", "content": text, "tool_calls": [call]}


def check_messages(messages: Any, where: str) -> None:
    """Raise [`UserError`] naming `where` unless `messages` is a conversation that the chat template can render.

    Roles: an optional leading system message, then user and assistant alternating; an assistant message with
    `tool_calls` is followed by one or more tool messages and the assistant message that continues the turn.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: `messages` must be a non-empty list of {{role, content}} objects")
    state = "start"
    for number, message in enumerate(messages, start=1):
        role = check_message(message, f"{where}, message {number}")
        if role not in FOLLOWERS[state]:
            expected = " or ".join(sorted(FOLLOWERS[state]))
            raise UserError(f"{where}, message {number}: role {role!r} is out of order, expected {expected}")
        state = "call" if role == "assistant" and message.get("tool_calls") else role


def check_message(message: Any, where: str) -> str:
    """Check the fields of one message and return its role."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{where}: expected an object with `role` and `content`")
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if role not in (*INSTRUCTIONS, "user", "assistant", "tool"):
        raise UserError(f"{where}: unknown role {role!r}, expected system, user, assistant or tool")
    if not is_text(content) and not (content is None and role == "assistant" and calls):
        raise UserError(f"{where}: `content` must be a string or a list of text parts {{type: text, text}}")
    if message.get("function_call") is not None:
        raise UserError(f"{where}: `function_call` is not supported; write it as one of `tool_calls`")
    if calls is not None and not isinstance(calls, list):
        raise UserError(f"{where}: `tool_calls` must be a list")
    if calls and role != "assistant":
        raise UserError(f"{where}: only an assistant message can have `tool_calls`, not role {role!r}")
    for call in calls or []:
        check_call(call, where)
    if role == "assistant" and message.get("weight") not in (None, 0, 1):
        raise UserError(f"{where}: `weight` must be 0, not trained on, or 1, found {message['weight']!r}")
    return "system" if role in INSTRUCTIONS else role


def check_call(call: Any, where: str) -> None:
    """Raise [`UserError`] unless a call of python has only `code`, and another function's can be written in Python."""
    function = (call.get("function") or call) if isinstance(call, dict) else {}
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise UserError(f"{where}: a tool call needs `name` and `arguments` (an object, not a JSON string)")
    if name == "python":
        given = {key: value for key, value in arguments.items() if value is not None}
        if given.keys() != {"code"} or not isinstance(given["code"], str):
            raise UserError(f"{where}: a call of python needs `arguments` {{code: string}} and nothing else")
        return
    for word in (*name.split("."), *arguments):
        if not word.isidentifier() or iskeyword(word):
            raise UserError(f"{where}: {word!r} is not a Python name, which a call of {name!r} needs; rename it")


def results_behind_calls(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Checked messages in which every call is followed by its result, as the engine writes them: call, result, ...

    Results belong to the call of their `tool_call_id`, and those without one to the remaining calls, in order. A
    conversation that ends before the first result of its last calls stays as it is.

    Raises:
        UserError: A result belongs to no call, two belong to one, or a call has none; names the message.
    """
    ordered: list[dict[str, Any]] = []
    number = 0
    while number < len(messages):
        message, number = messages[number], number + 1
        results = {}
        while message.get("tool_calls") and number < len(messages) and messages[number]["role"] == "tool":
            number += 1
            results[number] = messages[number - 1]  # by the number of the message, from 1
        if not results:
            ordered.append(message)
            continue
        rest = message | {"content": ""}
        matched = match_results(message["tool_calls"], results, where)
        for first, (call, result) in enumerate(zip(message["tool_calls"], matched, strict=True)):
            ordered += [(rest if first else message) | {"tool_calls": [call]}, result]
    return ordered


def match_results(calls: list[dict[str, Any]], results: dict[int, dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The result of each of the calls of one message; `results` are by their numbers in the conversation."""
    ids = [call.get("id") for call in calls]
    found: dict[int, dict[str, Any]] = {}
    for number, result in sorted(results.items(), key=lambda item: item[1].get("tool_call_id") is None):
        wanted = result.get("tool_call_id")
        candidates = [i for i, call_id in enumerate(ids) if wanted in (None, call_id)]
        unanswered = [i for i in candidates if i not in found]
        if not unanswered:
            why = "answers no call" if wanted is None or not candidates else "is the second result of its call"
            raise UserError(f"{where}, message {number}: `tool_call_id` {wanted!r} {why}")
        found[unanswered[0]] = result
    if missing := [i for i in range(len(calls)) if i not in found]:
        before = min(results) - 1
        raise UserError(f"{where}, message {before}: call {missing[0] + 1} of {len(calls)} has no result")
    return [found[i] for i in range(len(calls))]


def unread_keys(messages: list[dict[str, Any]]) -> set[str]:
    """Keys with a value that neither the chat template nor training reads, for instance `reasoning_content`."""
    return {
        key
        for message in messages
        for key, value in message.items()
        if value not in (None, "", [], {})
        and key not in READ_KEYS
        and not (key == "weight" and message["role"] == "assistant")
    }


def is_text(content: Any) -> bool:
    """A string, or a list of parts {"type": "text", "text": string}."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    )


def check_tools(tools: Any, where: str) -> None:
    """Raise [`UserError`] naming `where` unless `tools` is a list of functions that the chat template can list."""
    listed = tools if isinstance(tools, list) else [None]
    functions = [(tool.get("function") or tool) if isinstance(tool, dict) else {} for tool in listed]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise UserError(
            f"{where}: `tools` must be a list of {{type: function, function: {{name, description, parameters}}}}"
        )
