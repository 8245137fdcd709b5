"""Hugging Face models: load one, find its decoder blocks, and decide which linear layers a recipe prunes.

Works on any decoder whose blocks are a `ModuleList` as long as `num_hidden_layers`, so there is no list of supported
architectures to maintain. Only `nn.Linear` modules inside blocks are candidates; everything else stays dense, and is
reported by name with the reason. This file and `loader` are the only ones that read models with transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from maskgen.core.checkpoint import is_sparse_checkpoint
from maskgen.core.companions import SNAPSHOT_PATTERNS
from maskgen.core.errors import ModelError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.hf import gguf, loader
from maskgen.hf.errors import clear_errors, first_line

logger = logging.getLogger(__name__)

OUTSIDE = "outside the decoder blocks"
"""The reason why linear layers such as `lm_head` stay dense."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections that vLLM serves as one layer: all of them are sparse, or all of them dense."""


@dataclass(frozen=True)
class Plan:
    """Which layers of a model a run prunes.

    `blocks` are the decoder blocks in order, `targets[i]` the prunable layers of block i by full module name, and
    `ignored` every other `nn.Linear` of the model with the reason it stays dense.
    """

    blocks: Sequence[nn.Module]
    targets: Sequence[Mapping[str, nn.Linear]]
    ignored: Mapping[str, str]


def resolve(source: str, tell: Callable[[str], None] = lambda what: None) -> Path:
    """The directory of a model: `source` itself, the snapshot of a hub id (downloaded when not cached), or what a GGUF
    file was converted to (`maskgen.hf.gguf`).

    Only safetensors and tokenizer files are fetched, never code. `tell` is called with what begins, before a file is
    converted. Raises `ModelError`, and what the conversion does.
    """
    path = Path(source)
    if gguf.is_gguf(path):
        return gguf.converted(path, tell)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if files and not (path / "config.json").exists():
            raise ModelError(f"{source}: a directory of GGUF files without a config.json; give one file: {files[0]}")
        return path
    if path.suffix.lower() == ".gguf":
        raise ModelError(f"{source}: no such file")
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(
            f"{source}: not a directory; give a Hugging Face model directory, a GGUF file, or a hub id like org/name"
        )
    try:
        return Path(snapshot_download(source, allow_patterns=list(SNAPSHOT_PATTERNS)))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source}: neither a directory nor a hub model that can be downloaded: {first_line(error)}"
        ) from None


def load(path: Path, dtype: str | torch.dtype = "auto", device: str = "cpu") -> nn.Module:
    """Load a causal language model for inference, dense or sparse (decompressed). "auto" keeps the stored dtype.

    Code shipped with a model is never run. Raises `ModelError` when it cannot be loaded or when any weight would be
    missing, `FormatError` when a sparse checkpoint is damaged.
    """
    loader.register()
    path = Path(path)
    config = _config(path)
    if getattr(config, "quantization_config", None) is not None and not is_sparse_checkpoint(path):
        raise ModelError(f"{path}: already quantized; start from the model in bfloat16, float16 or float32")
    with clear_errors(path):
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            raise ModelError(f"{path}: {len(info[kind])} {kind.replace('_', ' ')}, such as {sorted(info[kind])[0]}")
    if info["unexpected_keys"]:
        logger.warning("%s: tensors the model does not use: %s", path, sorted(info["unexpected_keys"]))
    result: nn.Module = model.requires_grad_(False).eval().to(device)
    return result


def load_tokenizer(path: Path) -> Any:
    """The model's tokenizer; `ModelError` when the directory holds none."""
    with clear_errors(path, "no usable tokenizer"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def linear_names(path: Path) -> list[str]:
    """Names of every `nn.Linear` of a model directory, from its config alone (no weights are read).

    Raises `ModelError` when transformers cannot make such a model.
    """
    config = _config(path)
    with clear_errors(path), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def quiet() -> None:
    """Turn off progress bars and warnings of transformers, for command lines with an output of their own."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def plan(model: nn.Module, pattern: NMPattern, ignore: Sequence[str] = ()) -> Plan:
    """Decide which layers are pruned; `ignore` are fnmatch patterns of full names of layers that stay dense.

    Raises `ModelError` when there are no decoder blocks or nothing is left to prune, `RecipeError` for an ignore
    pattern that matches no linear layer.
    """
    prefix, blocks = decoder_blocks(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for glob in ignore:
        if not any(fnmatchcase(name, glob) for name in linears):
            raise RecipeError(f"ignore {glob!r}: matches no linear layer; names look like {next(iter(linears))}")
    targets: list[dict[str, nn.Linear]] = [{} for _ in blocks]
    ignored = {}
    for name, linear in linears.items():
        inside = name.startswith(prefix + ".")
        reason = _reason_to_keep_dense(name, linear, inside, pattern, ignore)
        if reason is None:
            targets[int(name[len(prefix) + 1 :].split(".")[0])][name] = linear
        else:
            ignored[name] = reason
    if not any(targets):
        raise ModelError(f"nothing to prune with pattern {pattern}: {ignored}")
    _check_fused({name for block in targets for name in block}, ignored)
    return Plan(list(blocks), targets, ignored)


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the decoder's list of blocks; `ModelError` unless there is exactly one candidate."""
    _check_no_conv1d(model)
    config: Any = model.config
    depth = config.get_text_config(decoder=True).num_hidden_layers
    candidates: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(outer + ".") for outer in candidates)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not nested and _all_have_linears(module):
            candidates[name] = module
    if len(candidates) != 1:
        raise ModelError(
            f"{type(model).__name__}: expected one ModuleList of {depth} decoder blocks (num_hidden_layers), found "
            f"{sorted(candidates) or 'none'}; this architecture is not supported"
        )
    return next(iter(candidates.items()))


def max_tokens(model: nn.Module) -> int | None:
    """The most tokens a sequence may have for this model; None if its config does not state a limit."""
    return _context_tokens(model.config)


def stored_max_tokens(path: Path) -> int | None:
    """`max_tokens` of a model directory, from its config alone; `ModelError` when transformers cannot read that."""
    return _context_tokens(_config(path))


def _config(path: Path) -> Any:
    with clear_errors(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def _context_tokens(config: Any) -> int | None:
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _reason_to_keep_dense(
    name: str, linear: nn.Linear, inside: bool, pattern: NMPattern, ignore: Sequence[str]
) -> str | None:
    if not inside:
        return OUTSIDE
    matching = [glob for glob in ignore if fnmatchcase(name, glob)]
    if matching:
        return f"ignored by {matching[0]!r}"
    if linear.in_features % pattern.column_multiple:
        return f"in_features {linear.in_features} is not a multiple of {pattern.column_multiple}"
    return None


def _check_fused(targets: Set[str], ignored: Iterable[str]) -> None:
    for name in ignored:
        parent, _, leaf = name.rpartition(".")
        for group in FUSED:
            siblings = [f"{parent}.{part}" for part in group] if leaf in group else []
            sparse = [sibling for sibling in siblings if sibling in targets]
            if sparse:
                raise RecipeError(
                    f"ignore leaves {name} dense and {sparse[0]} sparse, but engines serve {' and '.join(group)} "
                    "as one layer; ignore all of them or none"
                )


def _check_no_conv1d(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            raise ModelError(
                f"{type(model).__name__}: {name} is a Conv1D (GPT-2 style, weight stored [in, out]), which is not "
                "supported; use an architecture built from nn.Linear"
            )


def _all_have_linears(blocks: nn.ModuleList) -> bool:
    return all(any(isinstance(module, nn.Linear) for module in block.modules()) for block in blocks)
