"""Checkpoints of other tools, made byte by byte from the published layouts, with loops: nothing of the readers is used.

Each writer takes a masked-dense directory, and returns the weights that its result stands for, which another tool would
compute with.
"""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]

QUANTISED: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
ACTIVATIONS = {**QUANTISED, "strategy": "token", "dynamic": True}
BITMASK = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}
LEFTOVER = {**BITMASK, "format": "dense"}


def section(form: str, weights: Mapping[str, Any] | None, sparsity: Mapping[str, Any] | None, **more: Any) -> Any:
    """The `quantization_config` of compressed-tensors."""
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, **more}} if weights else {}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": groups,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "sparsity_config": sparsity,
    }


def rewrite(
    masked: Path, out: Path, config: Any, layer: Callable[[str, Tensor], tuple[Weights, Tensor]] | None
) -> Weights:
    """Copy a directory with `config` as its quantization_config and every layer of its blocks stored as `layer` says.

    `layer` returns what is stored, by suffix, and the weight that it stands for. All weights are returned.
    """
    shutil.copytree(masked, out)
    hf_config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**hf_config, "quantization_config": config}))
    tensors, meant = load_file(out / "model.safetensors"), {}
    for name in list(tensors):
        module, _, last = name.rpartition(".")
        if layer is None or last != "weight" or tensors[name].ndim != 2 or ".layers." not in name:
            continue
        stored, meant[name] = layer(module, tensors.pop(name))
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in stored.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return {name: tensor for name, tensor in tensors.items() if name.endswith(("weight", "bias"))} | meant


def bitmask_floats(module: str, weight: Tensor) -> tuple[Weights, Tensor]:
    """A weight of floats as values and bitmask."""
    return _bitmask(weight), weight


def bitmask_codes(dtype: torch.dtype, per_row: bool) -> Callable[[str, Tensor], tuple[Weights, Tensor]]:
    """8-bit codes with one scale for each row, or one for all. int8 codes reach -128, as compressed-tensors' do."""

    def layer(module: str, weight: Tensor) -> tuple[Weights, Tensor]:
        largest = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max().reshape(1)
        scale = (largest / (127.5 if dtype == torch.int8 else 448.0)).bfloat16()
        steps = weight / scale.float()
        codes = (steps.round().clamp(-128, 127) if dtype == torch.int8 else steps.clamp(-448, 448)).to(dtype)
        return {**_bitmask(codes, weight), "weight_scale": scale}, codes.float() * scale.float()

    return layer


def _bitmask(values: Tensor, weight: Tensor | None = None) -> Weights:
    rows, columns = values.shape
    kept, mask = torch.empty(rows, columns // 2, dtype=values.dtype), torch.zeros(rows, columns // 8, dtype=torch.uint8)
    raw, raw_kept = (tensor.view(torch.uint8).reshape(rows, -1, values.itemsize) for tensor in (values, kept))
    magnitudes = (values.float() if weight is None else weight.float()).abs()
    for row in range(rows):
        for group in range(columns // 4):
            four = magnitudes[row, 4 * group : 4 * group + 4].tolist()
            first, second = sorted(sorted(range(4), key=lambda column: (-four[column], -column))[:2])
            for place, column in ((0, first), (1, second)):
                raw_kept[row, 2 * group + place] = raw[row, 4 * group + column]
                at = 4 * group + column
                mask[row, at // 8] |= 1 << at % 8
    return {"compressed": kept, "bitmask": mask, "shape": torch.tensor([[rows], [columns]])}


def marlin24(bits: int, group: int | None) -> Callable[[str, Tensor], tuple[Weights, Tensor]]:
    """A weight as Sparse-Marlin reads it, with codes of `bits` bits and a scale for each row, or for `group` inputs."""

    def layer(module: str, weight: Tensor) -> tuple[Weights, Tensor]:
        rows, columns = weight.shape
        width = columns if group is None else group
        groups = weight.reshape(rows, columns // width, width)
        scale = (groups.abs().amax(2).clamp(min=0.01) / (2 ** (bits - 1) - 0.5)).half()
        steps = groups / scale.float()[:, :, None]
        codes = steps.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).reshape(rows, columns).int()
        kept, meta = marlin_metadata(codes.tolist())
        permuted = group is not None and group < columns // 2
        stored = {
            "weight_packed": _marlin_words(kept, bits),
            "meta": meta,
            "scale_packed": _marlin_scales(scale, permuted),
        }
        meant = codes.reshape(groups.shape).float() * scale.float()[:, :, None]
        return stored, meant.reshape(rows, columns)

    return layer


def marlin_metadata(codes: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    """The two kept codes of each group of four, and the metadata int16 `[I/32, 2*O]` in the kernel's order."""
    rows, words = len(codes), len(codes[0]) // 16
    kept: list[list[int]] = [[] for _ in codes]
    flat = [0] * (rows * words)
    for row, line in enumerate(codes):
        for word in range(words):
            bits = 0
            for group in range(4):
                four = line[16 * word + 4 * group :][:4]
                places = [place for place in range(4) if four[place]]
                places = sorted((places + [place for place in (3, 2, 1, 0) if place not in places])[:2])
                kept[row] += [four[place] for place in places]
                bits |= (places[0] | places[1] << 2) << 4 * group
            flat[reordered(row, word, rows)] = bits
    return kept, torch.from_numpy(np.array(flat, np.uint16).view(np.int16)).reshape(words // 2, 2 * rows)


def reordered(row: int, word: int, rows: int) -> int:
    """First the row moves within its 64, then 2 by 2 blocks of words are transposed, then pairs of columns are laid out
    one after the other."""
    block, inside = divmod(row, 64)
    eighth, place = divmod(inside, 8)
    target = 64 * block + 4 * eighth + {0: 0, 1: 2, 2: 32, 3: 34, 4: 1, 5: 3, 6: 33, 7: 35}[place]
    if target % 2 == 0 and word % 2 == 1:
        target, word = target + 1, word - 1
    elif target % 2 == 1 and word % 2 == 0:
        target, word = target - 1, word + 1
    return (word // 2) * 2 * rows + 2 * target + word % 2


def _marlin_words(kept: list[list[int]], bits: int) -> Tensor:
    rows, length = len(kept), len(kept[0])
    order = {8: (0, 2, 4, 6, 1, 3, 5, 7), 4: (0, 2, 1, 3)}[32 // bits]
    words = []
    for strip in range(length // 16):
        for four_tiles in range(rows // 64):
            stream = []
            for thread in range(32):
                for column in range(4):
                    for half in range(2):
                        for k in (0, 1, 8, 9):
                            n = 64 * four_tiles + 16 * (thread // 8) + 8 * (thread // 4 % 2) + 4 * half + column
                            code = kept[n][16 * strip + 2 * (thread % 4) + k]
                            stream.append(code + 2 ** (bits - 1))
            for start in range(0, len(stream), len(order)):
                words.append(sum(stream[start + at] << bits * place for place, at in enumerate(order)))
    return torch.from_numpy(np.array(words, np.uint32).view(np.int32)).reshape(length // 16, rows * bits // 2)


def _marlin_scales(scale: Tensor, permuted: bool) -> Tensor:
    lines = []
    for line in scale.t().tolist():
        eights = [line[start : start + 8] for start in range(0, len(line), 8)]
        order = (0, 4, 1, 5, 2, 6, 3, 7) if permuted else range(8)
        lines.append([eight[place] for eight in eights for place in order])
    return torch.tensor(lines, dtype=torch.float16)


def maskllm_archive(weights: Mapping[str, Tensor], path: Path) -> None:
    """MaskLLM's archive: the bits of `weight != 0`, the first one highest, as NumPy's format has arrays."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, weight in weights.items():
            bits = "".join("1" if value else "0" for value in weight.reshape(-1).ne(0).tolist())
            data = bytes(int(bits[start : start + 8].ljust(8, "0"), 2) for start in range(0, len(bits), 8))
            archive.writestr(f"{name}.mask.npy", npy(data, f"({len(data)},)"))


def npy(data: bytes, shape: str, dtype: str = "|u1") -> bytes:
    """NumPy's format, version 1.0."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data
