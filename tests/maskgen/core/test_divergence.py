"""Means over tokens, not over windows."""

from __future__ import annotations

import json

import pytest

from maskgen.core.divergence import Divergence


def test_every_scored_token_weighs_the_same() -> None:
    found = Divergence([0.5, 2.0], [1.0, 0.25], [30, 10])
    assert found.kl == pytest.approx((0.5 * 30 + 2.0 * 10) / 40)
    assert found.agreement == pytest.approx((30 + 2.5) / 40)
    stored = json.loads(json.dumps(found.to_dict()))
    assert (stored["kl"], stored["agreement"], stored["kl_per_window"]) == (found.kl, found.agreement, [0.5, 2.0])
