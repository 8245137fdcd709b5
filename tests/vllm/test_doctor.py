"""`sparse-serve tune` and `doctor` on a checkpoint that the real engine then serves with what they found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from maskgen.core.checkpoint import SparseCheckpoint
from sparse_serve.tuning.selection import BUCKETS
from tests import models
from tests.vllm.serving import SHAPE, damage_digest
from tests.vllm.test_plugin import serve


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: it imports vLLM, which changes the environment of whoever does."""
    command = [sys.executable, "-m", "sparse_serve.cli.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def figures(cache: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (cache / "sparse-serve").rglob("*.json")}


def test_what_is_tuned_is_what_doctor_tells_and_the_engine_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse, cache = tmp_path / "sparse", tmp_path / "cache"
    models.save("llama", tmp_path / "dense", **SHAPE)
    models.save_sparse(tmp_path / "dense", sparse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    tuned = run("tune", sparse, "--dtype", "float32")
    assert tuned.returncode == 0, tuned.stderr
    assert "WARNING" not in tuned.stderr
    known = figures(cache)
    assert len(known) == 4, "query, key and value are one layer in vLLM, gate and up another"

    told = run("doctor", sparse, "--dtype", "float32")
    assert told.returncode in (0, 1), told.stderr
    for layer in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        assert f"{models.LAYERS} {layer}" in told.stdout
    assert f"{len(SparseCheckpoint.open(sparse).config.targets)} layers are sparse, exactly 2 of every 4" in told.stdout
    assert "memory of these layers" in told.stdout and "sparse ms" in told.stdout

    with serve(sparse) as llm:
        stats = llm.collective_rpc("sparse_stats")[0]
    assert figures(cache) == known, "nothing was left to measure"
    if set(stats["kernels"]) != {"reference"}:  # where the native kernel cannot be used
        assert len(stats["choices"]) == 4 * len(BUCKETS)


def test_what_a_doctor_does_not_examine(tmp_path: Path) -> None:
    models.save("llama", tmp_path / "dense", **SHAPE)
    models.save_sparse(tmp_path / "dense", tmp_path / "sparse")
    dense = run("doctor", tmp_path / "dense")
    assert dense.returncode == 2
    assert "a dense model; make it sparse with maskgen run" in dense.stderr
    damage_digest(tmp_path / "sparse")
    damaged = run("doctor", tmp_path / "sparse")
    assert damaged.returncode == 2
    assert "masks and manifest come from different runs" in damaged.stderr
    threads = run("tune", tmp_path / "sparse", "--threads", "0")
    assert (threads.returncode, "--threads 0: input should be greater" in threads.stderr) == (2, True)


def test_the_memory_counted_is_that_of_the_device_served_on(tmp_path: Path) -> None:
    """Layouts of a GPU's kernels can be made there only. `meta` stands for one: what is on a CPU shows."""
    models.save("llama", tmp_path / "dense", **SHAPE)
    models.save_sparse(tmp_path / "dense", tmp_path / "sparse")
    program = """if True:
        import sys, torch
        from maskgen.core.checkpoint import SparseCheckpoint
        from sparse_serve.bench.survey import kinds_of, memory_of
        from sparse_serve.cli.doctor import memory_line
        from sparse_serve.tuning.selection import Choice
        from sparse_serve.kernels import LinearSpec, reference
        from sparse_serve.tuning.dispatch import Plan

        prepare = reference.prepare
        def on_meta(packed):
            assert packed.values.is_meta and packed.bitmask.is_meta
            return prepare(packed)
        reference.prepare = on_meta
        checkpoint = SparseCheckpoint.open(sys.argv[1])
        kinds = {
            LinearSpec(k.out_features, k.in_features, k.pattern, k.dtype, "meta", k.values): layers
            for k, layers in kinds_of(checkpoint, "float32").items()
        }
        print(memory_line(memory_of(checkpoint, kinds, [Choice(kind, Plan.of("reference")) for kind in kinds])))
    """
    command = [sys.executable, "-c", program, str(tmp_path / "sparse")]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0 and "0.5312 of it" in told.stdout, told.stderr
