"""The `maskgen` command: parse arguments, run one verb, turn errors into one line and an exit code.

Exit codes: 0 done, 2 something the user can fix (one line on stderr says what), 130 interrupted. Anything else is a
bug in maskgen and ends in a traceback. What decides a result lives in the recipe; flags are about files and machines.
torch and transformers are imported by the verb that needs them, so `--help` is immediate.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    _Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """\
examples:
  maskgen demo --out demo                                     a tiny trained model and text to try everything on
  maskgen run sparsegpt --model demo/model --data demo/calibration.txt --out demo/sparse
  maskgen run maskllm --model demo/model --data demo/calibration.txt --out demo/learned
  maskgen eval demo/sparse --data demo/heldout.txt            perplexity, protocol stated
  maskgen inspect demo/sparse                                 what is stored, layer by layer
"""

_CODES = ("int8", "fp8_e4m3")
"""Kinds of `maskgen.core.values`, which is not imported for `--help`; a test compares the two."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="maskgen: %(levelname)s: %(message)s")
    from maskgen.cli import verbs
    from maskgen.core.errors import SparseError

    try:
        verbs.VERBS[args.verb](args)
    except (SparseError, OSError) as error:
        print(f"maskgen: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("maskgen: interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(
        prog="maskgen",
        description="Prune language models to N:M patterns and write checkpoints that store only what is left.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_run(verbs)
    _add_permute(verbs)
    _add_compress(verbs)
    _add_quantise(verbs)
    _add_decompress(verbs)
    _add_inspect(verbs)
    _add_eval(verbs)
    _add_demo(verbs)
    _add_report(verbs)
    return parser


def _verb(verbs: _Verbs, name: str, summary: str, details: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=f"{summary}. {details}")
    return parser


def _add_run(verbs: _Verbs) -> None:
    parser = _verb(
        verbs,
        "run",
        "prune a model with a recipe, one-shot or learned, and write the result",
        "The result is a complete Hugging Face directory. A run that is stopped continues when started again with the "
        "same arguments: what is done is kept in OUT.work until the result is written.",
    )
    _add_inputs(parser, "a shipped recipe (such as magnitude, wanda, sparsegpt, maskllm; a wrong name lists them all)")
    _add_training(parser)
    parser.add_argument(
        "--masks-out", type=Path, metavar="FILE", help="also write the masks alone, as .safetensors (default: no)"
    )
    parser.add_argument("--keep-work", action="store_true", help="keep OUT.work after success (default: it is deleted)")


def _add_inputs(parser: argparse.ArgumentParser, recipes: str) -> None:
    """What `run` and `permute` start from, and where they write."""
    parser.add_argument("recipe", help=f"{recipes}, or the path of a .toml file")
    parser.add_argument("--model", required=True, help="dense model: a Hugging Face directory, or a hub id (org/name)")
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help='calibration or training text: plain text, .jsonl or .parquet with a "text" field, token ids as .npy or '
        ".safetensors, or hf:ORG/NAME[:CONFIG][:SPLIT]; several are mixed in equal parts (default: none; enough for "
        "methods that need no data, such as magnitude)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to write; must not exist")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="change one recipe value, such as method.damp=0.05 or calibration.samples=64; repeatable (default: none)",
    )
    _add_device(parser)


def _add_training(parser: argparse.ArgumentParser) -> None:
    """Flags of learned methods. They change how a run goes, never what comes out, but for `--prior`."""
    group = parser.add_argument_group("learned methods")
    group.add_argument(
        "--prior",
        type=Path,
        metavar="FILE",
        help="start from these masks (a file from --masks-out, or a sparse checkpoint of the same model) in place of "
        "the recipe's [prior] (default: the recipe's)",
    )
    group.add_argument(
        "--micro-batch", type=_count, metavar="WINDOWS", help="windows per forward pass; bounds memory (default: 8)"
    )
    group.add_argument(
        "--eval-every",
        type=_count,
        metavar="STEPS",
        help="steps between looks at the held-out perplexity of the masks (default: five looks a run)",
    )
    group.add_argument(
        "--checkpoint-every",
        type=_count,
        metavar="STEPS",
        help="steps between checkpoints, from which a killed run goes on (default: one every five minutes)",
    )
    group.add_argument("--keep-checkpoints", type=_count, metavar="N", help="newest checkpoints to keep (default: 2)")
    group.add_argument(
        "--checkpoint-activations",
        action="store_true",
        help="compute activations again in the backward pass: less memory, more time, the same result (default: no)",
    )
    group.add_argument(
        "--shard",
        action="store_true",
        help="under torchrun: split parameters, gradients and optimiser states over the processes (FSDP2) instead of "
        "keeping a copy in each (DDP) (default: no)",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _add_permute(verbs: _Verbs) -> None:
    parser = _verb(
        verbs,
        "permute",
        "reorder a dense model's hidden neurons so that masks keep more of the weights that matter",
        "The result is a dense model that computes the same function; prune it with any recipe of the same pattern.",
    )
    _add_inputs(parser, "whose scores: ria, wanda, magnitude")


def _add_compress(verbs: _Verbs) -> None:
    parser = _verb(verbs, "compress", "apply existing masks to the dense model they were made for")
    parser.add_argument("model", help="dense model: a Hugging Face directory or a hub id")
    parser.add_argument(
        "masks", type=Path, help="a mask file from `run --masks-out`, or a sparse checkpoint to take masks from"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to write; must not exist")
    parser.add_argument(
        "--values",
        choices=("float", *_CODES),
        default="float",
        help="how kept weights are stored: as they are, or as 8-bit codes with a scale per row (default: %(default)s)",
    )


def _add_quantise(verbs: _Verbs) -> None:
    parser = _verb(
        verbs,
        "quantise",
        "write a sparse checkpoint again with kept weights of 8 bits",
        "Masks, corrections and every other tensor stay as they are; pruned weights are exactly zero before and after.",
    )
    parser.add_argument("model", type=Path, help="sparse checkpoint directory with float values")
    parser.add_argument("--values", required=True, choices=_CODES, help="the code: integers, or floats of 8 bits")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to write; must not exist")


def _add_decompress(verbs: _Verbs) -> None:
    parser = _verb(
        verbs,
        "decompress",
        "write a sparse checkpoint as an ordinary dense one, zeros included, for other tools",
        "8-bit values become floats; corrections are added to the weights, which then have no zeros left.",
    )
    parser.add_argument("model", type=Path, help="sparse checkpoint directory")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to write; must not exist")


def _add_inspect(verbs: _Verbs) -> None:
    parser = _verb(
        verbs,
        "inspect",
        "show what a model directory holds, layer by layer",
        "Verifies a sparse checkpoint in full; tells whether the layers of a dense one follow a pattern.",
    )
    parser.add_argument("model", type=Path, help="model directory, dense or sparse")
    parser.add_argument("--pattern", default=None, help="pattern to check a dense model against (default: 2:4)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table (default: table)")


def _add_eval(verbs: _Verbs) -> None:
    parser = _verb(verbs, "eval", "measure perplexity, dense or sparse, with the protocol stated")
    parser.add_argument("model", help="model directory, dense or sparse, or a hub id")
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FILE",
        help='text to score: plain text, .jsonl or .parquet with a "text" field, or token ids as .npy or .safetensors',
    )
    parser.add_argument("--window", type=int, default=2048, help="tokens per window (default: %(default)s)")
    parser.add_argument(
        "--stride", type=int, default=None, help="tokens between windows (default: the window, so none overlap)"
    )
    parser.add_argument("--bos", action="store_true", help="start each window with the BOS token (default: no)")
    parser.add_argument("--max-windows", type=int, default=None, help="stop after this many windows (default: all)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype to run the model in; auto is the stored one (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=1, help="windows per forward pass (default: %(default)s)")
    _add_device(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every window's loss (default: no)")
    parser.add_argument(
        "--windows-out",
        type=Path,
        metavar="FILE",
        help="also write the token ids of every window, for a paired measurement elsewhere (default: no)",
    )


def _add_demo(verbs: _Verbs) -> None:
    parser = _verb(
        verbs,
        "demo",
        "make a small trained model and text to try the other verbs on, offline and in minutes",
        "A finished demo is found again, not made twice.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory to write (default: sparse-serve/demo-v1 in your cache directory)",
    )


def _add_report(verbs: _Verbs) -> None:
    parser = _verb(
        verbs,
        "report",
        "compare learned runs, finished or not, in one HTML page",
        "Curves, agreement by layer, perplexities and patterns; the page needs no network. Needs the extra `report`.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="output directory of `maskgen run`, the OUT.work of one that is running, or a log file",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="page to write; an older one is replaced (default: %(default)s)",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default=None, help="where to compute, such as cpu or cuda:0 (default: cuda if available, else cpu)"
    )
