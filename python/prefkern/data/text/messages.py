"""Conversations as lists of messages with a role and text: what is read as one, and what is refused."""

from typing import Any

from prefkern.data.arrays.views import describe

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""The role of each speaker of messages with ``from`` and ``value``, ShareGPT's form."""


class Refuse(Exception):  # noqa: N818 - it is the row's, not a fault
    """The row cannot be used; the message says why."""


def text_or_messages(name: str, part: Any) -> str | list[dict[str, Any]]:
    """Text as it is; a list of messages, or one message, as a list of messages with ``role`` and ``content``."""
    if isinstance(part, str):
        return part
    messages = [part] if isinstance(part, dict) else part
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Refuse(f"{name} must be text or a list of messages, got {short(part)}")
    return [_message(f"{name}[{index}]", message) for index, message in enumerate(messages)]


def refuse_empty_turns(name: str, messages: list[dict[str, Any]]) -> None:
    """An assistant's turn that is scored must say something, as a text must."""
    for index, message in enumerate(messages):
        content = message.get("content")
        words = "".join(block["text"] for block in content) if isinstance(content, list) else content
        others = (value for key, value in message.items() if key not in ("role", "content", "name", "weight"))
        if message["role"] == "assistant" and not words and not any(others):
            raise Refuse(f"{name}[{index}] is an assistant's turn that is empty")


def without_nulls(value: Any, kept: tuple[str, ...] = ()) -> Any:
    """Without the fields that are null, except those to be ``kept`` in the outermost: Arrow gives every struct the
    fields of all others, as nulls."""
    if isinstance(value, list):
        return [without_nulls(item, kept) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: without_nulls(item) for key, item in value.items() if item is not None or key in kept}


def short(value: object) -> str:
    text = describe(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _message(name: str, message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if role is None and message.get("from") is not None:
        speaker = message["from"]
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise Refuse(f"{name} must be from one of {', '.join(SPEAKERS)}, got {short(speaker)}")
        rest = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
        message = {"role": role, "content": message.get("value"), **rest}
    elif role not in ROLES:
        raise Refuse(f"{name} must have a role of {', '.join(ROLES)}, got {short(role)}")
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return message
    blocks = content if isinstance(content, list) else [None]
    for block in blocks:
        if not isinstance(block, dict) or not isinstance(block.get("text"), str) or block.get("type") != "text":
            raise Refuse(f"{name} must have text as its content, got {short(content)}")
    return message
