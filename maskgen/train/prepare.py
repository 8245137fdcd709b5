"""From a dense model to a training session: its layers replaced by those that learn, a teacher, an optimiser.

every target nn.Linear --attach--> LearnedLinear      the rest of the model frozen, or trained too, as `scope` says
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX, checkpoint_wrapper

from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.hf.blocks import check_finite
from maskgen.hf.layers import decoder_blocks
from maskgen.hf.planning import Plan
from maskgen.methods.learned import (
    FixedLinear,
    LearnedLinear,
    LearnedMethod,
    Result,
    TargetLayer,
    learned_parameters,
)
from maskgen.recipes.sections import Training
from maskgen.train.objective import Objective
from maskgen.train.parallel import ALONE, Group
from maskgen.train.start import Start
from maskgen.train.step import Session


def prepare(
    model: nn.Module,
    plan: Plan,
    units: Mapping[str, int],
    method: LearnedMethod,
    spec: Training,
    prior: Callable[[str], Tensor] | None,
    pattern: NMPattern,
    group: Group = ALONE,
    checkpointed: bool = False,
    start: Start | None = None,
) -> Session:
    """Replace the layers of `plan` in the dense `model` and build what trains them.

    `prior` gives a bool mask per layer name. With `start`, that checkpoint is trained further; its masks take the place
    of `prior`, and the dense model is always kept, to teach and to compare with. With `checkpointed`, only the inputs
    of the decoder's blocks are kept for the backward pass, which runs each block again: same bits, less memory.
    """
    group.check_batch(spec.batch, spec.noise_samples)
    model.requires_grad_(False)
    teacher = None
    if method.trains_weights and (spec.distill_weight > 0 or start is not None):
        teacher = _copy(model, spec.torch_dtype)
        group.split(teacher, decoder_blocks(teacher)[1])
    if start is not None:
        start.put_into(model, plan)
    others = _train_others(model, plan, spec.scope)
    layers = _attach(model, plan, units, method, spec, prior, pattern, start)
    assert learned_parameters(layers), "the method attached nothing that can be trained"
    if method.trains_weights:
        _cast_others(model, layers, spec.torch_dtype)
    blocks = _checkpointed(model, plan.blocks) if checkpointed else plan.blocks
    runner = group.wrap(model, blocks)
    parameters = {name.replace(_CHECKPOINT_PREFIX, ""): parameter for name, parameter in model.named_parameters()}
    learning = {name: layer for name, layer in layers.items() if not isinstance(layer, FixedLinear)}
    optimizer = method.optimizer(learning, [parameters[name] for name in others], spec.lr)
    for settings in optimizer.param_groups:
        settings["initial_lr"] = settings["lr"]
    objective = Objective(layers, spec.distill_weight, spec.distill_temperature, spec.torch_dtype, teacher)
    return Session(model, method, spec, layers, learning, objective, optimizer, group, runner, plan.stored)


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A frozen copy with its parameters in `dtype`; buffers (rotary frequencies) stay as they are."""
    copies: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, copies)


def _cast_others(model: nn.Module, layers: Mapping[str, LearnedLinear], dtype: torch.dtype) -> None:
    """Frozen parameters outside of `layers` in the dtype of matrix products, so that activations are in it, too.

    They are written from the files, not from here.
    """
    inside = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    for parameter in model.parameters():
        if not parameter.requires_grad and id(parameter) not in inside:
            parameter.data = parameter.data.to(dtype)


def _attach(
    model: nn.Module,
    plan: Plan,
    units: Mapping[str, int],
    method: LearnedMethod,
    spec: Training,
    prior: Callable[[str], Tensor] | None,
    pattern: NMPattern,
    start: Start | None,
) -> dict[str, LearnedLinear]:
    prior = prior if start is None else start.masks.mask
    generator = torch.Generator().manual_seed(spec.seed)
    layers: dict[str, LearnedLinear] = {}
    modules = {id(module): name for name, module in model.named_modules()}
    active = _active_blocks(spec, len(plan.blocks), method, prior is not None)
    targets = [(block, name, linear) for block, names in enumerate(plan.targets) for name, linear in names.items()]
    for index, (block, name, linear) in enumerate(targets):
        check_finite(linear.weight, f"{name}: weight")
        mask = None if prior is None else prior(name).to(linear.weight.device)
        correction = None if start is None else start.correction(name)
        target = TargetLayer(index, name, linear, pattern, mask, units.get(name), correction)
        layer = method.attach(target, generator) if block in active else FixedLinear(target)
        if layer is not None:
            model.set_submodule(modules[id(linear)], layer)
            layers[name] = layer
    return layers


def _active_blocks(spec: Training, blocks: int, method: LearnedMethod, has_prior: bool) -> range:
    if spec.blocks is None:
        return range(blocks)
    if not has_prior or method.result is not Result.SPARSE or method.correction is not None or spec.scope != "targets":
        raise RecipeError(
            f"train.blocks {list(spec.blocks)}: the other blocks keep the masks they start from, so this "
            "needs a method that starts from one and adds no correction, with scope = 'targets'"
        )
    if spec.blocks[1] > blocks:
        raise RecipeError(f"train.blocks {list(spec.blocks)}: the model has {blocks} blocks, numbered from 0")
    return range(*spec.blocks)


def _train_others(model: nn.Module, plan: Plan, scope: str) -> list[str]:
    """Make trainable what `scope` adds to the plan's targets; its names."""
    inside: Sequence[nn.Module] = {"targets": (), "blocks": plan.blocks, "all": (model,)}[scope]
    targets = {id(item) for block in plan.targets for linear in block.values() for item in linear.parameters()}
    wanted = {id(item) for module in inside for item in module.parameters()} - targets
    others = [name for name, parameter in model.named_parameters() if id(parameter) in wanted]
    for name in others:
        model.get_parameter(name).requires_grad_(True)
    return others


def _checkpointed(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Put torch's wrapper around every block; the wrapped blocks."""
    names = {id(module): name for name, module in model.named_modules()}
    wrapped = []
    for block in blocks:
        wrapped.append(checkpoint_wrapper(block, preserve_rng_state=False))
        model.set_submodule(names[id(block)], wrapped[-1])
    return wrapped
