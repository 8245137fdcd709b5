"""Which tokens every window of text begins with: beginning-of-sequence (BOS), for models that expect it.

Gemma, Llama 3 and others were trained with BOS in front of every text, and without it their perplexity says nothing.
Their tokenizers put it there by themselves, so the tokenizer decides: what it puts in front of a text is put in front
of every window for calibration, training and scoring. Most have one such token, some two (GLM-4: `[gMASK]<sop>`), and
most models without BOS have none. A window's length counts them.

Legend: S = windows, T = tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskgen.core.errors import DataError
from maskgen.core.perplexity import describe_bos

_PROBE = "a"


@dataclass(frozen=True)
class Bos:
    """Token ids at the start of every window (none: no BOS), and whether the tokenizer puts some there by itself."""

    ids: tuple[int, ...] = ()
    own: bool | None = None

    @classmethod
    def of(cls, tokenizer: Any, wanted: bool | None = None) -> Bos:
        """As `wanted`, or as the tokenizer does by itself (None). `DataError` for a tokenizer that has no BOS."""
        own = _in_front(tokenizer)
        if wanted is False:
            return cls((), bool(own))
        if wanted and not own:
            if tokenizer.bos_token_id is None:
                raise DataError("`bos`: the tokenizer has no beginning-of-sequence token; leave it out")
            return cls((tokenizer.bos_token_id,), False)
        return cls(own, bool(own))

    def text_tokens(self, window_tokens: int) -> int:
        """Tokens of text in a window of `window_tokens`. `DataError` when there is no room for any."""
        left = window_tokens - len(self.ids)
        if left < 1:
            raise DataError(f"windows of {window_tokens} tokens have no room for text after BOS; make them longer")
        return left

    def before(self, text_ST: Tensor) -> Tensor:
        """Windows `[S, T]` of the same type: BOS in front of every row of `text_ST`."""
        if not self.ids:
            return text_ST
        bos_ST = torch.tensor(self.ids, dtype=text_ST.dtype).expand(len(text_ST), -1)
        return torch.cat([bos_ST, text_ST], dim=1)

    def describe(self) -> str:
        """For people."""
        return describe_bos(bool(self.ids), self.own)


def _in_front(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts in front of a text; what it puts behind (EOS, even where that is the same token) is not.

    So the text's own tokens are looked for, and not the token that is called BOS.
    """
    text = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_PROBE)["input_ids"]
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return tuple(whole[:start])
    return ()
