"""The command line: quick help, lazy verbs, one line per error, and an end whatever hangs."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from sparse_serve.cli import main as cli
from sparse_serve.runtime.errors import ServeError
from sparse_serve.server.settings import Settings


def test_help_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from sparse_serve.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(sorted({'torch', 'vllm', 'grpc', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    assert all(verb in run.stdout for verb in ("serve", "generate", "gate"))


@pytest.mark.parametrize("verb", ["generate", "gate", "bench", "tune", "doctor"])
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert f"sparse-serve {verb}" in capsys.readouterr().out


def test_serve_help_shows_our_settings_and_says_that_vllms_flags_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "--grpc-port" in shown and str(Settings().grpc_port) in shown and "SPARSE_SERVE_" in shown
    assert "vllm serve" in shown
    assert "MODEL comes first" in shown


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"]])
def test_an_unknown_verb_is_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: sparse-serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "/no/such/dir"], "/no/such/dir is not a directory; expected one, or a Hugging Face name"),
        (
            ["serve", "--max-model-len", "4096", "dir"],
            "4096 is not a directory; expected one, or .* before vLLM's flags",
        ),
        (["serve", "x", "--drain-s", "soon"], "--drain-s is 'soon'; expected a number"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("sparse-serve: error: ") and re.search(message, line)


def gate_stub(monkeypatch: pytest.MonkeyPatch, main: object) -> None:
    gate = ModuleType("sparse_serve.cli.gate")
    gate.add_arguments = lambda parser: parser.add_argument("--dense")  # type: ignore[attr-defined]
    gate.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sparse_serve.cli.gate", gate)


def test_gate_gets_its_arguments_and_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SimpleNamespace] = []
    gate_stub(monkeypatch, lambda args: seen.append(args) or 7)
    assert cli.main(["gate", "--dense", "here"]) == 7
    assert seen[0].dense == "here"


@pytest.mark.parametrize(
    ("raised", "code"), [(ServeError("no"), 2), (FileNotFoundError("no"), 2), (KeyboardInterrupt(), 130)]
)
def test_errors_have_codes_and_no_traceback(
    raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise raised

    gate_stub(monkeypatch, fail)
    assert cli.main(["gate"]) == code
    assert "Traceback" not in capsys.readouterr().err


STUCK = """
import concurrent.futures, sys, threading
from sparse_serve.cli import main as cli
from sparse_serve.engine import vllm_engine

def load(engine):
    print("loading", flush=True)
    concurrent.futures.ThreadPoolExecutor().submit(threading.Event().wait).result()

vllm_engine.VllmEngine._load = load
vllm_engine._KILL_AFTER_S = 0.1
sys.exit(cli.main(["serve", sys.argv[1], "--verbose", "--http-port=0", "--grpc-port=0"]))
"""


def test_ctrl_c_ends_a_start_that_is_stuck_in_a_download(tmp_path: Path) -> None:
    """The hub's downloads run in threads that Python waits for when it ends."""
    (tmp_path / "config.json").write_text("{}")
    with subprocess.Popen([sys.executable, "-c", STUCK, str(tmp_path)], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None and server.stdout.readline() == "loading\n"
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0
        finally:
            server.kill()
