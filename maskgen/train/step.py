"""One training step of a learned method, over the whole model.

    before_step -> forward, loss, backward (per micro-batch) -> clip -> optimiser -> after_step

`prepare` makes the session, `loop` repeats the step. Everything a step does is a function of the recipe and the step's
number: which windows it sees, the noise, the learning rate. So resuming needs parameters, buffers and optimiser states
only, and ends with the same bits.

Legend: B = batch, T = tokens, S = windows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from maskgen.core.digest import derive_seed
from maskgen.core.errors import NumericalError
from maskgen.data.corpus import Corpus
from maskgen.methods.learned import Layers, LearnedMethod, Mode, StepContext
from maskgen.numerics.memory import peak_memory_bytes
from maskgen.numerics.shards import full
from maskgen.recipes.sections import Training
from maskgen.train.objective import Objective, in_mode
from maskgen.train.parallel import Group


@dataclass(frozen=True)
class TrainingStep:
    """What one step measured, `step` counted from 1; losses in nats per token, `elapsed_s` since the run began."""

    step: int
    steps: int
    loss: float
    cross_entropy: float
    divergence: float
    gradient_norm: float
    lr: float
    tokens: int
    elapsed_s: float
    peak_memory_bytes: int


@dataclass
class Session:
    """A model under training: its replaced layers, the objective and the optimiser.

    `layers` go by their stored names; `stored` maps names of the model's tensors to those in the files. `learning` are
    the `layers` that learn: all of them, unless the recipe learns in some blocks only. `runner` is
    `model` as its forward passes are run, which in a group of processes takes more than calling it. `step`
    steps are done, in `elapsed_s` seconds (those of earlier processes included).
    """

    model: nn.Module
    method: LearnedMethod
    spec: Training
    layers: Layers
    learning: Layers
    objective: Objective
    optimizer: torch.optim.Optimizer
    group: Group
    runner: nn.Module
    stored: Mapping[str, str]
    step: int = 0
    earlier_s: float = 0.0
    started_s: float = field(default_factory=time.perf_counter)

    @property
    def elapsed_s(self) -> float:
        """Seconds of this run, over all processes that worked on it."""
        return self.earlier_s + time.perf_counter() - self.started_s

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything the optimiser moves."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def run_step(self, corpus: Corpus, micro_batch: int) -> TrainingStep:
        """One optimiser step over the windows that belong to it, `micro_batch` of them per forward pass.

        Raises `NumericalError` when loss or gradient are not finite; parameters are then as they were.
        """
        factor = schedule(self.spec, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.set_context(noise_sample=0)
        with torch.no_grad():
            self.method.before_step(self.learning, self.context)
        totals, tokens = self.passes(corpus, micro_batch)
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        lr = self.spec.lr * factor
        with torch.no_grad():
            self.method.after_step(self.learning, self.context, lr)
        self.step += 1
        loss, ce, divergence = self.group.total(totals).tolist()
        return TrainingStep(
            self.step, self.spec.steps, loss, ce, divergence, norm, lr, tokens, self.elapsed_s,
            peak_memory_bytes(self.device),
        )  # fmt: skip

    def passes(self, corpus: Corpus, micro_batch: int) -> tuple[Tensor, int]:
        """Forward and backward passes of the next step: gradients are there afterwards, and nothing else has changed.

        Returns its losses `[3]`, summed over the windows of this process, and how many tokens all processes saw.
        """
        windows_BT = corpus.batch(self.step, self.spec.batch)
        parts = self.group.parts(windows_BT, self.spec.noise_samples, micro_batch)
        totals = torch.zeros(3, dtype=torch.float64)
        for number, (noise_sample, ids_BT) in enumerate(parts, 1):
            self.set_context(noise_sample)
            with self.group.accumulating(self.runner, more=number < len(parts)):
                totals += self._backward(ids_BT.to(self.device), len(ids_BT) / self.spec.batch)
        return totals, windows_BT.numel()

    @property
    def context(self) -> StepContext:
        """Where the run is: what the layers are told of it."""
        return next(iter(self.layers.values())).context

    def set_context(self, noise_sample: int) -> None:
        """Tell every layer what time it is and which of the step's noise samples to draw."""
        seed = derive_seed(self.spec.seed, self.step, noise_sample)
        for layer in self.layers.values():
            layer.context = StepContext(self.step, self.spec.steps, seed)

    def _backward(self, ids_BT: Tensor, share: float) -> Tensor:
        """Forward and backward of one micro-batch, which is `share` of the step's windows."""
        loss = self.objective(self.runner, ids_BT)
        penalty = self.method.regulariser(self.learning, self.context)
        total = loss.total if penalty is None else loss.total + penalty
        self._check_finite("loss", float(total.detach()))
        (total * (share * self.group.world)).backward()  # processes average their gradients
        return torch.tensor([float(total.detach()), loss.cross_entropy, loss.divergence], dtype=torch.float64) * share

    def _clip(self) -> float:
        """Clip the gradient and return its norm. A parameter that nothing reached has gradient 0, in every process."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = float(full(torch.nn.utils.clip_grad_norm_(self.parameters, self.spec.clip or math.inf)))
        self._check_finite("norm of the gradient", norm)
        return norm

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            self.optimizer.zero_grad(set_to_none=True)
            raise NumericalError(
                f"step {self.step + 1}: the {what} is {value}; lower train.lr, or compute with train.dtype=float32"
            )


@torch.no_grad()
def heldout_nll(session: Session, windows_ST: Tensor, batch: int, mode: Mode = Mode.HARD) -> float:
    """Mean negative log-likelihood of held-out windows `[S, T]`: HARD masks as exported now, or the DENSE model."""
    objective, model = Objective(session.layers, 0.0, 1.0, session.spec.torch_dtype), session.model
    if mode is Mode.DENSE and session.objective.teacher is not None:
        model = session.objective.teacher
    total = 0.0
    with in_mode(session.layers, mode):
        for ids_BT in windows_ST.split(batch):
            total += objective(model, ids_BT.to(session.device)).cross_entropy * len(ids_BT)
    return total / len(windows_ST)


def schedule(spec: Training, step: int) -> float:
    """Learning-rate factor: linear warm-up to 1, then cosine or linear decay to `final_lr`."""
    warm = spec.warmup * spec.steps
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / max(1.0, spec.steps - 1 - warm)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if spec.decay == "cosine" else 1 - progress
    return spec.final_lr + (1 - spec.final_lr) * shape
