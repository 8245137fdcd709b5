"""Tasks that need no network: sentences written for this project, put together from word lists, always the same ones.

Each sample has a beginning and endings of which one is right; a model answers with the ending it finds most likely.

    agreement     a verb agrees with its subject over words in between: The keys to the cabinet | are | is
    arithmetic    the sum of two numbers, or a sum that is off by a little
    recall        who has a thing that was handed on, two people having been named
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

SAMPLES = 1000


@dataclass(frozen=True)
class Sample:
    """A prompt, its possible endings, and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


_THINGS = (
    ("key", "keys"), ("letter", "letters"), ("picture", "pictures"), ("road", "roads"), ("window", "windows"),
    ("report", "reports"), ("bridge", "bridges"), ("garden", "gardens"), ("answer", "answers"), ("machine", "machines"),
    ("song", "songs"), ("table", "tables"), ("book", "books"), ("river", "rivers"), ("number", "numbers"),
    ("house", "houses"), ("ticket", "tickets"), ("lamp", "lamps"), ("box", "boxes"), ("plan", "plans"),
)  # fmt: skip
_LINKS = ("near", "behind", "beside", "next to", "close to", "in front of")
_VERBS = ((" is", " are"), (" was", " were"), (" has", " have"))
_BEGINNINGS = ("The", "As far as I know, the", "It seems that the", "Everybody says that the", "In this town, the")
_PEOPLE = (
    "Anna", "Tom", "Maria", "Peter", "Lucy", "David", "Emma", "Paul", "Sara", "Mark", "Helen", "John", "Nina", "Simon",
    "Laura", "Adam",
)  # fmt: skip
_HANDED = ("book", "ball", "letter", "ticket", "hammer", "cup", "map", "coat", "camera", "basket", "lamp", "pen")
_MEANWHILE = (
    "", " It was already late.", " Nobody else was in the room.", " The rain had stopped by then.",
    " Then they both went home.", " The day had been long.",
)  # fmt: skip


def _agreement(rng: random.Random) -> Sample:
    (one, many), (other_one, other_many) = rng.sample(_THINGS, 2)
    plural, verbs = rng.random() < 0.5, rng.choice(_VERBS)
    subject, between = (many, other_one) if plural else (one, other_many)
    return Sample(f"{rng.choice(_BEGINNINGS)} {subject} {rng.choice(_LINKS)} the {between}", verbs, int(plural))


def _arithmetic(rng: random.Random) -> Sample:
    left, right = rng.randint(1, 60), rng.randint(1, 39)
    total = left + right
    wrong = total + rng.choice([step for step in (-10, -2, -1, 1, 2, 10) if total + step > 0])
    answer = rng.randrange(2)
    choices = (f" {total}", f" {wrong}")
    return Sample(f"{left} + {right} =", choices if answer == 0 else choices[::-1], answer)


def _recall(rng: random.Random) -> Sample:
    (giver, taker), thing = rng.sample(_PEOPLE, 2), rng.choice(_HANDED)
    story = f"{giver} had a {thing}. {giver} gave the {thing} to {taker}.{rng.choice(_MEANWHILE)}"
    answer = rng.randrange(2)
    choices = (f" {taker}", f" {giver}")
    return Sample(f"{story} The {thing} now belongs to", choices if answer == 0 else choices[::-1], answer)


_MAKERS: dict[str, Callable[[random.Random], Sample]] = {
    "agreement": _agreement,
    "arithmetic": _arithmetic,
    "recall": _recall,
}
NAMES = tuple(_MAKERS)
"""Names of the tasks of the pack."""


def samples(name: str) -> list[Sample]:
    """The samples of a task of `NAMES`: `SAMPLES` of them, no two alike, always the same."""
    rng, make = random.Random(f"sparse-serve {name}"), _MAKERS[name]
    found: dict[str, Sample] = {}
    while len(found) < SAMPLES:
        sample = make(rng)
        found.setdefault(f"{sample.prompt}|{min(sample.choices)}|{max(sample.choices)}", sample)
    return list(found.values())
