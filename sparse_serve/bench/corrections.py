"""What the correction beside a sparse layer costs: bytes, and the time of its two small products on this machine.

Kernels are measured without it (`tuning`), as it is the same beside each of them. Here its time is added to theirs.

Legend: T = tokens, O = out features, I = in features, K = columns of S, P = parts of a fused layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from maskgen.core.correction import CorrectionConfig
from maskgen.core.packed import Correction
from sparse_serve.kernels import LinearSpec
from sparse_serve.tuning.correction import CorrectionKernel
from sparse_serve.tuning.measure import BUDGET_S
from sparse_serve.tuning.samples import random_input
from sparse_serve.tuning.selection import Choice
from sparse_serve.tuning.timing import gpu_s, interleaved, wall_s


def served_bytes(stored: Correction, form: CorrectionConfig, spec: LinearSpec) -> int:
    """What a correction takes in memory beside a layer of this `spec`."""
    out = stored.out.to(spec.device_type, spec.dtype)
    pool = None if stored.pool is None else stored.pool.to(spec.device_type, spec.dtype)
    prepared = CorrectionKernel.of(form, [len(out)], out, pool).prepare(out, pool)
    return sum(tensor.nbytes for tensor in prepared if tensor is not None)


def with_correction(choice: Choice, form: CorrectionConfig, rows: Sequence[int]) -> Choice:
    """`choice`, with the time of a correction of this `form` in every bucket.

    `rows` are the outputs of each of the checkpoint's layers that make up the one that vLLM has.
    """
    spec = choice.spec
    columns = form.columns(spec.in_features, "a layer")
    shapes = [(spec.out_features, columns)] + ([(len(rows) * columns, spec.in_features)] if form.stores_pool else [])
    generator = torch.Generator(spec.device_type).manual_seed(0)  # what a process samples stays as it was
    tensors = [torch.randn(shape, generator=generator, device=spec.device_type).to(spec.dtype) for shape in shapes]
    pool = tensors[1] if form.stores_pool else None
    correction = CorrectionKernel.of(form, rows, tensors[0], pool)
    out, pool = correction.prepare(tensors[0], pool)
    buckets = []
    with torch.inference_mode():
        for bucket in choice.buckets:
            x_TI = random_input(spec, bucket.tokens)
            y_TO = torch.zeros(bucket.tokens, spec.out_features, device=spec.device_type, dtype=spec.dtype)
            call = partial(correction.add, x_TI, y_TO, out, pool)
            clock = gpu_s if spec.device_type == "cuda" else wall_s
            seconds = bucket.seconds + min(interleaved({"": [call]}, BUDGET_S, clock=clock).seconds[""])
            buckets.append(replace(bucket, seconds=seconds, speedup=bucket.speedup * bucket.seconds / seconds))
    return replace(choice, buckets=tuple(buckets))
