"""Text of generated tokens only, where a prompt ends inside a character.

A prompt of token ids may end with some of the bytes of a character, and a prompt of text with U+FFFD itself. Both
decode to text that ends with U+FFFD, and then vLLM 0.32 (issue 48853) takes the prompt's text for generated: it answers
with all of it. `install` puts a detokenizer in place of vLLM's, in this process, that differs for such prompts:

    the generated tokens complete the character     the text begins with that character
    they do not                                     the text begins behind it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import tokenizers.decoders
from vllm.v1.engine import detokenizer

_REPLACEMENT = "\ufffd"
_TAIL_TOKENS = 8


class PromptFreeDetokenizer(detokenizer.FastIncrementalDetokenizer):
    """vLLM's detokenizer of one request, for tokenizers of the `tokenizers` library."""

    def __init__(self, tokenizer: Any, request: Any) -> None:
        super().__init__(tokenizer, request)
        tail_ids, self._prompt_text = _tail(request.prompt_token_ids or (), self._decode)
        self._starts_inside = self._prompt_text.endswith(_REPLACEMENT)
        if self._starts_inside:
            self._whole_text = self._without_last_character(tail_ids)
            self.stream = tokenizers.decoders.DecodeStream(ids=tail_ids, skip_special_tokens=self.skip_special_tokens)

    def decode_next(self, next_token_id: int) -> str:
        """Text that is complete with this token, or an empty one."""
        text: str = super().decode_next(next_token_id)
        if not (text and self._starts_inside):
            return text
        self._starts_inside = False
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(text, self._prompt_text, strict=False))
        whole = len(self._whole_text) if text.startswith(self._whole_text) else 0
        return text[max(len(list(shared)), whole) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=self.skip_special_tokens))

    def _without_last_character(self, token_ids: list[int]) -> str:
        """Text up to the character that is not finished: its bytes, at most three, may have spoiled those before."""
        texts = (self._decode(token_ids[:-count]) for count in (1, 2, 3))
        return next((text for text in texts if not text.endswith(_REPLACEMENT)), "")


def install() -> None:
    """Let vLLM make `PromptFreeDetokenizer`s for the requests of this process."""
    detokenizer.FastIncrementalDetokenizer = PromptFreeDetokenizer


def _tail(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[list[int], str]:
    """The last tokens of a prompt and their text: as few as have a whole character in them, so that what follows it
    decodes as it does in the whole prompt."""
    count = _TAIL_TOKENS
    while True:
        tail_ids = list(token_ids[-count:])
        text = decode(tail_ids)
        if text.strip(_REPLACEMENT) or count >= len(token_ids):
            return tail_ids, text
        count *= 2
