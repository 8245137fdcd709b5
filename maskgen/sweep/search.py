"""Which layers stay dense: within bytes, within a time, or within a rise of the perplexity at the fewest bytes.

For every number of bytes there is one best choice (`numerics.knapsack`), and the more bytes, the lower the perplexity.
So the fewest bytes are found by halving an interval, with a look at the perplexity of one choice at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from maskgen.core.errors import RecipeError
from maskgen.export.allocation import Look
from maskgen.hf.fused import ServedLayer
from maskgen.numerics.knapsack import knapsack
from maskgen.sweep.kernel_times import Times

LOOKS = 7
"""Halvings of the interval: the fewest bytes are found to 0.4 % of what 2:4 saves, times the dense bytes."""

Increase = Callable[[frozenset[str]], float]
"""How much higher than dense the perplexity is with these layers dense, and all others sparse, as a share of dense."""


def within_bytes(layers: Sequence[ServedLayer], cost: Sequence[float], share: float) -> list[bool]:
    """Which layers stay dense: those that save most, while all together take at most `share` of their dense bytes."""
    strict, dense = (sum(getattr(layer, kind) for layer in layers) for kind in ("sparse_bytes", "dense_bytes"))
    extra = [layer.dense_bytes - layer.sparse_bytes for layer in layers]
    return knapsack(cost, extra, math.floor(share * dense) - strict)


def within_time(cost: Sequence[float], times: Sequence[Times], speedup: float) -> list[bool]:
    """Which layers stay dense: those that save most, while a token gets through all of them `speedup` times as fast as
    with all of them dense."""
    room = math.floor(sum(dense for dense, _ in times) / speedup) - sum(sparse for _, sparse in times)
    return knapsack(cost, [dense - sparse for dense, sparse in times], room)


def within_increase(
    layers: Sequence[ServedLayer], cost: Sequence[float], most: float, increase: Increase
) -> tuple[list[bool], list[Look]]:
    """Which layers stay dense, so that the perplexity is higher by at most `most` and the bytes are the fewest found.

    Also returns every look at the perplexity. Raises `RecipeError` if one sparse layer alone is too many.
    """
    looks: list[Look] = []

    def is_met(kept: Sequence[bool]) -> bool:
        value = increase(names_of(layers, kept))
        looks.append(Look(bytes=share_of(layers, kept), increase=value))
        return value <= most

    best = [False] * len(layers)
    if is_met(best):
        return best, looks
    least = min(range(len(layers)), key=lambda index: cost[index])
    low, best = share_of(layers, best), [index != least for index in range(len(layers))]
    high = share_of(layers, best)
    if not is_met(best):
        raise RecipeError(
            f"budget.max_ppl_increase: with {layers[least].name} alone sparse, which costs least, the perplexity is "
            f"higher by {looks[-1].increase:.2g} of dense, and {most:.2g} was looked for; ask for more than that"
        )
    for _ in range(LOOKS):
        middle = (low + high) / 2
        kept = within_bytes(layers, cost, middle)
        if is_met(kept):
            best, high = kept, middle
        else:
            low = middle
    return best, looks


def names_of(layers: Sequence[ServedLayer], kept: Sequence[bool]) -> frozenset[str]:
    """Names of the layers that are kept dense."""
    return frozenset(name for layer, is_dense in zip(layers, kept, strict=True) if is_dense for name in layer.layers)


def share_of(layers: Sequence[ServedLayer], kept: Sequence[bool]) -> float:
    """What all layers take, as a share of what they take dense."""
    stored = sum(
        layer.dense_bytes if is_dense else layer.sparse_bytes for layer, is_dense in zip(layers, kept, strict=True)
    )
    return stored / sum(layer.dense_bytes for layer in layers)
