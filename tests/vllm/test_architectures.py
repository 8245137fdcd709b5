"""The table of what vLLM serves is what vLLM says of itself."""

from __future__ import annotations

import json

import pytest

from tests.vllm import architectures


@pytest.mark.parametrize(
    "name",
    [
        *("LlamaForCausalLM", "Glm4ForCausalLM", "Qwen2MoeForCausalLM", "DeepseekV2ForCausalLM"),
        "Gemma3ForConditionalGeneration",  # its tower is left out, and its blocks have other names in the files
        "GptOssForCausalLM",  # its class asks whether it is quantised
    ],
)
def test_the_committed_table_is_what_vllm_does(name: str) -> None:
    import vllm

    table = json.loads(architectures.TABLE.read_text())
    assert table["vllm"] == vllm.__version__.split("+")[0], "run make architectures"
    assert table["architectures"][name] == architectures.family(name)


def test_every_architecture_that_generates_text_is_in_it() -> None:
    table = json.loads(architectures.TABLE.read_text())
    assert set(architectures.generating()) <= table["architectures"].keys()


def test_what_vllm_reads_itself_is_dense_and_what_it_fuses_is_together() -> None:
    """Facts of some families that pruning depends on."""
    families = json.loads(architectures.TABLE.read_text())["architectures"]
    assert "self_attn.kv_b_proj" in families["DeepseekV2ForCausalLM"]["dense"], "vLLM multiplies by its dense weight"
    assert "mlp.shared_expert_gate" in families["Qwen2MoeForCausalLM"]["dense"], "vLLM builds it without a config"
    assert families["GPTJForCausalLM"]["fused"]["qkv_proj"] == ["q_proj", "k_proj", "v_proj"]
    attention = {f"self_attn.{part}_proj" for part in "qkvo"}
    for hybrid in ("GraniteMoeHybrid", "Jamba", "Qwen3Next", "Qwen3_5"):
        assert attention < set(families[f"{hybrid}ForCausalLM"]["sparse"]), "most blocks of these have none"
    assert families["Phi3ForCausalLM"]["fused"] == {}, "the checkpoint's own layers are those of vLLM"
