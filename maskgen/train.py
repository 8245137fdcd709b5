"""Driver 2: learn masks (or weights) end to end, over the whole model at once.

    every target nn.Linear --attach--> LearnedLinear      the rest of the model frozen, or trained too (scope = "all")
    for each step:  before_step -> forward, loss, backward (per micro-batch) -> clip -> optimiser -> after_step
    now and then:   hard-mask loss on held-out windows, checkpoint

Everything a step does is a function of the recipe and the step's number: which windows it sees, the noise, the learning
rate. So resuming needs parameters and optimiser states only, and ends with the same bits.

Legend: B = batch, T = tokens.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maskgen.core.digest import derive_seed
from maskgen.core.errors import NumericalError
from maskgen.corpus import Corpus
from maskgen.learned import LearnedLinear, LearnedMethod, Moment, Mode, Site, learned_parameters
from maskgen.model import Plan
from maskgen.objective import Objective, in_mode
from maskgen.recipe import Training
from maskgen.sweep import peak_rss_bytes


@dataclass(frozen=True)
class StepLog:
    """What one step measured; losses in nats per token."""

    step: int
    steps: int
    loss: float
    cross_entropy: float
    divergence: float
    gradient_norm: float
    lr: float
    tokens: int
    elapsed_s: float
    peak_rss_bytes: int
    heldout_nll: float | None = None
    agreement: float | None = None
    flipped: float | None = None


@dataclass
class Session:
    """A model under training: its replaced layers, the objective and the optimiser."""

    model: nn.Module
    method: LearnedMethod
    spec: Training
    layers: Mapping[str, LearnedLinear]
    objective: Objective
    optimizer: torch.optim.Optimizer
    step: int = 0
    started_s: float = field(default_factory=time.perf_counter)

    def run_step(self, corpus: Corpus, micro_batch: int) -> StepLog:
        """One optimiser step over the windows that belong to it."""
        factor = schedule(self.spec, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        windows_BT = corpus.batch(self.step, self.spec.batch).to(next(self.model.parameters()).device)
        parts = windows_BT.split(micro_batch)
        self.set_moment(noise_sample=0)
        with torch.no_grad():
            self.method.before_step(self.layers, self.moment)
        totals = torch.zeros(3, dtype=torch.float64)
        for number, ids_BT in enumerate(parts):
            self.set_moment(number * self.spec.noise_samples // len(parts))
            totals += self._backward(ids_BT, len(ids_BT) / self.spec.batch)
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        lr = self.spec.lr * factor
        with torch.no_grad():
            self.method.after_step(self.layers, self.moment, lr)
        self.step += 1
        loss, ce, divergence = totals.tolist()
        return StepLog(
            step=self.step, steps=self.spec.steps, loss=loss, cross_entropy=ce, divergence=divergence,
            gradient_norm=norm, lr=lr, tokens=windows_BT.numel(), elapsed_s=time.perf_counter() - self.started_s,
            peak_rss_bytes=peak_rss_bytes(),
        )  # fmt: skip

    @property
    def moment(self) -> Moment:
        """The moment the layers are at."""
        return next(iter(self.layers.values())).moment

    def set_moment(self, noise_sample: int) -> None:
        """Tell every layer what time it is and which of the step's noise samples to draw."""
        seed = derive_seed(self.spec.seed, self.step, noise_sample)
        for layer in self.layers.values():
            layer.moment = Moment(self.step, self.spec.steps, seed)

    def _backward(self, ids_BT: Tensor, share: float) -> Tensor:
        """Forward and backward of one micro-batch, which is `share` of the step's windows."""
        loss = self.objective(self.model, ids_BT)
        penalty = self.method.regulariser(self.layers, self.moment)
        total = loss.total if penalty is None else loss.total + penalty
        if not torch.isfinite(total):
            raise NumericalError(
                f"step {self.step}: the loss is {float(total)}; lower train.lr, or compute with train.dtype=float32"
            )
        (total * share).backward()
        return torch.tensor([float(total.detach()), loss.cross_entropy, loss.divergence], dtype=torch.float64) * share

    def _clip(self) -> float:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.spec.clip or math.inf)
        return float(norm)


def prepare(
    model: nn.Module,
    plan: Plan,
    units: Mapping[str, int],
    method: LearnedMethod,
    spec: Training,
    prior: Callable[[str], Tensor] | None,
    pattern: Any,
) -> Session:
    """Replace the layers of `plan` in `model` and build what trains them. `prior` gives a bool mask per layer name."""
    teacher = None
    model.requires_grad_(False)
    if method.trains_weights and spec.distill_weight > 0:
        teacher = copy.deepcopy(model).to(spec.torch_dtype)
    generator = torch.Generator().manual_seed(spec.seed)
    others: list[nn.Parameter] = []
    if spec.scope == "all":
        taken = {id(linear.weight) for block in plan.targets for linear in block.values()}
        others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        for parameter in others:
            parameter.requires_grad_(True)
    layers: dict[str, LearnedLinear] = {}
    targets = [item for block in plan.targets for item in block.items()]
    for index, (name, linear) in enumerate(targets):
        mask = None if prior is None else prior(name)
        layer = method.attach(Site(index, name, linear, pattern, mask, units.get(name)), generator)
        if layer is not None:
            model.set_submodule(name, layer)
            layers[name] = layer
    optimizer = method.optimizer(layers, others, spec.lr)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    objective = Objective(layers, spec.distill_weight, spec.distill_temperature, spec.torch_dtype, teacher)
    assert learned_parameters(layers)
    return Session(model, method, spec, layers, objective, optimizer)


@torch.no_grad()
def heldout_nll(session: Session, windows_ST: Tensor, batch: int) -> float:
    """Mean negative log-likelihood of held-out windows `[S, T]` with the masks as they would be exported now."""
    objective = Objective(session.layers, 0.0, 1.0, session.spec.torch_dtype)
    device = next(session.model.parameters()).device
    total = 0.0
    with in_mode(session.layers, Mode.HARD):
        for ids_BT in windows_ST.split(batch):
            total += objective(session.model, ids_BT.to(device)).cross_entropy * len(ids_BT)
    return total / len(windows_ST)


def schedule(spec: Training, step: int) -> float:
    """Learning-rate factor: linear warm-up to 1, then cosine or linear decay to `final_lr`."""
    warm = spec.warmup * spec.steps
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / max(1.0, spec.steps - 1 - warm)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if spec.decay == "cosine" else 1 - progress
    return spec.final_lr + (1 - spec.final_lr) * shape

