"""The Dockerfiles of deploy/container as values: stages, and what a container of the last one is started with."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from tests.architecture.source import ROOT

FOLDER = ROOT / "deploy/container"


@dataclass(frozen=True)
class Step:
    """One instruction: its word, and all that stands behind it, in one line."""

    word: str
    rest: str

    @property
    def words(self) -> list[str]:
        """The rest as a list: a JSON array is one already, flags (`--from=...`) are left out."""
        if self.rest.startswith("["):
            return list(json.loads(self.rest))
        return [word for word in shlex.split(self.rest) if not word.startswith("--")]

    def flag(self, name: str) -> str:
        """The value of `--name=...`, or ""."""
        return next((word.partition("=")[2] for word in self.rest.split() if word.startswith(f"--{name}=")), "")


@dataclass
class Stage:
    """What stands between one FROM and the next."""

    base: str
    name: str
    steps: list[Step] = field(default_factory=list)

    def all(self, word: str) -> list[Step]:
        return [step for step in self.steps if step.word == word]

    def last(self, word: str) -> Step:
        return self.all(word)[-1]


def stages(name: str) -> list[Stage]:
    """Of the file `Dockerfile.NAME`. Variables of ARG before the first FROM are put in."""
    text = re.sub(r"^\s*#.*\n", "", (FOLDER / f"Dockerfile.{name}").read_text("utf-8"), flags=re.MULTILINE)
    found: list[Stage] = []
    arguments: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        step = Step(word, rest.strip())
        if word == "FROM":
            base, _, stage = step.rest.partition(" AS ")
            base = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], base)
            found.append(Stage(base, stage))
        elif word == "ARG" and not found:
            key, _, value = step.rest.partition("=")
            arguments[key] = value
        elif word:
            found[-1].steps.append(step)
    return found


def environment(stage: Stage) -> dict[str, str]:
    """The variables that its ENV sets."""
    return dict(word.split("=", 1) for step in stage.all("ENV") for word in step.words)


def copied(name: str) -> set[str]:
    """What its COPY takes from the context, as patterns."""
    steps = [step for stage in stages(name) for step in stage.all("COPY") if not step.flag("from")]
    return {source for step in steps for source in step.words[:-1]}


def admitted(pattern: str) -> bool:
    """Whether .dockerignore leaves it in the context: all is left out but what it names."""
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    kept = [line for line in lines if line and not line.startswith("#")]
    assert kept[0] == "*", "everything is left out first"
    return f"!{pattern}" in kept


def is_there(pattern: str) -> bool:
    """In the repository; dist/ is what `make wheel` writes."""
    return pattern.startswith("dist/") or bool(list(Path(ROOT).glob(pattern)))
