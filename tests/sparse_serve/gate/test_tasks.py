"""Tasks: the pack, files, and two servers that answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparse_serve.gate import GateConfig, Verdict, run, task_pack, tasks
from sparse_serve.gate.plan import MeasurementPlan, plan
from sparse_serve.gate.task_pack import NAMES, Sample
from sparse_serve.runtime.errors import GateError, SettingsError
from tests.sparse_serve.gate.test_served import Answer, of_vllm, server


def knowing(samples: list[Sample], wrong: int) -> Answer:
    """A server that finds the right ending likely, and another one in the first so many samples."""
    likely = {
        sample.prompt + sample.choices[1 - sample.answer if at < wrong else sample.answer]
        for at, sample in enumerate(samples)
    }
    good, bad = of_vllm(), of_vllm(0.5)
    return lambda body: (good if body["prompt"] in likely else bad)(body)


def config(base: str, candidate: str, **asked: Any) -> GateConfig:
    return GateConfig.of({"version": 1, "base": {"url": base}, "candidate": {"url": candidate}, "tasks": asked})


@pytest.mark.parametrize("name", NAMES)
def test_the_pack_is_always_the_same_and_fair(name: str) -> None:
    samples = task_pack.samples(name)
    assert samples == task_pack.samples(name)
    assert len(samples) == len({(sample.prompt, sample.choices) for sample in samples}) == task_pack.SAMPLES
    for sample in samples:
        assert len(set(sample.choices)) == 2 and sample.answer in (0, 1)
        assert not sample.prompt.endswith(" ") and all(choice.startswith(" ") for choice in sample.choices)
    assert 400 < sum(sample.answer for sample in samples) < 600, "always the same answer is no better than chance"


def test_the_right_answers_are_right() -> None:
    for sample in task_pack.samples("arithmetic"):
        left, right = sample.prompt.removesuffix(" =").split(" + ")
        assert [int(choice) == int(left) + int(right) for choice in sample.choices].index(True) == sample.answer
    for sample in task_pack.samples("recall"):
        taker = sample.prompt.split(" to ")[1].split(".")[0]
        assert sample.choices[sample.answer] == f" {taker}"
    for sample in task_pack.samples("agreement"):
        subject = sample.prompt.split("he ")[1].split()[0]
        assert (sample.answer == 1) == (subject.endswith("s") or subject == "boxes"), sample


@pytest.mark.parametrize(("wrong", "verdict"), [(0, Verdict.PASS), (12, Verdict.FAIL), (3, Verdict.INCONCLUSIVE)])
def test_a_task_is_judged_sample_by_sample(wrong: int, verdict: Verdict) -> None:
    samples = task_pack.samples("arithmetic")[:200]
    with server(knowing(samples, 0)) as base, server(knowing(samples, wrong)) as candidate:
        report = run(config(base, candidate, tasks=["arithmetic"], max_samples=200, max_drop=0.02))
    assert report.verdict is verdict
    (result,) = report.results
    assert (result.check, result.subject) == ("tasks", "arithmetic")
    (task,) = report.evidence.tasks
    assert list(task.base) == [True] * 200
    assert list(task.candidate) == [False] * wrong + [True] * (200 - wrong)


def test_a_tie_is_wrong_and_a_server_that_fails_is_an_error() -> None:
    with server(of_vllm()) as base, server(lambda body: (500, b"no")) as candidate:
        sample = Sample("a", (" b", " c"), 0)
        with tasks.Endpoint(base) as endpoint:
            assert tasks.correct([sample], endpoint) == [False]
        with pytest.raises(GateError, match="status 500"):
            run(config(base, candidate, tasks=["recall"], max_samples=2))


def test_a_file_of_samples_is_a_task(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "a", "choices": ["b", "c", "d"], "answer": 2}\n\n')

    def planned(*names: str) -> MeasurementPlan:
        asked = config("http://a", "http://b", tasks=list(names)).model_dump(exclude_none=True)
        (tmp_path / "gate.yaml").write_text(json.dumps(asked))
        return plan(GateConfig.load(tmp_path / "gate.yaml"))

    todo = planned("own.jsonl", "recall")
    assert list(todo.samples) == ["own.jsonl", "recall"]
    assert todo.samples["own.jsonl"] == [Sample("a", ("b", "c", "d"), 2)]
    with pytest.raises(SettingsError, match=r"tasks\.tasks: two are called own\.jsonl"):
        planned("own.jsonl", "other/own.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is no JSON"),
        ("[]", "line 2: it: "),
        ('{"prompt": "", "choices": ["b", "c"], "answer": 0}', "line 2: prompt: "),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "line 2: choices: "),
        ('{"prompt": "a", "choices": ["b", "b"], "answer": 0}', "line 2: choices: .*has an entry twice"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "line 2: answer: 2: there are 2 choices"),
        (
            '{"prompt": "a", "choices": ["b", "c"], "answer": "0"}',
            "line 2: answer: '0': input should be a valid integer",
        ),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 0, "x": 1}', "line 2: x: "),
    ],
)
def test_a_line_that_is_no_sample_is_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n' + line)
    with pytest.raises(SettingsError, match=message):
        tasks.read(str(file), None)


def test_a_task_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no such file, and not one of agreement, arithmetic, recall"):
        tasks.read("arithmetics", None)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(SettingsError, match="holds no sample"):
        tasks.read(str(tmp_path / "empty.jsonl"), None)
