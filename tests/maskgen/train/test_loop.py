"""The loop around the steps: what is looked at, logged and saved, and that none of it changes what is learned."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.errors import NumericalError
from maskgen.core.mask import pack_bits
from maskgen.core.pattern import NMPattern
from maskgen.train import checkpoints as checkpoints_module
from maskgen.train import loop as fitting
from maskgen.train.checkpoints import Checkpoints
from maskgen.train.log import TrainLog, read
from maskgen.train.loop import Cadence, HeldOut, Watch, bitmasks, difference, fit, pattern_counts, perplexity
from maskgen.train.step import Session, TrainingStep, heldout_nll
from tests.maskgen.training import PATTERN, Toy, assert_same, corpus, session, state

RUN = "sha256:" + "7" * 64
HEADER = {"recipe": "toy"}
OFTEN = Cadence(micro_batch=2, eval_every=3, checkpoint_every=2)


def run(
    of: Session, folder: Path, cadence: Cadence = OFTEN, stop_after: int | None = None, prior: Any = None
) -> list[TrainingStep | HeldOut]:
    """`fit` in `folder`; dies in the progress report of step `stop_after`."""
    seen: list[TrainingStep | HeldOut] = []

    def progress(log: TrainingStep | HeldOut) -> None:
        seen.append(log)
        if isinstance(log, TrainingStep) and log.step == stop_after:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(folder / "checkpoints", RUN, cadence.keep_checkpoints)
    fit(of, corpus(), folder / "log.jsonl", HEADER, checkpoints, prior, cadence, progress)
    return seen


def records(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the machine."""
    return [
        {key: value for key, value in record.items() if key not in ("elapsed_s", "peak_memory_bytes")}
        for record in read(folder / "log.jsonl")
    ]


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5, 6, 8])
def test_a_run_that_died_goes_on_with_the_same_bits_and_the_same_log(stop_after: int, tmp_path: Path) -> None:
    whole, again = session(), session()
    run(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(session(), tmp_path / "died", stop_after=stop_after)
    seen = run(again, tmp_path / "died")
    assert_same(state(whole), state(again))
    assert records(tmp_path / "died") == records(tmp_path / "whole")
    steps = [log.step for log in seen if isinstance(log, TrainingStep)]
    assert steps == list(range((stop_after - 1) // 2 * 2 + 1, 9)), "work since the last checkpoint only is done again"
    elapsed = [record["elapsed_s"] for record in read(tmp_path / "died" / "log.jsonl") if record["kind"] == "step"]
    assert elapsed == sorted(elapsed), "the time of earlier processes counts"


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    run(session(), tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    assert run(session(), tmp_path) == []
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_looking_and_saving_change_nothing(tmp_path: Path) -> None:
    often, seldom = session(), session()
    run(often, tmp_path / "often", Cadence(micro_batch=2, eval_every=1, checkpoint_every=1))
    run(seldom, tmp_path / "seldom", Cadence(micro_batch=2, eval_every=8))
    assert_same(state(often), state(seldom))


def test_what_the_log_says(tmp_path: Path) -> None:
    trained = session(lr=0.2)
    seen = run(trained, tmp_path)
    header, *rest = read(tmp_path / "log.jsonl")
    assert header == {"kind": "header", **HEADER}
    assert [record["kind"] for record in rest] == [
        "eval", "step", "step", "step", "eval", "step", "step", "step", "eval", "step", "step", "eval", "layers",
    ]  # fmt: skip
    assert [record["step"] for record in rest] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8, 8]
    looks = [log for log in seen if isinstance(log, HeldOut)]
    assert looks[0].agreement == 1 and looks[0].flipped == 0
    assert looks[0].dense_nll == pytest.approx(heldout_nll(session(), corpus().heldout, 2, fitting.Mode.DENSE))
    assert all(look.dense_nll is None for look in looks[1:])
    assert looks[-1].heldout_nll == pytest.approx(heldout_nll(trained, corpus().heldout, 2))
    assert looks[-1].perplexity == pytest.approx(torch.tensor(looks[-1].heldout_nll).exp().item(), rel=1e-5)
    fresh, now = bitmasks(session(lr=0.2)), bitmasks(trained)
    assert looks[-1].agreement == 1 - difference(now, fresh) < 1
    assert sum(look.flipped for look in looks) >= 1 - looks[-1].agreement > 0
    layers = rest[-1]["layers"]
    assert list(layers) == list(trained.layers)
    weights = {name: layer.weight.numel() for name, layer in trained.layers.items()}
    mean = sum(layers[name]["agreement"] * weights[name] for name in layers) / sum(weights.values())
    assert mean == pytest.approx(looks[-1].agreement)
    for name, layer in layers.items():
        assert sum(layer["patterns"].values()) * 4 == weights[name]
        assert all(len(kept) == 4 and kept.count("1") == 2 for kept in layer["patterns"])


def test_agreement_is_with_the_prior_where_there_is_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    layers = session().layers
    masks = {
        name: PATTERN.mask_from_scores(torch.rand(layer.weight.shape, generator=generator))
        for name, layer in layers.items()
    }
    bits = {name: pack_bits(mask) for name, mask in masks.items()}
    elsewhere = run(session(), tmp_path / "elsewhere", prior=bits)[0]
    same = run(session(prior=masks.__getitem__), tmp_path / "same", prior=bits)[0]
    assert isinstance(elsewhere, HeldOut) and isinstance(same, HeldOut)
    assert same.agreement == 1 and 0.4 < elsewhere.agreement < 0.6


def test_a_broken_run_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = session()
    run_step = Session.run_step

    def step(self: Session, *args: Any) -> TrainingStep:
        if self.step == 5:
            with torch.no_grad():
                next(iter(self.layers.values())).score.fill_(float("nan"))
        return run_step(self, *args)

    monkeypatch.setattr(Session, "run_step", step)
    with pytest.raises(
        NumericalError, match=r"step 6: the loss is nan; .*; the checkpoint of step 4 is kept in .*chec"
    ):
        run(broken, tmp_path)
    monkeypatch.undo()
    whole, again = session(), session()
    run(whole, tmp_path / "whole")
    run(again, tmp_path)
    assert_same(state(whole), state(again))


@pytest.mark.parametrize("mode", [fitting.Mode.HARD, fitting.Mode.DENSE])
def test_a_held_out_loss_that_is_lost_says_what_is_kept(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(of: Session, windows_ST: Tensor, batch: int, which: Any = fitting.Mode.HARD) -> float:
        return math.nan if which is mode and of.step == (0 if mode is fitting.Mode.DENSE else 3) else 1.0

    monkeypatch.setattr(fitting, "heldout_nll", lost)
    kept = "the checkpoint of step 2 is kept in" if mode is fitting.Mode.HARD else "there is no checkpoint yet"
    with pytest.raises(
        NumericalError, match=rf"step \d: the loss of the {mode.value} model on held-out .* nan; .*; {kept}"
    ):
        run(session(), tmp_path)


@pytest.mark.parametrize("where", ["checkpoint", "log"])
def test_a_full_disk_says_what_is_kept(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def progress(log: TrainingStep | HeldOut) -> None:
        if isinstance(log, TrainingStep) and log.step == 3:
            monkeypatch.setattr(
                *((checkpoints_module, "write_json") if where == "checkpoint" else (TrainLog, "add")), full
            )

    checkpoints = Checkpoints(tmp_path / "checkpoints", RUN)
    with pytest.raises(OSError, match=r"No space left on device; make room.*; the checkpoint of step 2 is kept in"):
        fit(session(), corpus(), tmp_path / "log.jsonl", HEADER, checkpoints, None, OFTEN, progress)
    monkeypatch.undo()
    whole, again = session(), session()
    run(whole, tmp_path / "whole")
    run(again, tmp_path)
    assert_same(state(whole), state(again))


@pytest.mark.parametrize("learns_weights", [False, True])
def test_training_everything_resumes_too(learns_weights: bool, tmp_path: Path) -> None:
    method, options = Toy(learns_weights=learns_weights), {"scope": "all", "distill_weight": 0.5, "steps": 4}
    whole, again = session(method, **options), session(method, **options)
    run(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(session(method, **options), tmp_path / "died", stop_after=3)
    run(again, tmp_path / "died")
    assert_same(state(whole), state(again))
    assert records(tmp_path / "died") == records(tmp_path / "whole")


def test_cadence() -> None:
    assert [step for step in range(1, 301) if Cadence().evaluates(step, 300)] == [60, 120, 180, 240, 300]
    assert [step for step in range(1, 4) if Cadence().evaluates(step, 3)] == [1, 2, 3]
    assert [step for step in range(1, 8) if Cadence(eval_every=3).evaluates(step, 7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if Cadence(checkpoint_every=3).saves(step, 7, 9e9, 1)] == [3, 6, 7]
    assert Cadence().saves(5, 7, 301, 1) and Cadence().saves(7, 7, 0, 1) and not Cadence().saves(5, 7, 299, 1)
    assert not Cadence().saves(5, 7, 1999, 100) and Cadence().saves(5, 7, 2001, 100), "saving is 5 % of the time"


def test_a_checkpoint_that_takes_long_is_written_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, saved, save, run_step = [0.0], [], Checkpoints.save, Session.run_step

    def slow(self: Checkpoints, of: Session, extra: Mapping[str, Tensor]) -> None:
        saved.append(of.step)
        now[0] += 60
        save(self, of, extra)

    def step(self: Session, *args: Any) -> TrainingStep:
        now[0] += 301
        return run_step(self, *args)

    monkeypatch.setattr(fitting.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Checkpoints, "save", slow)
    monkeypatch.setattr(Session, "run_step", step)
    run(session(), tmp_path, Cadence(micro_batch=2))
    assert saved == [1, 5, 8]


def bits_of(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: pack_bits(mask) for name, mask in masks.items()}


@given(st.integers(0, 2**32 - 1), st.sampled_from(["1:4", "2:4", "4:8", "2:16"]))
def test_differences_and_counts_are_those_of_the_masks(seed: int, text: str) -> None:
    generator, pattern = torch.Generator().manual_seed(seed), NMPattern.parse(text)
    one, other = (
        {name: pattern.mask_from_scores(torch.rand(shape, generator=generator)) for name, shape in SHAPES.items()}
        for _ in range(2)
    )
    changed = sum(int((one[name] != other[name]).sum()) for name in SHAPES)
    assert difference(bits_of(one), bits_of(other)) == changed / sum(mask.numel() for mask in one.values())
    groups = one["a"].reshape(-1, pattern.m).int().tolist()
    strings = ["".join(map(str, group)) for group in groups]
    expected = {kept: strings.count(kept) for kept in sorted(set(strings))} if pattern.m <= 8 else {}
    assert pattern_counts(one["a"], pattern.m) == expected


SHAPES = {"a": (6, 32), "b": (3, 16)}


def test_a_lost_model_still_fits_into_json() -> None:
    assert json.loads(json.dumps(perplexity(1e6))) == perplexity(1e6) > 1e300


def test_watch_remembers_the_last_look() -> None:
    trained = session(lr=0.5)
    watch = Watch.begin(trained, None)
    assert watch.look(trained, corpus(), 4).flipped == 0
    for _ in range(3):
        trained.run_step(corpus(), 4)
    assert watch.look(trained, corpus(), 4).flipped > 0
    assert watch.look(trained, corpus(), 4).flipped == 0
