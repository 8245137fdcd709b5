"""Why a matrix of a decoder block stays dense, and how much of the blocks that is.

The reasons are found from names and shapes in the checkpoint alone, so that a run can state them before any weight is
read, and `inspect` for a checkpoint that was written long ago.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskgen.core.layout import WEIGHT_SUFFIX
from maskgen.core.pattern import NMPattern
from maskgen.hf import servable
from maskgen.hf.servable import Served
from maskgen.hf.stored import numbers_as_stars

OUTSIDE = "outside the decoder blocks"
"""The reason why linear layers such as `lm_head` stay dense."""

EXPERTS = "engines run the experts of a layer as one, and there is no sparse kernel for that"
ROUTER = "decides which experts a token goes to; engines read its weight themselves"
LATENT = "part of latent attention; engines read its weight themselves"
NOT_SERVED = "vLLM keeps it dense"
NOT_LINEAR = "not a linear layer"
LEFT_OUT = "the recipe or the masks left it out"
BUDGETED = "the budget keeps it dense, where sparsity costs most"
NOT_ALONE = "stored in other tensors than transformers makes of it"

_EXPERTS = re.compile(r"(?:^|\.)experts(?:\.|$)")
_PLACE = re.compile(r"(.+?)\.\d+\..+")
_LATENT = "kv_b_proj"
_ROUTERS = ("gate", "router", "wg", "shared_expert_gate", "router.layer", "router.classifier")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class KeptDense:
    """Matrices of decoder blocks that stay dense for one reason.

    `name` is "experts", the stored name of the only one, or with "*" for numbers that of several; `layers` is how many
    there are, and `share` their part of all weights in matrices of decoder blocks, from 0 to 1.
    """

    name: str
    layers: int
    share: float
    reason: str


@dataclass(frozen=True)
class Rules:
    """What decides for one model. `served` is what vLLM can serve of it, if that is known; `experts` are the numbers
    of experts that its configuration states."""

    pattern: NMPattern
    architecture: str
    served: Served | None
    experts: frozenset[int]

    @classmethod
    def of(cls, pattern: NMPattern, config: Mapping[str, Any]) -> Rules:
        """The rules for the model of a `config.json`."""
        decoder = config.get("text_config") or config
        counts = (decoder.get(key) for key in _EXPERT_COUNTS) if isinstance(decoder, Mapping) else ()
        names = servable.architectures(config)
        served = servable.table().find(names)
        return cls(pattern, " ".join(names), served, frozenset(count for count in counts if type(count) is int))

    def reason(self, name: str, shape: Sequence[int]) -> str | None:
        """Why the matrix stays dense that is stored as `name`, relative to its block, with `shape`; None if it may be
        sparse."""
        if self.is_expert(name, shape):
            return None if self._can_be_served(name) else EXPERTS
        if len(shape) != 2:
            return NOT_LINEAR
        if name.endswith(tuple("." + router for router in _ROUTERS)) or name in _ROUTERS:
            return ROUTER
        if not self._can_be_served(name):
            if name.rpartition(".")[2] == _LATENT:
                return LATENT
            if self.served is not None:
                return NOT_SERVED
        if shape[1] % self.pattern.column_multiple:
            return f"in_features {shape[1]} is not a multiple of {self.pattern.column_multiple}"
        return None

    def is_expert(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the matrix belongs to the experts of a mixture, which are stored one by one or all in one tensor."""
        in_one = len(shape) == 3 and shape[0] in self.experts and shape[1] > 1
        return in_one or _EXPERTS.search(name) is not None

    def _can_be_served(self, name: str) -> bool:
        return self.served is not None and numbers_as_stars(name) in self.served.sparse


def experts_module(name: str) -> str:
    """The module of all experts that a tensor of experts belongs to: `mlp.experts.3.w1` -> `mlp.experts`."""
    match = _EXPERTS.search(name)
    return name if match is None else name[: match.end()].removesuffix(".")


def kept_dense(matrices: Iterable[tuple[str, int, str]], total: int) -> list[KeptDense]:
    """(name, weights, reason) of matrices of decoder blocks that stay dense -> the same by kind, the largest first.

    `total` is the number of weights in all matrices of the blocks.
    """
    groups: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for name, weights, reason in matrices:
        kind = "experts" if reason == EXPERTS else numbers_as_stars(name)
        groups.setdefault((kind, reason), []).append((name, weights))
    found = []
    for (kind, reason), members in groups.items():
        shown = members[0][0] if len(members) == 1 and reason != EXPERTS else kind
        found.append(KeptDense(shown, len(members), sum(weights for _, weights in members) / total, reason))
    return sorted(found, key=lambda one: -one.share)


def kept_in_checkpoint(
    shapes: Mapping[str, Sequence[int]],
    targets: Mapping[str, Sequence[int]],
    rules: Rules,
    budgeted: Collection[str] = (),
) -> list[KeptDense]:
    """`kept_dense` of a checkpoint whose `targets` (name -> shape) are sparse; `shapes` are its other tensors, and
    `budgeted` the layers that a budget kept dense."""
    places = {match[1] for name in targets if (match := _PLACE.fullmatch(name))}
    inside = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(places)))})\.\d+\.(.+)")
    dense, total = [], sum(math.prod(shape) for shape in targets.values())
    for tensor, shape in shapes.items():
        name = tensor.removesuffix(WEIGHT_SUFFIX)
        match = inside.fullmatch(name)
        if match is not None and len(shape) >= 2:
            left_out = BUDGETED if name in budgeted else LEFT_OUT
            reason = rules.reason(match[1], shape) or (left_out if name != tensor else NOT_LINEAR)
            dense.append((name, math.prod(shape), reason))
            total += math.prod(shape)
    return kept_dense(dense, total)
