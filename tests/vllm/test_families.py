"""Families whose layers vLLM names, fuses or builds in ways of their own, served sparse against transformers.

All the others: `python -m tests.vllm.families`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import maskgen
from tests import models
from tests.vllm import families, tiny

FAMILIES = {
    "Gemma3ForCausalLM": 8,  # sliding windows, norms of queries and keys
    "Phi3ForCausalLM": 8,  # stored fused, as vLLM has it
    "Glm4ForCausalLM": 8,  # half of it is, and with biases
    "GPTJForCausalLM": 8,  # fused by a class that does not say so
    "FalconForCausalLM": 8,  # stored fused, attention beside the MLP
    "CohereForCausalLM": 8,
    "Qwen2MoeForCausalLM": 8,  # a shared expert, and its gate that is no layer of vLLM's
    "Qwen3MoeForCausalLM": 6,  # a router that is no `nn.Linear`
}
"""Linear layers that are sparse in vLLM, in two blocks."""


@pytest.mark.parametrize("name", FAMILIES)
def test_is_served_as_transformers_computes_it(name: str, tmp_path: Path) -> None:
    found = families.agreement(tiny.configs(name)[-1], tmp_path)
    assert (found.sparse_layers, found.same_tokens) == (FAMILIES[name], found.tokens)
    assert found.error < 2e-5 * max(1.0, found.spread)
    assert found.distinct > 2 and found.spread > 0.05, "a constant would hide a mistake"


def test_attention_with_a_latent_cache_keeps_the_layer_dense_that_it_reads(tmp_path: Path) -> None:
    found = families.agreement(tiny.configs("DeepseekV2ForCausalLM")[-1], tmp_path)
    assert found.sparse_layers == 10, "per block three of attention and two of an MLP or shared expert"
    assert found.error < 0.05 * found.spread, "in bfloat16, and so not the same tokens"


def test_widths_that_no_kernel_is_cut_for_are_dense_or_served(tmp_path: Path) -> None:
    """260 columns fit no group of 8 and stay dense, by name; 200 and 160 are no multiple of a kernel's tile."""
    (config,) = tiny.configs("LlamaForCausalLM")
    config.update({"hidden_size": 260, "intermediate_size": 200, "num_attention_heads": 5, "num_key_value_heads": 1})
    dense, sparse, masked = tmp_path / "dense", tmp_path / "sparse", tmp_path / "masked"
    tiny.save(config, dense)
    models.tokenizer().save_pretrained(dense)
    pruned = maskgen.prune(maskgen.PruneRequest(recipe="magnitude", model=dense, out=sparse))
    assert isinstance(pruned, maskgen.PruneResult)
    assert {one.reason for one in pruned.plan.kept} == {"in_features 260 is not a multiple of 8"}
    maskgen.decompress(maskgen.DecompressRequest(model=sparse, out=masked))
    found = families.served_like(sparse, masked, "float32")
    assert (found.sparse_layers, found.same_tokens) == (4, found.tokens), "o_proj and down_proj of two blocks"
    assert found.error < 2e-5 * max(1.0, found.spread) and found.distinct > 2
