"""A random mask of a layer, drawn by Gumbel-softmax from logits of its groups, and differentiable in these.

Three forms, given in `maskgen.methods.learned.maskllm`: a logit for each pattern of a group (`categorical`), the sum of
the logits of the columns that a pattern keeps (`additive`), and columns drawn one after the other (`reservoir`). A mask
is soft, with n per group in all; or it is a legal one that has the gradient of the soft (the straight-through
estimator: Jang et al., "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017).

Legend: O = out features, G = groups per row, m = columns per group, P = patterns, L = logits per group (P or m),
o = rows of a chunk, n = columns that a pattern keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from maskgen.core.pattern import NMPattern
from maskgen.numerics.gumbel import gumbel
from maskgen.numerics.memory import chunk_elements


@dataclass(frozen=True)
class MaskSample:
    """How to draw one random mask of a layer: in which form, how sharp, and with which seed of the noise.

    `hard`: the mask is a legal one, and has the gradient of the soft mask.
    """

    form: str
    pattern: NMPattern
    patterns_Pm: Tensor
    scale: float
    temperature: float
    seed: int
    hard: bool = False

    def chunks(self, logits_OLG: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of each chunk and their Gumbel noise `[o, P or m, G]`; the same numbers in every call."""
        rows, _, groups = logits_OLG.shape
        device = logits_OLG.device
        planes = self.patterns_Pm.shape[1 if self.form == "reservoir" else 0]
        size = max(1, chunk_elements(device) // (planes * groups))
        generator = torch.Generator(device).manual_seed(self.seed)
        for start in range(0, rows, size):
            shape = (min(size, rows - start), planes, groups)
            yield slice(start, start + size), gumbel(shape, generator, logits_OLG.dtype)

    def mask(self, logits_oLG: Tensor, noise: Tensor) -> Tensor:
        """The mask `[o, I]` of the rows of a chunk; differentiable in the logits."""
        mask_omG: Tensor = FORMS[self.form](self, logits_oLG, noise)
        return mask_omG.transpose(1, 2).flatten(1)


def categorical(sample: MaskSample, logits_oPG: Tensor, noise_oPG: Tensor) -> Tensor:
    """The mask `[o, m, G]` from one logit per pattern."""
    keys_oPG = torch.add(noise_oPG, logits_oPG, alpha=sample.scale)
    if sample.hard and not torch.is_grad_enabled():
        return sample.patterns_Pm.T @ _first_largest(keys_oPG)
    shares_oPG = torch.softmax(keys_oPG * (1 / sample.temperature), 1)
    if sample.hard:
        shares_oPG = _first_largest(keys_oPG.detach()) + (shares_oPG - shares_oPG.detach())
    return sample.patterns_Pm.T @ shares_oPG


def _first_largest(keys_oPG: Tensor) -> Tensor:
    """One where a group's key is the largest, and the first of them, else zero: what takes argmax ten times as long."""
    largest_oPG = keys_oPG == keys_oPG.amax(1, keepdim=True)
    if int(largest_oPG.sum()) > keys_oPG[:, 0].numel():
        largest_oPG &= largest_oPG.cumsum(1) == 1
    return largest_oPG.to(keys_oPG.dtype)


def additive(sample: MaskSample, theta_omG: Tensor, noise_oPG: Tensor) -> Tensor:
    """The mask `[o, m, G]` where a pattern's logit is the sum of its columns' logits."""
    return categorical(sample, sample.patterns_Pm @ theta_omG, noise_oPG)


def reservoir(sample: MaskSample, theta_omG: Tensor, noise_omG: Tensor) -> Tensor:
    """The mask `[o, m, G]` of n columns drawn one after the other without replacement."""
    keys_omG = torch.add(noise_omG, theta_omG, alpha=sample.scale)
    # 1 - mu is the sum of the other columns, not a difference: rounding could make that 0 and draw a column twice.
    others_mm = 1 - torch.eye(sample.pattern.m, dtype=keys_omG.dtype, device=keys_omG.device)
    tiny, mask_omG = torch.finfo(keys_omG.dtype).tiny, torch.zeros_like(keys_omG)
    for _ in range(sample.pattern.n):
        largest_o1G = keys_omG.detach().amax(1, keepdim=True)
        odds_omG = torch.exp((keys_omG - largest_o1G) * (1 / sample.temperature))
        total_o1G, rest_omG = odds_omG.sum(1, keepdim=True), others_mm @ odds_omG
        mask_omG = mask_omG + odds_omG / total_o1G
        log_rest_omG = (rest_omG.clamp_min(tiny) / total_o1G).log()
        keys_omG = keys_omG + torch.where(rest_omG > tiny, log_rest_omG, -1e30)
    if sample.hard:
        kept_onG = mask_omG.detach().topk(sample.pattern.n, 1).indices
        mask_omG = torch.zeros_like(mask_omG).scatter_(1, kept_onG, 1.0) + (mask_omG - mask_omG.detach())
    return mask_omG


FORMS: dict[str, Callable[[MaskSample, Tensor, Tensor], Tensor]] = {
    "categorical": categorical,
    "additive": additive,
    "reservoir": reservoir,
}
