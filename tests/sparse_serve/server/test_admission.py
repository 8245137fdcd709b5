"""Who may have how much of the queue: greedy clients leave room for those that come."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from sparse_serve.runtime.errors import BadRequestError, OverloadedError, TooManyError
from sparse_serve.server.admission import Admission
from sparse_serve.server.metrics import Metrics


def admission(per_client: int, of_all: int) -> Admission:
    return Admission(Metrics(CollectorRegistry()), per_client, of_all)


@given(clients=st.integers(1, 40), size=st.integers(1, 8), of_all=st.integers(64, 512))
async def test_greedy_clients_leave_room_for_a_newcomer(clients: int, size: int, of_all: int) -> None:
    shares, has = admission(of_all, of_all), dict.fromkeys(range(clients), 0)
    with contextlib.ExitStack() as inside:
        progress = True
        while progress:
            progress = False
            for client in has:
                with contextlib.suppress(OverloadedError):
                    inside.enter_context(shares.share(str(client), size))
                    has[client] += size
                    progress = True
        free = of_all - sum(has.values())
        assert max(has.values()) <= max(size, 2 * free)
        if size > 1 or clients * 2 < of_all:
            with shares.share("newcomer", 1):
                pass


async def test_the_queue_of_all_is_bounded_and_says_so() -> None:
    shares = admission(8, 8)
    with pytest.raises(BadRequestError, match="9 sequences in a request; expected at most 8"), shares.share("a", 9):
        pass
    with shares.share("a", 6):
        with pytest.raises(TooManyError, match="6 sequences running and asks for 1 more; there is room for 2"):
            shares.share("a", 1).__enter__()  # 7 of 8 would be over twice the 2 that are left, which are for others
        with pytest.raises(TooManyError, match="0 sequences running and asks for 2 more"):
            shares.share("b", 2).__enter__()  # nothing would be left
        with shares.share("b", 1), shares.share("c", 1), pytest.raises(OverloadedError, match="room for 0 now") as full:
            shares.share("d", 1).__enter__()
        assert not isinstance(full.value, TooManyError), "503: it is not this client's doing"
    with shares.share("a", 8):
        pass
