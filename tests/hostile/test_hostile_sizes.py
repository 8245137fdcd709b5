"""`config.json` that asks an engine for more memory than the checkpoint's own size justifies, section by section."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.pattern import NMPattern
from maskgen.core.sizes import check_dimensions
from maskgen.export.compress import check_source
from tests import models
from tests.directories import HIDDEN, INNER, LAYERS, VOCABULARY, edit_config, refused, sparse_dir

Config = dict[str, Any]
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
NOT_SIZES = [10**12, 2**63, 10**100, -1, True, False, "4", 4.0, {"a": 4}, [True], ["4"], [4, 10**12], "9" * 10**6]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_dir(tmp_path_factory.mktemp("hostile") / "tiny")


@pytest.fixture
def victim(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "victim"))


@pytest.fixture(params=[0, 1, 2], ids=["top", "text_config", "nested twice"])
def edit(request: pytest.FixtureRequest, victim: Path) -> Callable[..., None]:
    """Change sizes at the top, or in a `text_config`, or in one inside that."""

    def change(**sizes: Any) -> None:
        def nest(config: Config) -> None:
            for _ in range(request.param):
                config = config.setdefault("text_config", {})
            config.update(sizes)

        edit_config(victim, nest)

    return change


@pytest.mark.parametrize("value", NOT_SIZES)
@pytest.mark.parametrize("key", [*HEADS, *EXPERTS, "moe_intermediate_size", "kv_lora_rank"])
def test_values_that_are_no_size(victim: Path, key: str, value: Any) -> None:
    edit_config(victim, lambda config: config.update({key: value}))
    refused(SparseCheckpoint.open, victim, rf"config\.json: {key} .*, expected [01] to \d+ \(the ")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 10**9}, "hidden_size 1000000000 is not a dimension"),
        ({"vocab_size": 33}, "vocab_size 33 is not a dimension"),
        ({"num_hidden_layers": LAYERS + 1}, "num_hidden_layers 3, but tensors of 2 blocks"),
        ({"num_attention_heads": 0}, "num_attention_heads 0, expected 1 to 64"),
        ({"num_attention_heads": INNER + 1}, "num_attention_heads 65, expected 1 to 64"),
        ({"num_key_value_heads": 65}, "num_key_value_heads 65, expected 1 to 64"),
        ({"head_dim": 65}, "head_dim 65, expected 1 to 64"),
        ({"num_attention_heads": 8, "head_dim": 33}, "num_attention_heads 8 times head_dim 33 is more than 4 times 64"),
        ({"num_key_value_heads": 64, "head_dim": 5}, "num_key_value_heads 64 times head_dim 5"),
        ({"num_attention_heads": 64, "v_head_dim": 5}, "num_attention_heads 64 times v_head_dim 5"),
        ({"num_experts": 41}, "num_experts 41, expected 0 to 19"),
        ({"num_local_experts": 65}, "num_local_experts 65"),
        ({"n_routed_experts": 20}, "n_routed_experts 20"),
        ({"moe_intermediate_size": 65}, "moe_intermediate_size 65"),
        ({"intermediate_size": 33}, "intermediate_size 33 is not a dimension"),
        ({"intermediate_size": 33, "moe_intermediate_size": 16}, "intermediate_size 33"),
        ({"hidden_size": 32, "intermediate_size": 513, "moe_intermediate_size": 16}, "intermediate_size 513"),
        ({"intermediate_size": 33, "block_auto_adjust_ff_dim": "true"}, "intermediate_size 33 is not a dimension"),
        ({"hidden_size": 32, "intermediate_size": 513, "block_auto_adjust_ff_dim": True}, "intermediate_size 513"),
        ({"hidden_size": 32, "intermediate_size": -1, "moe_intermediate_size": 16}, "intermediate_size -1"),
        ({"hidden_size": 32, "intermediate_size": 2.0, "moe_intermediate_size": 16}, r"intermediate_size 2\.0"),
    ],
)
def test_a_size_that_nothing_stored_bears_out(
    victim: Path, edit: Callable[..., None], sizes: Config, message: str
) -> None:
    edit(**sizes)
    if "moe_intermediate_size" in sizes and "hidden_size" not in sizes:
        edit_config(victim, lambda config: config.pop("hidden_size"))
    refused(SparseCheckpoint.open, victim, rf"config\.json: (text_config: )*{message}")


@pytest.mark.parametrize("tokens", [2**27 + 1, 2**63, 10**100, 0, -1, True, "128", 128.0])
def test_context_lengths(victim: Path, edit: Callable[..., None], tokens: Any) -> None:
    edit(max_position_embeddings=tokens)
    refused(SparseCheckpoint.open, victim, r"max_position_embeddings .*, expected 1 to 134217728")


@pytest.mark.parametrize("section", [[], "x", 1, True, [{"hidden_size": 10**12}]])
def test_text_config_of_another_kind(victim: Path, section: Any) -> None:
    edit_config(victim, lambda config: config.update(text_config=section))
    refused(SparseCheckpoint.open, victim, r"config\.json: text_config .*, expected an object")


def test_text_config_without_end(victim: Path) -> None:
    nested: Config = {"hidden_size": 10**12}
    for _ in range(300):
        nested = {"text_config": nested}
    edit_config(victim, lambda config: config.update(nested))
    refused(SparseCheckpoint.open, victim, "text_config: text_config: another text_config; they may not be nested")


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32},
        {"num_attention_heads": 4, "num_key_value_heads": None, "head_dim": None},
        {"num_key_value_heads": [4, 4], "max_position_embeddings": 2**27},
        {"num_experts": 40, "num_local_experts": 0, "n_routed_experts": 19, "num_experts_per_tok": 2},
        {"hidden_size": HIDDEN, "intermediate_size": 512, "moe_intermediate_size": 16},
        {"hidden_size": HIDDEN, "intermediate_size": 33, "block_auto_adjust_ff_dim": True},
        {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS},
    ],
)
def test_sizes_of_sound_models(victim: Path, edit: Callable[..., None], sizes: Config) -> None:
    edit(**sizes)
    SparseCheckpoint.open(victim)


@pytest.mark.parametrize("kind", models.BUILDERS)
def test_every_tiny_model_is_accepted(kind: str, model_dir: Callable[..., Path]) -> None:
    check_source(model_dir(kind), NMPattern(2, 4), (), ())


REAL: dict[str, tuple[Config, dict[str, tuple[int, ...]]]] = {
    "dense, heads wider than the model": (
        {"hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 151936, "num_hidden_layers": 1}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960},
        {"q_proj": (2048, 1024), "k_proj": (1024, 1024), "down_proj": (1024, 3072), "embed_tokens": (151936, 1024)},
    ),
    "experts only": (
        {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 1}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
        | {"num_experts_per_tok": 8, "vocab_size": 151936, "mlp_only_layers": []},
        {"q_proj": (4096, 2048), "gate": (128, 2048), "experts.0.down_proj": (2048, 768), "embed": (151936, 2048)},
    ),
    "latent attention and shared experts": (
        {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 1}
        | {"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512}
        | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256}
        | {"n_shared_experts": 1, "num_experts_per_tok": 8, "max_position_embeddings": 163840},
        {"q_b_proj": (24576, 1536), "kv_b_proj": (32768, 512), "gate": (256, 7168), "mlp.up_proj": (18432, 7168)}
        | {"experts.0.up_proj": (2048, 7168)},
    ),
    "fused projections": (
        {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 1}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 131072},
        {"qkv_proj": (9216, 3072), "gate_up_proj": (16384, 3072), "down_proj": (3072, 8192)},
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_published_architectures_are_accepted(name: str, tmp_path: Path) -> None:
    config, shapes = REAL[name]
    check_dimensions(tmp_path, config, {f"model.layers.0.{key}.weight": shape for key, shape in shapes.items()})
