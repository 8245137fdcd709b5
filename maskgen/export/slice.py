"""Structured masks -> a smaller dense model: an ordinary Hugging Face directory that any engine serves unchanged.

Units (see `maskgen.numerics.units`) are removed: columns of the attention and FFN outputs, rows of what feeds
them, biases with the rows. Norms of single heads (Qwen3) have the size of a head, which stays. Since every layer keeps
the same number of units, only three numbers of `config.json` change: heads, key-value heads and the FFN width;
`head_dim` is written out, because the hidden size over the number of heads no longer gives it.

Writing streams, one tensor at a time, and is atomic. Any recipe for sparse weights can then be run on the result.

Legend: O = out features, I = in features, U = units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from maskgen.core.checkpoint import WEIGHT_SUFFIX, TensorHeader, iterate_tensors, read_dense_config, read_headers
from maskgen.core.companions import companion_files
from maskgen.core.errors import ModelError, clip
from maskgen.core.files import read_json
from maskgen.core.writer import SHARD_BYTES, CheckpointWriter
from maskgen.hf.layers import decoder_blocks
from maskgen.numerics.units import FEEDS, HEADS, NEURONS, LinearShape, count_parameters, kind_of

PROJECTIONS = {*FEEDS, *FEEDS[HEADS], *FEEDS[NEURONS]}
"""Last parts of the names of a block's linear layers."""

FIXED_HEADS = ("qwen2",)
"""Model types whose engines derive the size of a head from the number of heads, so that none can be removed."""

EVEN_HEADS = ("llama",)
"""Model types that transformers refuses unless the number of heads divides the hidden size."""


@dataclass(frozen=True)
class ShrinkReport:
    """What a smaller model has: units of each layer by kind, parameters of its blocks' linear layers before and after,
    and bytes of weights."""

    keep: Mapping[str, int]
    parameters_before: int
    parameters_after: int
    total_bytes: int

    @property
    def fraction(self) -> float:
        """R: parameters after over before, of the blocks' linear layers."""
        return self.parameters_after / self.parameters_before


def units(model: nn.Module) -> dict[str, int]:
    """How many units (key-value groups, hidden neurons) each site of a model has, by module name.

    Raises `ModelError` unless every block is made of exactly the projections of Llama, Qwen2, Qwen3 or Mistral.
    """
    config: Any = model.config
    prefix, blocks = decoder_blocks(model)
    unit_counts: dict[str, int] = {}
    for number, block in enumerate(blocks):
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        leaves = sorted(name.rpartition(".")[2] for name in linears)
        if leaves != sorted(PROJECTIONS):
            raise ModelError(
                f"{type(model).__name__}: block {number} has the linear layers {leaves}; heads and neurons are removed "
                f"from models with exactly {sorted(PROJECTIONS)} (Llama, Qwen2, Qwen3, Mistral)"
            )
        sites = {kind_of(name): (name, linear) for name, linear in linears.items() if kind_of(name) in FEEDS}
        groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        for kind, count in ((HEADS, groups), (NEURONS, config.intermediate_size)):
            name, linear = sites[kind]
            if linear.in_features % count:
                raise ModelError(f"{prefix}.{number}.{name}: {linear.in_features} inputs are not {count} equal units")
            if kind is NEURONS or config.model_type not in FIXED_HEADS:
                unit_counts[f"{prefix}.{number}.{name}"] = count
    return unit_counts


def write(
    model_dir: Path,
    out_dir: Path,
    weights: Mapping[str, Tensor],
    kept_units: Mapping[str, Tensor],
    extra: Mapping[str, Any] | None = None,
    others: Mapping[str, Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ShrinkReport:
    """Write the model of `model_dir` without the units that are False in `kept_units` (bool `[U]` by site).

    `weights` replaces weights `[O, I]` by module name, `others` any other tensor by its full name; both are cast to
    what the model stores. `extra` maps names of further JSON files to their values. Raises `ModelError` when layers
    would differ or the architecture cannot have these widths, `OutputExistsError`; then nothing is left behind.
    """
    hf_config, headers = read_dense_config(model_dir), read_headers(model_dir)
    keep = _widths(kept_units)
    shapes = _shapes(headers)
    counted = count_parameters(shapes, {site: len(kept_U) for site, kept_U in kept_units.items()})
    config = _config(hf_config, keep)
    replaced = {**(others or {}), **{name + WEIGHT_SUFFIX: weight for name, weight in weights.items()}}
    if unknown := sorted(replaced.keys() - headers.keys()):
        raise ModelError(f"{model_dir}: no tensor {clip(unknown[0])}, which was to be replaced")
    after = 0
    with CheckpointWriter(out_dir, config, companion_files(model_dir), extra, shard_bytes) as writer:
        for name, stored in iterate_tensors(headers):
            tensor = replaced.get(name, stored)
            if tensor.shape != stored.shape:
                raise ModelError(f"{name}: a tensor {tuple(tensor.shape)} replaces one {tuple(stored.shape)}")
            tensor = _cut(name, tensor.detach().cpu().to(stored.dtype), kept_units)
            after += tensor.numel() if name.rpartition(".")[0] in shapes else 0
            writer.add(name, tensor)
    return ShrinkReport(keep, counted.parameters, after, writer.total_bytes)


def check(model_dir: Path, kept_units: Mapping[str, Tensor]) -> None:
    """Raise `ModelError` if `write` would, for numbers of units that no engine could load; nothing is written."""
    _config(read_json(model_dir / "config.json"), _widths(kept_units))


def _shapes(headers: Mapping[str, TensorHeader]) -> dict[str, LinearShape]:
    """The linear layers of the blocks, by module name."""
    shapes = {}
    for name, header in headers.items():
        module = name.removesuffix(WEIGHT_SUFFIX)
        if module != name and kind_of(module) in PROJECTIONS:
            shapes[module] = LinearShape(header.shape[0], header.shape[1], module + ".bias" in headers)
    return shapes


def _widths(kept_units: Mapping[str, Tensor]) -> dict[str, int]:
    """Units kept in every layer, by kind."""
    keep: dict[str, int] = {}
    for site, kept_U in kept_units.items():
        count = int(kept_U.sum())
        if keep.setdefault(kind_of(site), count) != count or count == 0:
            raise ModelError(
                f"{site}: {count} units kept, in other layers {keep[kind_of(site)]}; all layers must keep as many, "
                "and at least one"
            )
    return keep


def _config(hf_config: Mapping[str, Any], keep: Mapping[str, int]) -> dict[str, Any]:
    """`config.json` of the smaller model. What its architecture cannot express is a `ModelError`."""
    config, kind = dict(hf_config), hf_config.get("model_type")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    kept = keep.get(HEADS, groups)
    after = heads // groups * kept
    if after != heads and (kind in FIXED_HEADS or (kind in EVEN_HEADS and hidden % after)):
        raise ModelError(
            f"{kind} with {after} of {heads} heads beside a hidden size of {hidden} cannot be loaded; keep all heads, "
            "or a number that divides the hidden size (method.heads_divide_hidden)"
        )
    config["head_dim"] = config.get("head_dim") or hidden // heads
    config |= {"num_attention_heads": after, "num_key_value_heads": kept}
    config["intermediate_size"] = keep.get(NEURONS, config["intermediate_size"])
    return config


def _cut(name: str, tensor: Tensor, kept_units: Mapping[str, Tensor]) -> Tensor:
    """The rows or columns of one stored tensor that stay."""
    module, _, parameter = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    if leaf in FEEDS and parameter == "weight" and module in kept_units:
        kept_U = kept_units[module].cpu()
        return tensor[:, kept_U.repeat_interleave(tensor.shape[1] // len(kept_U))]
    for kind, feeds in FEEDS.items():
        if leaf in feeds and (site := f"{parent}.{kind}") in kept_units:
            kept_U = kept_units[site].cpu()
            return tensor[kept_U.repeat_interleave(tensor.shape[0] // len(kept_U))]
    return tensor
