"""Is a model directory one that `maskgen convert` turns into a sparse checkpoint? Found out without reading all of it.

A server asks this about everything it is to serve. `config.json` tells it of checkpoints of compressed-tensors. Of an
ordinary directory some rows of some weights are read: of a model that was pruned, they follow 2:4. What is found here
is only a reason to convert, which then verifies every weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskgen.core.checkpoint import WEIGHT_SUFFIX, read_headers
from maskgen.core.config import CONFIG_KEY
from maskgen.core.errors import FormatError
from maskgen.core.files import open_tensors, read_json
from maskgen.core.pattern import NMPattern

COMPRESSED_TENSORS = "compressed-tensors"
MASKED, BITMASK, MARLIN, LEFTOVER = "masked-dense", "sparse-24-bitmask", "marlin-24", "leftover"

_PATTERN = NMPattern(2, 4)
_IN_A_BLOCK = re.compile(r"\.\d+\.")
_WEIGHTS, _ROWS = 16, 8
_DTYPES = ("BF16", "F16", "F32", "I8", "F8_E4M3")


def foreign_kind(path: Path) -> str | None:
    """What a directory holds: `sparse-24-bitmask`, `marlin-24`, `masked-dense` (zeros in weights that are stored in
    full), `leftover`, or None for anything else.

    `leftover` is a model of compressed-tensors that is not sparse, but has a `sparsity_config` which says so, and which
    engines refuse. Raises `FormatError` for a configuration that cannot be read.
    """
    if not (path / "config.json").is_file():
        return None
    hf_config = read_json(path / "config.json")
    if not may_be_foreign(hf_config):
        return None
    section = hf_config.get(CONFIG_KEY)
    if section is None:
        return MASKED if _looks_masked(path) else None
    sparsity = section.get("sparsity_config")
    stated = [section.get("format"), sparsity.get("format") if isinstance(sparsity, dict) else None]
    for kind in (MARLIN, BITMASK):
        if kind in stated:
            return kind
    if section.get("format") != "pack-quantized" and _looks_masked(path):
        return MASKED
    return LEFTOVER if sparsity else None


def may_be_foreign(hf_config: Mapping[str, Any]) -> bool:
    """Whether a directory with this `config.json` may be one that `foreign_kind` knows, by what is in its weights."""
    section = hf_config.get(CONFIG_KEY)
    return section is None or (isinstance(section, dict) and section.get("quant_method") == COMPRESSED_TENSORS)


def without_leftover(path: Path) -> dict[str, Any]:
    """The `quantization_config` of a `leftover`, without its `sparsity_config`."""
    section = read_json(path / "config.json")[CONFIG_KEY]
    return {key: value for key, value in section.items() if key != "sparsity_config"}


def _looks_masked(path: Path) -> bool:
    """Whether the first rows of some weight in the decoder blocks follow 2:4, and no chance made them."""
    try:
        headers = read_headers(path)
    except FormatError:  # dense models that only an engine reads: weights in other formats, under other names
        return False
    weights = [
        (name, header)
        for name, header in headers.items()
        if name.endswith(WEIGHT_SUFFIX)
        and _IN_A_BLOCK.search(name)
        and len(header.shape) == 2
        and header.dtype in _DTYPES
        and header.shape[1] % _PATTERN.column_multiple == 0
    ]
    for name, header in weights[:: max(1, len(weights) // _WEIGHTS)]:
        with open_tensors(header.path) as file:
            rows = file.get_slice(name)[: min(_ROWS, header.shape[0])]
        kept = rows.float().ne(0).reshape(-1, _PATTERN.m).sum(-1)
        if bool((kept <= _PATTERN.n).all()) and bool(kept.any()):
            return True
    return False
