"""A vLLM engine inside the test process, and what transformers says of the same model."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from maskgen.core.checkpoint import WEIGHT_SUFFIX, is_sparse_checkpoint, iterate_tensors, read_headers
from maskgen.core.digest import digest_json, digest_weights
from maskgen.core.mask import MaskSet
from maskgen.core.pattern import NMPattern
from maskgen.export.compress import compress_masks, decompress
from tests import models

PROMPTS = [[5, 9, 17, 33, 65, 129, 7, 70], [200, 100, 50, 25], [300, 3, 30]]
NEW_TOKENS = 12
SHAPE: dict[str, Any] = {"hidden_size": 128, "dtype": torch.float32}
HEAD_DIM = {"qwen3": {"head_dim": 32}}  # the smallest vLLM's CPU attention has; the others derive it


def make_sparse(kind: str, root: Path, pattern: str = "2:4", dense_layer: str | None = None) -> tuple[Path, Path]:
    """A sparse checkpoint and its masked-dense twin. `dense_layer`: part of the names of layers to leave dense."""
    base, sparse, masked = root / "base", root / "sparse", root / "masked"
    models.save(kind, base, **SHAPE, **HEAD_DIM.get(kind, {}))
    nm = NMPattern.parse(pattern)
    masks, ignored = {}, []
    for name, tensor in iterate_tensors(read_headers(base)):
        module = name.removesuffix(WEIGHT_SUFFIX)
        if tensor.ndim != 2 or module == name or "embed" in module:
            continue
        if ".layers." not in module or (dense_layer is not None and dense_layer in module):
            ignored.append(module)
        else:
            masks[module] = nm.mask_from_scores(tensor.abs())
    mask_set = MaskSet.from_masks(nm, masks, digest_weights(base), digest_json({"method": "magnitude"}))
    compress_masks(base, mask_set, sparse, tuple(ignored))
    decompress(sparse, masked)
    return sparse, masked


@contextmanager
def serve(
    path: Path,
    dtype: str = "float32",
    kernel: str = "cpu",
    activations: str = "float",
    lm_head: str = "float",
    **options: Any,
) -> Iterator[Any]:
    """A vLLM engine that is really gone afterwards. `kernel`: "auto" measures which is best, which takes a second."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(
        str(path),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=64,
        num_gpu_blocks_override=64,
        worker_extension_cls="sparse_serve.plugin.worker.WorkerExtension",
        additional_config={"sparse_nm": {"kernel": kernel, "activations": activations, "lm_head": lm_head}},
        load_format="sparse_nm" if is_sparse_checkpoint(path) else "auto",  # as our server has it
        **options,
    )
    try:
        yield llm
    finally:
        if hasattr(llm.llm_engine.engine_core, "shutdown"):
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(llm: Any) -> list[list[int]]:
    """Greedy continuations of `PROMPTS`, in new tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompt_logprobs(llm: Any) -> list[float]:
    """Log-probabilities of every prompt token but the first, over all prompts."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
    return [
        entry[token].logprob
        for output, ids in zip(outputs, PROMPTS, strict=True)
        for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)
    ]


@torch.no_grad()
def transformers_oracle(masked: Path) -> tuple[list[list[int]], list[float]]:
    """The same two answers from transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(masked, dtype=torch.float32)
    tokens, logprobs = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        picked = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        logprobs += picked.flatten().tolist()
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        tokens.append(ids[0, len(prompt) :].tolist())
    return tokens, logprobs
