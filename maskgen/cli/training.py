"""The flags of learned methods."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskgen.api.requests import LearnRequest
from maskgen.cli.flags import count, default


def add_training(parser: argparse.ArgumentParser) -> None:
    """Flags of learned methods. They change how a run goes, never what comes out, but for `--prior`, `--teacher` and
    `--minutes`."""
    group = parser.add_argument_group("learned methods")
    group.add_argument(
        "--prior",
        type=Path,
        metavar="MASKS",
        help="start from these masks (a file from --masks-out, or a sparse checkpoint of the same model, of which "
        "best-effort, reconstruct and eora take the weights, too) in place of the recipe's [prior] (default: the "
        "recipe's)",
    )
    group.add_argument(
        "--teacher",
        metavar="DENSE",
        help="the dense model that a sparse --model or --prior was made from (default: as it says, beside it or on the "
        "hub)",
    )
    group.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="as many steps as fit into this time, from the start of the command to its result, in place of the "
        "recipe's train.steps; the recipe beside the result has their number (default: the recipe's)",
    )
    group.add_argument(
        "--micro-batch",
        type=count,
        metavar="WINDOWS",
        help=f"windows per forward pass; bounds memory {default(LearnRequest, 'micro_batch')}",
    )
    group.add_argument(
        "--eval-every",
        type=count,
        metavar="STEPS",
        help="steps between looks at the held-out perplexity of the masks (default: five looks a run)",
    )
    group.add_argument(
        "--checkpoint-every",
        type=count,
        metavar="STEPS",
        help="steps between checkpoints, from which a killed run goes on (default: one every five minutes)",
    )
    group.add_argument(
        "--keep-checkpoints",
        type=count,
        metavar="N",
        help=f"newest checkpoints to keep {default(LearnRequest, 'keep_checkpoints')}",
    )
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
