"""Every file of `gate/checks/` is a check: deterministic, named after its file, and able to fail."""

from dataclasses import replace

import pytest

import sparse_serve.gate.checks as folder
from maskgen.core.registry import load, names
from sparse_serve.gate.evidence import Evidence
from sparse_serve.gate.verdict import Verdict
from tests.sparse_serve.gate.test_checks import INFO, LIMITS, evidence, kernel_parity


@pytest.mark.parametrize("name", names(folder))
def test_passes_a_good_model_and_fails_a_bad_one(name: str) -> None:
    run = load(folder, name).run
    good = evidence(shift=0.001)
    bad = evidence(shift=0.5, served_error=0.2, info=replace(INFO, sparse_weight_bytes=INFO.dense_equivalent_bytes))
    bad = replace(bad, kernels={"candidate": [replace(one, error=2 * one.allowed) for one in kernel_parity()]})
    assert {result.verdict for result in run(good, LIMITS)} == {Verdict.PASS}
    assert {result.verdict for result in run(bad, LIMITS)} == {Verdict.FAIL}


@pytest.mark.parametrize("name", names(folder))
def test_is_deterministic_and_explains_itself(name: str) -> None:
    run, sample = load(folder, name).run, evidence(shift=0.01)
    results = run(sample, LIMITS)
    assert results == run(sample, LIMITS)
    for result in results:
        assert result.check == name
        assert len(result.summary) > 20
        assert result.numbers


@pytest.mark.parametrize("name", names(folder))
def test_judges_nothing_where_nothing_was_measured(name: str) -> None:
    assert load(folder, name).run(Evidence(), LIMITS) == []
