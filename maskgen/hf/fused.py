"""Which layers of a decoder block engines serve as one (q, k and v; gate and up): these are sparse together, or dense.

Layers go by their names in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from torch import nn

from maskgen.core.errors import RecipeError
from maskgen.core.layout import LayerForm


@dataclass(frozen=True)
class ServedLayer:
    """Layers of block number `block` that are served as one: `layers` by name, `[out_features, in_features]` together.

    `dense_bytes` is what they take as they are, `sparse_bytes` as kept values, a bit per weight and the
    correction beside each, which takes `correction_bytes` of them.
    """

    block: int
    layers: tuple[str, ...]
    out_features: int
    in_features: int
    dense_bytes: int
    sparse_bytes: int
    correction_bytes: int = 0

    @property
    def name(self) -> str:
        """For people: `model.layers.0.self_attn.q_proj+k_proj+v_proj`."""
        first, *others = self.layers
        return "+".join([first, *(name.rpartition(".")[2] for name in others)])


def served_layers(
    targets: Sequence[Mapping[str, nn.Linear]],
    groups: Sequence[Sequence[str]],
    form: LayerForm,
    itemsize_of: Mapping[str, int],
) -> list[ServedLayer]:
    """The prunable layers of every block in order, those of one of `groups` under one parent together.

    `targets` are the prunable layers of each block by name, `itemsize_of` the bytes of a number of each as the model
    has it, and `form` is what is stored of a sparse one. `FormatError` if a layer cannot have its correction.
    """
    found = []
    for block, linears in enumerate(targets):
        parts: dict[tuple[str, ...], list[str]] = {}
        for name in linears:
            parent, _, leaf = name.rpartition(".")
            group = next((group for group in groups if leaf in group), (leaf,))
            parts.setdefault((parent, *group), []).append(name)
        found += [_served(block, names, linears, form, itemsize_of) for names in parts.values()]
    return found


def check_groups(targets: Set[str], ignored: Iterable[str], groups: Sequence[Sequence[str]]) -> None:
    """`RecipeError` if one of `ignored`, which stay dense, is served together with one of the pruned `targets`."""
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


def _served(
    block: int,
    names: Sequence[str],
    linears: Mapping[str, nn.Linear],
    form: LayerForm,
    itemsize_of: Mapping[str, int],
) -> ServedLayer:
    dense_bytes = sparse_bytes = correction_bytes = out_features = 0
    for name in names:
        rows, columns = linears[name].weight.shape
        out_features += rows
        dense_bytes += rows * columns * itemsize_of[name]
        sparse_bytes += form.packed_nbytes(rows, columns, itemsize_of[name])
        if form.correction is not None:
            stored = form.correction.shapes(rows, columns, name)
            correction_bytes += sum(math.prod(shape) for shape in stored if shape is not None) * itemsize_of[name]
    return ServedLayer(
        block, tuple(names), out_features, columns, dense_bytes, sparse_bytes + correction_bytes, correction_bytes
    )
