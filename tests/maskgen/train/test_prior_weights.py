"""A learned run that starts from the masks and weights of a prior: two commands as one, to the same bits.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.correction import PooledCorrection
from maskgen.core.digest import digest_weights
from maskgen.core.pattern import NMPattern
from maskgen.recipes import recipe
from maskgen.recipes.recipe import RECIPE_FILE
from maskgen.train import prior
from maskgen.train import run as learn
from maskgen.train import step as step_module
from maskgen.train.log import LOG_FILE, read
from tests import models
from tests.maskgen.cli.test_parser import run

ModelDir = Callable[..., Path]

SHORT = [
    *("--set", "train.steps=4", "--set", "train.batch=4", "--set", "train.window_tokens=16", "--set", "train.lr=1e-2"),
    *("--set", "train.heldout_windows=5", "--set", "train.dtype=float32", "--eval-every", "2"),
    *("--set", "calibration.samples=6", "--set", "calibration.window_tokens=16", "--set", "method.refresh_every=1"),
]


def words(name: str, dense: Path, text: Path, out: Path) -> list[Any]:
    return ["run", name, "--model", dense, "--data", text, "--out", out, *SHORT]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The log but for its header and what it says of time and memory."""
    return [
        {key: value for key, value in record.items() if key not in ("elapsed_s", "peak_memory_bytes")}
        for record in read(folder / LOG_FILE)[1:]
    ]


ALIKE = ("--set", "train.scope=blocks", "--set", "train.distill_temperature=1.0")
"""What `best-effort` says of training and `adaptive_sparse` does not."""


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ([], torch.bfloat16),
        (["mask='prior'"], torch.float32),
        (["slorb_segment=16", "slorb_pool='trained'"], torch.float32),
        (["rank=4"], torch.bfloat16),
    ],
    ids=str,
)
def test_one_command_does_what_two_do(
    method: list[str],
    dtype: torch.dtype,
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second command takes the checkpoint that the first one left in its work directory, as model and as prior."""
    dense, one = model_dir(dtype=dtype), tmp_path / "one"
    options = [word for option in method for word in ("--set", f"method.{option}")]
    corrected = ["--set", "prior.rank=4"] if "rank=4" in method else []
    argv = [*words("best-effort", dense, text_file, one), *options, *corrected, "--keep-work"]
    assert run(capsys, *argv)[0] == 0
    start = tmp_path / "one.work" / "start"
    assert (SparseCheckpoint.open(start).config.correction is not None) == bool(corrected)
    adaptive = [*words("adaptive_sparse", start, text_file, tmp_path / "two"), *options, *ALIKE, "--teacher", dense]
    assert run(capsys, *adaptive)[0] == 0
    given = [*words("best-effort", dense, text_file, tmp_path / "three"), *options, "--prior", start]
    assert run(capsys, *given)[0] == 0
    assert weights(one) == weights(tmp_path / "two") == weights(tmp_path / "three") != weights(start)
    assert timeless(one) == timeless(tmp_path / "two") == timeless(tmp_path / "three")

    config = SparseCheckpoint.open(one).config
    assert (config.base_model, config.base_digest) == (dense.name, digest_weights(dense))
    digests = [json.loads((tmp_path / name / learn.PROVENANCE_FILE).read_text()) for name in ("one", "two", "three")]
    assert {one["start"] for one in digests} == {digest_weights(start)}
    wanted = json.loads((one / RECIPE_FILE).read_text())
    assert json.loads((start / RECIPE_FILE).read_text())["method"] == wanted["prior"]
    assert "prior" not in json.loads((tmp_path / "three" / RECIPE_FILE).read_text()), "what was given took its place"


def test_the_prior_is_what_its_own_command_writes(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a method that needs no text, which the two commands would cut in different places."""
    dense, one = model_dir(), tmp_path / "one"
    argv = [*words("best-effort", dense, text_file, one), "--set", "prior={name='magnitude'}"]
    assert run(capsys, *argv)[0] == 0
    assert run(capsys, "run", "magnitude", "--model", dense, "--out", tmp_path / "first")[0] == 0
    second = words("adaptive_sparse", tmp_path / "first", text_file, tmp_path / "second")
    assert run(capsys, *second, *ALIKE, "--teacher", dense)[0] == 0
    assert weights(one) == weights(tmp_path / "second")


def test_weights_start_as_the_priors(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    still = ["--set", "train.lr=1e-12", "--set", "method.weight_decay=0", "--set", "method.masked_decay=0"]
    assert run(capsys, *words("best-effort", model_dir(), text_file, out), *still, "--keep-work")[0] == 0
    start, result = SparseCheckpoint.open(tmp_path / "out.work" / "start"), SparseCheckpoint.open(out)
    assert result.config.mask_digest == start.config.mask_digest and result.config.ignored == start.config.ignored
    dense = load_file(model_dir() / "model.safetensors")
    for name in start.config.targets:
        solved_OI = start.packed(name).unpack()
        torch.testing.assert_close(result.packed(name).unpack(), solved_OI, rtol=0, atol=1e-9)
        assert not torch.equal(solved_OI, dense[f"{name}.weight"] * start.packed(name).mask()), "ADMM repairs weights"


@pytest.mark.parametrize("moment", ["in the sweep", "before the digest", "in the training"])
def test_stopped_and_started_again(
    moment: str,
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, whole, stopped = model_dir(), tmp_path / "whole", tmp_path / "stopped"
    assert run(capsys, *words("best-effort", dense, text_file, whole))[0] == 0
    argv = [*words("best-effort", dense, text_file, stopped), "--checkpoint-every", "1"]
    swept, step = [], step_module.Session.run_step

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    def stop_at_the_third(session: Any, *args: Any) -> Any:
        return stop() if session.step == 2 else step(session, *args)

    with monkeypatch.context() as patch:
        if moment == "in the sweep":
            patch.setattr(prior.result, "write", stop)
        elif moment == "before the digest":
            patch.setattr(prior, "write_json", stop)
        else:
            patch.setattr(step_module.Session, "run_step", stop_at_the_third)
        assert run(capsys, *argv)[0] == 130
    kept = tmp_path / "stopped.work" / "start"
    assert kept.exists() == (moment != "in the sweep")
    sweep = prior.sweep
    monkeypatch.setattr(prior, "sweep", lambda *args: swept.append(sweep(*args)) or swept[-1])
    assert run(capsys, *argv)[0] == 0
    assert [report.solve_s for report, _ in swept] == ([{}] if moment == "in the sweep" else []), "nothing twice"
    assert weights(whole) == weights(stopped) and timeless(whole) == timeless(stopped)


@pytest.mark.parametrize("damage", ["a bit", "cut off", "config", "no weights", "digest", "another run's"])
def test_a_damaged_start_is_refused(
    damage: str,
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = words("best-effort", model_dir(), text_file, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(step_module.Session, "run_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(capsys, *argv)[0] == 130
    folder, note = tmp_path / "out.work" / "start", tmp_path / "out.work" / "start.json"
    shard, stated = folder / "model.safetensors", folder / "config.json"
    data = bytearray(shard.read_bytes())
    if damage == "a bit":
        data[-5] ^= 1
        shard.write_bytes(data)
    elif damage == "cut off":
        shard.write_bytes(data[:-100])
    elif damage == "config":
        stated.write_bytes(stated.read_bytes()[:-20])
    elif damage == "no weights":
        shard.unlink()
    elif damage == "digest":
        note.write_text('{"weights"')
    else:
        config = json.loads(stated.read_text())
        config["quantization_config"]["recipe_digest"] = "sha256:" + "0" * 64
        stated.write_text(json.dumps(config))
    code, _, errors = run(capsys, *argv)
    assert code == 2 and errors.startswith("maskgen: error: ") and errors.count("\n") == 1
    assert str(tmp_path / "out.work" / "start") in errors and "to have it made again" in errors
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert run(capsys, *argv)[0] == 0, "as the message says"


BARE = '[method]\nname = "adaptive_sparse"\nweights = "prior"\n'


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["best-effort", "--prior", "{masks}"], "--prior {masks}: has masks alone, and adaptive_sparse with these"),
        (["best-effort", "--prior", "{text}"], "not a valid safetensors file"),
        (["best-effort", "--prior", "{tmp}/no"], "no: no such file"),
        (["best-effort", "--prior", "{dense}"], "config.json has no quantization_config: a dense model"),
        (["best-effort", "--prior", "{foreign}"], "--model {dense}: its weights have digest"),
        (["best-effort", "--prior", "{sparse}", "--set", "pattern=1:4"], "--prior {sparse}: its pattern is 2:4, the"),
        (["best-effort", "--prior", "{corrected}"], "--prior {corrected}: its layers have a correction"),
        (["best-effort", "--model", "{sparse}", "--teacher", "{dense}", "--prior", "{sparse}"], "has masks of its own"),
        (
            ["best-effort", "--set", "method.weights=sparse"],
            "method.weights 'sparse': expected one of ['dense', 'prior",
        ),
        (["best-effort", "--set", "prior.name=maskllm"], "prior.name: maskllm is learned itself"),
        (["{bare}"], "adaptive_sparse starts from the weights and masks of a prior: give --prior, or a [prior]"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    argv: list[str],
    message: str,
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("masks", "foreign", "sparse", "corrected", "bare.toml")
    places = {name.partition(".")[0]: tmp_path / name for name in names}
    places |= {"tmp": tmp_path, "text": text_file, "dense": model_dir()}
    models.magnitude_masks(model_dir(), NMPattern(2, 4)).save(places["masks"])
    models.save_sparse(model_dir(), places["sparse"])
    models.save("llama", tmp_path / "other", seed=5)
    models.save_sparse(tmp_path / "other", places["foreign"])
    models.save_corrected(model_dir(), places["corrected"], PooledCorrection(16, "fixed"))
    places["bare"].write_text(BARE)
    before = sorted(tmp_path.iterdir())
    name, *flags = (part.format(**places) for part in argv)
    out = ["--data", text_file, "--out", tmp_path / "out"]
    code, _, errors = run(capsys, "run", name, "--model", model_dir(), *out, *flags)
    assert code == 2 and errors.startswith("maskgen: error: ") and errors.count("\n") == 1
    assert message.format(**places) in errors
    assert sorted(tmp_path.iterdir()) == before


def test_a_result_goes_on_in_place_of_the_prior(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result of one run is the model of the next, by the same recipe: nothing is swept."""
    first, second, dense = tmp_path / "first", tmp_path / "second", model_dir()
    assert run(capsys, *words("best-effort", dense, text_file, first))[0] == 0
    argv = [*words("best-effort", first, text_file, second), "--teacher", dense, "--keep-work"]
    assert run(capsys, *argv)[0] == 0
    assert not (tmp_path / "second.work" / "start").exists()
    assert read(second / LOG_FILE)[0]["digests"]["start"] == digest_weights(first)


def test_the_priors_recipe_is_part_of_the_run() -> None:
    shipped = recipe.load("best-effort")
    assert shipped.prior is not None and shipped.prior.name == "admm"
    assert recipe.load("best-effort", ["prior.damp=0.02"]).digest() != shipped.digest()
    assert recipe.load("best-effort", ["method.weights=dense"]).prior is None
