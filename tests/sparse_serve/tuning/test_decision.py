"""Which kernels are chosen from which times."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_serve.tuning.decision import PAIR_GAIN, SLACK, BucketChoice, decide, plan_of
from sparse_serve.tuning.measure import DENSE
from sparse_serve.tuning.selection import BUCKETS

Seconds = dict[int, dict[str, float]]


def seconds(**times: list[float]) -> Seconds:
    return {tokens: {name: each[at] for name, each in times.items()} for at, tokens in enumerate((1, 16, 256))}


@pytest.mark.parametrize("layouts", [1, 2])
def test_a_kernel_that_keeps_up_everywhere_beats_a_faster_one_that_does_not(layouts: int) -> None:
    buckets = decide(seconds(dense=[1, 1, 1], steady=[0.9, 0.9, 0.99], wild=[0.85, 0.85, 1.2]), layouts)
    assert buckets == (
        BucketChoice(1, "steady", 0.9, 1 / 0.9),
        BucketChoice(16, "steady", 0.9, 1 / 0.9),
        BucketChoice(256, "steady", 0.99, 1 / 0.99),
    )


def test_of_those_that_keep_up_the_fastest_on_the_whole_is_taken_alone() -> None:
    found = decide(seconds(dense=[1, 1, 1], few=[0.5, 0.5, 1.04], many=[0.9, 0.9, 0.8]))
    assert {bucket.kernel for bucket in found} == {"few"}, "1.09 times as fast is not worth a second layout"


def test_two_kernels_where_no_one_keeps_up() -> None:
    found = decide(seconds(dense=[1, 1, 1], few=[0.5, 0.6, 3], many=[2, 0.9, 0.7], none=[9, 9, 9]))
    assert [bucket.kernel for bucket in found] == ["few", "few", "many"]
    assert str(plan_of(found)) == "16=few,*=many"


def test_two_kernels_where_both_are_behind_in_the_middle_and_each_is_fast_at_one_end() -> None:
    times = seconds(dense=[1, 1, 1], few=[0.5, 1.6, 9], many=[1.55, 1.55, 0.7])
    assert [bucket.kernel for bucket in decide(times)] == ["few", "many", "many"]
    assert {bucket.kernel for bucket in decide(times, layouts=1)} == {"many"}


def test_a_pair_that_is_faster_on_the_whole_and_slower_where_it_counts_most_is_not_taken() -> None:
    found = decide(seconds(dense=[1, 1, 1], steady=[1.3, 1.3, 1.3], few=[0.2, 2, 9], many=[9, 2, 0.2]))
    assert max(1 / bucket.speedup for bucket in found) <= 1.3
    assert "steady" in {bucket.kernel for bucket in found}


def test_the_least_bad_where_all_are_slower() -> None:
    found = decide(seconds(dense=[1, 1, 1], slow=[2, 2, 2], slower=[3, 3, 1.99]))
    assert {bucket.kernel for bucket in found} == {"slow"}, "a hundredth is no reason for a second layout"


def test_a_layer_of_llama_3_8b_on_an_h200() -> None:
    """28672 x 4096, speeds against dense of gpu-kernels--block-bfloat16--nvidia-h200--20261126-041854.json."""
    cusparselt = [0.66, 0.67, 0.69, 0.71, 0.74, 0.78, 0.98, 1.31, 1.46, 1.51]
    skinny = [1.36, 1.23, 1.15, 0.84, 0.51, 0.27, 0.15, 0.09, 0.09, 0.09]
    tokens = (1, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
    times = {
        count: {DENSE: 1.0, "skinny": 1 / few, "cusparselt": 1 / many}
        for count, few, many in zip(tokens, skinny, cusparselt, strict=True)
    }
    assert str(plan_of(decide(times))) == "16=skinny,*=cusparselt"
    times[64] = {DENSE: 1.0, "skinny": 1 / 0.27, "cusparselt": 1 / 0.65}  # nothing helps there: the worst stays
    assert str(plan_of(decide(times))) == "16=skinny,*=cusparselt"


def worst_and_mean(times: Seconds, *kernels: str) -> tuple[float, float]:
    behind = [min(row[name] for name in kernels) / row[DENSE] for row in times.values()]
    return max(SLACK, *behind), math.prod(behind) ** (1 / len(behind))


def chosen(times: Seconds, layouts: int) -> tuple[float, float]:
    behind = [1 / bucket.speedup for bucket in decide(times, layouts)]
    return max(SLACK, *behind), math.prod(behind) ** (1 / len(behind))


A_LITTLE = 1 + 1e-9
durations = st.floats(0.1, 10.0)
tables = st.lists(st.tuples(durations, durations, durations, durations), min_size=7, max_size=7).map(
    lambda rows: {
        tokens: dict(zip((DENSE, "a", "b", "c"), row, strict=True)) for tokens, row in zip(BUCKETS, rows, strict=True)
    }
)


@given(tables)
def test_alone_it_is_the_kernel_with_the_smallest_worst_then_mean(times: Seconds) -> None:
    (name,) = {bucket.kernel for bucket in decide(times, layouts=1)}
    worst, mean = worst_and_mean(times, name)
    for other in "abc":
        other_worst, other_mean = worst_and_mean(times, other)
        assert worst < other_worst or (worst == other_worst and mean <= other_mean * A_LITTLE)


@given(tables)
def test_a_second_layout_never_makes_the_worst_worse_and_always_gains_clearly(times: Seconds) -> None:
    worst, mean = chosen(times, 1)
    worst_of_two, mean_of_two = chosen(times, 2)
    assert worst_of_two <= worst * A_LITTLE
    names = {bucket.kernel for bucket in decide(times, 2)}
    assert len(names) <= 2
    if names != {bucket.kernel for bucket in decide(times, 1)}:
        assert worst_of_two * SLACK < worst * A_LITTLE or mean_of_two * PAIR_GAIN < mean * A_LITTLE


@given(tables)
def test_no_pair_that_gains_clearly_is_passed_over(times: Seconds) -> None:
    if decide(times, 2) == decide(times, 1):
        worst, mean = chosen(times, 1)
        for pair in combinations("abc", 2):
            pair_worst, pair_mean = worst_and_mean(times, *pair)
            gains = pair_worst * SLACK * A_LITTLE < worst or pair_mean * PAIR_GAIN * A_LITTLE < mean
            assert pair_worst > worst / A_LITTLE or not gains


@given(tables, st.integers(-8, 8).map(lambda power: 2.0**power), st.sampled_from([1, 2]))
def test_only_ratios_count(times: Seconds, unit: float, layouts: int) -> None:
    other = {tokens: {name: each * unit for name, each in row.items()} for tokens, row in times.items()}
    assert plan_of(decide(other, layouts)) == plan_of(decide(times, layouts))
