"""Time and peak memory of every one-shot recipe on a random Llama: `python -m tests.bench.sweep_cost`.

The model has the reference model's shape with more and wider blocks (about ten times its weights by default); random
weights cost what trained ones cost. Each recipe runs in a process of its own, so that its peak memory is its own, and
only the sweep is timed. The peak is compared with what the driver promises: the process before the model is loaded, the
dense model, and one block's workspace (a float32 copy of the block, its statistics, and the activations).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.bench import record

RECIPES = ("magnitude", "wanda", "sparsegpt")
SAMPLES, WINDOW_TOKENS = 128, 256


def main() -> None:
    """Build the model, run each recipe in a process, write JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--one", nargs=2, metavar=("RECIPE", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), args.hidden, args.layers)
        command = [sys.executable, "-m", "tests.bench.sweep_cost", "--one"]
        rows = [
            json.loads(subprocess.run([*command, recipe, folder], capture_output=True, check=True).stdout)
            for recipe in RECIPES
        ]
    calibration = {"samples": SAMPLES, "window_tokens": WINDOW_TOKENS}
    path = record.save("sweep-cost", f"llama-{args.hidden}x{args.layers}", {"calibration": calibration, "rows": rows})
    for row in rows:
        print(row)  # noqa: T201
    print(f"written: {path.name}")  # noqa: T201


def build(folder: Path, hidden: int, layers: int) -> None:
    """A bfloat16 Llama with random weights; feed-forward three times as wide, as in the reference model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def measure(name: str, folder: str) -> dict[str, Any]:
    """Run one recipe and report seconds and bytes."""
    from maskgen.core.digest import digest_weights
    from maskgen.hf import model
    from maskgen.hf.planning import plan_of
    from maskgen.numerics.memory import peak_rss_bytes
    from maskgen.recipes import recipe
    from maskgen.sweep.driver import sweep

    wanted = recipe.load(name, [f"calibration.samples={SAMPLES}", f"calibration.window_tokens={WINDOW_TOKENS}"])
    base_digest, before_bytes = digest_weights(folder), peak_rss_bytes()
    dense = model.load(Path(folder))
    todo = plan_of(Path(folder), wanted.pattern, model=dense)
    block = max(sum(weight.numel() for weight in block.parameters()) for block in dense.model.layers)
    widest = max(linear.in_features for linear in dense.modules() if isinstance(linear, torch.nn.Linear))
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(4096, (SAMPLES, WINDOW_TOKENS), generator=generator)
    with tempfile.TemporaryDirectory() as work:
        report, _ = sweep(dense, todo, wanted, windows, Path(work) / "work", base_digest)
    return {
        "recipe": name,
        "million_weights": round(report.million_weights, 2),
        "s_per_million_weights": round(report.s_per_million_weights, 4),
        "sweep_s": round(report.total_s, 1),
        "peak_rss_bytes": report.peak_rss_bytes,
        "before_model_bytes": before_bytes,
        "dense_model_bytes": sum(weight.nbytes for weight in dense.parameters()),
        "block_float32_bytes": 4 * block,
        "widest_hessian_bytes": 4 * widest * widest,
        "activation_bytes": 4 * SAMPLES * WINDOW_TOKENS * dense.config.hidden_size,
    }


if __name__ == "__main__":
    main()
