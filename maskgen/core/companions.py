"""The files (tokenizer, generation settings, chat template) that are copied or downloaded with the weights.

They are copied beside every checkpoint that is written, and downloaded with every model of the hub. Code is not among
them, and neither are weights in other formats.
"""

from __future__ import annotations

import json
from pathlib import Path

from maskgen.core.checkpoint import MISTRAL_CONFIG
from maskgen.core.errors import FormatError
from maskgen.core.files import check_no_pointer
from maskgen.core.quality import QUALITY_FILE

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")

ALLOCATION_FILE = "maskgen_budget.json"
"""How a budget was spent on a sparse checkpoint (`maskgen.export.allocation`)."""

SETTINGS_FILE = "maskgen_settings.json"
"""What a sparse checkpoint was written with besides its weights (`settings`)."""

_OWN_FILES = ("config.json", MISTRAL_CONFIG, QUALITY_FILE, ALLOCATION_FILE, SETTINGS_FILE)

SETTINGS_PATTERNS = tuple("*" + suffix for suffix in _SUFFIXES)
SNAPSHOT_PATTERNS = ("*.safetensors", *SETTINGS_PATTERNS)
"""Names of the files to download of a model on the hub, as patterns for `huggingface_hub.snapshot_download`; those of
settings alone, and with weights."""


def companion_files(model_dir: Path) -> list[Path]:
    """The files of `model_dir` to copy beside its weights when they are written in another form, sorted.

    `config.json` and the index of the shards are not among them: they are written with the weights. Neither is what was
    measured of the model, says how a budget was spent on it or what it was written with, which is not true of what it
    becomes.
    """
    return sorted(
        path
        for path in model_dir.iterdir()
        if path.is_file()
        and path.suffix in _SUFFIXES
        and path.name not in _OWN_FILES
        and not path.name.endswith(".index.json")
    )


def check_companions(model_dir: Path) -> None:
    """`FormatError` for a companion file that is damaged: a link to no file, a directory, a pointer of Git LFS, or JSON
    that does not parse.

    A library that reads it later would not say which file, or would pass over it.
    """
    for path in sorted(model_dir.iterdir()):
        if path.suffix in _SUFFIXES and not path.is_file():
            found = "a link to no file" if path.is_symlink() else "not a regular file"
            raise FormatError(f"{path}: {found}; remove it, or download the model again")
    for path in companion_files(model_dir):
        check_no_pointer(path)
        if path.suffix == ".json":
            try:
                json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                raise FormatError(f"{path}: not valid JSON: {error}; download or write it again") from None
