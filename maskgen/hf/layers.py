"""The decoder blocks of a model, and the matrices in them and elsewhere by the names they are stored under.

Works on any decoder whose blocks are a `ModuleList` as long as `num_hidden_layers`, so there is no list of supported
architectures to maintain.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from maskgen.core.checkpoint import WEIGHT_SUFFIX, read_headers
from maskgen.core.errors import ModelError
from maskgen.hf.stored import Renamed, shapes_of, tensor_names

Shapes = Mapping[str, tuple[int, ...]]
"""Stored tensors: name -> shape."""


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


def stored_shapes(path: Path) -> Shapes:
    """The tensors of a model directory, from their headers alone; `FormatError` if these cannot be read."""
    return {name: header.shape for name, header in read_headers(path).items()}


@dataclass(frozen=True)
class Layers:
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
        """All of them, in no order."""
        return [*self.linears, *self.others, *self.outside]

    def listed(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names` that a manifest can list: modules with a stored weight, and heads that are tied."""
        return tuple(name for name in names if name in self.listable or name.endswith("lm_head"))

    def place(self, name: str) -> tuple[int, str]:
        """The number of the block that `name` is in, and its name there."""
        match = self.inside.fullmatch(name)
        assert match is not None, name
        return int(match[1]), match[2]


def find_layers(model: nn.Module, prefix: str, depth: int, shapes: Shapes | None) -> Layers:
    """The matrices of a model whose `depth` decoder blocks are the modules `prefix`.0, `prefix`.1 and so on.

    `shapes` are the tensors of its checkpoint; without it, each is taken to be stored under its own name. `ModelError`
    for a linear layer of the blocks that is not stored.
    """
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
        module = name.removesuffix(WEIGHT_SUFFIX)
        match = inside.fullmatch(module)
        if len(shape) < 2 or module in linears:
            continue
        if match is not None and int(match[1]) < depth:
            others[module] = shape
        elif name.endswith(WEIGHT_SUFFIX) and (match is not None or not renamed[name].alone):
            outside.append(module)  # blocks that only engines use, and what a tower's layers are made of
    listable = frozenset(name.removesuffix(WEIGHT_SUFFIX) for name in shapes if name.endswith(WEIGHT_SUFFIX))
    alone = frozenset(name.removesuffix(WEIGHT_SUFFIX) for name in stored.values())
    return Layers(linears, others, outside, listable, alone, stored, inside)


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
            raise _not_stored(model, weight, renamed)
    return linears, outside, places


def _not_stored(model: nn.Module, weight: str, renamed: Mapping[str, Renamed]) -> ModelError:
    """What to say of a linear layer whose `weight` no stored tensor becomes."""
    known = model.state_dict().keys()
    strange = [name for name, one in renamed.items() if name.endswith(WEIGHT_SUFFIX) and not known & set(one.targets)]
    if not strange:
        return ModelError(
            f"{type(model).__name__}: tensor {weight} is missing in its files; download the model again: "
            "transformers would put random weights in its place"
        )
    return ModelError(
        f"{type(model).__name__}: no tensor {weight} is stored, tensors have other names such as {strange[0]}, which "
        "transformers understands and engines may not: load the model with AutoModelForCausalLM, save_pretrained it in "
        "another directory, and start from that"
    )


def _check_no_conv1d(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            raise ModelError(
                f"{type(model).__name__}: {name} is a Conv1D (GPT-2 style, weight stored [in, out]), which cannot be "
                "stored packed; models made of nn.Linear can, such as Llama, Qwen, Gemma, Phi, GPT-NeoX or OPT"
            )


def _all_have_linears(blocks: nn.ModuleList) -> bool:
    return all(any(isinstance(module, nn.Linear) for module in block.modules()) for block in blocks)
