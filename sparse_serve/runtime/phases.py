"""How long the parts of something took, one after the other."""

import time
from collections.abc import Mapping


class Phases:
    """Seconds by phase, in order. The first begins now; each ends where the next begins."""

    def __init__(self) -> None:
        self._ends_s: dict[str, float] = {}
        self._begin_s = time.monotonic()

    def end(self, phase: str, at_s: float | None = None) -> None:
        """A phase has ended, now or at a time of `time.monotonic`, which may be another process's of this machine.

        A time before the end of the phase before, or after now, is moved there.
        """
        now_s = time.monotonic()
        last_s = max(self._ends_s.values(), default=self._begin_s)
        self._ends_s[phase] = min(max(now_s if at_s is None else at_s, last_s), now_s)

    @property
    def seconds(self) -> Mapping[str, float]:
        """What has ended so far."""
        begins_s = [self._begin_s, *self._ends_s.values()]
        return {
            phase: round(end_s - begin_s, 3)
            for (phase, end_s), begin_s in zip(self._ends_s.items(), begins_s, strict=False)
        }
