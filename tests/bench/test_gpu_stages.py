"""`python -m tests.gpu` survives what its stages do, and needs few packages. Small commands stand in for the stages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tests.gpu.__main__ as gpu
from tests.gpu.__main__ import Stage

ROOT = Path(__file__).parents[2]
WITHOUT = ("vllm", "pydantic", "pydantic_settings", "platformdirs", "psutil", "transformers", "grpc", "rich", "scipy")
"""Packages that a GPU machine with torch may lack."""


def stage(name: str, code: str, limit_s: float = 20) -> Stage:
    return Stage(name, (sys.executable, "-I", "-c", code), limit_s)


def run_all(monkeypatch: pytest.MonkeyPatch, *stages: Stage) -> int:
    monkeypatch.setattr(gpu, "stages", lambda out: list(stages))
    monkeypatch.setattr(sys, "argv", ["tests.gpu"])
    return gpu.main()


def test_a_stage_that_crashes_hangs_or_is_not_there_costs_that_stage(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status = run_all(
        monkeypatch,
        stage("card", "print('a card')"),
        stage("crash", "import os; os.abort()"),
        stage("hang", "import time; print('begun', flush=True); time.sleep(60)", limit_s=5),
        Stage("gone", ("no-such-program",), 20),
        stage("last", "print('still here')"),
    )
    *output, card, crash, hang, gone, last = capfd.readouterr().out.splitlines()
    assert status == 1
    assert "a card" in output and "begun" in output and "still here" in output
    assert card.startswith("card: ok, ") and last.startswith("last: ok, ")
    assert crash.startswith("crash: failed with -6, ") and hang.startswith("hang: killed after 5 s, ")
    assert gone.startswith("gone: failed: ") and "no-such-program" in gone


def test_without_a_card_nothing_else_is_tried(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_all(monkeypatch, stage("card", "raise SystemExit(9)"), stage("next", "print('tried')")) == 1
    shown = capfd.readouterr().out
    assert "card: failed with 9" in shown and "tried" not in shown and "next" not in shown


def test_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_all(monkeypatch, stage("card", ""), stage("next", "")) == 0


def test_no_stage_begins_when_the_budget_is_spent(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "BUDGET_S", 5.5)
    slow = stage("slow", "import time; time.sleep(1)")
    assert run_all(monkeypatch, slow, stage("late", "print('begun')")) == 1
    shown = capfd.readouterr().out
    assert "late: no time left" in shown and "begun" not in shown


def test_tests_that_share_the_gpu_leave_the_user_s_cache_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Algorithms that are searched while others use the GPU are not the best ones."""
    show = "import os; print('cache', os.environ.get('XDG_CACHE_HOME'))"
    alone, shared = stage("alone", show), stage("shared", show)._replace(is_alone=False)
    assert [stage.name for stage in gpu.stages(None) if stage.is_alone] == ["card", "speed"]
    assert run_all(monkeypatch, alone, shared) == 0
    caches = [line.split()[1] for line in capfd.readouterr().out.splitlines() if line.startswith("cache ")]
    assert caches[0] == os.environ["XDG_CACHE_HOME"] != caches[1]


@pytest.mark.parametrize("xdist", [True, False])
def test_stages_with_and_without_pytest_xdist(monkeypatch: pytest.MonkeyPatch, xdist: bool) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: object() if xdist and name == "xdist" else None)
    commands = {stage.name: stage.command for stage in gpu.stages(Path("out"))}
    assert [("-n" in commands[name]) for name in ("smoke", "skinny", "others")] == [False, xdist, xdist]
    assert commands["speed"][-2:] == ("--out", "out")


def test_the_pytest_stages_start_without_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a command itself, where no plugin and nothing of WITHOUT is installed: without a GPU it skips."""
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    (command,) = (stage.command for stage in gpu.stages(None) if stage.name == "others")
    assert command[1:3] == ("-m", "pytest")
    code = f"{blocking()}\nimport pytest\nsys.exit(pytest.main({list(command[3:])}))"
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, ran.stdout + ran.stderr
    assert "1 skipped" in ran.stdout


def blocking() -> str:
    return f"import sys\nfor name in {WITHOUT}: sys.modules[name] = None"


def test_the_gpu_part_imports_on_a_machine_with_torch_and_little_else() -> None:
    patterns = ("sparse_serve/kernels/*.py", "sparse_serve/tuning/*.py", "tests/gpu/*.py", "tests/bench/gpu_*.py")
    files = [file.relative_to(ROOT) for pattern in patterns for file in ROOT.glob(pattern)]
    modules = [".".join(file.with_suffix("").parts) for file in files if not file.name.startswith("test_")]
    assert {"sparse_serve.kernels.skinny", "tests.gpu.__main__", "tests.bench.gpu_measure"} <= set(modules)
    code = f"{blocking()}\nimport importlib\nfor name in {modules}: importlib.import_module(name)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
