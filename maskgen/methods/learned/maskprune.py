"""MaskPrune: which heads and hidden neurons to remove, the same number in every layer, learned with the model's loss.

Every key-value group and every hidden neuron has a mask m in front of the projection that reads it. Two numbers,
shared by all layers, are how many units each layer loses: s_h groups and s_f neurons. So all layers stay equally wide.

    min_{m, s, adapters} max_{y, z >= 0}  L + sum_l y_l ||m_l||^2_bottom(ceil s) + z (R(s_h, s_f) - R_target)

||m||^2_bottom(s), the sum of the s smallest squares, is zero exactly when s masks are, so the dual y_l turns "loses s
units" into an equality. L is the driver's loss (distillation from the dense model: masks 1, adapters off, the same
weights). One step, with eta the step size of the masks:

    1  Adam on the low-rank adapters of all layers, for L
       descent:  m -= eta (<dL/dm> / rms_l + 2 mu m)
    2  prox:     the ceil(s) smallest |m| of every layer are divided by 1 + 2 eta (y_l + augmented)
    3  s         (below)
    4  ascent:   y_l += dual_lr ||m_l||^2_bottom(ceil s) / U

where <.> is a running mean over steps and rms_l the running root mean square of dL/dm over one layer.

`budget = "ramp"` (the default) moves s along a fixed cubic from 0 to its target, reached at `ramp_until` of the run.
"minimax" lets s find its own way, and with it how the budget divides between heads and neurons:

    s += width_lr U (-z dR/d(s/U) - mean_l y_l m_l,(ceil s + 1)^2), the bracket clipped to [-1, 1]
    z  = max(0, z + budget_dual_lr (R - R_target))

until R first crosses the target; then z and s stay. Integral action in y and z with a shared s makes s swing around
its target otherwise, and the crossing can come late: s is set to the target when the selection settles, crossed or not.

If all masks start equal, noise decides which become small first, and the prox keeps these small; masks reflect
importance only if all of them are pulled down alike. Hence mu, the shrink, until the selection settles: a mask
rests where the loss pulls it up as hard as mu pulls it down. Hence also one scale for a whole layer in step 1: Adam,
with one for every mask, would let an unimportant mask climb as fast as an important one. On top of that
`init = "taylor"` measures sum (m dL/dm)^2 over the first steps, during which masks stay at 1, and starts the masks from
its ranking, between 1 - `init_spread` and 1. (A loss that is distillation only has no gradient at masks of 1: then use
"ones".) The bottom never reaches zero by itself, so when the selection settles (`settle`) the removed units are held at
zero, what mu took from the others is given back (their masks become 1), and the rest of the run tunes what stays.

Source: Qin et al., "MaskPrune: Mask-based LLM Pruning for Layer-wise Uniform Structures" (2025), whose code is not
published; the dynamics are those of the authors' earlier UMEC. Deviations: dual steps are divided by U, so that one
size suits any width; the scale of step 1; the ramp; step sizes. Widths are rounded to what engines serve, and R is
checked after rounding.

Legend: U = units of a layer, O = out features, I = in features.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from maskgen.core.errors import NumericalError, RecipeError
from maskgen.methods import Solution
from maskgen.methods.learned import Layers, LearnedLinear, LearnedMethod, Result, StepContext, TargetLayer
from maskgen.numerics.shards import full
from maskgen.numerics.unit_linear import UnitLinear, add_taylor, make_optimizer, parameter_count_of, sites
from maskgen.numerics.units import HEADS, Budget, ParameterCount, kind_of, resolve_widths, top_units

logger = logging.getLogger(__name__)

MOMENTUM = 0.9
"""Share of the past in the running means of a mask's gradient."""


def bottom_norm(mask_U: Tensor, removed: float) -> Tensor:
    """||m||^2_bottom(ceil removed): the sum of that many smallest squares; differentiable in the masks."""
    return mask_U.square().sort().values[: math.ceil(removed)].sum()


def bottom_norm_slope(mask_U: Tensor, removed: float) -> Tensor:
    """d bottom_norm / d removed, straight through the ceiling: the next smallest square (0 when none is left)."""
    squares_U = mask_U.square().sort().values
    following = math.ceil(removed)
    return squares_U[following] if following < len(squares_U) else squares_U.new_zeros(())


def prox(mask_U: Tensor, removed: float, strength: float) -> Tensor:
    """argmin_v ||v - m||^2 / 2 + strength ||v||^2_bottom(ceil removed)."""
    out = ~top_units(mask_U.abs(), len(mask_U) - math.ceil(removed))
    return torch.where(out, mask_U / (1 + 2 * strength), mask_U)


class MaskPruneLinear(UnitLinear, LearnedLinear):
    """A frozen layer with an adapter and, at a site, masks and the state of their optimisation (saved with the run).

    `y` is this layer's dual; `s` (units to remove) and `z` (dual of the budget) are equal in all layers of a kind.
    `mean_U` and `square` are running means of the masks' gradient and of its square.
    """

    y: Tensor
    s: Tensor
    z: Tensor
    crossed: Tensor
    mean_U: Tensor
    square: Tensor

    def __init__(self, target: TargetLayer, rank: int, generator: torch.Generator) -> None:
        super().__init__(target)
        self.add_units(target.units, rank, generator)
        if target.units is not None:
            for name in ("y", "s", "z"):
                self.register_buffer(name, torch.zeros((), dtype=torch.float64, device=self.weight.device))
            self.register_buffer("crossed", torch.tensor(False, device=self.weight.device))
            self.register_buffer("mean_U", torch.zeros_like(self.importance_U))
            self.register_buffer("square", torch.zeros((), device=self.weight.device))

    def solution(self) -> Solution:
        """The weight with masks and adapter merged in; the columns of removed units are zero."""
        return Solution(self.mask(), self.merged())

    @torch.no_grad()
    def observe(self) -> None:
        """Add the gradient of one step to the running means."""
        if self.mask_U.grad is not None:
            gradient_U = full(self.mask_U.grad)
            self.mean_U.lerp_(gradient_U, 1 - MOMENTUM)
            self.square.lerp_(gradient_U.square().mean(), 1 - MOMENTUM)

    def normalised_gradient(self) -> Tensor:
        """<dL/dm> / rms_l `[U]`; 0 where the layer has had no gradient."""
        return self.mean_U / self.square.sqrt().clamp(min=torch.finfo(torch.float32).tiny)

    @property
    def units_to_remove(self) -> int:
        """How many units are removed from this layer in the end."""
        return self.units - int(self.keep)


@dataclass(frozen=True)
class MaskPrune(LearnedMethod):
    """Options. Widths: `keep_parameters` of the blocks' linear layers stay, or explicit numbers (0: worked out), such
    that `tensor_parallel` ranks can divide the heads and `ffn_multiple` the FFN; `heads_divide_hidden` because
    transformers refuses other Llamas (Qwen3 and Mistral may do without). `lora_rank` 0 leaves all weights alone.
    `mask_lr` is in units of train.lr; `init_until`, `ramp_until` and `settle` are points of the run between 0 and 1.
    """

    result: ClassVar[Result] = Result.SLICED

    keep_parameters: float = 0.75
    keep_kv_groups: int = 0
    keep_ffn: int = 0
    tensor_parallel: int = 1
    ffn_multiple: int = 64
    heads_divide_hidden: bool = True
    lora_rank: int = 8
    mask_lr: float = 1.0
    init: str = "taylor"
    init_until: float = 0.1
    init_spread: float = 0.3
    budget: str = "ramp"
    ramp_until: float = 0.3
    settle: float = 0.4
    shrink: float = 0.03
    dual_lr: float = 20.0
    augmented: float = 1.0
    width_lr: float = 0.01
    budget_dual_lr: float = 2.0

    def __post_init__(self) -> None:
        Budget.of(self)
        self.require_one_of(init=("taylor", "ones"), budget=("ramp", "minimax"))
        if not 0 <= self.init_until < self.ramp_until <= self.settle <= 1:
            raise RecipeError(
                f"method: init_until {self.init_until}, ramp_until {self.ramp_until} and settle {self.settle} must "
                "follow one another between 0 and 1"
            )

    def attach(self, target: TargetLayer, generator: torch.Generator) -> LearnedLinear:
        """Every linear layer of the blocks gets an adapter; sites get masks too."""
        return MaskPruneLinear(target, self.lora_rank, generator)

    def optimizer(self, layers: Layers, others: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Adam on the adapters and `others`; `after_step` moves the masks."""
        targets = _maskprune_layers(layers)

        def on_gradients() -> None:
            context = next(iter(targets.values())).context
            if context.step < self._init_steps(context):
                add_taylor(targets)
            for layer in sites(targets).values():
                layer.observe()

        return make_optimizer(targets, others, lr, Budget.of(self), on_gradients)

    def after_step(self, layers: Layers, context: StepContext, lr: float) -> None:
        """Steps 2 to 4 of the module's list, with the step size eta = mask_lr * lr."""
        targets, eta = sites(_maskprune_layers(layers)), self.mask_lr * lr
        if self.init == "taylor" and context.step < self._init_steps(context):
            self._measure_importance(targets, last=context.step + 1 == self._init_steps(context))
            return
        settled = context.progress >= self.settle
        settles_now = settled and StepContext(context.step - 1, context.steps).progress < self.settle
        self._move_widths(layers, context, settled)
        for layer in targets.values():
            removed, shrink = float(layer.s), 0.0 if settled or not layer.units_to_remove else self.shrink
            mask_U = layer.masks()
            mask_U = mask_U - eta * (layer.normalised_gradient() + 2 * shrink * mask_U)
            if settled:
                layer.set_masks((torch.ones_like(mask_U) if settles_now else mask_U) * layer.kept_U())
                continue
            mask_U = prox(mask_U, removed, eta * (float(layer.y) + self.augmented))
            layer.y += self.dual_lr * bottom_norm(mask_U, removed) / layer.units
            layer.set_masks(mask_U)
        if settles_now:
            logger.info("selection settled; agreement with the Taylor ranking: %s", taylor_agreement(layers))

    def kept_units(self, layers: Layers) -> Mapping[str, Tensor]:
        """The units of the largest masks, as many in every layer."""
        return {name: layer.kept_U() for name, layer in sites(_maskprune_layers(layers)).items()}

    def _init_steps(self, context: StepContext) -> int:
        return math.ceil(self.init_until * context.steps)

    def _measure_importance(self, targets: Mapping[str, MaskPruneLinear], last: bool) -> None:
        """Keep masks at 1 while importance is measured; after that the least important starts at 1 - init_spread."""
        for name, layer in targets.items():
            mask_U = torch.ones_like(layer.importance_U)
            if last and layer.units_to_remove:
                if not layer.importance_U.any():
                    raise NumericalError(
                        f"{name}: masks have no gradient, so their importance is unknown; with "
                        'train.distill_weight = 1 set method.init = "ones", or lower distill_weight'
                    )
                rank_U = layer.importance_U.argsort().argsort() / (layer.units - 1)
                mask_U -= (1 - rank_U) * self.init_spread
            layer.set_masks(mask_U)

    def _move_widths(self, layers: Layers, context: StepContext, settled: bool) -> None:
        """Step 3: the shared numbers of units to remove."""
        targets = _maskprune_layers(layers)
        site_layers = sites(targets)
        if self.budget == "minimax" and not settled:
            self._step_widths(site_layers, parameter_count_of(targets))
            return
        span = (context.progress - self.init_until) / (self.ramp_until - self.init_until)
        done = 1 - (1 - min(max(span, 0.0), 1.0)) ** 3
        for layer in site_layers.values():
            layer.s.fill_(layer.units_to_remove * (1.0 if settled else done))

    def _step_widths(self, targets: Mapping[str, MaskPruneLinear], counted: ParameterCount) -> None:
        """One step of s and z by their gradients; at the first crossing of the budget both stay."""
        if all(bool(layer.crossed) for layer in targets.values()):
            return
        first = {kind: next(x for n, x in targets.items() if kind_of(n) == kind) for kind in counted.kinds}
        removed, z = {kind: float(layer.s) for kind, layer in first.items()}, float(next(iter(first.values())).z)
        for kind, shape in counted.kinds.items():
            members = [x for n, x in targets.items() if kind_of(n) == kind]
            resist = sum(float(x.y * bottom_norm_slope(x.masks(), removed[kind])) for x in members) / len(members)
            slope = shape.layers * shape.cost * shape.units / counted.parameters
            step = self.width_lr * shape.units * min(max(z * slope - resist, -1.0), 1.0)
            removed[kind] = min(max(removed[kind] + step, 0.0), shape.units - 1.0)
        left = counted.fraction({kind: shape.units - removed[kind] for kind, shape in counted.kinds.items()})
        crossed = left <= self.keep_parameters
        keep = {kind: shape.units - removed[kind] for kind, shape in counted.kinds.items()}
        if crossed:
            whole = resolve_widths(counted, Budget.of(self), keep.get(HEADS))
            keep = {kind: float(count) for kind, count in whole.items()}
        for name, layer in targets.items():
            kind = kind_of(name)
            layer.s.fill_(counted.kinds[kind].units - keep[kind])
            layer.z.fill_(max(0.0, z + self.budget_dual_lr * (left - self.keep_parameters)))
            layer.crossed.fill_(crossed)
            if crossed:
                layer.keep.fill_(int(keep[kind]))


def taylor_agreement(layers: Layers) -> dict[str, float]:
    """By kind of site, the fraction of the units kept that a Taylor ranking would keep too."""
    same: dict[str, list[float]] = {}
    for name, layer in sites(_maskprune_layers(layers)).items():
        both_U = layer.kept_U() & top_units(layer.importance_U, int(layer.keep))
        same.setdefault(kind_of(name), []).append(int(both_U.sum()) / int(layer.keep))
    return {kind: sum(values) / len(values) for kind, values in same.items()}


def _maskprune_layers(layers: Layers) -> Mapping[str, MaskPruneLinear]:
    return cast(Mapping[str, MaskPruneLinear], layers)


METHOD = MaskPrune
