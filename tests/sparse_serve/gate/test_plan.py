"""What the gate refuses before it spends minutes on measuring, and the exit status of what goes wrong later."""

import argparse
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from sparse_serve import gate
from sparse_serve.cli import gate as cli_gate
from sparse_serve.cli.main import main
from sparse_serve.engine.vllm_defaults import set_common
from sparse_serve.gate import report_file, runner
from sparse_serve.gate.evidence import Limits
from sparse_serve.gate.plan import plan
from sparse_serve.gate.provenance import provenance
from sparse_serve.gate.request import GateRequest
from sparse_serve.runtime import processes
from sparse_serve.runtime.errors import GateError, SettingsError
from tests.directories import dense_dir, sparse_dir


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    """The required fields of a request for a good pair of models."""
    (tmp_path / "data.txt").write_text("text")
    return {
        "dense": dense_dir(tmp_path / "dense"),
        "sparse": sparse_dir(tmp_path / "sparse"),
        "data": tmp_path / "data.txt",
    }


def command(pair: dict[str, Path], *more: str) -> list[str]:
    return ["gate", *(word for name, path in pair.items() for word in (f"--{name}", str(path))), *more]


def test_a_good_pair_is_planned(pair: dict[str, Path]) -> None:
    todo = plan(GateRequest(**pair, window_tokens=16))
    assert todo.request.dtype == "bfloat16"
    assert todo.request.window_tokens == 16
    assert todo.limits == Limits(parity_tolerance=0.01)
    assert provenance(todo)["base_matches"] is True


def test_flags_are_the_request_with_its_defaults(pair: dict[str, Path]) -> None:
    parser = argparse.ArgumentParser()
    cli_gate.add_arguments(parser)
    flags = parser.parse_args(command(pair)[1:])
    assert GateRequest(**{name: getattr(flags, name) for name in GateRequest.model_fields}) == GateRequest(**pair)


def test_another_base_is_refused_unless_allowed(pair: dict[str, Path], tmp_path: Path) -> None:
    other = pair | {"dense": dense_dir(tmp_path / "other", seed=1)}
    with pytest.raises(SettingsError, match=r"from another model than .*--allow-other-base, in gate.yaml allow_other"):
        gate.run(GateRequest(**other))
    todo = plan(GateRequest(**other, allow_other_base=True))
    assert provenance(todo)["base_matches"] is False


def test_an_adapter_is_no_dense_model(
    pair: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    assert main(command({**pair, "dense": tmp_path / "adapter"})) == 2
    assert "adapter: an adapter of 'owner/base', not a model; merge it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", "0.5"], "--alpha 0.5: input should be less than 0.5"),
        (["--alpha", "nan"], "--alpha nan: "),
        (["--max-ppl-increase", "inf"], "--max-ppl-increase inf: "),
        (["--window", "1"], "--window 1: input should be greater than or equal to 2"),
        (["--max-windows", "0"], "--max-windows 0: input should be greater than or equal to 1"),
        (["--parity-tolerance", "-1"], "--parity-tolerance -1.0: input should be greater than 0"),
        (["--data", "nowhere.txt"], "data nowhere.txt: no such file"),
    ],
)
def test_wrong_flags_are_refused_at_once(
    pair: dict[str, Path], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(pair, *flags)) == 2
    assert f"sparse-serve: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes", [{"alpha": 0.7}, {"dtype": "int8"}, {"windows": 3}, {"window_tokens": 0}, {"max_windows": 0}]
)
def test_a_request_checks_itself(pair: dict[str, Path], changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=f"^`{next(iter(changes))}` "):
        GateRequest(**pair, **changes)


def test_a_server_that_is_not_there_is_found_before_the_other_target_s_is_started(
    pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        asked = {"version": 1, "base": {"model": str(pair["dense"])}, "candidate": {"url": address, "name": "model"}}
        (tmp_path / "gate.yaml").write_text(json.dumps(asked | {"quality": {"texts": [str(pair["data"])]}}))
        monkeypatch.setattr(runner, "serving", lambda *args: pytest.fail("a server was started"))
        assert main(["gate", "run", str(tmp_path / "gate.yaml"), "--out", str(tmp_path / "out")]) == 3
    assert f"{address}/v1/models: ConnectError: " in capsys.readouterr().err
    (result,) = report_file.load(tmp_path / "out/report.json")["results"]
    assert result["check"] == "measurement"


def test_the_environment_is_left_as_it_was(pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def served(*args: Any) -> Any:
        processes.lead()  # as the engine does
        set_common(os.environ)
        raise GateError("the engine is gone")

    monkeypatch.delenv("VLLM_LOGGING_STREAM", raising=False)
    monkeypatch.setattr(runner, "measure_offline", lambda *args: None)
    monkeypatch.setattr(runner, "measure_served", served)
    before = dict(os.environ)
    with pytest.raises(GateError, match="the engine is gone"):
        gate.run(GateRequest(**pair, window_tokens=16))
    assert dict(os.environ) == before


def test_a_bug_is_not_a_regression(pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would exit with 1, which means a measured regression."""

    def broken(*args: Any, **options: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(runner, "run", broken)
    assert main(command(pair, "--out", str(tmp_path / "out"))) == 3
    (result,) = report_file.load(tmp_path / "out/report.json")["results"]
    assert (result["verdict"], result["summary"]) == ("error", "ZeroDivisionError:")
