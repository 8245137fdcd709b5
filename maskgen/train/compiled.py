"""Compiling what trains on a CPU: torch fuses what is not a matrix product, which is more than half of a step's time.

Norms, activations, rotary embeddings, the softmax of attention, the loss and the optimiser's update each read and write
whole tensors several times; compiled, once or twice. Each kind of block is compiled when it first runs, which takes a
processor half a minute: `pays` says whether that is worth it. Results then differ in rounding, so whether a run is
compiled is part of what it is. torch's own TORCH_COMPILE_DISABLE=1 switches it off.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from maskgen.core.compiler import has_cpp_compiler
from maskgen.hf.layers import decoder_blocks
from maskgen.numerics.annealed_adamw import AnnealedAdamW
from maskgen.recipes.sections import Training
from maskgen.train.objective import slice_losses, weighted_losses
from maskgen.train.step import Session

BACKEND = "inductor"
"""torch's compiler: on a CPU it writes C++."""

MIN_PRODUCTS = 1e13
"""Fewest products of a weight with a token, over a whole run, for which compiling saves more time than it takes."""

MAX_KINDS = 32
"""Most kinds of a decoder block that are compiled, where torch has 8: budgets leave some layers of a block dense, and
those of training and of evaluating are two. `pays` does not know how many there will be."""

MAX_SCORES = 1 << 24
"""Most attention scores of a layer and a micro-batch for attention written out, which a compiler sees through. For
short windows that is faster than torch's own attention on a CPU, but all scores are in memory."""


def pays(weights: int, spec: Training, device: str, processes: int) -> bool:
    """Whether to compile a run that trains a model of so many `weights`: alone on a CPU, with a compiler for C++."""
    assert spec.window_tokens is not None
    is_long = weights * spec.steps * spec.batch * spec.window_tokens >= MIN_PRODUCTS
    alone = torch.device(device).type == "cpu" and processes == 1
    return is_long and alone and not torch._dynamo.config.disable and has_cpp_compiler()


def compile_session(session: Session, blocks: Iterable[nn.Module], micro_batch: int) -> None:
    """Compile the decoder's `blocks`, those of the teacher, the loss and the optimiser's update, each when it first
    runs.

    What torch cannot compile runs as it is, without a word: it is not what the run is about.
    """
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = max(MAX_KINDS, torch._dynamo.config.recompile_limit)
    teacher = session.objective.teacher
    for block in (*blocks, *(() if teacher is None else decoder_blocks(teacher)[1])):
        block.compile(dynamic=False, backend=BACKEND)
    for model in filter(None, (session.model, teacher)):
        _write_attention_out(model, session.spec, micro_batch)
    if isinstance(session.optimizer, AnnealedAdamW):
        session.optimizer.update = torch.compile(session.optimizer.update, dynamic=True, backend=BACKEND)
    weighted = torch.compile(weighted_losses, dynamic=True, backend=BACKEND)
    session.objective = replace(session.objective, losses=partial(slice_losses, weighted=weighted))


def _write_attention_out(model: nn.Module, spec: Training, micro_batch: int) -> None:
    config: Any = model.config
    heads = config.get_text_config(decoder=True).num_attention_heads
    assert spec.window_tokens is not None
    if config._attn_implementation == "sdpa" and micro_batch * heads * spec.window_tokens**2 <= MAX_SCORES:
        model.set_attn_implementation("eager")  # type: ignore[operator]
