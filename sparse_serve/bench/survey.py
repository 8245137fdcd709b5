"""One checkpoint on this machine: its kinds of layers, the kernel of each, memory, and time of a step against dense.

    survey = examine(SurveyRequest(checkpoint="SPARSE"))
    survey.choices                      # for each kind of layer: which kernel at how many tokens, how fast, why
    survey.slower                       # the kinds for which dense would be faster somewhere

Layers are those that vLLM has (query, key and value are one layer there), on a single rank. Times are measured here,
now or before (`tuning.selection`), of each layer alone: the rest of a step (attention, embedding, head, sampling) comes
on top and is the same for sparse and dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.int4 import group_of, scale_shape
from maskgen.core.values import FLOAT
from sparse_serve.bench.corrections import served_bytes, with_correction
from sparse_serve.kernels import LinearSpec
from sparse_serve.plugin.dense import dense_layers
from sparse_serve.runtime.request import Request
from sparse_serve.tuning.selection import AUTO, Ask, Choice, buckets_of, choice_for
from sparse_serve.tuning.timing import torch_threads

if TYPE_CHECKING:
    from sparse_serve.plugin.served import ServedLayers

Kinds = dict[LinearSpec, dict[str, list[str]]]
"""By what a kernel sees of them: layers as vLLM has and names them, and the checkpoint's layers each consists of."""

Track = Callable[[list[LinearSpec]], Iterable[LinearSpec]]
"""Goes through the kinds of layers that are about to be measured, showing how far it is."""


class SurveyRequest(Request):
    """Which checkpoint, and how it will be served. Raises `SettingsError` for a value out of range.

    `dtype=None` is the checkpoint's. `activations` are `int8` where kernels may round them to that. `threads` are what
    is measured with, by default torch's number of now; figures of one number say nothing of another.
    """

    checkpoint: Path
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    activations: Literal["float", "int8"] = "float"
    threads: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of all sparse layers, corrections included: as the kernels hold them, and as they would be dense.

    `correction_bytes` is the part of the corrections.
    """

    resident_bytes: int
    dense_bytes: int
    correction_bytes: int = 0


@dataclass(frozen=True)
class StepTime:
    """All sparse layers of a step of `tokens` tokens, one after the other, against the same layers dense.

    `best` and `worst` are the speedups of the layers that gain most and least.
    """

    tokens: int
    dense_s: float
    sparse_s: float
    best: float
    worst: float


@dataclass(frozen=True)
class Survey:
    """What was found. `dense`: the other matrices, and why each is dense. `memory` is None after `tune`, which does not
    read the weights."""

    checkpoint: SparseCheckpoint
    kinds: Kinds
    choices: list[Choice]
    dense: Mapping[str, str]
    memory: Memory | None = None

    @property
    def measured(self) -> list[Choice]:
        """The choices that have times."""
        return [choice for choice in self.choices if choice.buckets]

    @property
    def slower(self) -> list[Choice]:
        """The choices for which dense is faster at some number of tokens."""
        return [choice for choice in self.measured if choice.slower]

    def step_times(self) -> list[StepTime]:
        """One for each number of tokens that is measured; layers without times are left out."""
        measured = self.measured
        times = []
        for at, tokens in enumerate(buckets_of(measured[0].spec.device_type) if measured else ()):
            layers = [(len(self.kinds[choice.spec]), choice.buckets[at]) for choice in measured]
            sparse_s = sum(count * bucket.seconds for count, bucket in layers)
            dense_s = sum(count * bucket.seconds * bucket.speedup for count, bucket in layers)
            speedups = [bucket.speedup for _, bucket in layers]
            times.append(StepTime(tokens, dense_s, sparse_s, max(speedups), min(speedups)))
        return times


def tune(request: SurveyRequest, track: Track = iter) -> Survey:
    """Measure every kind of layer anew, and keep the result where a server finds it."""
    checkpoint = SparseCheckpoint.open(request.checkpoint, verify_bits=False)
    layers = _served_layers(checkpoint)
    kinds = kinds_of(checkpoint, layers.sparse, request.dtype, request.activations)
    with torch_threads(request.threads):
        return Survey(checkpoint, kinds, _choices(kinds, Ask.AGAIN, track), layers.dense)


def examine(request: SurveyRequest, track: Track = iter) -> Survey:
    """Verify the checkpoint (every bit of its masks is read), measure what is not known, count memory. Times are those
    of a layer with its correction, if it has one.

    Raises `FormatError` for a checkpoint that is damaged, dense or not to be served sparse by vLLM, `SettingsError`
    where vLLM has no such model, `KernelError` where no kernel can serve a layer.
    """
    checkpoint = SparseCheckpoint.open(request.checkpoint)
    layers = _served_layers(checkpoint)
    kinds = kinds_of(checkpoint, layers.sparse, request.dtype, request.activations)
    with torch_threads(request.threads):
        choices = _choices(kinds, Ask.ALWAYS, track)
        memory = memory_of(checkpoint, kinds, choices)
        form = checkpoint.config.correction
        if form is not None:
            choices = [with_correction(choice, form, rows_of(checkpoint, kinds[choice.spec])) for choice in choices]
        return Survey(checkpoint, kinds, choices, layers.dense, memory)


def _served_layers(checkpoint: SparseCheckpoint) -> ServedLayers:
    from sparse_serve.plugin.served import served_layers  # seconds, which --help does not have

    return served_layers(checkpoint)


def kinds_of(
    checkpoint: SparseCheckpoint, layers: Mapping[str, list[str]], dtype: str | None, activations: str = FLOAT
) -> Kinds:
    """The kinds of vLLM's sparse `layers` (by name, the checkpoint's layers in each), on a single rank."""
    config, kinds = checkpoint.config, Kinds()
    served = getattr(torch, dtype) if dtype else checkpoint.weight_dtype(config.targets[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, parts in layers.items():
        shapes = [checkpoint.headers[f"{part}.bitmask"].shape for part in parts]
        rows, columns = sum(rows for rows, _ in shapes), shapes[0][1] * 8
        group = config.group
        if group is not None:
            kept = config.pattern.kept_columns(columns)
            group = group_of(kept, scale_shape(rows, kept, group))  # as a kernel has it: a short row is one group
        spec = LinearSpec(rows, columns, config.pattern, served, device, config.values, group, activations)
        kinds.setdefault(spec, {})[name] = parts
    return kinds


def rows_of(checkpoint: SparseCheckpoint, layers: Mapping[str, list[str]]) -> list[int]:
    """The outputs of each part of some layers of one kind; as the first of them is divided, which is how all are."""
    parts = next(iter(layers.values()))
    return [checkpoint.headers[f"{part}.bitmask"].shape[0] for part in parts]


def memory_of(checkpoint: SparseCheckpoint, kinds: Kinds, choices: Iterable[Choice]) -> Memory:
    """What the kernels make of the weights themselves, layer after layer."""
    resident = dense = corrections = 0
    form = checkpoint.config.correction
    for choice in choices:
        dtype = choice.spec.dtype
        for name in chain.from_iterable(kinds[choice.spec].values()):
            layer = checkpoint.layer(name)
            packed = layer.packed.to(choice.spec.device_type)
            if packed.kind == FLOAT:
                packed = replace(packed, values=packed.values.to(dtype))
            resident += sum(tensor.nbytes for tensor in choice.plan.prepare(packed).values())
            if layer.correction is not None and form is not None:
                corrections += served_bytes(layer.correction, form, choice.spec)
            dense += packed.dense_nbytes(dtype)
    return Memory(resident + corrections, dense, corrections)


def _choices(kinds: Kinds, ask: Ask, track: Track) -> list[Choice]:
    return [choice_for(spec, AUTO, dense_layers(spec.device_type), ask) for spec in track(list(kinds))]
