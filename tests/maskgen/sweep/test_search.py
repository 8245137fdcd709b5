"""Choices within bytes, and within a rise of the perplexity: met, and at few bytes."""

from __future__ import annotations

import pytest

from maskgen.core.errors import RecipeError
from maskgen.hf.fused import ServedLayer
from maskgen.sweep.search import LOOKS, names_of, share_of, within_bytes, within_increase

LAYERS = [ServedLayer(block, (f"layer{block}",), 8, 64 * (1 + block % 3), 1024 * (1 + block % 3), 576 * (1 + block % 3))
          for block in range(20)]  # fmt: skip
COST = [(7 * block % 20 + 1) / 100 for block in range(20)]


def increase(dense: frozenset[str]) -> float:
    """The perplexity of a model whose costs are exactly so."""
    return sum(cost for layer, cost in zip(LAYERS, COST, strict=True) if layer.layers[0] not in dense)


@pytest.mark.parametrize("share", [0.5625, 0.6, 0.75, 0.99])
def test_bytes_are_kept(share: float) -> None:
    kept = within_bytes(LAYERS, COST, share)
    assert share - 0.05 < share_of(LAYERS, kept) <= share
    assert any(kept) == (share > 0.5625)


@pytest.mark.parametrize("most", [0.02, 0.3, 1.0, 5.0])
def test_the_fewest_bytes_that_keep_the_perplexity(most: float) -> None:
    kept, looks = within_increase(LAYERS, COST, most, increase)
    assert increase(names_of(LAYERS, kept)) <= most
    if most == 5.0:
        assert not any(kept) and len(looks) == 1
        return
    assert len(looks) == LOOKS + 2
    fewer = within_bytes(LAYERS, COST, share_of(LAYERS, kept) - 0.02)
    assert increase(names_of(LAYERS, fewer)) > most, "two percent fewer bytes are too few"
    assert {look.bytes for look in looks if look.increase <= most} >= {share_of(LAYERS, kept)}


def test_what_one_layer_alone_exceeds_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"with layer0 alone sparse, which costs least, .* by 0.01"):
        within_increase(LAYERS, COST, 0.005, increase)
