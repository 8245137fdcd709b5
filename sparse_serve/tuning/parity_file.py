"""What `parity` found, on its way from the process that holds a layer to the one that judges it.

Layers live in vLLM's worker processes. Each writes a file of JSON lines into the folder that `environment` names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparse_serve.runtime import environment


@dataclass(frozen=True)
class KernelParity:
    """The worst output of one kernel in one layer, over the numbers of tokens of one bucket.

    `first_tokens` to `tokens` is the bucket, `at_tokens` the number of tokens of the call with the worst output. There
    the kernel was off by `error`, where rounding can explain `allowed`; `error` is infinite for NaN. `rows` are the
    first and last of the wrong outputs around the worst one, and `columns` the inputs that lead to them, counted from 0
    in vLLM's layer (`layer`, its name; of this rank); None where nothing is wrong, or no part of the inputs alone is.
    `rank` of `ranks` holds that part of the layer (tensor parallelism).
    """

    layer: str
    kernel: str
    first_tokens: int
    tokens: int
    at_tokens: int
    error: float
    allowed: float
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    rank: int = 0
    ranks: int = 1

    @property
    def place(self) -> str:
        """The layer, and which part of it where it has several."""
        return self.layer if self.ranks == 1 else f"{self.layer} (rank {self.rank} of {self.ranks})"

    @property
    def ratio(self) -> float:
        """By how many times more than rounding can explain it is off; up to 1 nothing is wrong."""
        return self.error / self.allowed

    @property
    def bucket(self) -> str:
        """The numbers of tokens in words."""
        same = self.first_tokens == self.tokens
        return (
            f"{self.tokens} token{'s' * (self.tokens > 1)}" if same else f"{self.first_tokens} to {self.tokens} tokens"
        )


def write(found: Iterable[KernelParity]) -> None:
    """Add to this process's file. There must be a folder (`environment.kernel_parity_folder`)."""
    folder = environment.kernel_parity_folder()
    assert folder is not None
    with (folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(one)) + "\n" for one in found)


def read(folder: Path) -> list[KernelParity]:
    """What all processes have written, layer by layer."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    return [of_dict(json.loads(line)) for line in lines]


def of_dict(stored: dict[str, Any]) -> KernelParity:
    """The inverse of `dataclasses.asdict`, also after a way through JSON."""
    pairs = {name: None if stored[name] is None else tuple(stored[name]) for name in ("rows", "columns")}
    return KernelParity(**{**stored, **pairs})
