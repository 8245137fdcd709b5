"""The command line: quick help, lazy verbs, one line per error."""

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from sparse_serve import cli
from sparse_serve.errors import ServeError
from sparse_serve.settings import Settings


def test_help_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from sparse_serve.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(sorted({'torch', 'vllm', 'grpc', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    assert all(verb in run.stdout for verb in ("serve", "generate", "gate"))


def test_serve_help_shows_our_settings_and_says_that_vllms_flags_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "--grpc-port" in shown and str(Settings().grpc_port) in shown and "SPARSE_SERVE_" in shown
    assert "vllm serve" in shown


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
        (["serve", "x", "--drain-s", "soon"], "--drain-s is 'soon'; expected a number"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("sparse-serve: error: ") and message in line


def gate_stub(monkeypatch: pytest.MonkeyPatch, main: object) -> None:
    gate = ModuleType("sparse_serve.gate.run")
    gate.add_arguments = lambda parser: parser.add_argument("--dense")  # type: ignore[attr-defined]
    gate.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sparse_serve.gate.run", gate)


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
