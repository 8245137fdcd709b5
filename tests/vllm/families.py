"""Every family of models served sparse by vLLM, against transformers.

    python -m tests.vllm.families [ARCHITECTURE ...]

A tiny random model of the family (`tests.vllm.tiny`) loses half of the weights of every linear layer that the table of
architectures says vLLM can hold packed, by magnitude. vLLM serves the checkpoint in float32, and what it says of
`offline.PROMPTS` is compared with transformers on the same weights, masked. Some families run in bfloat16 only on
vLLM's CPU backend, and of some vLLM makes something else than transformers even of dense weights; those are compared
with vLLM itself, serving the masked weights dense.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from maskgen.core.checkpoint import WEIGHT_SUFFIX, iterate_tensors, read_headers
from maskgen.core.digest import digest_json, digest_weights
from maskgen.core.mask import MaskSet
from maskgen.core.pattern import NMPattern
from maskgen.export.compress import compress_masks, decompress
from maskgen.hf.stored import tensor_names
from tests import models
from tests.vllm import architectures, nursery, offline, tiny

BFLOAT16 = {
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Qwen3NextForCausalLM",
}
"""Families that vLLM 0.32 does not run in float32 on a CPU, sparse or dense."""

OWN = {"Ernie4_5_MoeForCausalLM", "Lfm2MoeForCausalLM", "Mamba2ForCausalLM"}
"""Families of which vLLM 0.32 makes something else than transformers of dense random weights, too."""


@dataclass(frozen=True)
class Agreement:
    """Sparse layers in vLLM, the largest difference of a log-probability, and greedy tokens that are the same.

    `spread` is the standard deviation of the expected log-probabilities, `distinct` the number of different tokens
    expected: of outputs that are nearly constant an agreement says nothing.
    """

    sparse_layers: int
    error: float
    spread: float
    same_tokens: int
    tokens: int
    distinct: int


def agreement(config: PretrainedConfig, root: Path) -> Agreement:
    """Prune a random model of a configuration, serve it, and compare."""
    dtype = "bfloat16" if BFLOAT16.intersection(config.architectures or []) else "float32"
    sparse, masked = prune(config, root, dtype=getattr(torch, dtype))
    return served_like(sparse, masked, dtype, dtype != "float32" or not OWN.isdisjoint(config.architectures or []))


def served_like(sparse: Path, masked: Path, dtype: str, with_vllm: bool = False) -> Agreement:
    """Serve a sparse checkpoint, and compare with transformers on the masked weights, or with vLLM on these."""
    if not with_vllm:
        tokens, logprobs = offline.transformers_oracle(masked)
    else:
        with offline.serve(masked, dtype) as llm:
            logprobs, tokens = offline.prompt_logprobs(llm), offline.greedy(llm)
    with offline.serve(sparse, dtype) as llm:
        layers = llm.collective_rpc("sparse_stats")[0]["sparse_layers"]
        served_logprobs, served_tokens = offline.prompt_logprobs(llm), offline.greedy(llm)
    error = max(abs(one - other) for one, other in zip(served_logprobs, logprobs, strict=True))
    pairs = [pair for both in zip(served_tokens, tokens, strict=True) for pair in zip(*both, strict=True)]
    distinct = len({token for sequence in tokens for token in sequence})
    same = sum(one == other for one, other in pairs)
    return Agreement(layers, error, statistics.pstdev(logprobs), same, len(pairs), distinct)


def prune(
    config: PretrainedConfig, root: Path, also: Sequence[str] = (), dtype: torch.dtype = torch.float32
) -> tuple[Path, Path]:
    """A sparse checkpoint of a random model of a configuration, and its masked-dense twin.

    `also`: last names of layers to prune that vLLM cannot hold packed.
    """
    base, sparse, masked = root / "base", root / "sparse", root / "masked"
    model = tiny.save(config, base, dtype)
    models.tokenizer().save_pretrained(base)
    (architecture,) = config.architectures or [""]
    packable = set(json.loads(architectures.TABLE.read_text())["architectures"][architecture]["sparse"])
    headers, pattern, masks = read_headers(base), NMPattern(2, 4), {}
    stored = tensor_names(model, headers)
    inside, linears = architectures.in_blocks(model, config, stored), architectures.stored_linears(model, stored)
    for name, tensor in iterate_tensors(headers):
        module = name.removesuffix(WEIGHT_SUFFIX)
        if module not in linears or tensor.shape[1] % pattern.column_multiple:
            continue
        if inside(module) in packable or architectures.last(module) in also:
            masks[module] = pattern.mask_from_scores(tensor.abs())
    mask_set = MaskSet.from_masks(pattern, masks, digest_weights(base), digest_json({"method": "magnitude"}))
    compress_masks(base, mask_set, sparse, tuple(sorted(linears - masks.keys())))
    decompress(sparse, masked)
    return sparse, masked


def main(names: list[str]) -> int:
    """Print one line a variant; the exit status is 1 if any of them is not served as transformers computes it."""
    table = json.loads(architectures.TABLE.read_text())["architectures"]
    nursery.prepare()
    failed = False
    for name in names or [name for name, family in table.items() if family is not None]:
        for index, config in enumerate(tiny.configs(name)):
            found = architectures.in_child(lambda config=config: measure(config))
            failed |= found is None or found["same_tokens"] < found["tokens"]
            sys.stderr.write(f"== {name} {index}: {'not served' if found is None else found}\n")
    return int(failed)


def measure(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of `agreement`, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return vars(agreement(config, Path(folder)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
