"""Which running requests are preempted for which waiting ones, by vLLM's own scheduler, without an engine.

That they give the same tokens as if they had not been is tested on one (test_preemption.py).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vllm.scheduling import BLOCK, Driver, configuration, driver, step_and_check

KINDS = ["TurnScheduler", "AsyncTurnScheduler"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return configuration(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A step has one token for each of eight sequences, and eight for prompts."""
    return configuration(tmp_path_factory.mktemp("dense"), max_num_seqs=8, max_num_batched_tokens=16)


@pytest.fixture(scope="module")
def with_adapters(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return configuration(tmp_path_factory.mktemp("dense"), enable_lora=True, max_loras=1, max_lora_rank=8)


def flood(of: Driver, count: int = 4, tokens: int = 100, **other: Any) -> set[str]:
    """Requests that run; the last is due last."""
    names = [f"flood {number}" for number in range(count)]
    for number, name in enumerate(names):
        of.add(name, priority=8 + number, count=tokens, **other)
    while not all(of.requests[name].num_output_tokens for name in names):
        of.step()
    return set(names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_newcomer_is_in_the_next_step_and_all_come_to_their_end(config: Any, kind: str) -> None:
    of = driver(config, kind)
    running = flood(of)
    newcomer = of.add("newcomer", priority=1, count=2)
    assert of.step() == {"newcomer", *running} - {"flood 3"}
    aside = of.requests["flood 3"]
    assert aside.num_preemptions == 1
    assert of.events == ["PREEMPTED"], "vLLM counts it"
    of.run()
    assert of.preempted == ["flood 3"] and newcomer.num_preemptions == 0


def test_those_due_last_go_for_those_due_before_them_and_nobody_else(config: Any) -> None:
    of = driver(config)
    flood(of)
    for name, priority in (("third", 11), ("first", 1), ("fourth", 20), ("second", 9)):
        of.add(name, priority, count=4)
    assert of.step() == {"flood 0", "flood 1", "first", "second"}
    assert of.preempted == ["flood 3", "flood 2"], "among equals, who runs goes on"
    of.run()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    blocks=st.sampled_from([8, 12, 100]),
    arrivals=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 20), st.integers(1, 70), st.integers(1, 80)),
        min_size=1,
        max_size=16,
    ),
)
def test_everybody_gets_each_token_once_and_nobody_is_preempted_in_vain(
    config: Any, kind: str, blocks: int, arrivals: list[tuple[int, int, int, int]]
) -> None:
    of = driver(config, kind, blocks)
    for number, (steps, priority, count, prompt) in enumerate(arrivals):
        for _ in range(steps):
            step_and_check(of)
        of.add(str(number), priority, count, prompt)
    for _ in range(2000):
        if not of.scheduler.requests:
            break
        step_and_check(of)
    of.run()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "progress"), [(3, 16), (640, 56)])
def test_a_preempted_request_is_left_alone_until_it_has_got_on_and_then_not(
    config: Any, kind: str, prompt: int, progress: int
) -> None:
    """No livelock, and nobody becomes immune, though there is always one that is due before, for a token."""
    of = driver(config, kind, blocks=200)
    floods = [of.add(f"flood {number}", priority=1000, count=300, prompt=prompt) for number in range(4)]
    times: list[int] = []
    for step in range(4000):
        if not of.scheduler.waiting:
            of.add(f"newcomer {step}", priority=1, count=1)
        of.step()
        times += [step] * (len(of.preempted) - len(times))
        if all(other.is_finished() for other in floods):
            break
    assert all(other.is_finished() for other in floods)
    most = 1 + 300 // progress
    assert all(most // 2 <= other.num_preemptions <= most for other in floods)
    assert times[-1] > step - 8 * progress, "to the end"


def test_one_that_an_adapter_keeps_out_has_nobody_preempted(with_adapters: Any) -> None:
    of = driver(with_adapters)
    running = flood(of, adapter=1)
    of.add("kept out", priority=1, count=2, adapter=2)
    for _ in range(20):
        assert of.step() == running
    assert of.preempted == []
    of.add("same adapter", priority=2, count=1, adapter=1)
    assert of.step() == {"same adapter", *running} - {"flood 3"}
    of.step()
    of.add("no adapter", priority=2, count=1)
    assert "no adapter" in of.step()
    assert set(of.preempted) <= running and len(of.preempted) == 2


def test_no_more_go_than_a_step_reads_prompts_of(tight: Any) -> None:
    of = driver(tight)
    flood(of, count=8)
    for number in range(6):
        of.add(f"newcomer {number}", priority=1, count=1, prompt=6)
    found = of.step()
    assert len(of.preempted) == len(found - {f"flood {number}" for number in range(8)}) == 2
    of.run()


def test_nobody_goes_while_prompts_take_the_whole_step(tight: Any) -> None:
    of = driver(tight)
    flood(of, count=7)
    of.add("long", priority=30, count=1, prompt=64)
    of.step()
    of.add("newcomer", priority=1, count=1)
    for _ in range(3):
        assert "newcomer" not in of.step()
    assert of.preempted == []
    of.run()
    assert of.requests["newcomer"].num_output_tokens == 1


@pytest.mark.parametrize("state", ["PAUSED_NEW", "PAUSED_ALL"])
def test_nobody_goes_while_the_scheduler_is_paused(config: Any, state: str) -> None:
    from vllm.v1.core.sched.interface import PauseState

    of = driver(config)
    running = flood(of)
    of.add("newcomer", priority=1, count=2)
    of.scheduler.set_pause_state(PauseState[state])
    for _ in range(3):
        assert of.step() == (running if state == "PAUSED_NEW" else set())
    assert of.preempted == []
    of.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert "newcomer" in of.step()


def test_nobody_goes_in_a_step_that_takes_no_prompts(config: Any) -> None:
    """As data parallelism has them."""
    of = driver(config)
    running = flood(of)
    of.add("newcomer", priority=1, count=2)
    assert of.step(throttle_prefills=True) == running
    assert of.preempted == []


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_full_cache_as_many_go_as_make_room_or_nobody(config: Any, kind: str) -> None:
    """Of 20 blocks, 19 are of use and three sequences have six each."""
    of = driver(config, kind, blocks=20)
    running = flood(of, count=3, tokens=20, prompt=5 * BLOCK + 4)
    of.add("too long", priority=9, count=1, prompt=14 * BLOCK)
    for _ in range(3):
        assert of.step() == running
    assert of.preempted == [], "one is due later, and its blocks and the free one are too few"
    of.add("fits into two", priority=1, count=1, prompt=12 * BLOCK)
    assert of.step() == {"fits into two", "flood 0"}
    of.run()


def test_of_a_full_cache_nobody_goes_whom_another_makes_needless(config: Any) -> None:
    """The last has too few blocks, and the one before it enough alone."""
    of = driver(config, blocks=20)
    for priority, blocks in ((8, 4), (9, 9), (10, 3)):
        of.add(f"of {blocks}", priority, count=20, prompt=blocks * BLOCK + 4)
        of.step()
    of.step()
    of.add("newcomer", priority=1, count=1, prompt=8 * BLOCK)
    assert of.step() == {"of 4", "of 3", "newcomer"}
    assert of.preempted == ["of 9"]
    of.run()


def test_who_would_lose_more_than_a_place_keeps_it(config: Any) -> None:
    of = driver(config)
    flood(of, count=2)
    of.add("asks for its prompt's", priority=20, count=50, prompt_logprobs=1)
    of.add("last", priority=30, count=50)
    of.step()
    of.add("newcomer", priority=1, count=5)
    of.step()
    assert of.preempted == ["last"]
    of.add("another", priority=1, count=5)
    of.step()
    assert of.preempted == ["last", "flood 1"]


def test_one_whose_last_token_is_on_its_way_stays(config: Any) -> None:
    of = driver(config, "AsyncTurnScheduler")
    flood(of, count=3)
    last = of.add("ends", priority=50, count=2)
    while last.num_output_placeholders + last.num_output_tokens < 2:
        of.step()
    of.add("newcomer", priority=1, count=1)
    of.step()
    assert of.preempted == ["flood 2"]
    of.run()


def test_a_grammar_that_is_not_there_yet_has_nobody_preempted(config: Any) -> None:
    from vllm.v1.request import RequestStatus

    of = driver(config)
    running = flood(of)
    of.add("newcomer", priority=1, count=1)
    request = of.requests["newcomer"]
    request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    request.structured_output_request = SimpleNamespace(grammar=None)
    assert of.step() == running and of.preempted == []
    request.structured_output_request.grammar = "there"
    assert of.scheduler._turns.make_room() == [request]
    assert of.preempted == ["flood 3"]


def test_vain_preemptions_for_the_same_are_further_and_further_apart(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where vLLM has a reason to pass over it that is not known here."""
    of = driver(config)
    running = flood(of, tokens=400)
    newcomer = of.add("newcomer", priority=1, count=1)
    monkeypatch.setattr(of.scheduler, "_ec_transfer_pending", lambda request, *_: request is newcomer)
    for _ in range(200):
        assert of.step() == running
    assert 1 < len(of.preempted) <= 4
    monkeypatch.undo()
    of.run()


def test_a_prompt_that_is_cached_needs_no_room_for_what_others_hold(config: Any) -> None:
    """Twelve of its blocks are those of one that runs and stays."""
    prompt = list(range(12 * BLOCK + 1))
    of = driver(config, blocks=26)
    of.add("same prompt", priority=2, count=100, prompt=prompt)
    of.step()
    for number in range(3):
        of.add(f"flood {number}", priority=8 + number, count=100, prompt=3 * BLOCK)
    of.step()
    of.step()
    of.add("newcomer", priority=1, count=1, prompt=prompt)
    assert of.step() == {"same prompt", "flood 0", "flood 1", "newcomer"}
    of.run()


def test_vllm_itself_keeps_a_newcomer_waiting(config: Any) -> None:
    """What the above would not tell from ours otherwise."""
    of = driver(config, "Scheduler")
    running = flood(of)
    of.add("newcomer", priority=1, count=2)
    assert of.step() == running
