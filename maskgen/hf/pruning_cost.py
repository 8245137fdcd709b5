"""What pruning cost a model, on held-out windows: measured before and after, on the same model pruned in place.

The logits of the dense model are needed again when it is pruned: for every window the vocabulary's size for each token,
gigabytes in all. Kept instead is what its last decoder block put out, kilobytes a token. What comes after the blocks
(norm, head) is never pruned, so the dense logits are made again from that, to the same bits: the model runs with every
block replaced by one that returns what was kept.

Legend: S = windows, B = batch, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskgen.core.errors import ModelError
from maskgen.core.failures import machine_failure
from maskgen.core.perplexity import Perplexity, Protocol, Window
from maskgen.core.quality import MAX_TEXTS, Quality, name_for_people
from maskgen.hf import blocks as blocks_module
from maskgen.hf.errors import HF_ERRORS, first_line
from maskgen.hf.evaluate import Measured, measure
from maskgen.hf.logits import Logits, logits_of

_LARGEST_NLL = 700.0
"""Of a model that is lost; the perplexity is a number even then."""

_ROOM = 1.2
"""A model is moved to a GPU for measuring if so many times its bytes are free there."""


@dataclass(frozen=True)
class HeldOutText:
    """Windows `[S, T]` of token ids from texts of these names, the first `bos_tokens` of each being BOS."""

    ids_ST: Tensor
    bos_tokens: int
    names: Sequence[str]

    @property
    def protocol(self) -> Protocol:
        """How the windows are scored."""
        return Protocol(self.ids_ST.shape[1], bos=self.bos_tokens > 0)

    @property
    def windows(self) -> list[Window]:
        """The windows as they are scored."""
        return [Window(ids_T, max(1, self.bos_tokens)) for ids_T in self.ids_ST.tolist()]


@dataclass(frozen=True)
class Baseline:
    """What the last of a model's `blocks` put out for each of the windows of `text`, before anything was pruned."""

    text: HeldOutText
    blocks: Sequence[nn.Module]
    outputs: Sequence[Any]

    @classmethod
    @torch.no_grad()
    def record(
        cls, model: nn.Module, blocks: Sequence[nn.Module], text: HeldOutText, progress: Callable[[int, int], None]
    ) -> Baseline:
        """Run the dense model. `ModelError` for one that cannot be measured in this way."""
        found: list[Any] = []
        handle = blocks[-1].register_forward_hook(lambda block, args, output: found.append(_moved(output, "cpu")))
        try:
            logits = logits_of(model)
            found.clear()
            for index, ids_1T in enumerate(text.ids_ST.split(1)):
                last = logits(ids_1T)
                progress(index + 1, len(text.ids_ST))
        except HF_ERRORS as error:
            if (failure := machine_failure(error)) is not None:
                raise failure from None
            raise ModelError(f"the dense model cannot be run on text alone: {first_line(error)}") from error
        finally:
            handle.remove()
        again = cls(text, blocks, found[-1:])._logits(logits)
        if len(found) != len(text.ids_ST) or not _same_pieces(again(text.ids_ST[-1:]), last):
            raise ModelError("more than the last block's output decides the logits of this architecture")
        return cls(text, blocks, found)

    def compare(self, model: nn.Module, progress: Callable[[int, int], None]) -> Measured:
        """Run the model again, pruned by now. Raises `NumericalError`."""
        logits = logits_of(model)
        return measure(logits, self.text.windows, self.text.protocol, 1, self._logits(logits), progress)

    def _logits(self, logits: Logits) -> Logits:
        """The dense model's logits of one window after the other, in the order they were recorded.

        `logits` are those of the model as it is now.
        """
        return logits_after(logits, self.blocks, self.outputs)


def logits_after(logits: Logits, blocks: Sequence[nn.Module], outputs: Iterable[Any]) -> Logits:
    """What `logits` of a model are when the last of its `blocks` puts out the next of `outputs`, one for each call."""
    following, device = iter(outputs), next(blocks[0].parameters()).device

    def run(ids_BT: Tensor) -> Iterator[Tensor]:
        output = _moved(next(following), device)
        with blocks_module.replaced_forward(blocks, lambda *args, **kwargs: output):
            return logits(ids_BT)  # the blocks have run when it returns

    return run


@contextmanager
def placed(model: nn.Module, device: str) -> Iterator[None]:
    """Hold the whole model on a GPU while it is measured, if it has room there; else it stays where it is."""
    size_bytes = sum(tensor.nbytes for tensor in model.parameters())
    if not device.startswith("cuda") or torch.cuda.mem_get_info(device)[0] < _ROOM * size_bytes:
        yield
        return
    try:
        model.to(device)
        yield
    finally:
        model.to("cpu")


def quality_of(measured: Measured, text: HeldOutText, method: str, pattern: str) -> Quality:
    """What is kept of a measurement beside the weights."""
    assert measured.dense is not None and measured.divergence is not None
    return Quality(
        dense_perplexity=_perplexity(measured.dense),
        perplexity=_perplexity(measured.perplexity),
        kl=measured.divergence.kl,
        agreement=measured.divergence.agreement,
        windows=len(text.ids_ST),
        window_tokens=text.ids_ST.shape[1],
        bos=text.bos_tokens > 0,
        texts=tuple(map(name_for_people, text.names[:MAX_TEXTS])),
        method=method,
        pattern=pattern,
    )


def _perplexity(measured: Perplexity) -> float:
    mean = math.fsum(measured.nll_per_window) / len(measured.nll_per_window)
    return math.exp(min(mean, _LARGEST_NLL))


def _same_pieces(found: Iterator[Tensor], expected: Iterator[Tensor]) -> bool:
    return all(torch.equal(found_BnV, other_BnV) for found_BnV, other_BnV in zip(found, expected, strict=True))


def _moved(value: Any, device: str | torch.device) -> Any:
    """The same, with every tensor on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(part, device) for part in value)
    return value
