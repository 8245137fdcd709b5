"""How estimates, their bounds and their limits are said to people: with units, a loss as a loss and a gain as a gain.

The names are those of `CheckResult.numbers`. A slowdown of -0.18 is "18.0 % shorter", never "-18 % longer".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """`scale` leads from the stored number to the one that is said, with `digits` after the point and `unit` behind.

    `of` is said once, after the estimate. `more` and `less` say the direction of what is relative to the base; empty
    for what has none.
    """

    scale: float
    digits: int
    unit: str
    of: str = ""
    more: str = ""
    less: str = ""

    def size(self, value: float) -> str:
        """The number with its unit, without a direction."""
        return f"{abs(value) * self.scale:.{self.digits}f}{self.unit}"

    def direction(self, value: float) -> str:
        """`more` or `less`; empty without a direction, and where the number that is said is zero."""
        is_zero = not round(abs(value) * self.scale, self.digits)
        return "" if is_zero else self.less if value < 0 else self.more


QUANTITIES = {
    "ppl_increase": Quantity(100, 2, " %", more="higher", less="lower"),
    "kl": Quantity(1, 4, "", of="nats per token"),
    "flips": Quantity(100, 2, " %", of="of positions"),
    "slowdown": Quantity(100, 1, " %", more="longer", less="shorter"),
    "drop": Quantity(100, 2, " points", more="worse", less="better"),
}
"""What checks estimate; a point of `drop` is one sample in a hundred."""


def percent(share: float, digits: int = 2) -> str:
    """A share as "56.25 %"."""
    return f"{100 * share:.{digits}f} %"


def said(name: str, value: float) -> str:
    """An estimate or a bound: "18.0 % shorter", "unchanged", "0.0905 nats per token"."""
    one = QUANTITIES[name]
    direction = one.direction(value)
    if one.more and not direction:
        return "unchanged"
    return f"{one.size(value)} {direction or one.of}".rstrip()


def between(name: str, low: float, high: float) -> str:
    """Two bounds: "between 9.32 % and 14.42 % higher", "between 2.1 % shorter and 0.4 % longer"."""
    one = QUANTITIES[name]
    direction = one.direction(low)
    if direction == one.direction(high) and (direction or not one.more):
        return f"between {one.size(low)} and {one.size(high)} {direction}".rstrip()
    return f"between {said(name, low)} and {said(name, high)}"


def allowed(name: str, limit: float) -> str:
    """A limit: "allowed 3.0 % longer"; below zero a gain is asked for: "required 5.00 % lower"."""
    one = QUANTITIES[name]
    word, direction = ("allowed", one.more) if limit >= 0 else ("required", one.less)
    return f"{word} {one.size(limit)} {direction}".rstrip()
