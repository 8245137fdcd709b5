"""What the gate refuses before it spends minutes on measuring, and the exit status of what goes wrong later."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from sparse_serve.gate import run
from sparse_serve.gate.report import Limits
from sparse_serve.runtime.errors import SettingsError
from tests.directories import dense_dir, sparse_dir


@pytest.fixture
def arguments(tmp_path: Path) -> Any:
    """`arguments(**changes)` -> parsed flags for a good pair of models."""
    (tmp_path / "data.txt").write_text("text")
    dense, sparse = dense_dir(tmp_path / "dense"), sparse_dir(tmp_path / "sparse")

    def make(**changes: Any) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        run.add_arguments(parser)
        flags = ["--dense", dense, "--sparse", sparse, "--data", tmp_path / "data.txt", "--out", tmp_path / "out"]
        args = parser.parse_args(list(map(str, flags)))
        for name, value in changes.items():
            setattr(args, name, value)
        return args

    return make


def test_a_good_pair_is_planned(arguments: Any) -> None:
    todo = run.plan(arguments(window=16))
    assert todo.request.dtype == "bfloat16"
    assert todo.request.protocol.window_tokens == 16
    assert todo.limits == Limits(parity_tolerance=0.01)
    assert run.provenance(todo)["base_matches"] is True


def test_another_base_is_refused_unless_allowed(arguments: Any, tmp_path: Path) -> None:
    other = dense_dir(tmp_path / "other", seed=1)
    with pytest.raises(SettingsError, match="was made from another model than --dense"):
        run.plan(arguments(dense=other))
    todo = run.plan(arguments(dense=other, allow_other_base=True))
    assert run.provenance(todo)["base_matches"] is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.5}, r"--alpha 0\.5: expected a number between 0\.0 and 0\.5"),
        ({"alpha": float("nan")}, "--alpha nan"),
        ({"max_ppl_increase": float("inf")}, "--max-ppl-increase inf"),
        ({"parity_tolerance": -1.0}, "--parity-tolerance -1"),
        ({"data": Path("nowhere.txt")}, "--data nowhere.txt: no such file"),
    ],
)
def test_wrong_flags_are_refused_at_once(arguments: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        run.main(arguments(**changes))


def test_a_bug_is_not_a_regression(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would exit with 1, which means a measured regression."""

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(run, "gate", broken)
    assert run.main(arguments()) == 3
