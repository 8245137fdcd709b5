"""Every file of `gate/checks/` is a check: deterministic, named after its file, and able to fail."""

from dataclasses import replace

import pytest

import sparse_serve.gate.checks as folder
from maskgen.core.registry import load, names
from sparse_serve.gate.report import Limits, Verdict
from tests.sparse_serve.gate.test_checks import INFO, evidence


@pytest.mark.parametrize("name", names(folder))
def test_passes_a_good_model_and_fails_a_bad_one(name: str) -> None:
    run = load(folder, name).run
    good = evidence(shift=0.001)
    bad = evidence(shift=0.5, served_error=0.2, info=replace(INFO, sparse_weight_bytes=INFO.dense_equivalent_bytes))
    assert run(good, Limits()).verdict is Verdict.PASS
    assert run(bad, Limits()).verdict is Verdict.FAIL


@pytest.mark.parametrize("name", names(folder))
def test_is_deterministic_and_explains_itself(name: str) -> None:
    run, sample = load(folder, name).run, evidence(shift=0.01)
    first = run(sample, Limits())
    assert first == run(sample, Limits())
    assert first.check == name
    assert len(first.summary) > 20
    assert first.numbers
