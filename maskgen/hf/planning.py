"""Which layers of a model a run prunes, and why everything else in its decoder blocks stays dense.

Works on any decoder whose blocks are a `ModuleList` as long as `num_hidden_layers`, so there is no list of supported
architectures to maintain. Candidates are `nn.Linear` modules inside blocks, stored as one tensor each; of these, what
vLLM does not serve packed stays dense (`servable`), and what no engine treats as a linear layer (routers, experts).
Layers go by their names in the checkpoint (`stored`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from maskgen.core.checkpoint import WEIGHT_SUFFIX, read_headers
from maskgen.core.errors import ModelError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.hf.dense import (
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
from maskgen.hf.model import outline
from maskgen.hf.servable import USUAL_GROUPS
from maskgen.hf.stored import Renamed, shapes_of, tensor_names

Shapes = Mapping[str, tuple[int, ...]]
"""Stored tensors: name -> shape."""


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
    each tensor of the model that is stored as it is to its name in the files. `is_checked` says whether it is known
    which layers of `architecture` vLLM can serve.
    """

    blocks: Sequence[nn.Module]
    targets: Sequence[Mapping[str, nn.Linear]]
    ignored: Mapping[str, str]
    listed: tuple[str, ...]
    kept: Sequence[KeptDense]
    share: float
    stored: Mapping[str, str]
    architecture: str
    is_checked: bool

    def planned(self) -> Planned:
        """What of this is of interest before a run."""
        layers = sum(len(block) for block in self.targets)
        return Planned(self.architecture, layers, self.share, self.kept, self.is_checked)


def plan(model: nn.Module, pattern: NMPattern, ignore: Sequence[str] = (), shapes: Shapes | None = None) -> Plan:
    """Decide which layers are pruned; `ignore` are fnmatch patterns of full names of layers that stay dense.

    `shapes` are the tensors of the checkpoint that `model` belongs to; without it, each is taken to be stored under its
    own name. Raises `ModelError` when there are no decoder blocks, a layer is not stored, or nothing is left to prune,
    `RecipeError` for an ignore pattern that matches no layer, or that splits what engines serve as one.
    """
    prefix, blocks = decoder_blocks(model)
    rules = Rules.of(pattern, _config(model))
    found = _find(model, prefix, len(blocks), shapes)
    for glob in ignore:
        if not any(fnmatchcase(name, glob) for name in found.names):
            raise RecipeError(f"ignore {glob!r}: matches no linear layer; names look like {next(iter(found.linears))}")
    targets: list[dict[str, nn.Linear]] = [{} for _ in blocks]
    reasons: dict[str, str] = {}
    for name, linear in found.linears.items():
        block, relative = found.place(name)
        matching = [glob for glob in ignore if fnmatchcase(name, glob)]
        why = f"ignored by {matching[0]!r}" if matching else rules.reason(relative, linear.weight.shape)
        if why is None:
            targets[block][name] = linear
        else:
            reasons[name] = why
    if not any(targets):
        name, reason = next(iter(reasons.items()))
        raise ModelError(
            f"{type(model).__name__}: nothing to prune with pattern {pattern}: all {len(reasons)} linear layers of its "
            f"decoder blocks stay dense, such as {name}: {reason}"
        )
    _check_groups({name for block in targets for name in block}, reasons, rules)
    for name, shape in found.others.items():
        known = rules.reason(found.place(name)[1], shape)
        unknown = NOT_LINEAR if name in found.alone else NOT_ALONE
        reasons[name] = known if known in (EXPERTS, ROUTER, LATENT) else unknown
    return _summed_up(found, blocks, targets, reasons, rules)


def plan_of(path: Path, pattern: NMPattern, ignore: Sequence[str] = (), model: nn.Module | None = None) -> Plan:
    """`plan` for the model of a directory: for `model`, which was loaded from it, or for its outline.

    Of an outline the layers are on torch's meta device, and no weight is read. Raises `FormatError` too.
    """
    return plan(outline(path) if model is None else model, pattern, ignore, _shapes(path))


def dense_names(path: Path, targets: Container[str]) -> tuple[str, ...]:
    """What the manifest of a checkpoint lists as dense, if the layers of the model in `path` are sparse that `targets`
    names. Raises `ModelError`, `FormatError`."""
    model = outline(path)
    prefix, blocks = decoder_blocks(model)
    found, rules = _find(model, prefix, len(blocks), _shapes(path)), Rules.of(NMPattern(2, 4), _config(model))
    experts = {name for name, shape in found.others.items() if rules.is_expert(found.place(name)[1], shape)}
    return found.listed(name for name in found.names if name not in targets and name not in experts)


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the decoder's list of blocks; `ModelError` unless there is exactly one candidate."""
    _check_no_conv1d(model)
    config: Any = model.config
    decoder = config.get_text_config(decoder=True)
    depth = decoder.num_hidden_layers
    candidates: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(outer + ".") for outer in candidates)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not nested and _all_have_linears(module):
            candidates[name] = module
    if len(candidates) > 1 and decoder is not config:  # a tower that sees or hears may be as deep as the decoder
        inside = {id(module) for module in model.get_decoder().modules()}  # type: ignore[operator]
        candidates = {name: module for name, module in candidates.items() if id(module) in inside}
    if len(candidates) != 1:
        raise ModelError(
            f"{type(model).__name__}: expected one ModuleList of {depth} decoder blocks (num_hidden_layers), found "
            f"{sorted(candidates) or 'none'}; this architecture is not supported"
        )
    return next(iter(candidates.items()))


@dataclass(frozen=True)
class _Found:
    """The matrices of a model by the names of the modules they are stored for (the tensor's, where that is no weight).

    `linears` are the `nn.Linear` of the blocks that are stored as they are, `others` the shapes of every other matrix
    of the blocks, `outside` the linear layers elsewhere. `stored` maps tensors of the model to those in the files, and
    `inside` splits a name into the number of its block and the rest.
    """

    linears: Mapping[str, nn.Linear]
    others: Shapes
    outside: Sequence[str]
    listable: frozenset[str]
    alone: frozenset[str]
    stored: Mapping[str, str]
    inside: re.Pattern[str]

    @property
    def names(self) -> list[str]:
        return [*self.linears, *self.others, *self.outside]

    def listed(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names` that a manifest can list: modules with a stored weight, and heads that are tied."""
        return tuple(name for name in names if name in self.listable or name.endswith("lm_head"))

    def place(self, name: str) -> tuple[int, str]:
        """The number of the block that `name` is in, and its name there."""
        match = self.inside.fullmatch(name)
        assert match is not None, name
        return int(match[1]), match[2]


def _find(model: nn.Module, prefix: str, depth: int, shapes: Shapes | None) -> _Found:
    if shapes is None:
        shapes = shapes_of(model)
        renamed = {name: Renamed((name,), True) for name in shapes}
    else:
        renamed = tensor_names(model, shapes)
    stored = {one.targets[0]: name for name, one in renamed.items() if one.alone}
    linears, outside, places = _linears(model, prefix, stored, renamed)
    inside = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(places)))})\.(\d+)\.(.+)")
    others: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module, match = name.removesuffix(WEIGHT_SUFFIX), inside.fullmatch(name)
        if len(shape) < 2 or module in linears:
            continue
        if match is not None and int(match[1]) < depth:
            others[module] = shape
        elif name.endswith(WEIGHT_SUFFIX) and (match is not None or not renamed[name].alone):
            outside.append(module)  # blocks that only engines use, and what a tower's layers are made of
    listable = frozenset(name.removesuffix(WEIGHT_SUFFIX) for name in shapes if name.endswith(WEIGHT_SUFFIX))
    alone = frozenset(name.removesuffix(WEIGHT_SUFFIX) for name in stored.values())
    return _Found(linears, others, outside, listable, alone, stored, inside)


def _linears(
    model: nn.Module, prefix: str, stored: Mapping[str, str], renamed: Mapping[str, Renamed]
) -> tuple[dict[str, nn.Linear], list[str], set[str]]:
    """Linear layers of the blocks and names of those elsewhere, and the stored names of the list of blocks."""
    parts = {target for one in renamed.values() if not one.alone for target in one.targets}
    linears: dict[str, nn.Linear] = {}
    outside: list[str] = []
    places: set[str] = set()
    for module_name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module_name + WEIGHT_SUFFIX
        name = stored.get(weight, weight).removesuffix(WEIGHT_SUFFIX)
        if not module_name.startswith(prefix + "."):
            if weight in stored or name.endswith("lm_head"):
                outside.append(name)
        elif weight in stored:
            linears[name] = module
            number = module_name.removeprefix(prefix + ".").partition(".")[0]
            places.add(name.partition(f".{number}.")[0])
        elif weight not in parts:
            raise ModelError(
                f"{type(model).__name__}: no tensor {weight} is stored, tensors have other names such as "
                f"{next(iter(renamed))}, which transformers understands and engines may not: load the model with "
                "AutoModelForCausalLM, save_pretrained it in another directory, and start from that"
            )
    return linears, outside, places


def _summed_up(
    found: _Found,
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
        architecture=rules.architecture,
        is_checked=rules.served is not None,
    )


def _check_groups(targets: Set[str], ignored: Iterable[str], rules: Rules) -> None:
    groups = USUAL_GROUPS if rules.served is None else rules.served.groups
    for name in ignored:
        parent, _, leaf = name.rpartition(".")
        for group in groups:
            siblings = [f"{parent}.{part}" for part in group] if leaf in group else []
            sparse = [sibling for sibling in siblings if sibling in targets]
            if sparse:
                raise RecipeError(
                    f"ignore leaves {name} dense and {sparse[0]} sparse, but engines serve {' and '.join(group)} "
                    "as one layer; ignore all of them or none"
                )


def _shapes(path: Path) -> Shapes:
    return {name: header.shape for name, header in read_headers(path).items()}


def _config(model: nn.Module) -> dict[str, Any]:
    """The model's configuration as `config.json` states it, with its own class where that states none."""
    config: Any = model.config
    stated: dict[str, Any] = config.to_dict()
    return {**stated, "architectures": stated.get("architectures") or [type(model).__name__]}


def _check_no_conv1d(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            raise ModelError(
                f"{type(model).__name__}: {name} is a Conv1D (GPT-2 style, weight stored [in, out]), which cannot be "
                "stored packed; models made of nn.Linear can, such as Llama, Qwen, Gemma, Phi, GPT-NeoX or OPT"
            )


def _all_have_linears(blocks: nn.ModuleList) -> bool:
    return all(any(isinstance(module, nn.Linear) for module in block.modules()) for block in blocks)
