"""What a record says beside its figures, so that somebody else can run it again and trace a table back to it.

A record that holds is a file of `results/`, `<what>--<model>--<machine>--<time>.json`; one that others have taken the
place of is a line of `<what>--<model>--<machine>.jsonl` (`tests.bench.superseded`). Its name is the file's, without
`.json`. Records from before there was a schema are named in `legacy.json`, each with what it lacks. Figures are never
edited; a newer record that takes the place of an old one names it in `supersedes`.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
LEGACY = Path(__file__).parent / "legacy.json"
NOT_IN_HISTORY = "a commit of the history"
"""How `legacy.json` says that the commit a record names was rewritten later, and is nowhere."""

Text = Annotated[str, StringConstraints(min_length=1)]
Commit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class Record(BaseModel):
    """One record; its figures are what other keys it has.

    `commit` is that of a clean tree, as 40 hex digits. `command` is what was typed. `versions` are of the packages that
    decide the figures. `inputs` has the digest of everything that was read (models, texts), and is empty where nothing
    was. `supersedes` names records that this one takes the place of.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    created: AwareDatetime
    commit: Commit
    command: Text
    versions: dict[str, Text]
    machine: Text
    processor: Text
    cpus: Annotated[int, Field(ge=1)]
    inputs: dict[str, Digest]
    supersedes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Superseded:
    """A record that others have taken the place of: `by` names them."""

    by: tuple[str, ...]
    record: dict[str, Any]


def parse(text: str, name: str) -> dict[str, Any]:
    """The object in a text. Raises ValueError for another value, NaN, or a key that is there twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError(f"{name}: a key is there twice")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{name}: {constant} is no number")

    value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object")
    return value


def read(file: Path) -> dict[str, Any]:
    """The record in a file. Raises ValueError for what is none."""
    return parse(file.read_text("utf-8"), file.name)


def current(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """Every record that holds, by its name."""
    files = sorted((folder or RESULTS).glob("*.json"))
    return {file.stem: read(file) for file in files}


def superseded(folder: Path | None = None) -> dict[str, Superseded]:
    """Every record that others have taken the place of, by its name. Raises ValueError for a line in a wrong file."""
    found: dict[str, Superseded] = {}
    for file in sorted((folder or RESULTS).glob("*.jsonl")):
        for number, text in enumerate(file.read_text("utf-8").splitlines(), 1):
            line = parse(text, f"{file.name}:{number}")
            if set(line) != {"name", "superseded_by", "record"} or subject(line["name"]) != file.stem:
                raise ValueError(f"{file.name}:{number}: expected name, superseded_by and record of {file.stem}")
            found[line["name"]] = Superseded(tuple(line["superseded_by"]), line["record"])
    return found


def subject(name: str) -> str:
    """What a record of this name is about, and the machine: its name without the time."""
    return name.rpartition("--")[0]


def lacks(value: dict[str, Any]) -> list[str]:
    """The keys of `Record` that a record has not, or has wrong; none if it follows the schema."""
    try:
        Record.model_validate(value)
    except ValidationError as error:
        return sorted({str(entry["loc"][0]) for entry in error.errors()})
    return []


def legacy() -> dict[str, list[str]]:
    """What older records lack, by their names."""
    return dict(json.loads(LEGACY.read_text("utf-8")))


def history(root: Path = ROOT) -> frozenset[str] | None:
    """Every commit that led to the one that is checked out in `root`; None in a shallow clone, where there is no git,
    or where the repository is another one's, in which a copy of this one lies."""
    try:
        where, shallow = _git(root, "rev-parse", "--show-toplevel", "--is-shallow-repository").splitlines()
        if shallow == "true" or not Path(where).samefile(root):
            return None
        return frozenset(_git(root, "rev-list", "HEAD").split())
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout
