"""Every stream of vLLM's engine goes at the pace of `engine.pace`, whichever API reads it.

vLLM keeps what a request puts out in a `RequestOutputCollector` until somebody takes it, and puts together what came
meanwhile: texts, tokens and log-probabilities in their order. `install` puts a collector in its place that gives
nothing away between a message and the clock's tick, but for the end of the request: that goes at once, and so does an
error, after the tokens that were made before it.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from vllm.v1.engine import async_llm
from vllm.v1.engine.output_processor import RequestOutputCollector

from sparse_serve.engine.pace import Pace


def install(pace: Pace) -> None:
    """Let vLLM make collectors of this pace for the requests of this process."""
    async_llm.RequestOutputCollector = functools.partial(PacedCollector, pace)


class PacedCollector(RequestOutputCollector):
    """vLLM's collector of one request, whose event `ready` says when its output may be taken."""

    def __init__(self, pace: Pace, output_kind: Any, request_id: str) -> None:
        super().__init__(output_kind, request_id)
        self.ready: _Gate = _Gate()
        self._pace = pace
        self._error: Exception | None = None
        self._is_stream = False

    def put(self, output: Any) -> None:
        """Keep an output for who takes it, together with what is kept already."""
        if isinstance(output, Exception) and self.output is not None and not isinstance(self.output, Exception):
            self._error = output
        else:
            super().put(output)
        if isinstance(output, Exception) or output.finished:
            self._release()

    async def get(self) -> Any:
        """What there is, as soon as it may be taken."""
        await self.ready.wait()
        return self._take()

    def get_nowait(self) -> Any:
        """What there is, if it may be taken."""
        return self._take() if self.ready.is_set() else None

    def _take(self) -> Any:
        output = super().get_nowait()
        if self._error is not None:
            super().put(self._error)
            self._error = None
        elif output is not None and not output.finished:
            if not self._is_stream:
                self._is_stream = True
                self._pace.begin()
            self.ready.held = self._pace.hold(self._release)
        return output

    def _release(self) -> None:
        self.ready.held = False
        if self.output is not None:
            self.ready.set()

    def close(self) -> None:
        """Nobody takes anything any more."""
        if self._is_stream:
            self._is_stream = False
            self._pace.end()
        super().close()


class _Gate(asyncio.Event):
    """An event that does not come while it is held."""

    held = False

    def set(self) -> None:
        """It comes, unless it is held."""
        if not self.held:
            super().set()
