"""The arguments of `compress`, `convert`, `quantise` and `decompress`, which make one model directory of another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from maskgen.api.requests import DEFAULT_GROUP, Codes, CompressRequest, ConvertRequest, Group
from maskgen.cli.flags import DATA, add_bos, add_device, add_out, default, verb

if TYPE_CHECKING:
    from maskgen.cli.flags import Verbs

_CODES = get_args(Codes)


def add_conversions(verbs: Verbs) -> None:
    """All four verbs, in the order of the help."""
    _add_compress(verbs)
    _add_convert(verbs)
    _add_quantise(verbs)
    _add_decompress(verbs)


def _add_compress(verbs: Verbs) -> None:
    parser = verb(verbs, "compress", "apply existing masks to the dense model they were made for")
    parser.add_argument("model", help="dense model: a Hugging Face directory, a hub id or a GGUF file")
    parser.add_argument(
        "masks", type=Path, help="a mask file from `run --masks-out`, or a sparse checkpoint to take masks from"
    )
    add_out(parser)
    parser.add_argument(
        "--values",
        choices=("float", *_CODES),
        help="how kept weights are stored: as they are, as 8-bit codes with a scale per row, or as 4-bit codes with a "
        "scale per group " + default(CompressRequest, "values"),
    )
    _add_group(parser)


def _add_convert(verbs: Verbs) -> None:
    parser = verb(
        verbs,
        "convert",
        "write a sparse model of another tool as a checkpoint of ours",
        "Takes weights with zeros in them (an ordinary directory, floats or 8-bit codes), sparse-24-bitmask and "
        "marlin-24 of compressed-tensors, a dense model with MaskLLM's masks, and older checkpoints of ours. Every "
        "layer is verified.",
    )
    parser.add_argument("model", help="Hugging Face directory or hub id")
    parser.add_argument(
        "--masks",
        type=Path,
        metavar="FILE",
        help="masks of MaskLLM (.npz) for MODEL, which is then the dense model they were learned on (default: none)",
    )
    parser.add_argument("--pattern", help=f"pattern of weights with zeros in them {default(ConvertRequest, 'pattern')}")
    add_out(parser)


def _add_quantise(verbs: Verbs) -> None:
    parser = verb(
        verbs,
        "quantise",
        "write a sparse checkpoint again with kept weights of 8 or 4 bits",
        "Each kept weight becomes the nearest code; with --data, the code that serves the layer's outputs best. "
        "Masks, corrections and every other tensor stay as they are; pruned weights are exactly zero before and after.",
    )
    parser.add_argument("model", type=Path, help="sparse checkpoint directory with float values")
    parser.add_argument(
        "--values", required=True, choices=_CODES, help="the code: integers of 8 or 4 bits, or floats of 8"
    )
    _add_group(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        metavar="FILE",
        help=f"text to choose int4 codes by: {DATA}; or self (default: none, codes are the nearest)",
    )
    add_bos(parser)
    add_device(parser)
    add_out(parser)


def _add_group(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--group",
        type=lambda text: int(text) if text.isdecimal() else text,
        choices=get_args(Group),
        help=f"kept int4 weights that share a scale (default: {DEFAULT_GROUP})",
    )


def _add_decompress(verbs: Verbs) -> None:
    parser = verb(
        verbs,
        "decompress",
        "write a sparse checkpoint, or a GGUF file, as an ordinary dense model, zeros included, for other tools",
        "8-bit and 4-bit values become floats; corrections are added to the weights, which then have no zeros left.",
    )
    parser.add_argument("model", type=Path, help="sparse checkpoint directory, or a GGUF file")
    add_out(parser)
