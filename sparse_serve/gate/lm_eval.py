"""Tasks of EleutherAI's `lm_eval` (extra `tasks`): `lm_eval:NAME`, its own or the hub's, or a local `TASK.yaml`.

It runs as a process of its own for each target, through the target's completions API, and writes what became of each
sample (`--log_samples`). Samples are paired by task, filter, number and the digest of their document and prompt. A
sample is right if its first known metric is 1; metrics that are no yes or no, such as a similarity, are refused. A task
that is a group gives a result for each of its parts.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from maskgen.core.digest import digest_json
from maskgen.core.errors import clip
from sparse_serve.gate.evidence import TaskEvidence
from sparse_serve.gate.speed import Served
from sparse_serve.runtime.errors import GateError, SettingsError

PREFIX = "lm_eval:"
METRICS = ("exact_match", "acc", "acc_norm", "em", "pass@1")
"""What says whether a sample was answered correctly; the first that a task has."""

_FILE = re.compile(r"samples_(.+)_\d{4}-\d\d-\d\dT[\d.:-]+\.jsonl")
_TAIL = 3
_UNREACHABLE = r"on the Hub|LocalEntryNotFoundError|OfflineModeIsEnabled|Max retries exceeded"
_NO_HUB = "; data sets of the hub need a network, or a cache (HF_HOME) of a machine that had one"

Key = tuple[str, int, str]
"""Filter, number of the document, digest of document and prompt."""


def is_task(name: str) -> bool:
    """Whether a task of gate.yaml is lm_eval's."""
    return name.startswith(PREFIX) or name.endswith((".yaml", ".yml"))


def check(name: str) -> None:
    """`SettingsError` if lm_eval is not installed, or a local task is not there."""
    if find_spec("lm_eval") is None:
        raise SettingsError(f"task {name}: lm_eval is not installed; pip install 'sparse-serve[tasks]'")
    if not name.startswith(PREFIX) and not Path(name).is_file():
        raise SettingsError(f"task {name}: no such file")


def measure(
    name: str, targets: Mapping[str, Served], most: int | None, work_dir: Path, on_target: Callable[[str], None]
) -> list[TaskEvidence]:
    """Run a task on both targets. Raises `GateError` when lm_eval fails, or the two were not asked the same samples."""
    found: dict[str, dict[str, dict[Key, bool]]] = {}
    for role, served in targets.items():
        if role == "candidate" and served == targets["base"]:
            found[role] = found["base"]  # a recording
            continue
        on_target(f"{name}: {role}")
        folder = work_dir / f"lm_eval-{len(list(work_dir.iterdir()))}"
        _run(name, served, most, folder)
        found[role] = read(folder)
    return pair(name, found["base"], found["candidate"])


def pair(
    name: str, base: Mapping[str, Mapping[Key, bool]], candidate: Mapping[str, Mapping[Key, bool]]
) -> list[TaskEvidence]:
    """Answers of both, by task and sample, as evidence. `GateError` if the samples are not the same."""
    for task in base.keys() | candidate.keys():
        if base.get(task, {}).keys() != candidate.get(task, {}).keys():
            raise GateError(f"{name}: lm_eval asked the two targets other samples of {task}; nothing can be paired")
    if not base:
        raise GateError(f"{name}: lm_eval wrote no samples")
    return [
        TaskEvidence(
            task, list(answers.values()), [candidate[task][key] for key in answers], digest_json(list(answers))
        )
        for task, answers in sorted(base.items())
    ]


def _run(name: str, served: Served, most: int | None, folder: Path) -> None:
    where = {
        "base_url": f"{served.url}/v1/completions",
        "model": served.model,
        "tokenizer": str(served.tokenizer.resolve()),
        "tokenizer_backend": "huggingface",
        "num_concurrent": 4,
        "max_retries": 1,
    }
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--log_samples"]
    command += ["--model_args", json.dumps(where), "--output_path", str(folder.resolve())]
    is_file = not name.startswith(PREFIX)
    command += ["--tasks", str(Path(name).resolve()) if is_file else name.removeprefix(PREFIX)]
    if most is not None:
        command += ["--limit", str(most)]
    beside = Path(name).resolve().parent if is_file else None  # a task's own data is named relative to its file
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=beside)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        hint = _NO_HUB if re.search(_UNREACHABLE, said) else ""
        raise GateError(f"{name}: lm_eval on {served.url} ended with {done.returncode}: {_reason(said)}{hint}")


def _reason(said: str) -> str:
    """The end of what a process said, without the traceback before it."""
    lines = list(
        itertools.takewhile(lambda line: not line.startswith((" ", "Traceback ")), reversed(said.splitlines()))
    )
    return " ".join(reversed(lines[:_TAIL])) or said[-200:]


def read(folder: Path) -> dict[str, dict[Key, bool]]:
    """Which samples were answered correctly, by task, from all files of samples below a folder.

    Raises `GateError` for a file that is none of `lm_eval --log_samples`.
    """
    found: dict[str, dict[Key, bool]] = {}
    for path in sorted(folder.rglob("samples_*.jsonl")):
        name = _FILE.fullmatch(path.name)
        answers = found.setdefault(name[1] if name else path.stem, {})
        for at, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            key, is_right = _sample(line, f"{path.name}, line {at}")
            if key in answers:
                raise GateError(f"{path.name}, line {at}: a sample is there twice")
            answers[key] = is_right
    return found


def _sample(line: str, where: str) -> tuple[Key, bool]:
    try:
        value = json.loads(line)
        key = (str(value["filter"]), int(value["doc_id"]), f"{value['doc_hash']} {value['prompt_hash']}")
        names: Sequence[str] = value["metrics"]
        metric = next((name for name in METRICS if name in names), None)
        score: Any = None if metric is None else value[metric]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise GateError(f"{where}: is no sample of lm_eval: {type(error).__name__}: {error}") from None
    if metric is None or score not in (0, 1):
        raise GateError(
            f"{where}: {clip(names)} {clip(score)}: no metric that is 0 or 1; expected one of {', '.join(METRICS)}"
        )
    return key, bool(score)
