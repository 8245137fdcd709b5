"""Turns: of each request its own, shared by its tasks, and never later than its end."""

from __future__ import annotations

import asyncio

from sparse_serve.runtime import turns


async def test_turns_go_up_within_a_request_until_its_end() -> None:
    async def request(start: int, end: int) -> list[int]:
        turns.enter(start, end)
        await asyncio.sleep(0)
        return [turns.due(sequences) for sequences in (1, 3, 1, 1)]

    found = await asyncio.gather(request(0, 5), request(100, 105), request(0, 5))
    assert found == [[1, 4, 5, 5], [101, 104, 105, 105], [1, 4, 5, 5]]


async def test_tasks_of_one_request_share_its_turns() -> None:
    async def prompt() -> int:
        return turns.due(1)

    turns.enter(7, 10)
    assert sorted(await asyncio.gather(prompt(), prompt(), prompt())) == [8, 9, 10]


async def test_who_was_not_admitted_comes_first() -> None:
    async def probe() -> list[int]:
        return [turns.due(1), turns.due(1)]

    assert await asyncio.create_task(probe()) == [0, 0]


async def test_a_request_has_begun_when_one_of_its_prompts_has() -> None:
    begun = {"a": False, "b": False}

    async def prompt(name: str) -> None:
        request = turns.current()
        assert request is not None
        request.watch(lambda: begun[name])

    entered = turns.enter(0, 2)
    assert not entered.have_begun
    await asyncio.gather(prompt("a"), prompt("b"))
    assert not entered.have_begun
    begun["b"] = True
    assert entered.have_begun
