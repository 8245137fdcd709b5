"""Tiny Hugging Face directories, dense and sparse, built from tensors and JSON alone; and ways to damage them.

For tests of files. Models that run are in `tests.models`.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskgen.core.checkpoint import read_headers
from maskgen.core.config import SparseConfig
from maskgen.core.correction import CorrectionConfig
from maskgen.core.digest import digest_bytes, digest_weights
from maskgen.core.errors import FormatError, SparseError
from maskgen.core.files import open_tensors
from maskgen.core.mask import MaskSet
from maskgen.core.packed import Correction, PackedTensor, StoredLayer
from maskgen.core.pattern import NMPattern
from maskgen.core.writer import CheckpointWriter
from maskgen.export.compress import compress, compress_masks

TWO_FOUR = NMPattern(2, 4)
HIDDEN, INNER, VOCABULARY, LAYERS = 32, 64, 40, 2
RECIPE = digest_bytes(b"recipe")
TARGETS = tuple(
    f"model.layers.{layer}.{module}"
    for layer in range(LAYERS)
    for module in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj")
)
"""The linear layers of `dense_dir`, sorted, but for the `lm_head`."""

COMPANIONS = ("chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.json", "tokenizer.model")
"""Files `dense_dir` writes that belong to the model and are neither weights nor `config.json` nor code."""


def config_json(**changes: Any) -> dict[str, Any]:
    """`config.json` of `dense_dir`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
        **changes,
    }


def dense_tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a two-layer decoder, with a bias and norms."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN), "model.norm.weight": normal(HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = normal(HIDDEN)
        tensors[prefix + "self_attn.q_proj.weight"] = normal(HIDDEN, HIDDEN)
        tensors[prefix + "self_attn.q_proj.bias"] = normal(HIDDEN)
        tensors[prefix + "mlp.up_proj.weight"] = normal(INNER, HIDDEN)
        tensors[prefix + "mlp.down_proj.weight"] = normal(HIDDEN, INNER)
    return {**tensors, "lm_head.weight": normal(VOCABULARY, HIDDEN)}


def dense_dir(
    path: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, shard_bytes: int = 1 << 30, **config: Any
) -> Path:
    """Write a dense model with a tokenizer, custom code and a picture beside it."""
    with CheckpointWriter(path, config_json(**config), shard_bytes=shard_bytes) as writer:
        for name, tensor in dense_tensors(dtype, seed).items():
            writer.add(name, tensor)
    for name in COMPANIONS:
        (path / name).write_text("{}" if name.endswith(".json") else name, "utf-8")
    (path / "modeling_custom.py").write_text("raise SystemExit('imported')", "utf-8")
    (path / "picture.png").write_bytes(b"png")
    return path


def magnitude_masks(path: Path, pattern: NMPattern = TWO_FOUR, targets: tuple[str, ...] = TARGETS) -> MaskSet:
    """Masks that keep the largest weights of a dense directory."""
    weights = read_all(path)
    masks = {name: pattern.mask_from_scores(weights[name + ".weight"].float().abs()) for name in targets}
    return MaskSet.from_masks(pattern, masks, digest_weights(path), RECIPE)


def sparse_dir(path: Path, shard_bytes: int = 1 << 30, pattern: NMPattern = TWO_FOUR, **config: Any) -> Path:
    """Write a sparse checkpoint; its dense model stays beside it as `<name>-dense`."""
    dense = dense_dir(path.with_name(path.name + "-dense"), **config)
    compress_masks(dense, magnitude_masks(dense, pattern), path, ignored=("lm_head",), shard_bytes=shard_bytes)
    return path


def corrected_dir(
    path: Path, values: str = "float", form: CorrectionConfig | None = None, group: int | None = None, **config: Any
) -> Path:
    """Write a sparse checkpoint with `values` of any kind and random corrections; its dense model stays beside it."""
    dense = dense_dir(path.with_name(path.name + "-dense"), **config)
    masks, generator = magnitude_masks(dense), torch.Generator().manual_seed(2)
    manifest = SparseConfig(
        masks.pattern,
        masks.names,
        ("lm_head",),
        masks.digest(),
        RECIPE,
        "tiny",
        masks.base_digest,
        values,
        form,
        group=group,
    )

    def pack(name: str, weight_OI: Tensor) -> StoredLayer:
        packed = PackedTensor.pack(weight_OI, masks.mask(name), masks.pattern, name)
        if form is None:
            return StoredLayer(packed)
        out_shape, pool_shape = form.shapes(*packed.shape, name)
        pool = None if pool_shape is None else torch.randn(pool_shape, generator=generator)
        return StoredLayer(packed, Correction(torch.randn(out_shape, generator=generator), pool))

    compress(dense, manifest, pack, path)
    return path


def read_all(path: Path) -> dict[str, Tensor]:
    """Every tensor of a directory."""
    tensors = {}
    for name, header in read_headers(path).items():
        with open_tensors(header.path) as file:
            tensors[name] = file.get_tensor(name)
    return tensors


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor: equal for equal bits, so that -0.0 is not 0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a one-shard directory in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change `config.json` of a directory in place."""
    config = json.loads((path / "config.json").read_text("utf-8"))
    edit(config)
    (path / "config.json").write_text(json.dumps(config), "utf-8")


def raw_safetensors(path: Path, header: bytes, data: bytes = b"") -> Path:
    """Write a safetensors file from its header and its data, checking nothing."""
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def peak_growth_mib(work: Callable[[], object]) -> float:
    """How far the resident set rises above where it was, in MiB (Linux: the high-water mark is reset first)."""

    def resident_kib(key: str) -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")
    before_kib = resident_kib("VmRSS")
    work()
    return (resident_kib("VmHWM") - before_kib) / 1024


def refused(
    read: Callable[[Path], object],
    path: Path,
    message: str,
    most_mib: float = 32,
    most_s: float = 1,
    kind: type[SparseError] = FormatError,
) -> None:
    """Reading a hostile file ends in one error that names the file and the thing, soon, and without allocating much."""
    caught: list[pytest.ExceptionInfo[SparseError]] = []

    def attempt() -> None:
        with pytest.raises(kind, match=message) as info:
            read(path)
        caught.append(info)

    start_s = time.process_time()
    grown_mib = peak_growth_mib(attempt)
    assert time.process_time() - start_s < most_s
    assert grown_mib < most_mib
    assert caught[0].type is kind
    assert caught[0].value.__cause__ is None
    text = str(caught[0].value)
    assert str(path) in text
    assert text.isprintable()
    assert len(text) < len(str(path)) + 500
