"""Turns: a client's first request comes before another's hundredth, and tasks do not share their place."""

from __future__ import annotations

import asyncio

from sparse_serve.runtime import turns


async def test_places_go_up_within_a_request_and_start_where_its_client_is() -> None:
    async def request(running: int) -> list[int]:
        turns.enter(running)
        await asyncio.sleep(0)
        return [turns.place(sequences) for sequences in (1, 3, 1)]

    found = await asyncio.gather(request(0), request(100), request(0))
    assert found == [[0, 1, 4], [100, 101, 104], [0, 1, 4]]


async def test_tasks_of_one_request_share_its_places() -> None:
    async def prompt() -> int:
        return turns.place(1)

    turns.enter(7)
    assert sorted(await asyncio.gather(prompt(), prompt(), prompt())) == [7, 8, 9]


async def test_who_was_not_admitted_comes_first() -> None:
    async def probe() -> list[int]:
        return [turns.place(1), turns.place(1)]

    assert await asyncio.create_task(probe()) == [0, 0]
