"""What a well-formed conversation is: `{"messages": [{"role", "content", "tool_calls"?}], "tools"?}`, in the order that the template renders."""

from typing import Any

from .errors import UserError

# A tool result may only answer a call, and an assistant that called a tool must go on after the result.
FOLLOWERS = {
    "start": {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user"},
    "call": {"tool"},
    "tool": {"tool", "assistant"},
}


def check_messages(messages: Any, where: str) -> None:
    """Raise [`UserError`] naming `where` unless `messages` is a conversation that the chat template can render.

    Roles: an optional leading system message, then user and assistant in turn; between an assistant message with
    `tool_calls` and the assistant message that continues the turn stand one or more tool messages.
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
    """The role of one message, after its own fields were checked."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{where}: expected an object with `role` and `content`")
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if role not in ("system", "user", "assistant", "tool"):
        raise UserError(f"{where}: unknown role {role!r}, expected system, user, assistant or tool")
    if not is_text(content) and not (content is None and role == "assistant" and calls):
        raise UserError(f"{where}: `content` must be a string or a list of text parts {{type: text, text}}")
    if calls is not None and not isinstance(calls, list):
        raise UserError(f"{where}: `tool_calls` must be a list")
    for call in calls or []:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not all(
            isinstance(function.get(key), kind) for key, kind in (("name", str), ("arguments", dict))
        ):
            raise UserError(f"{where}: a tool call needs `name` and `arguments` (an object, not a JSON string)")
    return role


def is_text(content: Any) -> bool:
    """A string, or a list of parts {"type": "text", "text": string}."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    )


def check_tools(tools: Any, where: str) -> None:
    """Raise [`UserError`] naming `where` unless `tools` is a list of functions that the chat template can list."""
    functions = [tool.get("function", tool) if isinstance(tool, dict) else None for tool in tools or []]
    if (tools is not None and not isinstance(tools, list)) or any(
        not isinstance(function, dict) or not isinstance(function.get("name"), str) for function in functions
    ):
        raise UserError(f"{where}: `tools` must be a list of {{type: function, function: {{name, description, parameters}}}}")
