"""What a result file says beside its figures, so that somebody else can run it again and trace a table back to it.

Files that were written before there was a schema are named in `legacy.json`, each with what it lacks. They are never
edited; a newer result that takes the place of an old one names it in `supersedes`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

RESULTS = Path(__file__).parent / "results"
LEGACY = Path(__file__).parent / "legacy.json"

Text = Annotated[str, StringConstraints(min_length=1)]
Commit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class Record(BaseModel):
    """One result file; its figures are what other keys it has.

    `commit` is that of a clean tree, as 40 hex digits. `command` is what was typed. `versions` are of the packages that
    decide the figures. `inputs` has the digest of everything that was read (models, texts), and is empty where nothing
    was. `supersedes` names result files that this one takes the place of.
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


def read(path: Path) -> dict[str, Any]:
    """The object in a result file. Raises ValueError for another value, NaN, or a key that is there twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError(f"{path.name}: a key is there twice")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{path.name}: {constant} is no number")

    value = json.loads(path.read_text("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: expected an object")
    return value


def lacks(value: dict[str, Any]) -> list[str]:
    """The keys of `Record` that a result file has not, or has wrong; none if it follows the schema."""
    try:
        Record.model_validate(value)
    except ValidationError as error:
        return sorted({str(entry["loc"][0]) for entry in error.errors()})
    return []


def legacy() -> dict[str, list[str]]:
    """What older files lack, by their names."""
    return dict(json.loads(LEGACY.read_text("utf-8")))
