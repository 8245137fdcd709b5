"""Finds an engine that hangs: its process lives, and no token comes.

An engine that makes no step for a quarter of the time limit is asked for a token, which has to come in another quarter;
of several replicas of the model each is. One that was told to pause, or to sleep, says so and is left alone.

A server that was itself suspended finds its time over when it wakes, with nothing wrong; so it takes two misses in a
row.
"""

import asyncio
import logging
import time

from sparse_serve.engine import Engine
from sparse_serve.runtime.errors import EngineDiedError, OverloadedError

logger = logging.getLogger(__name__)

_MISSES = 2


async def until_hung(engine: Engine, limit_s: float) -> None:
    """Return when the engine has not made a step for `limit_s`, also asked for one. Ends with it when it dies."""
    part_s = limit_s / (2 * _MISSES)
    misses = 0
    while misses < _MISSES:
        await asyncio.sleep(part_s)
        if time.monotonic() - engine.progress.last_step_s < part_s:
            misses = 0
            continue
        asked_s = time.monotonic()
        try:
            async with asyncio.timeout(part_s):
                if not await engine.rests():
                    await engine.probe()
        except TimeoutError:
            if engine.progress.last_step_s < asked_s:
                misses += 1
                logger.warning("the engine has made no step for %.0f s", time.monotonic() - engine.progress.last_step_s)
                continue
        except OverloadedError:
            if engine.progress.last_step_s < asked_s - part_s:
                misses += 1
                continue
        except EngineDiedError:
            return
        except Exception:
            logger.exception("the engine did not take the watchdog's question")
        misses = 0
