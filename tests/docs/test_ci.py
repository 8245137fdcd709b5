"""The examples for build servers: both run the same script in the same container, and take exit statuses alike."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "docs/ci"
COMMAND = "bash ci/gate.sh"
PASS, FAIL, USAGE, ERROR, INCONCLUSIVE = 0, 1, 2, 3, 4


def load(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / name).read_text("utf-8")))


def test_both_run_the_same_script_in_the_same_container() -> None:
    github, gitlab = load("github.yml")["jobs"]["gate"], load("gitlab.yml")["gate"]
    assert github["container"] == gitlab["image"]
    assert gitlab["script"] == [COMMAND]
    (step,) = [step for step in github["steps"] if step.get("name") == "gate"]
    assert COMMAND in step["run"]
    assert gitlab["allow_failure"] == {"exit_codes": [INCONCLUSIVE]}


@pytest.mark.parametrize("status", [PASS, FAIL, USAGE, ERROR, INCONCLUSIVE])
def test_github_s_step_ends_as_the_gate_does_but_for_inconclusive(status: int, tmp_path: Path) -> None:
    (tmp_path / "ci").mkdir()
    (tmp_path / "ci/gate.sh").write_text(f"mkdir -p gate; echo report > gate/report.md; exit {status}\n")
    (step,) = [step for step in load("github.yml")["jobs"]["gate"]["steps"] if step.get("name") == "gate"]
    environ = {"PATH": os.environ["PATH"], "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    ran = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert ran.returncode == (PASS if status == INCONCLUSIVE else status)
    assert ("::warning::" in ran.stdout) == (status == INCONCLUSIVE)
    assert (tmp_path / "summary").read_text() == "report\n"


@pytest.mark.parametrize("status", [PASS, FAIL, INCONCLUSIVE])
def test_the_script_installs_and_ends_as_the_gate_does(status: int, tmp_path: Path) -> None:
    """git, make and the installed command are stand-ins, which write down how they are called."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    gate = ".sparse-serve/.venv/bin/sparse-serve"
    script = f'printf "%s\\n" "#!/bin/sh" \'echo "gate $*" >> log\' "exit {status}" > {gate}; chmod +x {gate}'
    programs = {
        "git": 'mkdir -p .sparse-serve/.venv/bin; echo "git $*" >> log',
        "make": f'echo "make $*" >> log; {script}',
    }
    for name, text in programs.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_ / name).chmod(stat.S_IRWXU)
    environ = {"PATH": f"{bin_}:{os.environ['PATH']}", "SPARSE_SERVE": "https://host.invalid/sparse-serve"}
    ran = subprocess.run(["bash", FOLDER / "gate.sh"], cwd=tmp_path, env=environ, capture_output=True, check=False)
    assert ran.returncode == status
    assert (tmp_path / "log").read_text().splitlines() == [
        "git clone --quiet --depth 1 https://host.invalid/sparse-serve .sparse-serve",
        "make --no-print-directory -C .sparse-serve EXTRA=cpu install",
        "gate gate run gate.yaml --out gate",
    ]
