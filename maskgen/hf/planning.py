"""Which layers of a model a run prunes, and why everything else in its decoder blocks stays dense.

Candidates are `nn.Linear` modules inside blocks, stored as one tensor each; of these, what vLLM does not serve packed
stays dense (`servable`), and what no engine treats as a linear layer (routers, experts).
Layers go by their names in the checkpoint (`stored`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from maskgen.core.errors import ModelError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.hf.dense import (
    BUDGETED,
    EXPERTS,
    LATENT,
    NOT_ALONE,
    NOT_LINEAR,
    OUTSIDE,
    ROUTER,
    KeptDense,
    Rules,
    experts_module,
    kept_dense,
)
from maskgen.hf.fused import check_groups
from maskgen.hf.layers import Layers, Shapes, decoder_blocks, find_layers, stored_shapes
from maskgen.hf.model import outline
from maskgen.hf.servable import USUAL_GROUPS


@dataclass(frozen=True)
class Planned:
    """What a run will prune is settled, and nothing is loaded yet.

    `layers` layers are pruned, with `share` of the weights in matrices of the decoder blocks (0 to 1); `kept` says what
    stays dense there, and why. `is_checked` says whether it was known which layers of `architecture` vLLM can serve.
    """

    architecture: str
    layers: int
    share: float
    kept: Sequence[KeptDense]
    is_checked: bool


@dataclass(frozen=True)
class Plan:
    """Which layers of a model a run prunes. All names are those of the checkpoint.

    `blocks` are the decoder blocks in order, `targets[i]` the prunable layers of block i by name. `ignored` maps what
    stays dense to the reason: every other `nn.Linear` of the model, and every other matrix of the blocks (all experts
    of a block under one name). `listed` are those of them that a checkpoint's manifest lists. `kept` counts the ones
    inside the blocks, and `share` is the part of the weights in matrices of the blocks that is pruned. `stored` maps
    each tensor of the model that is stored as it is to its name in the files. `groups` are the last parts of names of
    layers that are served as one. `is_checked` says whether it is known which layers of `architecture` vLLM can serve.
    """

    blocks: Sequence[nn.Module]
    targets: Sequence[Mapping[str, nn.Linear]]
    ignored: Mapping[str, str]
    listed: tuple[str, ...]
    kept: Sequence[KeptDense]
    share: float
    stored: Mapping[str, str]
    groups: tuple[tuple[str, ...], ...]
    architecture: str
    is_checked: bool

    def planned(self) -> Planned:
        """What of this is of interest before a run."""
        layers = sum(len(block) for block in self.targets)
        return Planned(self.architecture, layers, self.share, self.kept, self.is_checked)


def plan(
    model: nn.Module,
    pattern: NMPattern,
    ignore: Sequence[str] = (),
    shapes: Shapes | None = None,
    budgeted: Collection[str] = (),
) -> Plan:
    """Decide which layers are pruned; `ignore` are fnmatch patterns of full names of layers that stay dense, and
    `budgeted` the names of layers that a budget keeps dense.

    `shapes` are the tensors of the checkpoint that `model` belongs to; without it, each is taken to be stored under its
    own name. Raises `ModelError` when there are no decoder blocks, a layer is not stored, or nothing is left to prune,
    `RecipeError` for an ignore pattern that matches no layer, or that splits what engines serve as one.
    """
    prefix, blocks = decoder_blocks(model)
    rules = Rules.of(pattern, _config(model))
    found = find_layers(model, prefix, len(blocks), shapes)
    for glob in ignore:
        if not any(fnmatchcase(name, glob) for name in found.names):
            raise RecipeError(f"ignore {glob!r}: matches no linear layer; names look like {next(iter(found.linears))}")
    targets: list[dict[str, nn.Linear]] = [{} for _ in blocks]
    reasons: dict[str, str] = {}
    for name, linear in found.linears.items():
        block, relative = found.place(name)
        matching = [glob for glob in ignore if fnmatchcase(name, glob)]
        why = f"ignored by {matching[0]!r}" if matching else rules.reason(relative, linear.weight.shape)
        why = BUDGETED if why is None and name in budgeted else why
        if why is None:
            targets[block][name] = linear
        else:
            reasons[name] = why
    if not any(targets):
        name, reason = next(iter(reasons.items()))
        raise ModelError(
            f"{type(model).__name__}: nothing to prune with pattern {pattern}: all {len(reasons)} linear layers of its "
            f"decoder blocks stay dense, such as {name}: {reason}; serve this model as it is"
        )
    check_groups({name for block in targets for name in block}, reasons, _groups(rules))
    for name, shape in found.others.items():
        known = rules.reason(found.place(name)[1], shape)
        unknown = NOT_LINEAR if name in found.alone else NOT_ALONE
        reasons[name] = known if known in (EXPERTS, ROUTER, LATENT) else unknown
    return _summed_up(found, blocks, targets, reasons, rules)


def plan_of(
    path: Path,
    pattern: NMPattern,
    ignore: Sequence[str] = (),
    model: nn.Module | None = None,
    budgeted: Collection[str] = (),
) -> Plan:
    """`plan` for the model of a directory: for `model`, which was loaded from it, or for its outline.

    Of an outline the layers are on torch's meta device, and no weight is read. Raises `FormatError` too.
    """
    return plan(outline(path) if model is None else model, pattern, ignore, stored_shapes(path), budgeted)


def dense_names(path: Path, targets: Container[str]) -> tuple[str, ...]:
    """What the manifest of a checkpoint lists as dense, if the layers of the model in `path` are sparse that `targets`
    names. Raises `ModelError`, `FormatError`."""
    model = outline(path)
    prefix, blocks = decoder_blocks(model)
    found, rules = (
        find_layers(model, prefix, len(blocks), stored_shapes(path)),
        Rules.of(NMPattern(2, 4), _config(model)),
    )
    experts = {name for name, shape in found.others.items() if rules.is_expert(found.place(name)[1], shape)}
    return found.listed(name for name in found.names if name not in targets and name not in experts)


def _summed_up(
    found: Layers,
    blocks: nn.ModuleList,
    targets: Sequence[Mapping[str, nn.Linear]],
    reasons: Mapping[str, str],
    rules: Rules,
) -> Plan:
    """The plan, with everything that stays dense named and counted."""
    sizes = {name: linear.weight.numel() for name, linear in found.linears.items()}
    sizes |= {name: math.prod(shape) for name, shape in found.others.items()}
    total = sum(sizes.values())
    ignored: dict[str, str] = {}
    for name, reason in reasons.items():
        fused = reason == EXPERTS and name not in found.linears
        ignored[experts_module(name) if fused else name] = reason
    ignored |= dict.fromkeys(found.outside, OUTSIDE)
    return Plan(
        blocks=list(blocks),
        targets=targets,
        ignored=ignored,
        listed=found.listed(ignored),
        kept=kept_dense(((name, sizes[name], reason) for name, reason in reasons.items()), total),
        share=sum(sizes[name] for block in targets for name in block) / total,
        stored=found.stored,
        groups=_groups(rules),
        architecture=rules.architecture,
        is_checked=rules.served is not None,
    )


def _groups(rules: Rules) -> tuple[tuple[str, ...], ...]:
    return USUAL_GROUPS if rules.served is None else rules.served.groups


def _config(model: nn.Module) -> dict[str, Any]:
    """The model's configuration as `config.json` states it, with its own class where that states none."""
    config: Any = model.config
    stated: dict[str, Any] = config.to_dict()
    return {**stated, "architectures": stated.get("architectures") or [type(model).__name__]}
