"""Why a matrix stays dense, told from its name and shape alone, and how much of the blocks that is."""

from __future__ import annotations

import pytest

from maskgen.core.pattern import NMPattern
from maskgen.hf import dense
from maskgen.hf.dense import KeptDense, Rules
from maskgen.hf.servable import Served

TWO_FOUR = NMPattern(2, 4)
NOT_CHECKED = Rules(TWO_FOUR, "Some", None, frozenset({4}))
CHECKED = Rules(
    TWO_FOUR,
    "Some",
    Served(frozenset({"attn.q_proj", "mlp.gate", "attn.kv_b_proj", "mlp.experts.*.w1"}), ()),
    frozenset(),
)


@pytest.mark.parametrize(
    ("name", "shape", "not_checked", "checked"),
    [
        ("attn.q_proj", (64, 64), None, None),
        ("attn.q_proj", (64, 20), "in_features 20 is not a multiple of 8", "in_features 20 is not a multiple of 8"),
        ("attn.o_proj", (64, 64), None, dense.NOT_SERVED),
        ("mlp.gate", (4, 64), dense.ROUTER, dense.ROUTER),
        ("block_sparse_moe.router.layer", (4, 64), dense.ROUTER, dense.ROUTER),
        ("mlp.shared_expert_gate", (1, 64), dense.ROUTER, dense.ROUTER),
        ("mlp.gate_proj", (64, 64), None, dense.NOT_SERVED),
        ("attn.kv_b_proj", (64, 64), dense.LATENT, None),
        ("mlp.experts.3.w1", (64, 64), dense.EXPERTS, None),
        ("mlp.experts.3.w2", (64, 64), dense.EXPERTS, dense.EXPERTS),
        ("mlp.experts.gate_up_proj", (4, 64, 64), dense.EXPERTS, dense.EXPERTS),
        ("moe.input_linear", (4, 64, 64), dense.EXPERTS, dense.NOT_LINEAR),
        ("mlp.shared_experts.up_proj", (64, 64), None, dense.NOT_SERVED),
        ("mixer.conv1d", (4, 1, 4), dense.NOT_LINEAR, dense.NOT_LINEAR),
    ],
)
def test_reasons(name: str, shape: tuple[int, ...], not_checked: str | None, checked: str | None) -> None:
    assert NOT_CHECKED.reason(name, shape) == not_checked
    assert CHECKED.reason(name, shape) == checked


def test_kinds_are_counted_together() -> None:
    matrices = [
        ("layers.0.mlp.experts.0.w1", 30, dense.EXPERTS),
        ("layers.1.mlp.experts.gate_up_proj", 20, dense.EXPERTS),
        ("layers.0.mlp.gate", 2, dense.ROUTER),
        ("layers.1.mlp.gate", 2, dense.ROUTER),
        ("layers.1.attn.o_proj", 6, "ignored by 'x'"),
    ]
    assert dense.kept_dense(matrices, 100) == [
        KeptDense("experts", 2, 0.5, dense.EXPERTS),
        KeptDense("layers.1.attn.o_proj", 1, 0.06, "ignored by 'x'"),
        KeptDense("layers.*.mlp.gate", 2, 0.04, dense.ROUTER),
    ]


def test_what_a_checkpoint_keeps_dense() -> None:
    targets = {"model.layers.0.attn.q_proj": (8, 8), "model.layers.1.attn.q_proj": (8, 8)}
    shapes = {
        "model.embed.weight": (100, 8),
        "tower.layers.0.attn.q_proj.weight": (100, 8),
        "model.layers.0.norm.weight": (8,),
        "model.layers.0.attn.o_proj.weight": (8, 8),
        "model.layers.0.mixer.A_log": (4, 16),
        "model.layers.1.mlp.experts.up_proj": (4, 4, 8),
    }
    assert dense.kept_in_checkpoint(shapes, targets, NOT_CHECKED) == [
        KeptDense("experts", 1, 128 / 384, dense.EXPERTS),
        KeptDense("model.layers.0.attn.o_proj", 1, 64 / 384, dense.LEFT_OUT),
        KeptDense("model.layers.0.mixer.A_log", 1, 64 / 384, dense.NOT_LINEAR),
    ]
