"""A LoRA adapter in the files that PEFT writes, and the model that it makes of another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from maskgen.core.checkpoint import WEIGHT_SUFFIX

RANK, ALPHA = 4, 8


def save_adapter(dense: Path, directory: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a random adapter for every linear layer of a model, the last one too; returns what it adds to weights.

    `changes` override its config.
    """
    generator, tensors, added = torch.Generator().manual_seed(5), {}, {}
    for name, weight_OI in sorted(load_file(dense / "model.safetensors").items()):
        if not name.endswith(WEIGHT_SUFFIX) or weight_OI.ndim != 2 or "embed" in name:
            continue
        a_RI = torch.randn(RANK, weight_OI.shape[1], generator=generator) * 0.1
        b_OR = torch.randn(weight_OI.shape[0], RANK, generator=generator) * 0.1
        layer = f"base_model.model.{name.removesuffix(WEIGHT_SUFFIX)}"
        tensors |= {f"{layer}.lora_A.weight": a_RI, f"{layer}.lora_B.weight": b_OR}
        added[name] = ALPHA / RANK * b_OR @ a_RI
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    layers = sorted({name.split(".")[-2] for name in added})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": layers, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config | changes))
    return added


def save_merged(dense: Path, directory: Path, added: dict[str, torch.Tensor]) -> Path:
    """Write the model whose weights have the adapter in them."""
    shutil.copytree(dense, directory)
    file = directory / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {name: weights[name] + more for name, more in added.items()}, file, {"format": "pt"})
    return directory
