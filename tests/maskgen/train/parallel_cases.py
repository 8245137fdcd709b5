"""What `test_parallel` runs in one process and, as a program under `torchrun`, in two.

torchrun --nproc-per-node 2 -m tests.maskgen.train.parallel_cases FOLDER        prints one JSON object
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from maskgen.methods import create
from maskgen.methods.learned import LearnedMethod
from maskgen.numerics.shards import local
from maskgen.train.checkpoints import Checkpoints
from maskgen.train.loop import bitmasks
from maskgen.train.parallel import Group, joined
from maskgen.train.step import heldout_nll
from tests import models
from tests.maskgen.training import PATTERN, corpus, session

STEPS = 5


def prior(name: str) -> torch.Tensor:
    """The largest weights of the model that `session` makes."""
    return PATTERN.mask_from_scores(models.build("llama").get_parameter(f"{name}.weight").detach().abs())


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "maskllm": ("maskllm", {"prior_strength": 0.0, "init_noise": True, "moments": "float32"}, {"noise_samples": 2}),
    "blocks": ("maskllm", {"weight_reward": 0.0}, {"blocks": (0, 1), "prior": prior}),
    "proxsparse": ("proxsparse", {"strength": 0.5}, {}),
    "adaptive_sparse": ("adaptive_sparse", {"slorb_segment": 8, "refresh_every": 2}, {"scope": "all"}),
    "dense_control": ("dense_control", {}, {}),
    "maskprune": ("maskprune", {"ffn_multiple": 16}, {}),
    "structured": ("structured", {"ffn_multiple": 16, "score_steps": 2}, {}),
    "saving": ("adaptive_sparse", {}, {"scope": "all", "dtype": "bfloat16", "checkpointed": True}),
}
"""Method, options and training by name."""

RESUMED = ("maskllm", "adaptive_sparse", "maskprune")
"""Those that are also stopped and go on."""


def key(case: str, shard: bool) -> str:
    """The name of a case's result."""
    return f"{case} {'shards' if shard else 'replicas'}"


def learned(case: str, group: Group) -> dict[str, Any]:
    """Losses, gradient norms, held-out loss and masks after a few steps."""
    name, options, spec = CASES[case]
    method = create(name, options)
    assert isinstance(method, LearnedMethod)
    running = session(method, group=group, distill_weight=0.5, lr=1e-3, steps=STEPS, **spec)
    text = corpus()
    logs = [running.run_step(text, 1) for _ in range(STEPS)]
    return {
        "losses": [log.loss for log in logs],
        "gradient_norms": [log.gradient_norm for log in logs],
        "heldout": heldout_nll(running, text.heldout, 4),
        "masks": [bits.flatten().tolist() for bits in bitmasks(running).values()],
    }


def differs_when_resumed(case: str, group: Group, folder: Path) -> list[str]:
    """Parameters that are not the same bits in a run that went on from a checkpoint, and in one that did not stop."""
    name, options, spec = CASES[case]
    checkpoints = Checkpoints(folder, "sha256:" + "0" * 64)
    text = corpus()
    runs = [session(create(name, options), group=group, lr=1e-2, steps=STEPS, **spec) for _ in range(2)]
    for step in range(STEPS):
        if step == 2:
            checkpoints.save(runs[0], {})
            assert checkpoints.restore(runs[1], {})
        runs[0].run_step(text, 1)
        if step >= 2:
            runs[1].run_step(text, 1)
    whole, resumed = ({name: local(item.detach()) for name, item in run.model.named_parameters()} for run in runs)
    return [name for name, tensor in whole.items() if not torch.equal(tensor, resumed[name])]


def main() -> None:
    """Every case, replicated and sharded."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with joined("cpu", shard=False) as group:
        for shard in (False, True):
            for case in CASES:
                this = dataclasses.replace(group, shard=shard)
                results[key(case, shard)] = learned(case, this)
                if case in RESUMED:
                    results[key(case, shard)]["resumed"] = differs_when_resumed(
                        case, this, Path(sys.argv[1]) / key(case, shard)
                    )
        results["told"] = group.broadcast(lambda: f"process {group.rank}")
        results["told to all"] = group.total(torch.tensor(float(results["told"] == "process 0"))).item()
        if group.first:
            print(json.dumps(results), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
