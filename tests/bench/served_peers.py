"""Dense models with integer weights in the format that stock vLLM serves (compressed-tensors), to time them.

What `tests.bench.peers` writes has the values of such a model, for scoring, but runs as a dense one. These hold the
codes: int8 with a scale for each row, which vLLM multiplies with activations rounded to int8 for each token (W8A8), or
int4 in groups with activations as they are (W4A16). The codes are those of rounding to the nearest; which code a weight
has changes no time, so they stand for GPTQ's too.

Legend: O = out features, I = in features, G = groups of a row.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgen.core.checkpoint import SINGLE_NAME, iterate_tensors, read_headers
from maskgen.core.companions import companion_files
from maskgen.core.files import read_json, save_tensors, write_json
from tests.bench import peers
from tests.bench.peers import Scheme


def is_served(model_dir: Path, scheme: Scheme) -> bool:
    """Whether vLLM serves such a model: groups have to be whole in every layer."""
    return scheme.group is None or all(
        linear.in_features % scheme.group == 0
        for targets in peers.linears(model_dir).targets
        for linear in targets.values()
    )


def write(model_dir: Path, out: Path, scheme: Scheme) -> None:
    """Write `out`, the model of the dense directory `model_dir` with the codes of `scheme`."""
    layers = {name for targets in peers.linears(model_dir).targets for name in targets}
    tensors: dict[str, Tensor] = {}
    for name, tensor in iterate_tensors(read_headers(model_dir)):
        module = name.removesuffix(".weight")
        if module in layers:
            tensors |= {f"{module}.{suffix}": part for suffix, part in _codes(tensor, scheme).items()}
        else:
            tensors[name] = tensor
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_tensors(tensors, part / SINGLE_NAME, {"format": "pt"})
    for file in companion_files(model_dir):
        shutil.copy(file, part)
    write_json(part / "config.json", {**read_json(model_dir / "config.json"), "quantization_config": _config(scheme)})
    part.rename(out)


def _codes(weight_OI: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of one layer by the ends of their names."""
    scale_OI = peers.scales(weight_OI.float(), scheme)
    codes_OI = (peers.rounded(weight_OI.float(), scale_OI, scheme.bits) / scale_OI).round().to(torch.int8)
    scale_OG = scale_OI[:, :: scheme.group or scale_OI.shape[1]].to(weight_OI.dtype).contiguous()
    if scheme.bits == 8:
        return {"weight": codes_OI, "weight_scale": scale_OG}
    shape = torch.tensor(codes_OI.shape)
    return {"weight_packed": _packed(codes_OI), "weight_scale": scale_OG, "weight_shape": shape}


def _packed(codes_OI: Tensor) -> Tensor:
    """Codes from -8 to 7 as int32 `[O, I / 8]`: 8 is added to each, and the first of eight has the lowest bits."""
    parts_OW8 = (codes_OI.to(torch.int64) + 8).unflatten(1, (-1, 8))
    words_OW = (parts_OW8 << torch.arange(0, 32, 4)).sum(2)
    return torch.where(words_OW < 2**31, words_OW, words_OW - 2**32).to(torch.int32)


def _config(scheme: Scheme) -> dict[str, Any]:
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
        "ignore": ["lm_head"],
    }
