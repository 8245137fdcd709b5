"""`sparse-serve tune` and `doctor` on a checkpoint that the real engine then serves with what they found."""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.correction import CorrectionConfig, LowRankCorrection, PooledCorrection
from maskgen.core.errors import FormatError
from maskgen.core.packed import PackedTensor
from maskgen.core.quality import QUALITY_FILE, Quality
from sparse_serve.bench import layer_peers
from sparse_serve.bench.corrections import with_correction
from sparse_serve.bench.survey import Survey, kinds_of, memory_of, rows_of
from sparse_serve.cli.doctor import dense_lines, memory_line
from sparse_serve.kernels import reference
from sparse_serve.plugin import quantised
from sparse_serve.runtime.errors import SettingsError
from sparse_serve.tuning.decision import BucketChoice
from sparse_serve.tuning.dispatch import Plan
from sparse_serve.tuning.selection import BUCKETS, Choice
from tests import models
from tests.vllm import families, tiny
from tests.vllm.nursery import command
from tests.vllm.offline import serve
from tests.vllm.serving import SHAPE, damage_digest


def figures(cache: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (cache / "sparse-serve").rglob("*.json")}


def test_what_is_tuned_is_what_doctor_tells_and_the_engine_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse, cache = tmp_path / "sparse", tmp_path / "cache"
    models.save("llama", tmp_path / "dense", **SHAPE)
    models.save_sparse(tmp_path / "dense", sparse)
    quality = Quality(20.0, 50.0, 0.75, 0.5, 16, 512, False, ("a.txt",), "sparsegpt", "2:4")
    (sparse / QUALITY_FILE).write_text(json.dumps(quality.to_dict()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    tuned = command("tune", sparse, "--dtype", "float32")
    assert tuned.returncode == 0, tuned.stderr
    assert "WARNING" not in tuned.stderr
    known = figures(cache)
    assert len(known) == 4, "query, key and value are one layer in vLLM, gate and up another"

    told = command("doctor", sparse, "--dtype", "float32", "--peers")
    not_worth_it = "slower than dense with" in told.stdout or "could not be measured" in told.stdout
    assert told.returncode == (1 if not_worth_it else 0), told.stderr
    for layer in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        assert f"{models.LAYERS} {layer}" in told.stdout
    assert f"{len(SparseCheckpoint.open(sparse).config.targets)} layers are sparse, exactly 2 of every 4" in told.stdout
    assert "dense: lm_head, model.embed_tokens (outside of the decoder blocks)" in told.stdout
    first, *others = (f"  {line}\n" for line in quality.lines())
    assert "".join([f"  quality: {first.lstrip()}", *others]) in told.stdout and len(others) > 1
    assert "memory of these layers" in told.stdout and "sparse ms" in told.stdout
    rows = re.findall(rf"vllm W8A8 +{4 * models.LAYERS} ", told.stdout)
    if torch.cpu._is_amx_tile_supported():
        assert told.stdout.count("W8A8 has no layer of ") == 4 and not rows
    else:
        assert len(rows) == 3, f"all layers, at three numbers of tokens: {told.stdout[-3000:]}"
    if quantised.has_int4():
        assert told.stdout.count(f"vLLM's {quantised.int4_name()} has no layer of ") == 4
        assert "in torch.float32: bfloat16 and inputs in groups" in told.stdout
    else:
        assert told.stdout.count(quantised.NO_INT4) == 4

    with serve(sparse, kernel="auto") as llm:
        stats = llm.collective_rpc("sparse_stats")[0]
    assert figures(cache) == known, "nothing was left to measure"
    if set(stats["kernels"]) != {"reference"}:  # where the native kernel cannot be used
        assert len(stats["choices"]) == 4 * len(BUCKETS)


def test_layers_beside_quantised_ones_of_the_same_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.save("llama", tmp_path / "dense", **SHAPE | {"intermediate_size": 224})
    models.save_sparse(tmp_path / "dense", tmp_path / "sparse")
    checkpoint = SparseCheckpoint.open(tmp_path / "sparse")
    names = [f"model.layers.{block}.mlp.{part}_proj" for block in (0, 1) for part in ("up", "down")]
    kinds = kinds_of(checkpoint, {name: [name] for name in names}, "bfloat16")
    survey = Survey(checkpoint, kinds, [Choice(kind, Plan.of("reference")) for kind in kinds], {})
    monkeypatch.setattr(layer_peers, "BUDGET_S", 0.0)
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    monkeypatch.setattr(quantised, "GROUPS", (128,))
    times = layer_peers.compare(survey, threads=1)
    assert [(step.tokens, step.peer, step.layers) for step in times.steps] == [
        (tokens, peer, layers)
        for tokens in layer_peers.TOKENS
        for peer, layers in (("vllm W8A8", 4), *([("vllm W4A16", 2)] if quantised.has_int4() else []))
    ]
    refused = ["vllm W4A16, 128x224"] if quantised.has_int4() else ["vllm W4A16, 224x128", "vllm W4A16, 128x224"]
    assert list(times.refused) == refused
    assert ("groups of one of" if quantised.has_int4() else quantised.NO_INT4) in times.refused["vllm W4A16, 128x224"]
    assert all(step.sparse_s > 0 and step.peer_s > 0 for step in times.steps)
    for tokens in layer_peers.TOKENS:
        both, *one = (step.sparse_s for step in times.steps if step.tokens == tokens)
        assert all(part < both for part in one), "only layers that the peer has count"
    on_gpu = replace(survey, kinds={replace(kind, device_type="cuda"): names for kind, names in kinds.items()})
    with pytest.raises(SettingsError, match="--peers: vLLM's quantised layers are timed on a CPU, and this is cuda"):
        layer_peers.compare(on_gpu)


def test_what_vllm_cannot_serve_is_said_in_one_line_with_what_to_do(tmp_path: Path) -> None:
    from vllm import ModelRegistry

    from sparse_serve.plugin.served import READ, served_layers

    config = tiny.configs("DeepseekV2ForCausalLM")[1]
    sparse, _ = families.prune(config, tmp_path, also=("kv_b_proj",))
    words = "READ, so it cannot be served packed; prune again with it dense: --set 'ignore=[\"*.kv_b_proj\"]'"
    with pytest.raises(FormatError, match=re.escape(words.replace("READ", READ))):
        served_layers(SparseCheckpoint.open(sparse))
    told = command("doctor", sparse)
    assert (told.returncode, told.stderr.count("\n"), READ in told.stderr) == (2, 1, True)
    file = sparse / "config.json"
    file.write_text(file.read_text().replace("DeepseekV2ForCausalLM", "NobodysForCausalLM"))
    with pytest.raises(SettingsError, match=r"vLLM \S+ cannot serve it \(NobodysForCausalLM\)"):
        served_layers(SparseCheckpoint.open(sparse))
    ModelRegistry.register_model("NobodysForCausalLM", "not_installed.nobody:Nobody")
    with pytest.raises(SettingsError, match=r"\(NobodysForCausalLM\): No module named 'not_installed'; for other"):
        served_layers(SparseCheckpoint.open(sparse))


def test_a_failing_disk_is_not_put_down_to_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_serve.plugin import served

    def fail(*args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/models/config.json")

    models.save("llama", tmp_path / "dense", **SHAPE)
    models.save_sparse(tmp_path / "dense", tmp_path / "sparse")
    monkeypatch.setattr(served, "build", fail)
    with pytest.raises(OSError, match=r"Input/output error: '/models/config\.json'"):
        served.served_layers(SparseCheckpoint.open(tmp_path / "sparse"))


def test_why_layers_are_dense_is_said(tmp_path: Path) -> None:
    from sparse_serve.plugin.served import EXPERTS, NOT_PACKABLE, served_layers

    sparse, _ = families.prune(tiny.configs("Qwen2MoeForCausalLM")[0], tmp_path)
    lines = dense_lines(served_layers(SparseCheckpoint.open(sparse)).dense)
    experts = ", ".join(f"model.layers.*.mlp.experts.*.{part}_proj" for part in ("down", "gate", "up"))
    assert f"{experts} ({EXPERTS})" in lines
    assert f"model.layers.*.mlp.gate, model.layers.*.mlp.shared_expert_gate ({NOT_PACKABLE})" in lines


def test_what_a_doctor_does_not_examine(tmp_path: Path) -> None:
    models.save("llama", tmp_path / "dense", **SHAPE)
    models.save_sparse(tmp_path / "dense", tmp_path / "sparse")
    dense = command("doctor", tmp_path / "dense")
    assert dense.returncode == 2
    assert "a dense model; make it sparse with maskgen run" in dense.stderr
    file = tmp_path / "sparse" / "config.json"
    written = file.read_text()
    file.write_text(json.dumps(json.loads(written) | {"rms_norm_eps": 1e5}))
    edited = command("doctor", tmp_path / "sparse")
    assert edited.returncode == 2
    assert "config.json: rms_norm_eps is 100000.0, and was 1e-0" in edited.stderr
    file.write_text(written)
    damage_digest(tmp_path / "sparse")
    damaged = command("doctor", tmp_path / "sparse")
    assert damaged.returncode == 2
    assert "masks and manifest come from different runs" in damaged.stderr
    threads = command("tune", tmp_path / "sparse", "--threads", "0")
    assert (threads.returncode, "--threads 0: input should be greater" in threads.stderr) == (2, True)


def test_the_memory_counted_is_that_of_the_device_served_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts of a GPU's kernels can be made there only. `meta` stands for one: what is on a CPU shows."""
    models.save("llama", tmp_path / "dense", **SHAPE)
    models.save_sparse(tmp_path / "dense", tmp_path / "sparse")
    prepare = reference.prepare

    def on_meta(packed: PackedTensor) -> dict[str, Tensor]:
        assert packed.values.is_meta and packed.bitmask.is_meta
        return prepare(packed)

    monkeypatch.setattr(reference, "prepare", on_meta)
    checkpoint = SparseCheckpoint.open(tmp_path / "sparse")
    layers = {name: [name] for name in checkpoint.config.targets}
    found = kinds_of(checkpoint, layers, "float32")
    kinds = {replace(kind, device_type="meta"): names for kind, names in found.items()}
    told = memory_line(memory_of(checkpoint, kinds, [Choice(kind, Plan.of("reference")) for kind in kinds]))
    assert "0.5312 of it" in told


@pytest.mark.parametrize("form", [LowRankCorrection(8), PooledCorrection(8, "fixed")], ids=str)
def test_a_correction_is_priced(tmp_path: Path, form: CorrectionConfig) -> None:
    """In bytes as the engine holds it, and in the time of every number of tokens, which dense does not need."""
    models.save("llama", tmp_path / "dense", **SHAPE)
    models.save_corrected(tmp_path / "dense", tmp_path / "sparse", form)
    checkpoint = SparseCheckpoint.open(tmp_path / "sparse")
    attention = "model.layers.0.self_attn"
    parts = [f"{attention}.{part}_proj" for part in "qkv"]
    kinds = kinds_of(checkpoint, {f"{attention}.qkv_proj": parts}, "bfloat16")
    (kind,) = kinds
    buckets = (BucketChoice(1, "reference", 1e-6, 2.0), BucketChoice(64, "reference", 2e-6, 1.0))
    choice = Choice(kind, Plan.of("reference"), buckets)
    memory = memory_of(checkpoint, kinds, [choice])
    stored = sum(one.nbytes for part in parts if (one := checkpoint.layer(part).correction) is not None) // 2
    if form.stores_pool:
        assert stored <= memory.correction_bytes <= 2.5 * stored, "float32 as bfloat16, in blocks of 16 rows"
    else:
        assert memory.correction_bytes == stored, "float32 as bfloat16"
    elsewhere = {replace(kind, device_type="meta"): names for kind, names in kinds.items()}
    (meta,) = elsewhere
    at_gpus = memory_of(checkpoint, elsewhere, [replace(choice, spec=meta)])
    assert at_gpus.correction_bytes == stored, "blocks are for CPUs"
    assert "MB of that for corrections" in memory_line(memory)
    plain = replace(memory, resident_bytes=memory.resident_bytes - memory.correction_bytes, correction_bytes=0)
    assert "corrections" not in memory_line(plain)
    priced = with_correction(choice, form, rows_of(checkpoint, kinds[kind]))
    for before, after in zip(buckets, priced.buckets, strict=True):
        assert after.seconds > before.seconds and (after.tokens, after.kernel) == (before.tokens, before.kernel)
        assert after.seconds * after.speedup == pytest.approx(before.seconds * before.speedup), "dense takes as long"
    assert priced.slower == [1, 64], "these are shorter than any call"
