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
