"""What a JSON request may ask for: bounds that vLLM's own HTTP API does not have.

vLLM takes 16,384 sequences in a request of 9 KB, a grammar of megabytes that every other client then waits for, and a
request id that is repeated in each chunk of the answer and written into the log as it stands. What is checked here is
answered with 400, before vLLM sees it; what is not JSON, or of another type than expected, is left for vLLM to refuse.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_serve.runtime.errors import BadRequestError
from sparse_serve.server.settings import Settings

REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_GRAMMARS = ("json", "regex", "grammar", "structural_tag")
MAX_LOGIT_BIAS = 1024
_TOOLS_TIMES = 4
"""All tools of a request together may be so many times as large as one grammar."""


@dataclass(frozen=True)
class BodyLimits:
    """Sequences (prompts times `n`), bytes of a JSON schema, grammar or choice, of a regular expression, and stops."""

    max_sequences: int
    max_grammar_bytes: int
    max_regex_bytes: int
    max_choices: int
    max_stop: int
    max_stop_bytes: int

    def check(self, body: bytes) -> int:
        """The number of sequences that `body`, a request of the HTTP API, asks for. Raises `BadRequestError`."""
        try:
            asked = json.loads(body)  # as vLLM's application does: another parser would let other bytes through
        except ValueError:
            return 1
        except RecursionError:
            raise BadRequestError("the body is nested too deeply") from None
        return self.check_asked(asked) if isinstance(asked, dict) else 1

    def check_asked(self, asked: Mapping[str, Any]) -> int:
        """The same for a request as its JSON would be read."""
        check_request_id("request_id", asked.get("request_id"))
        self._check_stops(asked)
        bias = asked.get("logit_bias")
        if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
            raise BadRequestError(f"logit_bias has {len(bias)} entries; expected at most {MAX_LOGIT_BIAS}")
        self._check_grammars(asked)
        return self._sequences(asked)

    def _sequences(self, asked: Mapping[str, Any]) -> int:
        n = _whole(asked.get("n", 1))
        # which of them an application reads is its own affair
        prompts = max(_count(asked.get(name)) for name in ("prompt", "input", "messages"))
        self.check_sequences(prompts, n)
        return prompts * n

    def check_sequences(self, prompts: int, n: int) -> None:
        """Raise `BadRequestError` for too many sequences in one request."""
        if prompts * n > self.max_sequences:
            raise BadRequestError(
                f"{prompts} prompts with n = {n} are {prompts * n} sequences; expected at most {self.max_sequences} in "
                "a request (--max-sequences); send several requests"
            )

    def _check_stops(self, asked: Mapping[str, Any]) -> None:
        for name in ("stop", "stop_token_ids", "bad_words"):
            given = asked.get(name)
            entries = given if isinstance(given, list) else [given]
            if len(entries) > self.max_stop:
                raise BadRequestError(f"{name} has {len(entries)} entries; expected at most {self.max_stop}")
            for text in entries:
                if isinstance(text, str) and len(text.encode(errors="replace")) > self.max_stop_bytes:
                    raise BadRequestError(f"{name} has a string of more than {self.max_stop_bytes} bytes")

    def _check_grammars(self, asked: Mapping[str, Any]) -> None:
        structured = asked.get("structured_outputs")
        if isinstance(structured, dict):
            for name in _GRAMMARS:
                self.check_grammar(f"structured_outputs.{name}", name, structured.get(name))
            self.check_choice("structured_outputs.choice", structured.get("choice"))
        for name in ("response_format", "text"):
            self.check_grammar(name, "json", asked.get(name))
        self.check_tools(asked.get("tools"))

    def check_grammar(self, field: str, kind: str, grammar: Any) -> None:
        """Raise `BadRequestError` for a schema, grammar or regular expression that is too large."""
        limit = self.max_regex_bytes if kind == "regex" else self.max_grammar_bytes
        if grammar is not None and (size := _size(grammar)) > limit:
            raise BadRequestError(f"{field} takes {size} bytes; expected at most {limit}")

    def check_tools(self, tools: Any) -> None:
        """Raise `BadRequestError` for tools that are too large together."""
        limit = _TOOLS_TIMES * self.max_grammar_bytes
        if isinstance(tools, list) and (size := _size(tools)) > limit:
            raise BadRequestError(f"tools take {size} bytes; expected at most {limit}", "tools")

    def check_choice(self, field: str, choice: Any) -> None:
        """Raise `BadRequestError` for too many choices, or too long ones."""
        if not isinstance(choice, list | tuple):
            return
        if len(choice) > self.max_choices:
            raise BadRequestError(f"{field} has {len(choice)} entries; expected at most {self.max_choices}")
        self.check_grammar(field, "choice", list(choice))


def check_request_id(where: str, given: Any) -> None:
    """Raise `BadRequestError` for a request id that is anything but 1 to 64 of letters, digits, `_` and `-`."""
    if isinstance(given, str) and not REQUEST_ID.fullmatch(given):
        raise BadRequestError(f"{where} has to be 1 to 64 letters, digits, '_' or '-'; it has {len(given)} characters")


def _whole(n: Any) -> int:
    """A number of sequences as pydantic would read it, from text too; 1 for what it refuses."""
    try:
        return max(int(n), 1)
    except (TypeError, ValueError, OverflowError):
        return 1


def _size(value: Any) -> int:
    """Bytes of a text, or of anything else as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return len(text.encode(errors="replace"))


def body_limits(settings: Settings) -> BodyLimits:
    """The limits that the settings name."""
    return BodyLimits(
        settings.max_sequences,
        settings.max_grammar_bytes,
        settings.max_regex_bytes,
        settings.max_choices,
        settings.max_stop,
        settings.max_stop_bytes,
    )


def _count(prompts: Any) -> int:
    """How many there are: a list of numbers is the tokens of one, a list of messages one conversation."""
    several = isinstance(prompts, list) and bool(prompts) and not isinstance(prompts[0], int | dict)
    return len(prompts) if several else 1
