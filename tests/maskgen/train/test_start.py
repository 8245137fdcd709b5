"""Training that goes on from a sparse checkpoint, while the dense model it was made from teaches and is the base.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskgen.core.checkpoint import SparseCheckpoint, is_sparse_checkpoint
from maskgen.core.correction import LowRankCorrection, PooledCorrection
from maskgen.core.digest import digest_weights
from maskgen.export.compress import decompress
from maskgen.hf import model
from maskgen.train import run as learn
from maskgen.train import step as step_module
from maskgen.train.log import LOG_FILE, read
from tests import models
from tests.maskgen.cli.test_parser import run
from tests.maskgen.train.test_run import measured, settled

ModelDir = Callable[..., Path]

SHORT = [
    *("--set", "train.steps=4", "--set", "train.batch=4", "--set", "train.window_tokens=16"),
    *("--set", "train.heldout_windows=5", "--set", "train.dtype=float32", "--eval-every", "2"),
]
STILL = ["--set", "train.lr=1e-12", "--set", "method.weight_decay=0"]
"""Steps that move no weight: the result is what training started from."""


@pytest.fixture
def sparse(model_dir: ModelDir, tmp_path: Path) -> Path:
    """A checkpoint in which the kept weights are not the dense model's, beside a copy of that model."""
    dense, made = tmp_path / "dense", tmp_path / "sparse"
    shutil.copytree(model_dir(), dense)
    models.save_sparse(dense, made)
    tensors = load_file(made / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".values"):
            tensor.mul_(1.1)
    save_file(tensors, made / "model.safetensors")
    return made


def words(name: str, start: Path, text: Path, out: Path) -> list[Any]:
    return ["run", name, "--model", start, "--data", text, "--out", out, *SHORT]


def looks(out: Path) -> list[dict[str, Any]]:
    return [record for record in read(out / LOG_FILE) if record["kind"] == "eval"]


@pytest.mark.parametrize("mask", ["adaptive", "prior"])
def test_weights_and_masks_of_a_checkpoint_are_the_start(
    mask: str, sparse: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    argv = [*words("adaptive_sparse", sparse, text_file, out), *STILL, "--set", f"method.mask={mask}"]
    argv += ["--set", "method.refresh_every=1"]
    assert run(capsys, *argv)[::2] == (0, "")
    before, after = SparseCheckpoint.open(sparse), SparseCheckpoint.open(out)
    assert after.config.mask_digest == before.config.mask_digest and after.config.ignored == before.config.ignored
    for name in before.config.targets:
        torch.testing.assert_close(after.packed(name).unpack(), before.packed(name).unpack(), rtol=0, atol=1e-9)
    assert after.config.base_digest == digest_weights(dense) and after.config.base_model == "dense"
    first, *_, last = looks(out)
    assert first["agreement"] == last["agreement"] == 1
    settings = settled("adaptive_sparse")
    assert first["heldout_nll"] == pytest.approx(measured(sparse, dense, text_file, settings), rel=1e-5)
    assert first["dense_nll"] == pytest.approx(measured(dense, dense, text_file, settings), rel=1e-5)
    digests = json.loads((out / learn.PROVENANCE_FILE).read_text())
    assert digests["start"] == digest_weights(sparse) and digests["base"] == digest_weights(dense)


def test_the_dense_model_teaches(
    sparse: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The divergence that the first step reports is that of the checkpoint from the dense model."""
    out, elsewhere = tmp_path / "out", tmp_path / "moved" / "teacher"
    elsewhere.parent.mkdir()
    (tmp_path / "dense").rename(elsewhere)
    distill = ["--set", "train.distill_weight=1.0", "--set", "train.distill_temperature=1.0", "--teacher", elsewhere]
    assert run(capsys, *words("adaptive_sparse", sparse, text_file, out), *distill)[::2] == (0, "")
    settings = settled("adaptive_sparse")
    windows_BT = learn.read_corpus(settings, [text_file], elsewhere, tmp_path / "cache").batch(0, 4)
    with torch.no_grad():
        q_MV, p_MV = (
            model.load(path, torch.float32)(input_ids=windows_BT).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            for path in (sparse, elsewhere)
        )
    expected = float((p_MV.exp() * (p_MV - q_MV)).sum(-1).mean())
    first = next(record for record in read(out / LOG_FILE) if record["kind"] == "step")
    assert first["divergence"] == pytest.approx(expected, rel=1e-4) and expected > 0.01
    assert SparseCheckpoint.open(out).config.base_model == "dense", "the name stays, wherever the model is now"


def test_dense_control_goes_on_from_a_checkpoint_too(
    sparse: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(capsys, *words("dense_control", sparse, text_file, out), *STILL)[::2] == (0, "")
    decompress(sparse, tmp_path / "expected")
    found, expected = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "expected"))
    assert not is_sparse_checkpoint(out) and found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("values", ["float", "int8"])
@pytest.mark.parametrize("pool", ["fixed", "trained"])
def test_a_correction_is_trained_further(
    pool: str,
    values: str,
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dense, start, out = model_dir(), tmp_path / "start", tmp_path / "out"
    models.save_corrected(dense, start, PooledCorrection(16, pool), values)
    argv = [*words("adaptive_sparse_slorb", start, text_file, out), "--teacher", dense, *STILL]
    assert run(capsys, *argv, "--set", f"method.slorb_pool={pool}")[::2] == (0, "")
    before, after = SparseCheckpoint.open(start), SparseCheckpoint.open(out)
    assert after.config.correction == before.config.correction and after.config.values == "float"
    for name in before.config.targets:
        ours, theirs = after.layer(name), before.layer(name)
        torch.testing.assert_close(ours.dense(torch.float32), theirs.dense(torch.float32), rtol=0, atol=1e-6)
    expected = measured(start, dense, text_file, settled("adaptive_sparse"))
    assert looks(out)[0]["heldout_nll"] == pytest.approx(expected, rel=1e-4)
    code, _, errors = run(capsys, *words("adaptive_sparse", start, text_file, tmp_path / "no"), "--teacher", dense)
    assert code == 2 and f"method.slorb_segment=16 and method.slorb_pool={pool}" in errors


def test_a_low_rank_correction_is_trained_further(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, start, out = model_dir(), tmp_path / "start", tmp_path / "out"
    models.save_corrected(dense, start, LowRankCorrection(4))
    argv = [*words("adaptive_sparse", start, text_file, out), "--teacher", dense]
    assert run(capsys, *argv, *STILL, "--set", "method.rank=4")[::2] == (0, "")
    before, after = SparseCheckpoint.open(start), SparseCheckpoint.open(out)
    assert after.config.correction == before.config.correction
    for name in before.config.targets:
        ours, theirs = after.layer(name), before.layer(name)
        torch.testing.assert_close(ours.dense(torch.float32), theirs.dense(torch.float32), rtol=0, atol=1e-5)
    assert looks(out)[0]["heldout_nll"] == pytest.approx(
        measured(start, dense, text_file, settled("adaptive_sparse")), rel=1e-4
    )
    again = [*words("adaptive_sparse", start, text_file, tmp_path / "no"), "--teacher", dense]
    for options in ((), ("--set", "method.rank=8")):
        code, _, errors = run(capsys, *again, *options)
        assert code == 2 and "method.rank=4" in errors
    code, _, errors = run(capsys, *again, "--set", "method.rank=4", "--set", "method.slorb_segment=16")
    assert code == 2 and "method.rank 4: a layer has one correction" in errors


def test_a_new_correction_starts_at_nothing(
    sparse: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(capsys, *words("adaptive_sparse_slorb", sparse, text_file, out))[::2] == (0, "")
    expected = measured(sparse, tmp_path / "dense", text_file, settled("adaptive_sparse"))
    assert looks(out)[0]["heldout_nll"] == pytest.approx(expected, rel=1e-5)
    checkpoint = SparseCheckpoint.open(out)
    assert any(bool(checkpoint.tensor(f"{name}.correction_out").any()) for name in checkpoint.config.targets)


def test_what_was_trained_beside_the_layers_stays(
    sparse: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of scope = 'all' has norms and embeddings of its own; a second run leaves them as they are."""
    first, second = tmp_path / "first", tmp_path / "second"
    all_of_it = ["--set", "train.scope=all", "--set", "train.lr=1e-2"]
    assert run(capsys, *words("adaptive_sparse", sparse, text_file, first), *all_of_it)[::2] == (0, "")
    assert run(capsys, *words("adaptive_sparse", first, text_file, second))[::2] == (0, "")
    trained, dense = load_file(first / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    result, expected = load_file(second / "model.safetensors"), looks(first)[-1]["heldout_nll"]
    assert looks(second)[0]["heldout_nll"] == pytest.approx(expected, rel=1e-5)
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert torch.equal(result[name], trained[name]) and not torch.equal(result[name], dense[name])


def test_other_blocks_keep_the_checkpoints_weights(
    sparse: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = [*words("adaptive_sparse", sparse, text_file, out), "--set", "train.blocks=[1,2]", "--set", "train.lr=1e-2"]
    assert run(capsys, *argv)[::2] == (0, "")
    before, after = SparseCheckpoint.open(sparse), SparseCheckpoint.open(out)
    for name in before.config.targets:
        same = torch.equal(before.packed(name).unpack(), after.packed(name).unpack())
        assert same == (".layers.1." not in name), name


def test_a_stopped_run_goes_on_with_the_same_bits(
    sparse: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--checkpoint-every", "1", "--set", "train.lr=1e-2", "--set", "method.refresh_every=1"]
    assert run(capsys, *words("adaptive_sparse", sparse, text_file, tmp_path / "whole"), *flags)[0] == 0
    argv = [*words("adaptive_sparse", sparse, text_file, tmp_path / "stopped"), *flags]
    step = step_module.Session.run_step

    def stop_at_the_third(session: Any, *args: Any) -> Any:
        if session.step == 2:
            raise KeyboardInterrupt
        return step(session, *args)

    with monkeypatch.context() as patch:
        patch.setattr(step_module.Session, "run_step", stop_at_the_third)
        assert run(capsys, *argv)[0] == 130
    assert run(capsys, *argv)[0] == 0
    whole, stopped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped
    assert [look["heldout_nll"] for look in looks(tmp_path / "whole")] == [
        look["heldout_nll"] for look in looks(tmp_path / "stopped")
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["adaptive_sparse", "--teacher", "{other}"], "--teacher {other}: its weights have digest"),
        (["adaptive_sparse", "--teacher", "{sparse}"], "--teacher {sparse}: a sparse checkpoint; give the dense model"),
        (["adaptive_sparse", "--teacher", "{tmp}/none"], "none: not a directory"),
        (["adaptive_sparse", "--prior", "{sparse}"], "--prior {sparse}: {sparse} is sparse and has masks of its own"),
        (["adaptive_sparse", "--set", "pattern=1:4"], "its pattern is 2:4, the recipe's is 1:4"),
        (["adaptive_sparse", "--set", "ignore=['model.layers.0.*']"], "layer model.layers.0.mlp.down_proj is sparse"),
        (["maskllm"], "already sparse; start from the dense model, with this checkpoint as --prior"),
        (["proxsparse"], "already sparse; start from the dense model"),
        (["maskprune"], "already sparse; start from the dense model"),
        (["sparsegpt"], "already sparse; start from the dense model"),
        (["adaptive_sparse", "--model", "{dense}", "--prior", "{sparse}"], "or give a sparse checkpoint as --model"),
        (["adaptive_sparse", "--model", "{dense}", "--teacher", "{dense}"], "{dense} is dense, and is its own teacher"),
        (["magnitude", "--model", "{dense}", "--teacher", "{dense}"], "--teacher {dense}"),
        (["adaptive_sparse", "--model", "{orphan}"], "made from 'dense', which is not beside it; give that dense"),
        (["adaptive_sparse", "--model", "{orphan}", "--teacher", "{orphan}"], "a sparse checkpoint; give the dense"),
        (["adaptive_sparse", "--model", "{hub}"], "made from 'org/dense', which cannot be used: "),
        (["adaptive_sparse", "--model", "{climbs}"], "made from '..', which is not beside it"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    argv: list[str],
    message: str,
    sparse: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"tmp": tmp_path, "sparse": sparse, "dense": tmp_path / "dense", "other": tmp_path / "other"}
    models.save("llama", places["other"], seed=5)
    for name, base in (("orphan", "dense"), ("hub", "org/dense"), ("climbs", "..")):
        places[name] = tmp_path / "away" / name / "checkpoint"
        shutil.copytree(sparse, places[name])
        stated = json.loads((places[name] / "config.json").read_text())
        stated["quantization_config"]["base_model"]["name"] = base
        (places[name] / "config.json").write_text(json.dumps(stated))
    name, *flags = (part.format(**places) for part in argv)
    before = sorted(tmp_path.iterdir())
    flags = [*flags, "--data", str(text_file), "--out", str(tmp_path / "o")]
    code, _, errors = run(capsys, "run", name, "--model", sparse, *flags)
    assert code == 2 and errors.startswith("maskgen: error: ") and errors.count("\n") == 1
    assert message.format(**places) in errors
    assert sorted(tmp_path.iterdir()) == before
