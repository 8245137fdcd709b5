"""lm_eval's files of samples, and its runner: with a stand-in that writes such files, and itself where it is there."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sparse_serve.gate import GateConfig, lm_eval, run
from sparse_serve.gate.plan import plan
from sparse_serve.gate.speed import Served
from sparse_serve.runtime.errors import GateError, SettingsError
from tests import models
from tests.sparse_serve.gate.servers import of_lm_eval, server

STAND_IN = """
import json, sys
from pathlib import Path
flags = dict(zip(sys.argv[2::1], sys.argv[3::1]))
model = json.loads(flags["--model_args"])
assert sys.argv[1] == "run" and flags["--model"] == "local-completions" and "--log_samples" in sys.argv
assert model["base_url"].endswith("/v1/completions") and model["tokenizer"].startswith("/")
if model["model"] == "broken":
    sys.exit("connection refused")
if model["model"] == "offline":
    raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub (LocalEntryNotFoundError)")
folder = Path(flags["--output_path"]) / model["model"]
folder.mkdir(parents=True)
for task in flags["--tasks"].split("+"):
    with (folder / f"samples_{task}_2026-01-02T03-04-05.678901.jsonl").open("w") as file:
        for at in range(int(flags.get("--limit", 4))):
            right = float(model["model"] == "good" or at % 2)
            file.write(json.dumps({"doc_id": at, "filter": "none", "metrics": ["acc"], "doc_hash": f"d{at}",
                                   "prompt_hash": "p", "target_hash": "t", "acc": right}) + "\\n")
"""


def sample(at: int, **changes: Any) -> dict[str, Any]:
    """A line as `lm_eval --log_samples` writes it."""
    return {
        "doc_id": at,
        "doc": {"question": "?"},
        "target": "0",
        "arguments": {"gen_args_0": {"arg_0": "?", "arg_1": " yes"}},
        "resps": [[["-1.0", "True"]]],
        "filtered_resps": [["-1.0", "True"]],
        "filter": "none",
        "metrics": ["acc", "acc_norm"],
        "doc_hash": f"doc{at}",
        "prompt_hash": f"prompt{at}",
        "target_hash": "target",
        "acc": 1.0,
        "acc_norm": 0.0,
        **changes,
    }


def write(folder: Path, *lines: Any, task: str = "arc_easy") -> Path:
    (folder / "model").mkdir(parents=True, exist_ok=True)
    path = folder / f"model/samples_{task}_2026-11-27T04-34-28.123456.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return folder


def test_samples_are_paired_by_document_prompt_and_filter(tmp_path: Path) -> None:
    base = lm_eval.read(write(tmp_path / "a", sample(0), sample(1), sample(0, filter="strict", acc=0.0)))
    other = lm_eval.read(write(tmp_path / "b", sample(0, filter="strict"), sample(1, acc=0.0), sample(0)))
    (found,) = lm_eval.pair("arc_easy", base, other)
    assert found.task == "arc_easy"
    assert (list(found.base), list(found.candidate)) == ([True, True, False], [True, False, True])
    assert found.samples_digest.startswith("sha256:")


def test_a_group_has_a_result_for_each_part(tmp_path: Path) -> None:
    write(tmp_path, sample(0), task="mmlu_law")
    found = lm_eval.read(write(tmp_path, sample(0, acc=0.0), task="mmlu_art"))
    assert [(one.task, list(one.base)) for one in lm_eval.pair("mmlu", found, found)] == [
        ("mmlu_art", [False]),
        ("mmlu_law", [True]),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is no sample of lm_eval: JSONDecodeError"),
        ("[]", "is no sample of lm_eval: TypeError"),
        ("[" * 100_000, "is no sample of lm_eval: RecursionError"),
        ({"doc_id": 0}, "is no sample of lm_eval: KeyError: 'filter'"),
        (sample(0, metrics=["bleu"], bleu=0.3), "'bleu'.* no metric that is 0 or 1; expected one of exact_match, acc"),
        (sample(0, acc=0.5), "0.5: no metric that is 0 or 1"),
        (sample(0, acc=float("nan")), "nan: no metric that is 0 or 1"),
        (sample(0, metrics=None), "is no sample of lm_eval: TypeError"),
    ],
)
def test_a_file_that_is_none_is_one_clear_error(line: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=message) as caught:
        lm_eval.read(write(tmp_path, line))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_other_samples_are_not_paired(tmp_path: Path) -> None:
    one = lm_eval.read(write(tmp_path / "a", sample(0)))
    for other in (lm_eval.read(write(tmp_path / "b", sample(0, prompt_hash="x"))), {}):
        with pytest.raises(GateError, match="other samples of arc_easy"):
            lm_eval.pair("arc_easy", one, other)
    with pytest.raises(GateError, match="wrote no samples"):
        lm_eval.pair("arc_easy", {}, {})
    with pytest.raises(GateError, match="a sample is there twice"):
        lm_eval.read(write(tmp_path / "c", sample(0), sample(0)))


def served(model: str) -> Served:
    return Served("http://127.0.0.1:1", model, Path("tokenizer"))


def test_each_target_is_asked_by_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages/lm_eval").mkdir(parents=True)
    (tmp_path / "packages/lm_eval/__init__.py").touch()  # goes before a real one that is installed
    (tmp_path / "packages/lm_eval/__main__.py").write_text(STAND_IN)
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "packages"), *filter(None, sys.path)]))
    told: list[str] = []
    targets = {"base": served("good"), "candidate": served("bad")}
    found = lm_eval.measure("lm_eval:one+two", targets, 6, tmp_path / "work", told.append)
    assert [one.task for one in found] == ["one", "two"]
    assert all((sum(one.base), sum(one.candidate)) == (6, 3) for one in found)
    assert told == ["lm_eval:one+two: base", "lm_eval:one+two: candidate"]
    lm_eval.measure("lm_eval:one", dict.fromkeys(targets, served("good")), None, tmp_path / "work", told.append)
    assert len(told) == 3, "a recording has one target"
    with pytest.raises(GateError, match=r"lm_eval on http://127.0.0.1:1 ended with 1: connection refused"):
        lm_eval.measure("lm_eval:one", {"base": served("broken")}, None, tmp_path / "work", told.append)
    unreachable = (
        r"ended with 1: ConnectionError: Couldn't reach 'allenai/ai2_arc' .*; data sets of the hub need a network"
    )
    with pytest.raises(GateError, match=unreachable) as caught:
        lm_eval.measure("lm_eval:one", {"base": served("offline")}, None, tmp_path / "work", told.append)
    assert "File" not in str(caught.value), "no traceback"


def test_what_cannot_be_run_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = {"url": "http://127.0.0.1:1", "tokenizer": str(tmp_path)}
    config = {"version": 1, "base": target, "candidate": target, "tasks": {"tasks": ["lm_eval:arc_easy", "a.yaml"]}}
    asked = GateConfig.of(config, folder=tmp_path)
    assert asked.tasks is not None and asked.tasks.tasks == ["lm_eval:arc_easy", str(tmp_path / "a.yaml")]
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"lm_eval is not installed; pip install 'sparse-serve\[tasks\]'"):
        plan(asked)
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: name)
    with pytest.raises(SettingsError, match=r"a\.yaml: no such file"):
        plan(asked)
    (tmp_path / "a.yaml").touch()
    assert plan(asked).lm_eval_tasks == asked.tasks.tasks
    with pytest.raises(SettingsError, match=r"base\.tokenizer: missing; `speed` and lm_eval need"):
        plan(
            GateConfig.of(
                {**config, "base": {"url": target["url"]}, "candidate": {"url": target["url"]}}, "g", tmp_path
            )
        )


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra `tasks` is not installed")
def test_a_local_task_runs_through_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    models.save("llama", tmp_path / "dense")
    docs = [{"question": f"On day {at} the", "choices": [" tall", " child"], "answer": at % 2} for at in range(8)]
    (tmp_path / "docs.jsonl").write_text("".join(f"{json.dumps(doc)}\n" for doc in docs))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: docs.jsonl}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}]\n"
    )
    with server(of_lm_eval) as base, server(of_lm_eval) as candidate:
        target = {"url": base, "tokenizer": "dense"}
        tasks = {"tasks": ["mine.yaml"], "max_samples": 6}
        config = {"version": 1, "base": target, "candidate": {"url": candidate}, "tasks": tasks}
        report = run(GateConfig.of(config, folder=tmp_path))
    (found,) = report.evidence.tasks
    assert found.task == "mine" and found.base == found.candidate and len(found.base) == 6
    assert sum(found.base) == 3, "the same choice every time, which is right every other time"
