"""Peak memory and time of a MaskLLM step against plain autograd: `python -m tests.bench.mask_memory`.

All train the same logits of the same model, each in a process of its own. "plain" is the textbook form: softmax, mask
and W * M are ordinary tensors that autograd keeps for the backward pass; AdamW is torch's. Two peaks are given: what
the allocator had handed out at most (counted from the profiler's events), and what the process held at most (VmHWM)
above what it held before the model was loaded. The default model is a random Llama of 68.8 M prunable weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.functional import linear as dense_linear

from maskgen.core.pattern import NMPattern
from maskgen.hf import model
from maskgen.hf.planning import plan
from maskgen.methods.learned import StepContext, TargetLayer, learned_parameters
from maskgen.methods.learned.maskllm import MaskLLM, MaskLLMLinear
from tests.bench import record
from tests.bench.sweep_cost import build

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"moments": "float32"},
    "recomputed": {"moments": "float32"},
    "recomputed, bfloat16 moments": {},
    "recomputed, additive, bfloat16 moments": {"logits": "additive"},
}
STEPS = 4


class PlainLinear(MaskLLMLinear):
    """The textbook form: autograd keeps what it wants to keep."""

    def train_forward(self, x: Tensor) -> Tensor:
        sample = self.sample()
        generator = torch.Generator(self.logits.device).manual_seed(sample.seed)
        uniform = torch.rand(self.logits.shape, generator=generator, device=self.logits.device).clamp_(1e-7)
        probs_OPG = torch.softmax((sample.scale * self.logits - (-uniform.log()).log()) / sample.temperature, 1)
        mask_OI = (sample.patterns_Pm.T @ probs_OPG).transpose(1, 2).flatten(1)
        masked_OI = self.weight * mask_OI
        self.energy = masked_OI.float().square().sum()
        return dense_linear(x, masked_OI, self.bias)


def main() -> None:
    """Run every variant in a process, write JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face directory instead of the random Llama")
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--dry", action="store_true", help="print only, write no JSON")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.windows, args.window_tokens)))  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            build(Path(folder), args.hidden, args.layers)
        size = ["--windows", str(args.windows), "--window-tokens", str(args.window_tokens)]
        rows = [run(variant, args.model or folder, size) for variant in args.variants]
    for row in rows:
        for key in ("peak_tensor_bytes", "peak_process_bytes", "step_s"):
            row[key.removesuffix("_bytes").removesuffix("_s") + "_ratio"] = round(row[key] / rows[0][key], 3)
        print(row)  # noqa: T201
    if not args.dry:
        name = Path(args.model).name if args.model else f"llama-{args.hidden}x{args.layers}"
        tokens = {"windows": args.windows, "window_tokens": args.window_tokens}
        print(f"written: {record.save('mask-memory', name, {'tokens': tokens, 'rows': rows}).name}")  # noqa: T201


def run(variant: str, folder: str, size: list[str]) -> dict[str, Any]:
    """One variant in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.mask_memory", "--one", variant, folder, *size]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def measure(variant: str, folder: str, windows: int, window_tokens: int) -> dict[str, Any]:
    """Steps of one variant: the first under the memory profiler, the others on the clock."""
    before_bytes = resident_bytes("VmRSS")
    net = model.load(Path(folder))
    loaded_bytes = resident_bytes("VmRSS")
    step, weights = prepare(net, variant, windows, window_tokens)
    reset_peak()
    step(0)
    times_s = []
    for number in range(1, STEPS):
        began_s = time.perf_counter()
        step(number)
        times_s.append(time.perf_counter() - began_s)
    peak_bytes = resident_bytes("VmHWM")
    standing_bytes = sum(storage.nbytes() for storage in live_tensors())
    tensor_bytes = standing_bytes + allocated_peak(lambda: step(STEPS))
    return {
        "variant": variant,
        "million_weights": round(weights / 1e6, 2),
        "step_s": round(statistics.median(times_s), 3),
        "peak_tensor_bytes": tensor_bytes,
        "peak_process_bytes": peak_bytes - before_bytes,
        "tensor_bytes_per_weight": round(tensor_bytes / weights, 2),
        "process_bytes_per_weight": round((peak_bytes - before_bytes) / weights, 2),
        "loaded_model_bytes": loaded_bytes - before_bytes,
    }


def prepare(net: Any, variant: str, windows: int, window_tokens: int) -> tuple[Callable[[int], None], int]:
    """A function that makes one optimiser step, and how many weights it prunes."""
    method, pattern = MaskLLM(**VARIANTS[variant]), NMPattern(2, 4)
    kind = PlainLinear if variant == "plain" else MaskLLMLinear
    generator = torch.Generator().manual_seed(0)
    net.requires_grad_(False)
    targets = [item for block in plan(net, pattern).targets for item in block.items()]
    layers = {}
    for index, (name, linear) in enumerate(targets):
        prior_OI = pattern.mask_from_scores(linear.weight.float().abs())
        layers[name] = kind(TargetLayer(index, name, linear, pattern, prior_OI), method, generator)
        net.set_submodule(name, layers[name])
    optimizer = method.optimizer(layers, [], 1e-3)
    ids_BT = torch.randint(net.config.vocab_size, (windows, window_tokens), generator=generator)

    def step(number: int) -> None:
        context = StepContext(number, 100, number)
        for layer in layers.values():
            layer.context = context
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = net(input_ids=ids_BT, use_cache=False).logits
        loss = cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())
        (loss + method.regulariser(layers, context)).backward()
        torch.nn.utils.clip_grad_norm_(learned_parameters(layers), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(layer.weight.numel() for layer in layers.values())


def live_tensors() -> list[torch.UntypedStorage]:
    """Storages of every tensor that exists, once each."""
    import gc

    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage
    return list(found.values())


def allocated_peak(work: Callable[[], None]) -> int:
    """The most bytes of tensors that `work` had allocated and not freed, from the allocator's own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def resident_bytes(key: str) -> int:
    """`VmRSS` (now) or `VmHWM` (the most since `reset_peak`) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def reset_peak() -> None:
    """Forget the high-water mark so far."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
