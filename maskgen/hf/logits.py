"""Logits of a batch of windows, a piece of tokens after the other, so that a wide vocabulary does not fill the memory.

Logits are the widest tensors of a language model: 2048 tokens over the 262144 words of Gemma 3 are 2 GB in float32. A
batch with more of them than `PIECE_ELEMENTS` is run up to the head first, and the head then on one piece of the hidden
states after the other. It is the model's own code in both cases, soft-capping and scaling of logits included: its
forward pass runs as always, while the part below the head (transformers' `base_model`) returns a piece of what it had
put out. That this gives the same logits is tried on a few tokens first; a model of which it is not true is run whole.

Legend: B = batch, T = tokens, n = tokens of a piece, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskgen.hf.blocks import replaced_forward
from maskgen.hf.errors import HF_ERRORS
from maskgen.numerics.products import bfloat16_products

Forward = Callable[[Tensor], Tensor]
"""Token ids `[B, T]` -> logits `[B, T, V]` of the token after each."""

Logits = Callable[[Tensor], Iterator[Tensor]]
"""The same in pieces of consecutive tokens, `[B, n, V]`; n follows from B and V, so two models' pieces go together.

When it returns, all but the head has run. What an iterator has given should be let go before the next is asked for.
"""

PIECE_ELEMENTS = 1 << 26
"""Most logits of a piece. With many fewer, reading the head's weights again for each would take the time."""

_PROBE_TOKENS = 4


def logits_of(model: nn.Module, forward: Forward | None = None) -> Logits:
    """A causal language model as a function of token ids, which may be on any device.

    `forward` runs the model where that takes more than calling it. A few tokens are run through it here.
    """

    def call(ids_BT: Tensor) -> Tensor:
        device = next(model.parameters()).device
        with bfloat16_products(device):
            logits_BTV: Tensor = model(input_ids=ids_BT.to(device), use_cache=False).logits
        return logits_BTV

    run = call if forward is None else forward
    return _in_pieces(model, run) or _whole(run)


def _whole(run: Forward) -> Logits:
    """Pieces of logits that are all there."""

    def pieces(ids_BT: Tensor) -> Iterator[Tensor]:
        logits_BTV = run(ids_BT)
        return iter(logits_BTV.split(_piece_tokens(len(ids_BT), logits_BTV.shape[-1]), 1))

    return pieces


def _in_pieces(model: nn.Module, run: Forward) -> Logits | None:
    """Logits of which only a piece is there at a time, if the model can be run so."""
    known = _Head.of(model, run)
    if known is None:
        return None
    (head, vocabulary), whole = known, _whole(run)

    def pieces(ids_BT: Tensor) -> Iterator[Tensor]:
        batch, tokens = ids_BT.shape
        step = _piece_tokens(batch, vocabulary)
        if step >= tokens:
            return whole(ids_BT)
        return head.pieces(ids_BT, [slice(start, start + step) for start in range(0, tokens, step)])

    return pieces


@dataclass(frozen=True)
class _Head:
    """What a model, run by `run`, does after its `base`."""

    base: nn.Module
    run: Forward

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, run: Forward) -> tuple[_Head, int] | None:
        """What of the model is its head, and the vocabulary's size; None if that is not known.

        Its base is what transformers names so or, where the model steps over that (OPT), its decoder.
        """
        probe_BT, half = torch.arange(_PROBE_TOKENS)[None], _PROBE_TOKENS // 2
        for find in (lambda: model.base_model, lambda: model.get_decoder()):  # type: ignore[operator]
            try:
                base = find()
                if not isinstance(base, nn.Module) or base is model:
                    continue
                whole_BTV, head = run(probe_BT), cls(base, run)
                pieces = list(head.pieces(probe_BT, [slice(half), slice(half, _PROBE_TOKENS)]))
                if _close(torch.cat(pieces, 1), whole_BTV):
                    return head, whole_BTV.shape[-1]
            except HF_ERRORS:  # what is wrong with the model is said when all of it runs
                continue
        return None

    def pieces(self, ids_BT: Tensor, where: Sequence[slice]) -> Iterator[Tensor]:
        """Logits of the tokens in each of `where`. All below the head runs now, the head as they are asked for."""
        found: list[Any] = []

        def keep(base: nn.Module, args: Any, output: Any) -> Any:
            found.append(output)
            return _cut(output, slice(1))

        handle = self.base.register_forward_hook(keep)
        try:
            self.run(ids_BT)
        finally:
            handle.remove()
        (output,) = found
        return (self._piece(ids_BT, _cut(output, tokens)) for tokens in where)

    def _piece(self, ids_BT: Tensor, output: Any) -> Tensor:
        with replaced_forward([self.base], lambda *args, **kwargs: output):
            return self.run(ids_BT)


def _cut(output: Any, tokens: slice) -> Any:
    """What a model's base puts out, with the hidden states of some of the tokens only."""
    if isinstance(output, tuple):
        return (output[0][:, tokens], *output[1:])
    return dataclasses.replace(output, last_hidden_state=output.last_hidden_state[:, tokens])


def _piece_tokens(batch: int, vocabulary: int) -> int:
    return max(1, PIECE_ELEMENTS // (batch * vocabulary))


def _close(found_BTV: Tensor, expected_BTV: Tensor) -> bool:
    """Whether they are the same but for rounding, where a product of other shape may sum in another order."""
    if found_BTV.shape != expected_BTV.shape:
        return False
    largest = expected_BTV.float().nan_to_num(0.0, 0.0, 0.0).abs().amax()
    room = max(1e-4, 4 * torch.finfo(found_BTV.dtype).eps) * float(largest)
    return torch.allclose(found_BTV.float(), expected_BTV.float(), rtol=0.0, atol=room, equal_nan=True)
