"""Lines about what is pruned of a model and what stays dense, and why: before a run, after it, and in `inspect`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from maskgen.api.events import Planned
from maskgen.hf.dense import KeptDense

SMALL_SHARE = 0.5
"""A run that prunes less than this part of the decoder blocks says so before it starts."""


def print_planned(planned: Planned) -> None:
    """What a user should know before a run starts; nothing for a model that is pruned nearly whole."""
    if not planned.is_checked:
        _say(
            f"{planned.architecture}: not checked against vLLM, so whether it serves these layers packed is known only "
            "when it does"
        )
    if planned.share < SMALL_SHARE:
        kept = ", ".join(f"{one.name} {percent(one.share)}" for one in planned.kept)
        _say(
            f"only {percent(planned.share)} of the weights in decoder blocks will be pruned ({planned.layers} layers); "
            f"these stay dense: {kept}"
        )


def print_kept(kept: Sequence[KeptDense]) -> None:
    """One line for each kind of matrix that stays dense."""
    for one in kept:
        count = f" ({one.layers} layers)" if "*" in one.name else ""
        _say(f"  kept dense: {one.name}{count}, {percent(one.share)} of the weights in decoder blocks: {one.reason}")


def percent(share: float) -> str:
    """For people: `12.3 %`."""
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _say(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)
