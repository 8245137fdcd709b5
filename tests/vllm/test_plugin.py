"""Sparse checkpoints on real vLLM, against transformers on the masked-dense model.

Float32 throughout: bfloat16 rounding would hide a wrong column behind a tolerance.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import maskgen
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.config import SparseConfig
from maskgen.core.digest import digest_json
from maskgen.core.errors import FormatError
from maskgen.core.mask import MaskSet
from maskgen.core.pattern import NMPattern
from maskgen.export.compress import decompress
from tests import models
from tests.vllm.offline import SHAPE, greedy, make_sparse, prompt_logprobs, serve, transformers_oracle


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen2", "qwen3", "mistral", "opt", "gpt_neox"])
def test_serves_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    sparse, masked = make_sparse(kind, tmp_path)
    tokens, logprobs = transformers_oracle(masked)
    with serve(sparse) as llm:
        stats = llm.collective_rpc("sparse_stats")[0]
        assert prompt_logprobs(llm) == pytest.approx(logprobs, abs=2e-4)
        assert greedy(llm) == tokens
    checkpoint = SparseCheckpoint.open(sparse)
    assert stats["sparse_layers"] > 0
    weights = sum(checkpoint.packed(name).dense_nbytes(torch.float32) for name in checkpoint.config.targets)
    assert stats["dense_equivalent_bytes"] == weights
    assert weights * (0.5 + 1 / 32) <= stats["sparse_weight_bytes"] < weights * 0.57, "stored size, and padded ends"


@pytest.mark.parametrize("pattern", ["1:4", "4:8"])
def test_other_patterns(pattern: str, tmp_path: Path) -> None:
    sparse, masked = make_sparse("llama", tmp_path, pattern)
    tokens, _ = transformers_oracle(masked)
    with serve(sparse, kernel="auto") as llm:
        assert greedy(llm) == tokens


def test_layers_that_a_budget_keeps_dense(text_file: Path, tmp_path: Path) -> None:
    dense = models.save("qwen2", tmp_path / "dense", **SHAPE)
    overrides = {"calibration.samples": 4, "calibration.window_tokens": 32}
    made = maskgen.prune(
        maskgen.PruneRequest(
            recipe="sparsegpt", model=dense, data=text_file, out=tmp_path / "sparse", overrides=overrides, bytes=0.75
        )
    )
    assert isinstance(made, maskgen.PruneResult) and made.allocation is not None
    decompress(made.out, tmp_path / "masked")
    tokens, _ = transformers_oracle(tmp_path / "masked")
    with serve(made.out) as llm:
        stats = llm.collective_rpc("sparse_stats")[0]
        assert greedy(llm) == tokens
    kept = sum(layer.dense for layer in made.allocation.layers)
    assert 0 < kept < 12 and (stats["sparse_layers"], stats["dense_layers"]) == (12 - kept, kept)


def test_tensor_parallel_2_gives_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, masked = make_sparse("llama", tmp_path)
    tokens, _ = transformers_oracle(masked)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with serve(sparse, tensor_parallel_size=2) as llm:
        stats = llm.collective_rpc("sparse_stats")
        assert greedy(llm) == tokens
    assert len(stats) == 2
    assert stats[0]["sparse_weight_bytes"] == stats[1]["sparse_weight_bytes"]


def test_a_half_sparse_fused_group_is_refused_by_name(tmp_path: Path) -> None:
    sparse, _ = make_sparse("llama", tmp_path, dense_layer="layers.1.self_attn.q_proj")
    with pytest.raises(Exception, match=r"layers\.1\.self_attn\.qkv_proj is one layer in vLLM"), serve(sparse):
        pass


def test_a_layer_that_neither_manifest_nor_files_know_is_refused(tmp_path: Path) -> None:
    sparse, masked = make_sparse("llama", tmp_path, dense_layer="layers.1.")
    name = "model.layers.1.mlp.down_proj"
    edit_config(sparse, lambda section: section["ignored"].remove(name))
    with serve(sparse) as llm:  # stored dense, as routers are that are no `nn.Linear`
        assert greedy(llm) == transformers_oracle(masked)[0]
    tensors = load_file(sparse / "model.safetensors")
    del tensors[f"{name}.weight"]
    save_file(tensors, sparse / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"neither targets nor ignored .* nor stored dense"), serve(sparse):
        pass


@pytest.mark.parametrize("name", ["mlp.extra_proj", "self_attn.rotary_emb.inv_freq_proj"])
def test_a_target_that_vllms_model_has_not_is_refused_before_it_loads(name: str, tmp_path: Path) -> None:
    """The manifest and the files agree on it. Of the first name vLLM would say that it has no such module; tensors with
    "rotary_emb.inv_freq" in their names it drops, and says nothing."""
    sparse, _ = make_sparse("llama", tmp_path)
    add_target(sparse, f"model.layers.0.{name}")
    words = rf"1 of \d+ sparse layers of the manifest are not in the model vLLM built, first model.layers.0.{name}"
    with pytest.raises(FormatError, match=words), serve(sparse):
        pass


def test_a_target_that_no_layer_claims_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_serve.plugin import config as plugin

    digest = digest_json({})
    targets = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    manifest = SparseConfig(NMPattern(2, 4), targets, (), digest, digest, "base", digest)
    config = plugin.SparseNMConfig(manifest)
    monkeypatch.setattr(plugin, "_on_this_rank", lambda module: True)
    config.attached.add(targets[0])
    with pytest.raises(FormatError, match=r"1 of 2 sparse layers .* first model\.layers\.1\.mlp\.down_proj"):
        config.check_all_attached()
    config.attached.add(targets[1])
    config.check_all_attached()


def test_a_layer_whose_name_leaves_a_level_out_is_found_in_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Falcon-H1 calls its `self_attn.qkv_proj` by a shorter name."""
    from sparse_serve.plugin import config as plugin

    digest = digest_json({})
    targets = tuple(f"model.layers.1{block}.self_attn.{part}_proj" for block in ("", "0") for part in "qkv")
    config = plugin.SparseNMConfig(SparseConfig(NMPattern(2, 4), targets, (), digest, digest, "base", digest))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    monkeypatch.setattr(plugin, "_stacked_modules", lambda prefix: [])
    assert config._stored_names("model.layers.1.qkv_proj") == list(targets[:3])
    assert config._stored_names("model.layers.2.qkv_proj") == [f"model.layers.2.{part}_proj" for part in "qkv"]


def test_damaged_bits_never_reach_a_kernel(tmp_path: Path) -> None:
    sparse, _ = make_sparse("llama", tmp_path)
    file = sparse / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.bitmask"][3, 0] = 0b0111_0011
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"layers\.2\.mlp\.up_proj: row 3, columns 4\.\.7 keep 3"), serve(sparse):
        pass


def test_an_unknown_kernel_is_an_error(tmp_path: Path) -> None:
    sparse, _ = make_sparse("llama", tmp_path)
    with pytest.raises(Exception, match="no 'fastest' in kernels"), serve(sparse, kernel="fastest"):
        pass


def add_target(sparse: Path, name: str) -> None:
    """Add a sparse layer to a checkpoint, files and manifest alike: a copy of another one under a name of its own."""
    file = sparse / "model.safetensors"
    tensors = load_file(file)
    for suffix in (".values", ".bitmask"):
        tensors[name + suffix] = tensors["model.layers.0.mlp.up_proj" + suffix].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    bitmasks = {name.removesuffix(".bitmask"): bits for name, bits in tensors.items() if name.endswith(".bitmask")}
    masks = MaskSet(NMPattern(2, 4), bitmasks, "", "")
    changes = {"targets": list(masks.names), "mask_digest": masks.digest()}
    edit_config(sparse, lambda section: section.update(changes))


def edit_config(path: Path, change: Any) -> None:
    """Change `quantization_config` of a checkpoint in place."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def test_a_dense_model_is_served_untouched(tmp_path: Path) -> None:
    _, masked = make_sparse("llama", tmp_path)
    shutil.rmtree(tmp_path / "sparse")
    with serve(masked) as llm:
        assert llm.collective_rpc("sparse_stats")[0]["sparse_layers"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": "cpu"}, r"unknown keys \['kernels'\], expected an object with some of"),
        ({"activations": "int4"}, r"activations is 'int4', expected one of \['float', 'int8'\]"),
        ("cpu", r"is 'cpu', expected an object"),
        ({"lm_head": "int4"}, r"lm_head is 'int4', expected one of \['float', 'int8'\]"),
        ({"lm_head": []}, r"lm_head is \[\], expected one of"),
    ],
)
def test_wrong_options_are_refused(options: object, message: str) -> None:
    from sparse_serve.plugin.options import Options, read_options

    wanted = {"activations": "int8", "lm_head": "int8"}
    assert read_options({"sparse_nm": wanted}) == Options("auto", "int8", "int8")
    assert read_options({"other": 1}) == read_options(None) == Options("auto", "float", "float")
    with pytest.raises(FormatError, match=message):
        read_options({"sparse_nm": options})
