"""What a step has left is counted as vLLM counts it, for several newcomers, too."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm.scheduling import BLOCK, configuration, driver, step_and_check


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return configuration(tmp_path_factory.mktemp("dense"))


def test_blocks_that_one_newcomer_takes_over_are_not_counted_for_the_next(config: Any) -> None:
    """The first finds its prompt in the cache of one that runs, who then frees none of that by going."""
    of = driver(config, blocks=14)
    shared = list(range(1000, 1000 + 6 * BLOCK))
    of.add("holder", priority=20, count=100, prompt=shared)
    of.add("other", priority=11, count=100, prompt=3 * BLOCK)
    while not all(request.num_output_tokens for request in of.requests.values()):
        of.step()
    of.add("takes over", priority=1, count=4, prompt=[*shared, 7])
    of.add("next", priority=2, count=4, prompt=5 * BLOCK)
    step_and_check(of)
    of.run()


def test_nobody_goes_for_one_that_has_to_wait_for_who_went_before(config: Any) -> None:
    """The first victim is then ahead in vLLM's queue, and does not fit."""
    of = driver(config, blocks=14)
    of.add("large", priority=20, count=100, prompt=7 * BLOCK)
    of.add("small", priority=30, count=100, prompt=BLOCK)
    while not all(request.num_output_tokens for request in of.requests.values()):
        of.step()
    of.add("first", priority=2, count=4, prompt=9 * BLOCK)
    of.add("second", priority=25, count=4, prompt=BLOCK)
    step_and_check(of)
    of.run()
