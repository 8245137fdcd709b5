"""Driver 2: learn masks (or weights) end to end, over the whole model at once.

    every target nn.Linear --attach--> LearnedLinear      the rest of the model frozen, or trained too (scope = "all")
    for each step:  before_step -> forward, loss, backward (per micro-batch) -> clip -> optimiser -> after_step

This file does one step; `fit` is the loop around it. Everything a step does is a function of the recipe and the step's
number: which windows it sees, the noise, the learning rate. So resuming needs parameters, buffers and optimiser states
only, and ends with the same bits.

Legend: B = batch, T = tokens, S = windows.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from maskgen.core.digest import derive_seed
from maskgen.core.errors import NumericalError
from maskgen.core.pattern import NMPattern
from maskgen.corpus import Corpus
from maskgen.learned import LearnedLinear, LearnedMethod, Mode, Moment, Site, learned_parameters
from maskgen.memory import peak_rss_bytes
from maskgen.model import Plan
from maskgen.objective import Objective, in_mode
from maskgen.recipe import Training


@dataclass(frozen=True)
class StepLog:
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
    peak_rss_bytes: int


@dataclass
class Session:
    """A model under training: its replaced layers, the objective and the optimiser.

    `step` steps are done, in `elapsed_s` seconds (those of earlier processes included).
    """

    model: nn.Module
    method: LearnedMethod
    spec: Training
    layers: Mapping[str, LearnedLinear]
    objective: Objective
    optimizer: torch.optim.Optimizer
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

    def run_step(self, corpus: Corpus, micro_batch: int) -> StepLog:
        """One optimiser step over the windows that belong to it, `micro_batch` of them per forward pass.

        Raises `NumericalError` when loss or gradient are not finite; parameters are then as they were.
        """
        factor = schedule(self.spec, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.set_moment(noise_sample=0)
        with torch.no_grad():
            self.method.before_step(self.layers, self.moment)
        totals = torch.zeros(3, dtype=torch.float64)
        tokens = 0
        for noise_sample, ids_BT in self._parts(corpus, micro_batch):
            self.set_moment(noise_sample)
            totals += self._backward(ids_BT, len(ids_BT) / self.spec.batch)
            tokens += ids_BT.numel()
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        lr = self.spec.lr * factor
        with torch.no_grad():
            self.method.after_step(self.layers, self.moment, lr)
        self.step += 1
        loss, ce, divergence = totals.tolist()
        return StepLog(
            self.step, self.spec.steps, loss, ce, divergence, norm, lr, tokens, self.elapsed_s, peak_rss_bytes()
        )

    @property
    def moment(self) -> Moment:
        """The moment the layers are at."""
        return next(iter(self.layers.values())).moment

    def set_moment(self, noise_sample: int) -> None:
        """Tell every layer what time it is and which of the step's noise samples to draw."""
        seed = derive_seed(self.spec.seed, self.step, noise_sample)
        for layer in self.layers.values():
            layer.moment = Moment(self.step, self.spec.steps, seed)

    def _parts(self, corpus: Corpus, micro_batch: int) -> Iterator[tuple[int, Tensor]]:
        """Micro-batches `[B, T]` of the step with the number of their noise sample; none has two."""
        windows_BT = corpus.batch(self.step, self.spec.batch).to(self.device)
        for noise_sample, sample_BT in enumerate(windows_BT.tensor_split(self.spec.noise_samples)):
            for ids_BT in sample_BT.split(micro_batch):
                yield noise_sample, ids_BT

    def _backward(self, ids_BT: Tensor, share: float) -> Tensor:
        """Forward and backward of one micro-batch, which is `share` of the step's windows."""
        loss = self.objective(self.model, ids_BT)
        penalty = self.method.regulariser(self.layers, self.moment)
        total = loss.total if penalty is None else loss.total + penalty
        self._check_finite("loss", float(total.detach()))
        (total * share).backward()
        return torch.tensor([float(total.detach()), loss.cross_entropy, loss.divergence], dtype=torch.float64) * share

    def _clip(self) -> float:
        """Clip the gradient and return its norm. A parameter that nothing reached has gradient 0, in every process."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.spec.clip or math.inf))
        self._check_finite("norm of the gradient", norm)
        return norm

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            self.optimizer.zero_grad(set_to_none=True)
            raise NumericalError(
                f"step {self.step + 1}: the {what} is {value}; lower train.lr, or compute with train.dtype=float32"
            )


def prepare(
    model: nn.Module,
    plan: Plan,
    units: Mapping[str, int],
    method: LearnedMethod,
    spec: Training,
    prior: Callable[[str], Tensor] | None,
    pattern: NMPattern,
) -> Session:
    """Replace the layers of `plan` in `model` and build what trains them. `prior` gives a bool mask per layer name."""
    teacher = None
    model.requires_grad_(False)
    if method.trains_weights and spec.distill_weight > 0:
        teacher = copy.deepcopy(model).to(spec.torch_dtype)
    targets = [item for block in plan.targets for item in block.items()]
    others: list[nn.Parameter] = []
    if spec.scope == "all":
        taken = {id(parameter) for _, linear in targets for parameter in linear.parameters()}
        others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        for parameter in others:
            parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(spec.seed)
    layers: dict[str, LearnedLinear] = {}
    for index, (name, linear) in enumerate(targets):
        mask = None if prior is None else prior(name).to(linear.weight.device)
        layer = method.attach(Site(index, name, linear, pattern, mask, units.get(name)), generator)
        if layer is not None:
            model.set_submodule(name, layer)
            layers[name] = layer
    assert learned_parameters(layers), "the method attached nothing that can be trained"
    optimizer = method.optimizer(layers, others, spec.lr)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    objective = Objective(layers, spec.distill_weight, spec.distill_temperature, spec.torch_dtype, teacher)
    return Session(model, method, spec, layers, objective, optimizer)


def checkpoint_activations(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Keep the inputs of the decoder's blocks only and run each again in the backward pass: same bits, less memory."""
    wanted = {id(block) for block in blocks}
    for name, module in list(model.named_modules()):
        if id(module) in wanted:
            model.set_submodule(name, checkpoint_wrapper(module, preserve_rng_state=False))


@torch.no_grad()
def heldout_nll(session: Session, windows_ST: Tensor, batch: int, mode: Mode = Mode.HARD) -> float:
    """Mean negative log-likelihood of held-out windows `[S, T]`: HARD masks as exported now, or the DENSE model."""
    objective = Objective(session.layers, 0.0, 1.0, session.spec.torch_dtype)
    total = 0.0
    with in_mode(session.layers, mode):
        for ids_BT in windows_ST.split(batch):
            total += objective(session.model, ids_BT.to(session.device)).cross_entropy * len(ids_BT)
    return total / len(windows_ST)


def schedule(spec: Training, step: int) -> float:
    """Learning-rate factor: linear warm-up to 1, then cosine or linear decay to `final_lr`."""
    warm = spec.warmup * spec.steps
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / max(1.0, spec.steps - 1 - warm)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if spec.decay == "cosine" else 1 - progress
    return spec.final_lr + (1 - spec.final_lr) * shape
