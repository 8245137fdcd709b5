"""What `test_parallel` runs in one process and, as a program under `torchrun`, in two.

torchrun --nproc-per-node 2 -m tests.maskgen.parallel_cases        prints one JSON object
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from maskgen.fit import bitmasks
from maskgen.learned import LearnedMethod
from maskgen.method import create
from maskgen.parallel import Group, joined
from maskgen.train import heldout_nll
from tests.maskgen.training import corpus, session

STEPS = 5

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "maskllm": ("maskllm", {"prior_strength": 0.0, "init_noise": True, "moments": "float32"}, {"noise_samples": 2}),
    "proxsparse": ("proxsparse", {"strength": 0.5}, {}),
    "adaptive_sparse": ("adaptive_sparse", {"slorb_segment": 8, "refresh_every": 2}, {"scope": "all"}),
    "dense_control": ("dense_control", {}, {}),
}
"""Method, options and training by name."""


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


def main() -> None:
    """Every case, replicated and sharded."""
    torch.set_num_threads(1)
    results = {}
    with joined("cpu", shard=False) as group:
        for shard in (False, True):
            for case in CASES:
                results[key(case, shard)] = learned(case, dataclasses.replace(group, shard=shard))
        if group.first:
            print(json.dumps(results), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
