"""What the tests of training share: a small learned method with every kind of state, random text, one call.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

from maskgen.core.digest import derive_seed
from maskgen.core.pattern import NMPattern
from maskgen.data.corpus import Corpus
from maskgen.export import slice as slice_module
from maskgen.hf.planning import plan
from maskgen.methods import Solution
from maskgen.methods.learned import Layers, LearnedLinear, LearnedMethod, Result, StepContext, TargetLayer
from maskgen.recipes.sections import Training
from maskgen.train.parallel import ALONE, Group
from maskgen.train.prepare import prepare
from maskgen.train.step import Session
from tests import models

PATTERN = NMPattern(2, 4)


class ToyLinear(LearnedLinear):
    """y = (W * (sigmoid(score + noise) + kept) / 2) x, where `kept` is refreshed every `refresh` steps."""

    kept_OI: Tensor

    def __init__(self, site: TargetLayer, method: Toy, generator: torch.Generator) -> None:
        super().__init__(site)
        self.method = method
        if method.learns_weights:
            self.weight.requires_grad_(True)
        start_OI = self.weight.detach().float().abs() if site.prior_OI is None else site.prior_OI.float()
        noise_OI = torch.randn(start_OI.shape, generator=generator) * 1e-3
        self.score = nn.Parameter(start_OI * 0.2 + noise_OI)
        self.register_buffer("kept_OI", torch.ones_like(start_OI, dtype=torch.bool))

    def train_forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.context.noise_seed, self.index))
        noise_OI = torch.randn(self.score.shape, generator=generator) * self.method.noise
        soft_OI = (torch.sigmoid(5 * (self.score + noise_OI)) + self.kept_OI) / 2
        return dense_linear(x, (self.weight * soft_OI).to(x.dtype), self.bias)

    def mask(self) -> Tensor:
        return self.pattern.mask_from_scores(self.score.detach())

    def solution(self) -> Solution:
        return Solution(self.mask(), self.weight.detach() if self.method.learns_weights else None)


@dataclass(frozen=True)
class Toy(LearnedMethod):
    """Scores for every weight, a buffer, noise, and a penalty."""

    noise: float = 0.05
    refresh: int = 3
    penalty: float = 1e-3
    learns_weights: bool = False

    @property
    def trains_weights(self) -> bool:  # type: ignore[override]
        return self.learns_weights

    def attach(self, site: TargetLayer, generator: torch.Generator) -> LearnedLinear:
        return ToyLinear(site, self, generator)

    def optimizer(self, layers: Layers, others: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        own = [parameter for layer in layers.values() for parameter in layer.parameters() if parameter.requires_grad]
        return torch.optim.AdamW([{"params": own}, {"params": list(others), "lr": lr / 10}][: 1 + bool(others)], lr)

    def regulariser(self, layers: Layers, context: StepContext) -> Tensor | None:
        return self.penalty * sum(layer.score.square().mean() for layer in layers.values())

    def before_step(self, layers: Layers, context: StepContext) -> None:
        if context.step % self.refresh == 0:
            for layer in layers.values():
                layer.kept_OI.copy_(layer.mask())


def corpus(windows: int = 40, tokens: int = 16, files: int = 2, heldout: int = 6) -> Corpus:
    """Text of repeated phrases, so that there is something to learn."""
    generator = torch.Generator().manual_seed(5)
    phrases = torch.randint(models.VOCABULARY, (12, 8), generator=generator)
    streams = [
        phrases[torch.randint(12, (windows * tokens // 8,), generator=generator)].flatten() for _ in range(files)
    ]
    return Corpus.pack(streams, [f"file {number}" for number in range(files)], tokens, heldout, 0)


def session(
    method: LearnedMethod | None = None,
    kind: str = "llama",
    prior: Any = None,
    pattern: NMPattern = PATTERN,
    group: Group = ALONE,
    checkpointed: bool = False,
    **spec: Any,
) -> Session:
    """A tiny model ready to be trained in float32."""
    wanted = Training(**{"steps": 8, "batch": 4, "window_tokens": 16, "lr": 1e-2, "dtype": "float32", **spec})
    model = models.build(kind).requires_grad_(False)
    method = method or Toy()
    units = slice_module.units(model) if method.result is Result.SLICED else {}
    return prepare(model, plan(model, pattern), units, method, wanted, prior, pattern, group, checkpointed)


def state(of: Session) -> dict[str, Tensor]:
    """A copy of everything in the model."""
    return {name: tensor.clone() for name, tensor in of.model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Writing more than this into a file is a real `OSError`, as it is when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
