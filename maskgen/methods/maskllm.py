"""MaskLLM: learn which pattern each group follows, by Gumbel-softmax over all of them, with the weights frozen."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

from maskgen.core.digest import derive_seed
from maskgen.core.pattern import NMPattern
from maskgen.learned import Layers, LearnedLinear, LearnedMethod, Moment, Site


def candidates(pattern: NMPattern) -> Tensor:
    """All legal patterns `[P, m]`, float32."""
    rows = [[float(c in kept) for c in range(pattern.m)] for kept in itertools.combinations(range(pattern.m), pattern.n)]
    return torch.tensor(rows)


class _SoftLinear(torch.autograd.Function):
    """y = x (W * M)^T + b and the reward sum (W M)^2 / sum W^2; the soft mask is recomputed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits_OPG: Tensor, layer: MaskLLMLinear) -> tuple[Tensor, Tensor]:
        mask_OI = layer.soft_mask(logits_OPG)[1]
        masked_OI = layer.weight * mask_OI
        ctx.save_for_backward(x, logits_OPG)
        ctx.layer, ctx.moment = layer, layer.moment
        return dense_linear(x, masked_OI.to(x.dtype)), masked_OI.float().square().sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dy, dreward = grads
        x, logits_OPG = ctx.saved_tensors
        layer: MaskLLMLinear = ctx.layer
        probs_OPG, mask_OI = layer.soft_mask(logits_OPG)
        masked_OI = layer.weight * mask_OI
        dx = dy @ masked_OI.to(dy.dtype)
        dweight_OI = dy.flatten(0, -2).T @ x.flatten(0, -2)
        dmask_OI = layer.weight * (dweight_OI + (2 * dreward) * masked_OI)
        dprobs_OPG = torch.einsum("ogm,pm->opg", dmask_OI.float().unflatten(1, (-1, layer.pattern.m)), layer.patterns_PM)
        inner = (probs_OPG * dprobs_OPG).sum(1, keepdim=True)
        kappa, tau = layer.temperatures()
        return dx, probs_OPG * (dprobs_OPG - inner) * (kappa / tau), None


class MaskLLMLinear(LearnedLinear):
    """`logits` `[O, P, G]`: one per legal pattern and group."""

    def __init__(self, site: Site, method: MaskLLM) -> None:
        super().__init__(site)
        self.method = method
        self.register_buffer("patterns_PM", candidates(site.pattern), persistent=False)
        groups = site.linear.in_features // site.pattern.m
        logits_OPG = torch.zeros(site.linear.out_features, len(self.patterns_PM), groups)
        if site.prior_OI is not None:
            similarity = torch.einsum("ogm,pm->opg", site.prior_OI.float().unflatten(1, (-1, site.pattern.m)), self.patterns_PM)
            logits_OPG += (similarity - similarity.mean(1, keepdim=True)) * method.prior_strength * method.init_std
        self.logits = nn.Parameter(logits_OPG)

    def temperatures(self) -> tuple[float, float]:
        p, method = self.moment.progress, self.method
        kappa = method.scale_start + (method.scale_end - method.scale_start) * p
        return kappa, method.temperature_start * (method.temperature_end / method.temperature_start) ** p

    def soft_mask(self, logits_OPG: Tensor) -> tuple[Tensor, Tensor]:
        kappa, tau = self.temperatures()
        generator = torch.Generator(logits_OPG.device).manual_seed(derive_seed(self.moment.noise_seed, self.index))
        noisy = torch.rand(logits_OPG.shape, generator=generator, device=logits_OPG.device).clamp_(1e-9).log_().neg_().log_().neg_()
        noisy.add_(logits_OPG, alpha=kappa).div_(tau)
        probs_OPG = torch.softmax(noisy, 1)
        mask_OI = torch.einsum("opg,pm->ogm", probs_OPG, self.patterns_PM).flatten(1)
        return probs_OPG, mask_OI

    def train_forward(self, x: Tensor) -> Tensor:
        y, self.reward = _SoftLinear.apply(x, self.logits, self)
        return y if self.bias is None else y + self.bias

    def mask(self) -> Tensor:
        best_OG = self.logits.detach().argmax(1)
        return self.patterns_PM[best_OG].bool().flatten(1)


@dataclass(frozen=True)
class MaskLLM(LearnedMethod):
    prior_strength: float = 3.0
    init_std: float = 0.01
    scale_start: float = 100.0
    scale_end: float = 500.0
    temperature_start: float = 4.0
    temperature_end: float = 0.05
    weight_reward: float = 1.0
    weight_decay: float = 0.1

    @property
    def uses_prior(self) -> bool:
        return self.prior_strength > 0

    def attach(self, site: Site, generator: torch.Generator) -> LearnedLinear | None:
        return MaskLLMLinear(site, self)

    def optimizer(self, layers: Layers, others: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW([l.logits for l in layers.values()], lr, betas=(0.9, 0.95), weight_decay=self.weight_decay, fused=True)

    def regulariser(self, layers: Layers, moment: Moment) -> Tensor | None:
        total = sum(float(l.weight.float().square().sum()) for l in layers.values())
        return -self.weight_reward * (1 - moment.progress) * sum(l.reward for l in layers.values()) / total


METHOD = MaskLLM
