"""Conversations as text: the model's own chat template, as in serving, without the prompt for another answer.

    messages         [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]
    conversations    [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]

Either spelling of the messages is read under either name. Content may be a list of parts, if all of them are text. What
else a message has, such as tool calls, is the template's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from maskgen.core.errors import DataError, clip

FIELDS = ("messages", "conversations")
"""Fields that hold a conversation."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""What a template raises about messages that it was not written for."""


def render(value: Any, tokenizer: Any, where: str) -> str:
    """The text of one conversation. `DataError` for what is none, or what the template refuses, saying `where`.

    `tokenizer` is the model's; None stands for no model.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f'{where}: messages are {clip(value)}, expected a list of {{"role": ..., "content": ...}}')
    messages = [_message(one, f"{where}: message {number}") for number, one in enumerate(value)]
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{where}: a conversation, but the model's tokenizer has no chat template; use a chat model, or write what "
            'the model is to see as a string in "text"'
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    except _TEMPLATE_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{where}: the model's chat template refuses this conversation: {reason}") from None
    return text


def _message(value: Any, where: str) -> dict[str, Any]:
    """One message as templates know it. Fields that a table fills with nothing are left out."""
    if not isinstance(value, Mapping):
        raise DataError(f'{where}: expected an object with "role" and "content", found {clip(value)}')
    fields = {name: field for name, field in value.items() if field is not None}
    if "from" in fields and "role" not in fields:
        speaker = fields.pop("from")
        role = _ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise DataError(f"{where}: from {clip(speaker)}, expected one of {sorted(_ROLES)}")
        fields = {"role": role, "content": fields.pop("value", None), **fields}
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(role, str):
        raise DataError(f'{where}: "role" is {clip(role)}, expected a string such as "user"')
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(content, str) and not (content is None and "tool_calls" in fields):
        raise DataError(f'{where}: "content" is {clip(content)}, expected a string')
    return {**fields, "role": role, "content": content}


def _joined(parts: list[Any], where: str) -> str:
    """The text of content that comes in parts."""
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    for part, text in zip(parts, texts, strict=True):
        if not isinstance(text, str):
            raise DataError(f"{where}: content {clip(part)} is no text; only text can be calibrated or trained on")
    return "".join(text for text in texts if isinstance(text, str))
