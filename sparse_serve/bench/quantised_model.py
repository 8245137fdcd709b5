"""The dense model with integer weights, in the files that stock vLLM serves: what a user would pick in place of 2:4.

int8 with a scale for each row, which vLLM multiplies with activations rounded to int8 for each token (W8A8), or int4
with a scale for each group of a row and activations as they are (W4A16) or rounded (W4A8). The format is that of
compressed-tensors, `int-quantized` and `pack-quantized`. Codes are symmetric and rounded to the nearest; which code a
weight has changes no time, so they stand for GPTQ's too. These are peers for benchmarks: nobody is meant to serve them
for their answers.

Legend: O = out features, I = in features, G = groups of a row.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgen.core.checkpoint import SINGLE_NAME, iterate_tensors, read_headers
from maskgen.core.companions import companion_files
from maskgen.core.files import read_json, save_tensors, write_json
from sparse_serve.plugin.quantised import to_words

SCALE_BYTES = 2


@dataclass(frozen=True)
class Scheme:
    """Codes of `bits` bits, with a scale for each `group` inputs of a row (None: one for the row); rounded to the
    nearest, or by GPTQ."""

    bits: int
    group: int | None = None
    gptq: bool = False

    def stored_bytes(self, out_features: int, in_features: int) -> int:
        """Of one layer: its codes and scales. A row's last group may be a part of one."""
        groups = 1 if self.group is None else -(-in_features // self.group)
        return out_features * (in_features * self.bits // 8 + groups * SCALE_BYTES)


def scales(weight_OI: Tensor, scheme: Scheme) -> Tensor:
    """The scale of every entry, float32 `[O, I]`: that of its group, as 16 bits hold it; 1 for a group of zeros."""
    in_features = weight_OI.shape[1]
    parts = weight_OI.abs().split(scheme.group or in_features, dim=1)
    largest_OG = torch.stack([part.amax(1) for part in parts], dim=1)
    step_OG = (largest_OG / (2 ** (scheme.bits - 1) - 1)).to(torch.bfloat16).float()
    step_OG = torch.where(step_OG > 0, step_OG, 1.0)
    widths_G = torch.tensor([part.shape[1] for part in parts])
    return step_OG.repeat_interleave(widths_G, dim=1)


def rounded(weight_OI: Tensor, scale_OI: Tensor, bits: int) -> Tensor:
    """The values of the nearest codes."""
    limit = 2 ** (bits - 1)
    return (weight_OI / scale_OI).round().clamp(-limit, limit - 1) * scale_OI


def write(model_dir: Path, out: Path, scheme: Scheme, layers: Collection[str]) -> None:
    """Write `out`, the model of the dense directory `model_dir` with the codes of `scheme` in `layers`.

    Groups have to be whole in every one of them. Raises `FormatError` for a directory that is damaged.
    """
    tensors: dict[str, Tensor] = {}
    dense = {"lm_head"}
    for name, tensor in iterate_tensors(read_headers(model_dir)):
        module = name.removesuffix(".weight")
        if module in layers:
            tensors |= {f"{module}.{suffix}": part for suffix, part in _codes(tensor, scheme).items()}
            continue
        tensors[name] = tensor
        if tensor.ndim == 2 and module != name:
            dense.add(module)
    config = {**read_json(model_dir / "config.json"), "quantization_config": _section(scheme, sorted(dense))}
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_tensors(tensors, part / SINGLE_NAME, {"format": "pt"})
    for file in companion_files(model_dir):
        shutil.copy(file, part)
    write_json(part / "config.json", config)
    part.rename(out)


def _codes(weight_OI: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of one layer by the ends of their names."""
    scale_OI = scales(weight_OI.float(), scheme)
    codes_OI = (rounded(weight_OI.float(), scale_OI, scheme.bits) / scale_OI).round().to(torch.int8)
    scale_OG = scale_OI[:, :: scheme.group or scale_OI.shape[1]].to(weight_OI.dtype).contiguous()
    if scheme.bits == 8:
        return {"weight": codes_OI, "weight_scale": scale_OG}
    return {"weight_packed": to_words(codes_OI), "weight_scale": scale_OG, "weight_shape": torch.tensor(codes_OI.shape)}


def _section(scheme: Scheme, dense: list[str]) -> dict[str, Any]:
    """The section of `config.json` that says so. The package compressed-tensors is not used for it: importing that
    starts torch's compiler."""
    numbers = {"num_bits": scheme.bits, "type": "int", "symmetric": True, "dynamic": False}
    if scheme.group is None:
        weights: dict[str, Any] = {**numbers, "strategy": "channel"}
    else:
        weights = {**numbers, "strategy": "group", "group_size": scheme.group}
    inputs = {**numbers, "strategy": "token", "dynamic": True} if scheme.bits == 8 else None
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if scheme.bits == 8 else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        "ignore": dense,
    }
