"""What pruning or training a model would cost: memory, GPUs, hours, money, by the formulas of docs/plan.md.

    python deploy/train/plan.py llama-3.1-8b
    python deploy/train/plan.py MODEL/config.json --price 2.5 --tokens 2e9

Three numbers are measured (`MEASURED_*`); everything else is counted from the shapes of the model, and every line for
a model larger than those that were measured is an extrapolation.

Legend: T = tokens, O = out features, I = in features, L = blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEASURED_GPU_FLOPS = 6.7e13
"""Of `adaptive_sparse` on SmolLM2-135M, one H200: 62,000 tokens/s times 8 FLOP for each of 134.5 M weights
(tests/bench/results/gpu-learned--smollm2-135m-adaptive_sparse--nvidia-h200--20261126-042200.json)."""

MEASURED_SWEEP_MEMORY = 3.65
"""Peak workspace of a SparseGPT sweep by what is counted here
(tests/bench/results/sweep-cost--llama-640x14--x86_64-2core--20261122-0724.json)."""

MEASURED_MASKLLM_BYTES = 20.3
"""Of tensors for each prunable weight (docs/results-7m.md, "Memory of one step"); of other methods it is counted."""

ASSUMED_SHARE = 0.4
"""Of a GPU's peak that large models are often trained at; not measured here."""

WINDOW_T = 2048


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family."""

    hidden: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """From config.json. Raises `KeyError` for one that is no Llama's."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            hidden,
            config["intermediate_size"],
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads", heads),
            config.get("head_dim") or hidden // heads,
            config["vocab_size"],
            config.get("tie_word_embeddings", False),
        )

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Outputs and inputs of a block's layers that share one input: qkv, o, gate and up, down."""
        attention = self.heads * self.head
        return [
            (attention + 2 * self.kv_heads * self.head, self.hidden),
            (self.hidden, attention),
            (2 * self.inner, self.hidden),
            (self.hidden, self.inner),
        ]

    @property
    def block(self) -> int:
        """Weights of one."""
        return sum(outputs * inputs for outputs, inputs in self.layers)

    @property
    def prunable(self) -> int:
        """Weights of all blocks."""
        return self.blocks * self.block

    @property
    def used(self) -> int:
        """Weights that a token is multiplied with: all blocks and the output layer."""
        return self.prunable + self.hidden * self.vocabulary

    @property
    def stored(self) -> int:
        """Weights in the files, norms apart."""
        return self.used + (0 if self.tied else self.hidden * self.vocabulary)


MODELS = {
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, False),
    "llama-3.1-70b": Shape(8192, 28672, 80, 64, 8, 128, 128256, False),
    "llama-3.1-405b": Shape(16384, 53248, 126, 128, 8, 128, 128256, False),
}


@dataclass(frozen=True)
class Cost:
    """`gpu_bytes` on each of `gpus`, None where no number of them is enough; `flop` in all."""

    gpus: int | None
    gpu_bytes: float
    flop: float


@dataclass(frozen=True)
class Sweep:
    """A method that looks at one block at a time, on one GPU. `grams` matrices `[I, I]` are held and inverted, and a
    layer's weights are multiplied with one of them `products` times; `passes` forward passes are made."""

    samples: int = 128
    passes: int = 2
    grams: int = 0
    products: float = 0.0

    def cost(self, shape: Shape, gpu_bytes: float, tokens: float) -> Cost:
        """Of the whole model; `tokens` are for training, and change nothing here."""
        calibration_T = self.samples * WINDOW_T
        squares = [inputs**2 for _, inputs in shape.layers]
        gram = calibration_T * sum(squares) + sum(inputs**3 for _, inputs in shape.layers)
        solving = self.products * sum(outputs * inputs**2 for outputs, inputs in shape.layers)
        flop = 2 * self.passes * shape.prunable * calibration_T
        flop += shape.blocks * ((2 * gram if self.grams else 0) + 2 * solving)
        held = 4 * (shape.block + max(1, self.grams) * max(squares) + calibration_T * shape.hidden)
        needed = MEASURED_SWEEP_MEMORY * held if self.samples else 4.0 * shape.block
        return Cost(1 if needed <= gpu_bytes else None, needed, flop)


@dataclass(frozen=True)
class Training:
    """A method that trains all blocks, with `--shard` and `--checkpoint-activations`. `state` and `gathered` are bytes
    for each prunable weight, of what is split over the GPUs and of the two blocks that each has whole at a time."""

    state: float
    gathered: float
    flop_per_weight: float = 10.0
    """Forward 2, backward 4, again forward 2, teacher 2."""
    micro_T: int = WINDOW_T

    def cost(self, shape: Shape, gpu_bytes: float, tokens: float) -> Cost:
        """Of training on so many tokens."""
        inside = self.micro_T * 2 * (8 * shape.hidden + 4 * shape.inner)
        logits = self.micro_T * shape.vocabulary * 12
        inputs = self.micro_T * shape.blocks * shape.hidden * 2
        whole = 2 * self.gathered * shape.block + inside + logits + inputs
        split = self.state * shape.prunable + 2 * (shape.stored - shape.prunable)
        flop = self.flop_per_weight * shape.used * tokens
        if whole >= gpu_bytes:
            return Cost(None, whole, flop)
        least = math.ceil(split / (gpu_bytes - whole))
        gpus = 2 ** math.ceil(math.log2(least)) if least <= 8 else 8 * math.ceil(least / 8)
        return Cost(gpus, whole + split / gpus, flop)


METHODS: dict[str, Sweep | Training] = {
    "magnitude": Sweep(samples=0, passes=0),
    "wanda, ria": Sweep(),
    "sparsegpt": Sweep(grams=1, products=0.5),
    "admm": Sweep(samples=64, passes=3, grams=5, products=20),
    "maskllm": Training(MEASURED_MASKLLM_BYTES, 15),
    "proxsparse": Training(18, 11),
    "adaptive_sparse, dense_control": Training(19, 11),
    "maskprune": Training(2, 4),
}


def rows(shape: Shape, args: argparse.Namespace) -> Iterator[str]:
    """A line of the table for each method."""
    for name, method in METHODS.items():
        cost = method.cost(shape, 0.9e9 * args.gpu_gb, args.tokens)
        each = f"{cost.gpu_bytes / 1e9:.0f} GB"
        gpus = f"too small: {each}" if cost.gpus is None else f"{cost.gpus} x {each}"
        hours = [cost.flop / rate / 3600 for rate in (MEASURED_GPU_FLOPS, ASSUMED_SHARE * args.peak_tflops * 1e12)]
        money = [f"{said(all_hours)} h, ${said(all_hours * args.price)}" for all_hours in hours]
        yield f"| `{name.replace(', ', '`, `')}` | {gpus} | {money[0]} | {money[1]} |"


def said(value: float) -> str:
    """Two digits: nothing here is known better."""
    if value < 0.1:
        return "< 0.1"
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def table(name: str, shape: Shape, args: argparse.Namespace) -> str:
    """A model's part of the page."""
    head = f"{name}: {shape.prunable / 1e9:.1f} G prunable weights, {2 * shape.stored / 1e9:,.0f} GB in bfloat16\n\n"
    head += "| method | GPUs | GPU-hours, cost at the measured rate | at 40 % of the peak |\n|---|---|---:|---:|\n"
    return head + "".join(f"{row}\n" for row in rows(shape, args))


def parser() -> argparse.ArgumentParser:
    """The flags; defaults are an H200's."""
    made = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add: Callable[..., Any] = made.add_argument
    add("models", nargs="*", metavar="MODEL", help=f"config.json, or {', '.join(MODELS)} (default: these)")
    add("--tokens", type=float, default=1e9, help="that training sees (default: %(default)g)")
    add("--gpu-gb", type=float, default=141.0, help="memory of a GPU; a tenth is left free (default: %(default)g)")
    add("--peak-tflops", type=float, default=989.0, help="of a GPU in dense bfloat16 (default: %(default)g)")
    add("--price", type=float, default=3.0, help="dollars for a GPU-hour (default: %(default)g)")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Print a table for each model."""
    flags = parser()
    args = flags.parse_args(words)
    for name in args.models or MODELS:
        if name in MODELS:
            shape = MODELS[name]
        else:
            try:
                shape = Shape.of(json.loads(Path(name).read_text("utf-8")))
            except (OSError, ValueError, KeyError, TypeError) as error:
                flags.error(f"{name}: is neither a config.json of a Llama nor one of {', '.join(MODELS)}: {error!r}")
        print(table(name, shape, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
