"""Sparse checkpoints on real vLLM, against transformers on the masked-dense model.

Each model is served in this process (tensor parallel 2 needs processes of its own and runs once). Float32 throughout:
bfloat16 rounding would hide a wrong column behind a tolerance.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskgen.core.checkpoint import WEIGHT_SUFFIX, SparseCheckpoint, iterate_tensors, read_headers
from maskgen.core.config import SparseConfig
from maskgen.core.digest import digest_json, digest_weights
from maskgen.core.errors import FormatError
from maskgen.core.mask import MaskSet
from maskgen.core.pattern import NMPattern
from maskgen.export.compress import compress_masks, decompress
from tests import models

PROMPTS = [[5, 9, 17, 33, 65, 129, 7, 70], [200, 100, 50, 25], [300, 3, 30]]
NEW_TOKENS = 12
SHAPE: dict[str, Any] = {"hidden_size": 128, "dtype": torch.float32}
HEAD_DIM = {"qwen3": {"head_dim": 32}}  # the smallest vLLM's CPU attention has; the others derive it


def make_sparse(kind: str, root: Path, pattern: str = "2:4", dense_layer: str | None = None) -> tuple[Path, Path]:
    """A sparse checkpoint and its masked-dense twin. `dense_layer`: part of the names of layers to leave dense."""
    base, sparse, masked = root / "base", root / "sparse", root / "masked"
    models.save(kind, base, **SHAPE, **HEAD_DIM.get(kind, {}))
    nm = NMPattern.parse(pattern)
    masks, ignored = {}, []
    for name, tensor in iterate_tensors(read_headers(base)):
        module = name.removesuffix(WEIGHT_SUFFIX)
        if tensor.ndim != 2 or module == name or "embed" in module:
            continue
        if ".layers." not in module or (dense_layer is not None and dense_layer in module):
            ignored.append(module)
        else:
            masks[module] = nm.mask_from_scores(tensor.abs())
    mask_set = MaskSet.from_masks(nm, masks, digest_weights(base), digest_json({"method": "magnitude"}))
    compress_masks(base, mask_set, sparse, tuple(ignored))
    decompress(sparse, masked)
    return sparse, masked


@contextmanager
def serve(path: Path, dtype: str = "float32", **options: Any) -> Iterator[Any]:
    """A vLLM engine that is really gone afterwards."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(
        str(path),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=64,
        worker_extension_cls="sparse_serve.plugin.worker.WorkerExtension",
        **options,
    )
    try:
        yield llm
    finally:
        if hasattr(llm.llm_engine.engine_core, "shutdown"):
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(llm: Any) -> list[list[int]]:
    """Greedy continuations of `PROMPTS`, in new tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompt_logprobs(llm: Any) -> list[float]:
    """Log-probabilities of every prompt token but the first, over all prompts."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
    return [
        entry[token].logprob
        for output, ids in zip(outputs, PROMPTS, strict=True)
        for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)
    ]


@torch.no_grad()
def transformers_oracle(masked: Path) -> tuple[list[list[int]], list[float]]:
    """The same two answers from transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(masked, dtype=torch.float32)
    tokens, logprobs = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        picked = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        logprobs += picked.flatten().tolist()
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        tokens.append(ids[0, len(prompt) :].tolist())
    return tokens, logprobs


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
    with serve(sparse) as llm:
        assert greedy(llm) == tokens


def test_some_layers_dense(tmp_path: Path) -> None:
    sparse, masked = make_sparse("qwen2", tmp_path, dense_layer="layers.1.")
    tokens, _ = transformers_oracle(masked)
    with serve(sparse) as llm:
        stats = llm.collective_rpc("sparse_stats")[0]
        assert greedy(llm) == tokens
    assert (stats["sparse_layers"], stats["dense_layers"]) == (8, 4)


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


def test_a_layer_the_manifest_does_not_know_is_refused(tmp_path: Path) -> None:
    sparse, _ = make_sparse("llama", tmp_path, dense_layer="layers.1.")
    edit_config(sparse, lambda section: section["ignored"].remove("model.layers.1.mlp.down_proj"))
    with pytest.raises(Exception, match="neither targets nor ignored"), serve(sparse):
        pass


def test_fewer_layers_than_the_manifest_are_refused(tmp_path: Path) -> None:
    """The manifest and the files agree on an extra target, but vLLM's model has no such layer."""
    sparse, _ = make_sparse("llama", tmp_path)
    file = sparse / "model.safetensors"
    tensors = load_file(file)
    for suffix in (".values", ".bitmask"):
        tensors["model.layers.0.mlp.extra_proj" + suffix] = tensors["model.layers.0.mlp.up_proj" + suffix].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    bitmasks = {name.removesuffix(".bitmask"): bits for name, bits in tensors.items() if name.endswith(".bitmask")}
    masks = MaskSet(NMPattern(2, 4), bitmasks, "", "")
    changes = {"targets": list(masks.names), "mask_digest": masks.digest()}
    edit_config(sparse, lambda section: section.update(changes))
    with (
        pytest.raises(Exception, match=r"sparse layers of the manifest are not in the model|extra_proj"),
        serve(sparse),
    ):
        pass


def test_a_target_that_no_layer_claims_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_serve.plugin import linear

    digest = digest_json({})
    targets = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    manifest = SparseConfig(NMPattern(2, 4), targets, (), digest, digest, "base", digest)
    config = linear.SparseNMConfig(manifest)
    monkeypatch.setattr(linear, "_on_this_rank", lambda module: True)
    config.attached.add(targets[0])
    with pytest.raises(FormatError, match=r"1 of 2 sparse layers .* first model\.layers\.1\.mlp\.down_proj"):
        config.check_all_attached()
    config.attached.add(targets[1])
    config.check_all_attached()


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
    options = {"additional_config": {"sparse_nm": {"kernel": "fastest"}}}
    with pytest.raises(Exception, match="no 'fastest' in kernels"), serve(sparse, **options):
        pass


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
