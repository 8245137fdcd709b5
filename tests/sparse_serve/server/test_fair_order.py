"""Fair order: nobody waits behind all of another client's sequences, and nobody waits for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sparse_serve.server.fair_order import FairOrder, Span


def test_a_newcomer_is_due_before_what_another_has_waiting() -> None:
    order = FairOrder()
    flood = [order.enter("flood", 1) for _ in range(100)]
    newcomer = order.enter("newcomer", 1)
    assert (newcomer.start, newcomer.end) == (0, 1)
    for span in flood[:50]:
        order.leave(span, True)
    order.leave(newcomer, True)
    assert order.enter("another", 1).end == 51 == flood[50].end, "as the first of the others that are inside"


def test_a_request_of_many_sequences_is_many_turns() -> None:
    order = FairOrder()
    assert order.enter("flood", 128).end == 128
    assert [order.enter("newcomer", 1).end for _ in range(3)] == [1, 2, 3]


def test_two_clients_that_never_stop_do_not_starve_a_third() -> None:
    order = FairOrder()
    order.enter("patient", 1)
    waiting = order.enter("patient", 1)
    served = 0
    inside = {name: order.enter(name, 1) for name in ("b", "c")}
    while any(span.end <= waiting.end for span in inside.values()):
        name = min(inside, key=lambda name: inside[name].end)
        order.leave(inside[name], True)
        inside[name] = order.enter(name, 1)
        served += 1
    assert served <= 4


def test_clients_that_are_always_new_do_not_starve_one_that_waits() -> None:
    """As behind a proxy that opens a connection for each request."""
    order = FairOrder()
    order.enter("patient", 1)
    waiting = order.enter("patient", 1)
    inside = [order.enter(f"new {number}", 1) for number in range(4)]
    for served in range(100):
        following = min(inside, key=lambda span: span.end)
        if following.end > waiting.end:
            assert served <= 8
            return
        inside.remove(following)
        order.leave(following, True)
        inside.append(order.enter(f"later {served}", 1))
    raise AssertionError("the newcomers always go first")


def test_who_only_cancels_puts_nobody_off() -> None:
    """Requests that were never begun do not move the clock, however many; one that was begun does."""
    order = FairOrder()
    waiting = [order.enter("flood", 1) for _ in range(10)]
    for _ in range(1000):
        order.leave(order.enter("cancels", 128), False)
    assert order.enter("newcomer", 1).end == 1
    begun = order.enter("cancels", 1)
    assert begun.start > 1000, "its own time has gone on"
    order.leave(waiting[5], True)
    assert order.enter("another", 1).end == waiting[6].end


def test_those_who_leave_after_a_token_do_not_starve_one_that_waits() -> None:
    order = FairOrder()
    order.leave(order.enter("patient", 8), True)
    kept = order.enter("new", 1)
    order.enter("patient", 8)
    waiting = order.enter("patient", 1)
    for number in range(100):
        following = order.enter(f"new {number}", 1)
        if following.end > waiting.end:
            return
        order.leave(kept, True)
        kept = following
    raise AssertionError("those who leave always go first")


def test_new_clients_that_cancel_at_once_do_not_starve_one_that_waits() -> None:
    """A new connection for each request, which is cancelled while its prompt is read."""
    order = FairOrder()
    order.enter("patient", 1)
    waiting = order.enter("patient", 1)
    for number in range(100):
        following = order.enter(f"new {number}", 1)
        if following.end >= waiting.end:  # and later, so behind it
            return
        order.leave(following, False)
    raise AssertionError("those who cancel always go first")


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9), st.booleans(), st.booleans()), max_size=60))
def test_times_only_go_on_and_clients_are_forgotten(steps: list[tuple[int, int, bool, bool]]) -> None:
    order = FairOrder()
    inside: list[Span] = []
    ends: dict[str, int] = {}
    for client, sequences, leaves, has_begun in steps:
        span = order.enter(str(client), sequences)
        assert span.end - span.start == sequences
        assert span.start >= ends.get(span.client, 0)
        assert span.start <= max([0, *ends.values()])
        ends[span.client] = span.end
        inside.append(span)
        if leaves:
            order.leave(inside.pop(0), has_begun)
    for span in inside:
        order.leave(span, True)
    assert len(order) == 0
