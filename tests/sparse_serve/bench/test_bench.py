"""`sparse-serve bench` without its measurements: flags, facts, the byte limit, tables, the roofline."""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from sparse_serve.bench import kernels as bench_kernels
from sparse_serve.bench import record, roofline, survey
from sparse_serve.bench.kernels import DENSE, READ, Result
from sparse_serve.bench.roofline import Panel, Point, Roof
from sparse_serve.cli import bench as cli_bench
from sparse_serve.kernels import LinearSpec
from sparse_serve.runtime.errors import SettingsError
from sparse_serve.tuning.timing import Times
from tests.directories import sparse_dir


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli_bench.add_arguments(parser)
    return parser.parse_args(arguments)


def test_flags_become_numbers_and_the_rest_is_vllms() -> None:
    kernels = parse("kernels", "--shapes", "64x128,8x16", "--tokens", "1,3")
    assert (kernels.kind, kernels.shapes, kernels.tokens) == ("kernels", [(64, 128), (8, 16)], [1, 3])
    serve = parse("serve", "--dense", "a", "--sparse", "b", "--", "--max-model-len", "64", "--enforce-eager")
    assert (serve.kind, serve.dense, serve.clients, serve.rounds) == ("serve", Path("a"), [1, 8], 3)
    assert serve.vllm_flags == ["--max-model-len", "64", "--enforce-eager"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "--shapes", "64x0"], "argument --shapes: '0': expected a whole number above 0"),
        (["kernels", "--shapes", "64"], "argument --shapes: '': expected a whole number above 0"),
        (["kernels", "--tokens", "1,,2"], "argument --tokens: '': expected a whole number above 0"),
        (["kernels", "--threads", "-1"], "argument --threads: '-1': expected a whole number above 0"),
        (["serve", "--dense", "a", "--sparse", "b", "--output-tokens", "1"], "'1': expected 2 or more"),
        (["serve", "--dense", "a"], "required: --sparse"),
        ([], "required: KIND"),
    ],
)
def test_wrong_flags_are_said(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from sparse_serve.cli.main import main\n"
        "try: main(['bench', 'serve', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(sorted({'torch', 'vllm', 'matplotlib'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--rounds" in run.stdout and run.stdout.splitlines()[-1] == "[]"


def test_the_command_is_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/sparse-serve", "bench", "kernels", "--plot", "a b.svg"])
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=None))
    assert record.command() == "sparse-serve bench kernels --plot 'a b.svg'"
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=SimpleNamespace(name="tests.gpu.__main__")))
    assert record.command() == "python -m tests.gpu bench kernels --plot 'a b.svg'"


def test_facts_have_commit_versions_and_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = record.run_metadata()
    assert {"created", "commit", "command", "versions", "machine", "processor", "cpus"} == set(facts)
    assert {"sparse-serve", "torch"} <= set(facts["versions"])
    assert facts["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", facts["commit"])
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "somebody else's"], check=True)
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    assert record.commit() is None
    subprocess.run([*git, "add", "__init__.py"], check=True)
    assert str(record.commit()).endswith("-dirty")


def test_the_byte_limit_is_ones_own_bytes_at_the_speed_of_the_read() -> None:
    times = Times({READ: [1.0, 2.0, 1.0], "cpu": [2.0, 4.0, 1.0], "cpu int8": [1.0, 2.0, 1.0], DENSE[0]: [4.0] * 3})
    share = bench_kernels.of_byte_limit(times, {READ: 100, "cpu": 100, "cpu int8": 60, DENSE[0]: 200})
    assert share == {"cpu": 0.5, "cpu int8": pytest.approx(0.6), DENSE[0]: 0.5}
    assert bench_kernels.of_byte_limit(times, {"cpu": 100}) == {}


def results() -> list[Result]:
    nbytes = {"dense torch": 200, "dense vllm": 200, "cpu": 112, READ: 112}
    times = {"dense torch": 4e-9, "dense vllm": 2e-9, "cpu": 4e-9, READ: 1e-9}
    over = {"dense torch": {"cpu": 1.0}, "dense vllm": {"cpu": 0.5}, "vllm W8A8": {"cpu": 2.0}}
    limits = {"dense torch": 0.44, "dense vllm": 0.89, "cpu": 0.25}
    one = Result(10, 10, 1, 9, nbytes, times, {"cpu": 0.5}, over, limits)
    without = {name: value for name, value in times.items() if name != READ}
    return [one, Result(10, 10, 4, 9, nbytes, without, {"cpu": 0.5}, over, {})]


def test_the_table_has_every_ratio_and_shows_where_dense_wins() -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(cli_bench.kernels_table(results()))
    shown = console.export_text(styles=True)
    line = next(line for line in shown.splitlines() if " cpu " in line)
    assert re.sub(r"\x1b\[[0-9;]*m", "", line).split() == ["cpu", "0.000", "0.50x", "2.00x", "25", "%"]
    assert "\x1b[31m0.50x" in line and "\x1b[31m2.00x" not in line


def test_points_and_roof_are_what_was_measured() -> None:
    (panel,) = bench_kernels.panels(results())
    assert panel.title == "10 x 10"
    assert [(point.candidate, point.tokens) for point in panel.points] == [
        (name, tokens) for tokens in (1, 4) for name in ("dense torch", "dense vllm", "cpu")
    ]
    assert panel.points[1] == Point("dense vllm", 1, 1.0, pytest.approx(1e11))
    assert panel.points[5].operations_per_byte == pytest.approx(800 / 112)
    assert bench_kernels.roof(results()) == Roof(pytest.approx(112e9), pytest.approx(4e11))
    assert bench_kernels.roof(results()[1:]).bytes_per_s is None


@pytest.mark.parametrize("bandwidth", [30e9, None])
def test_a_roofline_names_everything(tmp_path: Path, bandwidth: float | None) -> None:
    points = [Point(name, tokens, tokens, 1e10 * tokens) for name in ("dense torch", "cpu") for tokens in (1, 64)]
    panels = [Panel("8 x 16", points), Panel("16 x 8", points[:2])]
    for name in ("a.svg", "b.svg"):
        roofline.roofline(panels, Roof(bandwidth, 64e10), "on a machine", tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert all(f">{text}</text>" in drawn for text in ("on a machine", "8 x 16", "16 x 8", "cpu", "64"))
    assert ("memory: 30 GB/s" in drawn) == (bandwidth is not None) and "fastest dense: 640 GFLOP/s" in drawn
    assert drawn == (tmp_path / "b.svg").read_text()


def test_that_nothing_can_be_drawn_is_said_before_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    roofline.check(Path("a.svg"))
    with pytest.raises(SettingsError, match=r"a\.jpg: expected a name that ends in one of \.svg"):
        roofline.check(Path("a.jpg"))
    monkeypatch.setattr(roofline, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"needs matplotlib.* pip install 'sparse-serve\[report\]'"):
        roofline.check(Path("a.svg"))


def test_kernels_are_timed_with_the_threads_asked_for_and_the_process_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(bench_kernels, "_candidates", lambda *arguments: {})
    monkeypatch.setattr(bench_kernels, "_measure", lambda *arguments: seen.append(torch.get_num_threads()))
    request = bench_kernels.KernelsRequest(shapes=((8, 16),), tokens=(1,), threads=before + 1)
    bench_kernels.run(request)
    assert (seen, torch.get_num_threads()) == ([before + 1], before)
    assert bench_kernels.record(request, [])["threads"] == before + 1
    assert bench_kernels.record(bench_kernels.KernelsRequest(), [])["threads"] == before


@pytest.mark.parametrize("function", [survey.tune, survey.examine])
def test_a_survey_measures_with_the_threads_asked_for_and_leaves_the_process_as_it_was(
    function: Callable[..., survey.Survey], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(survey, "_served_layers", lambda checkpoint: SimpleNamespace(sparse={}, dense={}))

    def track(kinds: list[LinearSpec]) -> list[LinearSpec]:
        seen.append(torch.get_num_threads())
        return kinds

    function(survey.SurveyRequest(checkpoint=sparse_dir(tmp_path / "tiny"), threads=before + 1), track)
    assert (seen, torch.get_num_threads()) == ([before + 1], before)
