"""What README and the manual show of commands, run as it stands there, page by page, on a tiny model.

The pages are read by somebody who has a dense model, a sparse one, texts and two reports of the gate, under the names
that pages use, and who does not type again what another page has shown. What would take minutes is asked for less of
(`SMALLER`); nothing else is changed. What takes vLLM, a server or more than a machine is in `elsewhere`.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import maskgen
from sparse_serve.gate.verdict import Verdict
from tests import foreign_files, models
from tests.architecture.source import ROOT
from tests.docs import elsewhere
from tests.docs.pages import blocks
from tests.sparse_serve.gate.test_report import report

FEW_WINDOWS = "--set calibration.samples=4 --set calibration.window_tokens=64"
FEW_STEPS = f"{FEW_WINDOWS} --set train.steps=2 --set train.batch=2 --set train.window_tokens=64"
SMALLER = {
    "run admm": f"run admm {FEW_WINDOWS}",
    "run best-effort --minutes 10": f"run best-effort {FEW_STEPS}",
    "run maskllm": f"run maskllm {FEW_STEPS}",
    "deploy/train/plan.py": str(ROOT / "deploy/train/plan.py"),
}
COMMAND_S = 900.0


def shown(page: str) -> list[str]:
    """The commands of a page that are run here."""
    found = [block for block in blocks() if block.page == page and not block.why_not]
    return [command for block in found for command in block.commands if elsewhere.is_run_here(command)]


PAGES = sorted({block.page for block in blocks() if shown(block.page)})


class Reader:
    """Somebody who types what pages show, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.typed: set[str] = set()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environ = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}

    def type(self, command: str) -> None:
        """Run a command that is new. What it is told to write is not there yet."""
        words = shlex.split(command, comments=True)
        if shlex.join(words) in self.typed:
            return
        self.typed.add(shlex.join(words))
        for place in (words[index + 1] for index, word in enumerate(words) if word == "--out"):
            shutil.rmtree(self.folder / place, ignore_errors=True)
        for full, less in SMALLER.items():
            command = command.replace(full, less)
        folder = ROOT if words[0] == "make" else self.folder
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=self.environ, capture_output=True, text=True, timeout=COMMAND_S
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A folder with everything that pages take for granted."""
    folder = tmp_path_factory.mktemp("reader")
    dense, sparse = folder / "DENSE", folder / "SPARSE"
    models.save("llama", dense, tokens=models.bos_tokenizer, hidden_size=128, max_position_embeddings=1024)
    models.save_sparse(dense, sparse)
    maskgen.decompress(maskgen.DecompressRequest(model=sparse, out=folder / "MODEL"))
    weights = load_file(folder / "MODEL" / "model.safetensors")
    pruned = {name: weight for name, weight in weights.items() if name.endswith("_proj.weight")}
    foreign_files.maskllm_archive(pruned, folder / "MASKS.npz")
    (folder / "corpus").mkdir()
    for place, name in enumerate(("calibration.txt", "corpus/a.txt", "corpus/b.txt", "heldout.txt")):
        (folder / name).write_text(models.TEXT[6_000 * place : 6_000 * (place + 1)], "utf-8")
    said = [{"role": "user", "content": models.TEXT[:400]}, {"role": "assistant", "content": models.TEXT[400:800]}]
    (folder / "conversations.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 20, "utf-8")
    for name in ("gate", "baseline"):
        report(Verdict.PASS).write(folder / name)
    return Reader(folder)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs(page: str, reader: Reader) -> None:
    for command in shown(page):
        reader.type(command)


@pytest.mark.parametrize(("start", "test"), (elsewhere.RUN_BY | elsewhere.LIKE).items())
def test_what_is_run_elsewhere_is_shown_and_tested(start: str, test: str) -> None:
    every = [elsewhere.plain(command) for block in blocks() if not block.why_not for command in block.commands]
    assert any(command.startswith(start) for command in every)
    assert (ROOT / test).is_file()
    assert test not in elsewhere.RUN_BY.values() or "elsewhere.run_by" in (ROOT / test).read_text("utf-8")


def test_every_reason_not_to_run_a_block_is_listed_with_tests() -> None:
    assert {block.why_not for block in blocks() if block.why_not} == set(elsewhere.NOT_RUN)
    assert all((ROOT / test).is_file() for tests in elsewhere.NOT_RUN.values() for test in tests)
