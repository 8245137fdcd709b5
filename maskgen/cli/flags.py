"""Flags that several verbs of `maskgen` have, and how a verb and a default are written in its help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from maskgen.api.requests import Request

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


DATA = (
    'plain text; .json, .jsonl, .ndjson, .csv, .tsv or .parquet with "text" or "messages" (through the model\'s chat '
    "template); any of these as .gz, .zst, .bz2 or .xz; token ids as .npy or .safetensors; or "
    "hf:ORG/NAME[:CONFIG][:SPLIT]"
)
"""What text may come from, for the help of `--data`."""


def verb(verbs: Verbs, name: str, summary: str, details: str = "") -> argparse.ArgumentParser:
    """The parser of one verb. A flag that is not typed is not in the namespace."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, description=f"{summary}. {details}", argument_default=argparse.SUPPRESS
    )
    return parser


def default(kind: type[Request], name: str) -> str:
    """For the end of a flag's help."""
    return f"(default: {kind.model_fields[name].default})"


def count(text: str) -> int:
    """The type of a flag that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def add_bos(parser: argparse.ArgumentParser) -> None:
    """`--bos` and `--no-bos`."""
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin each window with BOS, or do not (default: as the model's tokenizer does by itself)",
    )


def add_out(parser: argparse.ArgumentParser) -> None:
    """`--out`."""
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to write; must not exist")


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`."""
    parser.add_argument(
        "--device", help="where to compute, such as cpu or cuda:0 (default: cuda if available, else cpu)"
    )
