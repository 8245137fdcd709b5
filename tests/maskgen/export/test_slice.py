"""Slicing: the smaller model says what the masked one says, and is an ordinary model.

Legend: B = batch, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskgen.core.checkpoint import SparseCheckpoint, iterate_tensors, read_headers
from maskgen.core.errors import FormatError, ModelError, OutputExistsError
from maskgen.export import slice as slice_module
from maskgen.hf import model as loader
from maskgen.hf.planning import plan
from maskgen.methods import create
from maskgen.methods.learned import Mode
from maskgen.numerics.unit_linear import parameter_count_of
from maskgen.numerics.units import HEADS, NEURONS
from maskgen.recipes.sections import Training
from maskgen.train.objective import in_mode
from maskgen.train.prepare import prepare
from maskgen.train.step import Session
from tests import models
from tests.maskgen.cli.test_parser import SMALL as CALIBRATION
from tests.maskgen.cli.test_parser import run
from tests.maskgen.training import PATTERN, corpus

ModelDir = Callable[..., Path]
KINDS = ["llama", "llama_tied", "mistral", "qwen2", "qwen3"]
SMALL = {"keep_kv_groups": 1, "keep_ffn": 32, "ffn_multiple": 16}


def trained(model_dir: Path, method: str = "maskprune", steps: int = 6, **options: Any) -> Session:
    """A few steps of a structured method, enough that masks, adapters and selections are nothing special."""
    model = loader.load(model_dir)
    spec = Training(
        steps=steps, batch=4, window_tokens=16, lr=1e-2, dtype="float32", distill_weight=0.5, heldout_windows=4
    )
    sites = slice_module.units(model)
    if not any(name.endswith(HEADS) for name in sites):
        options["keep_kv_groups"] = 0
    session = prepare(model, plan(model, PATTERN), sites, create(method, options), spec, None, PATTERN)
    text = corpus()
    for _ in range(steps):
        session.run_step(text, 4)
    return session


def write(session: Session, model_dir: Path, out: Path, **options: Any) -> slice_module.ShrinkReport:
    solved = {name: layer.solution().weight for name, layer in session.layers.items()}
    weights = {name: weight for name, weight in solved.items() if weight is not None}
    return slice_module.write(model_dir, out, weights, session.method.kept_units(session.layers), **options)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """`[B, T, V]` of fixed tokens."""
    ids_BT = torch.randint(models.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
    result: Tensor = model(input_ids=ids_BT).logits
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_the_sliced_model_says_what_the_masked_one_says(kind: str, tmp_path: Path) -> None:
    dense = models.save(kind, tmp_path / "dense")
    session = trained(dense, **SMALL)
    report = write(session, dense, tmp_path / "sliced")
    with in_mode(session.layers, Mode.HARD):
        masked_BTV = logits(session.model)
    sliced = AutoModelForCausalLM.from_pretrained(tmp_path / "sliced", dtype=torch.float32)
    torch.testing.assert_close(logits(sliced), masked_BTV, rtol=1e-4, atol=1e-4)
    assert (logits(loader.load(dense)) - masked_BTV).abs().max() > 0.1, "nothing was pruned: the test would not notice"
    groups = 2 if kind == "qwen2" else 1
    assert report.keep == ({NEURONS: 32} if kind == "qwen2" else {HEADS: 1, NEURONS: 32})
    assert (sliced.config.num_key_value_heads, sliced.config.num_attention_heads) == (groups, 2 * groups)
    assert (sliced.config.intermediate_size, sliced.config.head_dim) == (32, 16)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_fraction_of_parameters_is_counted_exactly(kind: str, tmp_path: Path) -> None:
    dense = models.save(kind, tmp_path / "dense")
    session = trained(dense, steps=2, **SMALL)
    report = write(session, dense, tmp_path / "sliced")
    counted = parameter_count_of(session.layers)  # type: ignore[arg-type]
    before, after = (
        sum(
            sum(tensor.numel() for tensor in linear.parameters())
            for block in plan(loader.load(path), PATTERN).targets
            for linear in block.values()
        )
        for path in (dense, tmp_path / "sliced")
    )
    assert (report.parameters_before, report.parameters_after) == (before, after)
    assert report.fraction == after / before == pytest.approx(counted.fraction(report.keep), abs=1e-12)


@pytest.mark.parametrize("score", ["taylor", "magnitude"])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_baselines_slice_the_same_way(score: str, rank: int, tmp_path: Path) -> None:
    dense = models.save("llama", tmp_path / "dense")
    session = trained(dense, "structured", score=score, score_steps=2, lora_rank=rank, **SMALL)
    write(session, dense, tmp_path / "sliced")
    with in_mode(session.layers, Mode.HARD):
        masked_BTV = logits(session.model)
    torch.testing.assert_close(logits(loader.load(tmp_path / "sliced")), masked_BTV, rtol=1e-4, atol=1e-4)


def test_files_travel_and_shards_add_up(tmp_path: Path) -> None:
    dense = models.save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    session = trained(dense, steps=2, **SMALL)
    norm = torch.full((64,), 0.5)
    report = write(
        session,
        dense,
        tmp_path / "sliced",
        extra={"note.json": {"a": 1}},
        others={"model.norm.weight": norm},
        shard_bytes=20_000,
    )
    stored = dict(iterate_tensors(read_headers(tmp_path / "sliced")))
    assert len(list((tmp_path / "sliced").glob("*.safetensors"))) > 1
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["model.norm.weight"].float(), norm)
    assert report.total_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert json.loads((tmp_path / "sliced" / "note.json").read_text()) == {"a": 1}
    assert AutoTokenizer.from_pretrained(tmp_path / "sliced")("On day 3").input_ids
    kept_U = session.method.kept_units(session.layers)["model.layers.1.mlp.down_proj"]
    up_OI = dict(iterate_tensors(read_headers(dense)))["model.layers.1.mlp.up_proj.weight"]
    assert stored["model.layers.1.mlp.up_proj.weight"].shape == (32, 64) == up_OI[kept_U].shape
    loader.load(tmp_path / "sliced")


def test_every_layer_keeps_as_many(tmp_path: Path) -> None:
    dense = models.save("llama", tmp_path / "dense")
    session = trained(dense, steps=2, **SMALL)
    kept = dict(session.method.kept_units(session.layers))
    assert {int(kept_U.sum()) for name, kept_U in kept.items() if name.endswith(NEURONS)} == {32}
    name = next(name for name in kept if name.endswith(NEURONS))
    for wrong_U in (torch.ones_like(kept[name]), torch.zeros_like(kept[name])):
        with pytest.raises(ModelError, match="all layers must keep as many"):
            slice_module.write(dense, tmp_path / "out", {}, {**kept, name: wrong_U})
    assert not (tmp_path / "out").exists()


def test_widths_that_nobody_could_load_are_refused(tmp_path: Path) -> None:
    """transformers refuses a Llama whose heads do not divide its hidden size; vLLM works out Qwen2's head size."""
    dense = models.save("llama", tmp_path / "dense", num_attention_heads=4, num_key_value_heads=4)
    sites = slice_module.units(loader.load(dense))
    kept = {name: torch.arange(count) < (3 if name.endswith(HEADS) else 96) for name, count in sites.items()}
    with pytest.raises(ModelError, match="llama with 3 of 4 heads beside a hidden size of 64"):
        slice_module.write(dense, tmp_path / "out", {}, kept)
    qwen = models.save("qwen2", tmp_path / "qwen")
    kept = {f"model.layers.{number}.self_attn.o_proj": torch.tensor([True, False]) for number in range(models.LAYERS)}
    with pytest.raises(ModelError, match="qwen2 with 2 of 4 heads"):
        slice_module.write(qwen, tmp_path / "out", {}, kept)


@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_heads_need_not_divide_the_hidden_size_everywhere(kind: str, tmp_path: Path) -> None:
    dense = models.save(kind, tmp_path / "dense", num_key_value_heads=4)
    session = trained(dense, steps=2, **{**SMALL, "keep_kv_groups": 3, "heads_divide_hidden": False})
    write(session, dense, tmp_path / "sliced")
    with in_mode(session.layers, Mode.HARD):
        masked_BTV = logits(session.model)
    sliced = loader.load(tmp_path / "sliced")
    torch.testing.assert_close(logits(sliced), masked_BTV, rtol=1e-4, atol=1e-4)
    assert sliced.config.num_attention_heads == 3


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    dense = models.save("llama", tmp_path / "dense")
    kept = {name: torch.ones(count, dtype=torch.bool) for name, count in slice_module.units(loader.load(dense)).items()}
    with pytest.raises(ModelError, match=r"no tensor 'model\.layers\.9"):
        slice_module.write(dense, tmp_path / "out", {"model.layers.9.mlp.up_proj": torch.zeros(96, 64)}, kept)
    with pytest.raises(ModelError, match=r"\(2, 2\) replaces one \(96, 64\)"):
        slice_module.write(dense, tmp_path / "out", {"model.layers.0.mlp.up_proj": torch.zeros(2, 2)}, kept)
    models.save_sparse(dense, tmp_path / "sparse")
    with pytest.raises(FormatError, match="start from the dense model"):
        slice_module.write(tmp_path / "sparse", tmp_path / "out", {}, kept)
    with pytest.raises(OutputExistsError):
        slice_module.write(dense, tmp_path / "sparse", {}, kept)


@pytest.mark.parametrize("kind", ["opt", "gpt_neox"])
def test_other_architectures_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ModelError, match="Llama, Qwen2, Qwen3, Mistral"):
        slice_module.units(models.build(kind))


def test_sites_of_a_model() -> None:
    sites = slice_module.units(models.build("llama"))
    assert len(sites) == 2 * models.LAYERS
    assert sites["model.layers.2.self_attn.o_proj"] == 2
    assert sites["model.layers.2.mlp.down_proj"] == 96
    multi_head = slice_module.units(models.build("llama", num_key_value_heads=4))
    assert multi_head["model.layers.0.self_attn.o_proj"] == 4
    assert all(name.endswith(NEURONS) for name in slice_module.units(models.build("qwen2")))


def test_sparse_weights_on_top_of_a_sliced_model(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two commands: fewer heads and neurons, then 2:4 on what is left."""
    settings = [f"method.{name}={value}" for name, value in SMALL.items()]
    settings += ["train.steps=4", "train.batch=4", "train.window_tokens=32", "train.heldout_windows=8"]
    overrides = [part for setting in settings for part in ("--set", setting)]
    sliced, sparse = tmp_path / "sliced", tmp_path / "sparse"
    model = model_dir("llama")
    code, said, errors = run(
        capsys, "run", "maskprune", "--model", model, "--data", text_file, "--out", sliced, *overrides
    )
    assert (code, errors) == (0, "") and "of the parameters of the blocks" in said
    code, said, errors = run(
        capsys, "run", "sparsegpt", "--model", sliced, "--data", text_file, "--out", sparse, *CALIBRATION
    )
    assert (code, errors) == (0, "")
    checkpoint = SparseCheckpoint.open(sparse)
    assert checkpoint.hf_config["intermediate_size"] == 32 and checkpoint.hf_config["num_key_value_heads"] == 1
    assert len(checkpoint.config.targets) == 7 * models.LAYERS
    assert logits(loader.load(sparse)).isfinite().all()
