"""A sweep that was killed continues to the same bits; work that is finished is not done again; runs never mix."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from maskgen.core.errors import FormatError, OutputExistsError
from maskgen.core.layout import LayerForm
from maskgen.sweep.report import Progress
from maskgen.sweep.workdir import TOKENS_FOLDER, WorkDir, reserve_for_run, run_digest
from tests import models
from tests.maskgen.sweeping import BASE, recipe, run, windows

CHILD = """
import os, signal, sys
from pathlib import Path
from tests import models
from tests.maskgen.sweeping import recipe, run

def die(progress):
    if (progress.block, progress.what) == (1, sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

run(models.build("llama"), recipe("sparsegpt"), Path(sys.argv[1]), progress=die)
"""


def assert_same_bits(whole: nn.Module, reference: WorkDir, resumed: nn.Module, work: WorkDir) -> None:
    for block in range(models.LAYERS):
        name = f"block-{block:05d}.safetensors"
        assert (reference.path / name).read_bytes() == (work.path / name).read_bytes()
    for key, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key


def test_a_killed_run_continues_to_the_same_bits(tmp_path: Path) -> None:
    whole, resumed = models.build("llama"), models.build("llama")
    _, reference = run(whole, recipe("sparsegpt"), tmp_path / "whole")
    killed = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "killed"), "model.layers.1.mlp.gate_proj"],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    report, work = run(resumed, recipe("sparsegpt"), tmp_path / "killed")
    assert report.resumed_blocks == 1
    assert_same_bits(whole, reference, resumed, work)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("stop_after", range(models.LAYERS))
def test_a_run_interrupted_anywhere_continues_to_the_same_bits(name: str, stop_after: int, tmp_path: Path) -> None:
    class Interrupt(Exception):
        pass

    def interrupt(progress: Progress) -> None:
        if (progress.block, progress.what) == (stop_after, "block done"):
            raise Interrupt

    whole, resumed = (models.build("llama", dtype=torch.bfloat16) for _ in range(2))
    _, reference = run(whole, recipe(name), tmp_path / "whole")
    with pytest.raises(Interrupt):
        run(models.build("llama", dtype=torch.bfloat16), recipe(name), tmp_path / "work", progress=interrupt)
    report, work = run(resumed, recipe(name), tmp_path / "work")
    assert report.resumed_blocks == stop_after + 1
    assert_same_bits(whole, reference, resumed, work)


def test_a_finished_run_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = models.build("llama"), models.build("llama")
    run(first, recipe("wanda"), tmp_path / "work")
    monkeypatch.setattr(type(again), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    report, work = run(again, recipe("wanda"), tmp_path / "work")
    assert report.resumed_blocks == models.LAYERS and report.solve_s == {}
    assert torch.equal(first.state_dict()[report.targets[0] + ".weight"], work.packed(report.targets[0]).unpack())


def test_another_run_does_not_mix_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(models.build("llama"), recipe("wanda"), tmp_path / "work")
    for wanted, data in ((recipe("sparsegpt"), windows()), (recipe("wanda"), windows(seed=1))):
        with pytest.raises(OutputExistsError, match=r"work: belongs to another run .*delete it .*choose another `out`"):
            run(models.build("llama"), wanted, tmp_path / "work", data)
    digests = {
        run_digest(recipe("wanda"), BASE, windows()),
        run_digest(recipe("wanda"), "sha256:" + "c" * 64, windows()),
        run_digest(recipe("wanda"), BASE, windows(seed=1)),
        run_digest(recipe("wanda"), BASE, None),
        run_digest(recipe("wanda", "calibration.seed=1"), BASE, windows()),
        run_digest(recipe("wanda"), BASE, windows(), "cuda"),
    }
    assert len(digests) == 6
    assert run_digest(recipe("wanda"), BASE, windows(), "cuda:1") in digests
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "1.0")
        assert run_digest(recipe("wanda"), BASE, windows()) not in digests
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(OutputExistsError):
        run(models.build("llama"), recipe("wanda"), tmp_path / "other")


def test_another_device_does_not_continue_a_run(tmp_path: Path) -> None:
    """Bits depend on what computes them; the meta device stands for one this machine may not have."""
    run(models.build("llama"), recipe("wanda"), tmp_path / "work")
    with pytest.raises(OutputExistsError, match="kind of device"):
        run(models.build("llama"), recipe("wanda"), tmp_path / "work", device="meta")


def test_leftovers_of_a_killed_start_do_not_count(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / ".run.json.123.partial").write_text('{"ru')
    WorkDir(work, BASE, LayerForm(recipe("wanda").pattern))
    WorkDir(work, BASE, LayerForm(recipe("wanda").pattern))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.partial").touch()
    with pytest.raises(OutputExistsError):
        WorkDir(tmp_path / "other", BASE, LayerForm(recipe("wanda").pattern))


def test_a_damaged_block_file_is_named(tmp_path: Path) -> None:
    _, work = run(models.build("llama"), recipe("magnitude"), tmp_path / "work")
    path = work.path / "block-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match=r"block-00001\.safetensors: damaged; delete this file to solve its block"):
        run(models.build("llama"), recipe("magnitude"), tmp_path / "work")
    path.write_bytes((work.path / "block-00000.safetensors").read_bytes())
    with pytest.raises(FormatError, match=r"block-00001\.safetensors: not written by this run; delete this file"):
        run(models.build("llama"), recipe("magnitude"), tmp_path / "work")


def test_a_block_file_of_another_run_is_not_taken(tmp_path: Path) -> None:
    _, work = run(models.build("llama"), recipe("wanda"), tmp_path / "work")
    _, other = run(models.build("llama"), recipe("wanda"), tmp_path / "other", windows(seed=1))
    path = work.path / "block-00001.safetensors"
    path.write_bytes((other.path / path.name).read_bytes())
    with pytest.raises(FormatError, match=r"block-00001\.safetensors: not written by this run"):
        run(models.build("llama"), recipe("wanda"), tmp_path / "work")


def test_a_token_cache_may_be_there_before_the_run_is_known(tmp_path: Path) -> None:
    (tmp_path / "work" / TOKENS_FOLDER).mkdir(parents=True)
    reserve_for_run(tmp_path / "work", BASE)
    reserve_for_run(tmp_path / "work", BASE)
    with pytest.raises(OutputExistsError, match="another run"):
        reserve_for_run(tmp_path / "work", "sha256:" + "c" * 64)
