"""Reading a sparse checkpoint: a Hugging Face directory whose target weights are stored as values + bitmask.

`SparseCheckpoint.open` treats the directory as hostile input. In this order, and before anything is allocated from
what the files claim: `config.json` is strict JSON with a known `quantization_config`; the shard list names plain files
inside the directory, no other weight file lies beside them (an engine that globs would load it unverified), and nothing
makes an engine take the directory for one in Mistral's format, with sizes from another file; every shard parses; the
set of tensors is exactly what the manifest implies (`layout`); dtypes and shapes belong together and to the model's
dimensions (`sizes`); and (unless `verify_bits=False`) every bitmask has exactly `n` bits set in each group, all of them
together have the manifest's `mask_digest`, quantised values hold only codes and scales that a writer writes, and
corrections are finite. Only then may a kernel see a tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgen.core import layout
from maskgen.core.config import CONFIG_KEY, WEIGHTS_KEY, SparseConfig, is_shard_name, is_sparse_config
from maskgen.core.digest import digest_file
from maskgen.core.errors import FormatError, PatternError, clip
from maskgen.core.files import check_tensor_names, open_tensors, read_json
from maskgen.core.layout import VALUES_SUFFIX as VALUES_SUFFIX  # the two names everybody needs
from maskgen.core.layout import WEIGHT_SUFFIX as WEIGHT_SUFFIX
from maskgen.core.layout import TensorHeader as TensorHeader
from maskgen.core.mask import BITMASK_SUFFIX, MaskSet, check_bits, digest_bitmasks
from maskgen.core.packed import PackedTensor, StoredLayer
from maskgen.core.sizes import check_dimensions
from maskgen.core.values import FLOAT, FLOAT_DTYPES

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MISTRAL_CONFIG = "params.json"
"""`config.json` of Mistral's format, whose weights are `consolidated*.safetensors`; vLLM prefers it to ours."""

ADAPTER_CONFIG = "adapter_config.json"
"""What the directory of an adapter has in place of `config.json`."""

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class SparseCheckpoint:
    """A verified sparse checkpoint. `hf_config` is all of `config.json`; `headers` maps tensor names to headers."""

    path: Path
    config: SparseConfig
    hf_config: Mapping[str, Any]
    headers: Mapping[str, TensorHeader]

    @classmethod
    def open(cls, path: Path | str, verify_bits: bool = True) -> SparseCheckpoint:
        """Open and verify a directory; `FormatError` names the first thing that is wrong.

        `verify_bits=False` skips reading the bitmasks (1/9 of the bytes of a 2:4 weight in 16 bits), quantised
        values and corrections; for processes that start after one that has read them.
        """
        path = Path(path)
        check_directory(path)
        hf_config = read_json(path / "config.json")
        if CONFIG_KEY not in hf_config:
            raise FormatError(
                f"{path}: config.json has no {CONFIG_KEY}: a dense model; make it sparse with maskgen run"
            )
        try:
            config = SparseConfig.from_dict(hf_config[CONFIG_KEY])
        except (FormatError, PatternError) as error:
            raise FormatError(f"{path / 'config.json'}: {error}") from None
        headers = read_headers(path)
        _check_shards(path, headers)
        _check_listed(path, config, headers)
        layout.check_headers(path, config, headers)
        check_dimensions(path, hf_config, {name: header.shape for name, header in headers.items()})
        checkpoint = cls(path, config, hf_config, headers)
        if verify_bits:
            _check_masks(checkpoint)
            _check_values(checkpoint)
        return checkpoint

    def verify_digests(self) -> None:
        """Read all shards and compare them with the digests in the manifest; `FormatError` names one that differs, and
        a checkpoint of version 2, which has no digests."""
        if self.config.shards is None:
            raise FormatError(
                f"{self.path}: no digests: it was written in an earlier version of the format; `maskgen convert` "
                "writes it again, with the digests of what is there now"
            )
        for name, expected in sorted(self.config.shards.items()):
            digest = digest_file(self.path / name)
            if digest != expected:
                raise FormatError(
                    f"{self.path / name}: digest {digest}, but {CONFIG_KEY} says {expected}; the file was changed or "
                    "is damaged: download or make the checkpoint again"
                )

    def tensor(self, name: str) -> Tensor:
        """Read one stored tensor (CPU). `KeyError` when there is none of that name."""
        with open_tensors(self.headers[name].path) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def layer(self, module: str) -> StoredLayer:
        """Read all that is stored of one target module, its weight and its correction."""
        return layout.read_layer(lambda suffix: self.tensor(module + suffix), self.config)

    def packed(self, module: str) -> PackedTensor:
        """Read one target module's weight."""
        return self.layer(module).packed

    def weight_dtype(self, module: str) -> torch.dtype:
        """The dtype one target's dense weight has: that of its values, or where they are codes `config.json`'s."""
        if self.config.values == FLOAT:
            return _DTYPES[self.headers[module + VALUES_SUFFIX].dtype]
        claimed = self.hf_config.get("dtype", self.hf_config.get("torch_dtype"))
        return next((dtype for dtype in FLOAT_DTYPES if claimed == str(dtype).removeprefix("torch.")), torch.float32)

    def mask_set(self) -> MaskSet:
        """All masks, for use as a prior or to compress again."""
        bitmasks = {name: self.tensor(name + BITMASK_SUFFIX) for name in self.config.targets}
        return MaskSet(self.config.pattern, bitmasks, self.config.base_digest, self.config.recipe_digest)


def is_sparse_checkpoint(path: Path | str) -> bool:
    """Whether `config.json` says that the directory is a sparse checkpoint. Only `SparseCheckpoint.open` verifies
    it."""
    file = Path(path) / "config.json"
    return file.is_file() and is_sparse_config(read_json(file))


def read_dense_config(model_dir: Path) -> dict[str, Any]:
    """`config.json` of a dense model directory; `FormatError` if it says that weights are sparse or quantised."""
    hf_config = read_json(model_dir / "config.json")
    if CONFIG_KEY in hf_config:
        section = hf_config[CONFIG_KEY]
        method = (
            f" ({clip(section['quant_method'])})" if isinstance(section, dict) and "quant_method" in section else ""
        )
        raise FormatError(f"{model_dir}: config.json already has a {CONFIG_KEY}{method}; start from the dense model")
    if hf_config.get(WEIGHTS_KEY) not in (None, SINGLE_NAME, INDEX_NAME):
        raise FormatError(
            f"{model_dir}: config.json names {clip(hf_config[WEIGHTS_KEY])} in {WEIGHTS_KEY}, but weights are read "
            f"from {SINGLE_NAME} or by {INDEX_NAME}; save_pretrained the model again"
        )
    return hf_config


def check_directory(path: Path) -> None:
    """`FormatError` for a file, and for the directory of an adapter (LoRA), which is only a part of a model."""
    if path.is_file():
        advice = "; `maskgen decompress` makes one of a GGUF file" if path.suffix.lower() == ".gguf" else ""
        raise FormatError(f"{path}: a file, expected a model directory{advice}")
    adapter = path / ADAPTER_CONFIG
    if adapter.is_file() and not (path / "config.json").exists():
        base = read_json(adapter).get("base_model_name_or_path")
        raise FormatError(
            f"{path}: an adapter of {clip(base)}, not a model; merge it into that model (merge_and_unload of peft), "
            "save_pretrained the result, and start from there"
        )


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Headers of every tensor of a Hugging Face safetensors directory, dense or sparse; nothing else is read."""
    check_directory(path)
    index_path = path / INDEX_NAME
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{index_path}: no weight_map object")
        shards = sorted(set(map(str, weight_map.values())))
    elif not path.exists():
        raise FormatError(f"{path}: no such directory; check the path")
    else:
        weight_map, shards = None, [SINGLE_NAME]
        if not (path / SINGLE_NAME).exists():
            raise FormatError(
                f"{path / SINGLE_NAME}: no such file, and no {INDEX_NAME}; weights are read from safetensors files: "
                "download those, or load the model with transformers and save_pretrained it"
            )
    headers: dict[str, TensorHeader] = {}
    for shard in shards:
        if not is_shard_name(shard):
            raise FormatError(f"{index_path}: shard {clip(shard)} is not a plain *.safetensors file name")
        if not (path / shard).exists():
            raise FormatError(f"{path / shard}: no such file, though {INDEX_NAME} names it; download the model again")
        _read_shard_headers(path / shard, headers)
    if weight_map is not None:
        _check_index(index_path, weight_map, headers)
    return headers


def check_packable(headers: Mapping[str, TensorHeader], modules: Iterable[str]) -> None:
    """`FormatError` for the weight of a module whose stored dtype is none that is pruned."""
    for name in modules:
        header = headers[name + WEIGHT_SUFFIX]
        if header.dtype not in _DTYPES:
            raise FormatError(
                f"{header.path}: {name} is stored as {header.dtype}, expected one of {list(_DTYPES)}: load the model "
                "with AutoModelForCausalLM in bfloat16, save_pretrained it in another directory, and start from that"
            )


def iterate_tensors(headers: Mapping[str, TensorHeader]) -> Iterator[tuple[str, Tensor]]:
    """Read every tensor of `headers`, with its name, one at a time, shard by shard."""
    for path in sorted({header.path for header in headers.values()}):
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                yield name, file.get_tensor(name)


def _read_shard_headers(shard: Path, headers: dict[str, TensorHeader]) -> None:
    with open_tensors(shard) as file:
        check_tensor_names(shard)
        if not file.keys():
            raise FormatError(f"{shard}: holds no tensors")
        for name in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
            if name in headers:
                raise FormatError(f"{shard}: tensor {clip(name)} is also in {headers[name].path.name}")
            tensor_slice = file.get_slice(name)
            header = TensorHeader(shard, str(tensor_slice.get_dtype()), tuple(tensor_slice.get_shape()))
            if 0 in header.shape:
                raise FormatError(f"{shard}: tensor {clip(name)} of shape {clip(header.shape)} is empty")
            headers[name] = header


def _check_index(index_path: Path, weight_map: dict[str, Any], headers: dict[str, TensorHeader]) -> None:
    for name in sorted(set(weight_map) | set(headers)):
        if name not in headers or weight_map.get(name) != headers[name].path.name:
            found = headers[name].path.name if name in headers else "no shard"
            raise FormatError(
                f"{index_path}: tensor {clip(name)}: index says {clip(weight_map.get(name))}, found in {found}"
            )


def _check_shards(path: Path, headers: Mapping[str, TensorHeader]) -> None:
    shards = {header.path.name for header in headers.values()}
    for file in sorted(path.glob("*.safetensors")):
        if file.name not in shards:
            raise FormatError(
                f"{path}: {clip(file.name)} is not one of the checkpoint's shards {clip(sorted(shards))}; an engine "
                "might load it unverified: remove it"
            )
    mistral = [name for name in sorted(shards) if name.lower().startswith("consolidated")]
    if os.path.lexists(path / MISTRAL_CONFIG):
        mistral.append(MISTRAL_CONFIG)
    if mistral:
        raise FormatError(
            f"{path}: {clip(mistral[0])} belongs to Mistral's format, whose sizes an engine would use unverified; a "
            f"sparse checkpoint has neither {MISTRAL_CONFIG} nor consolidated*.safetensors"
        )


def _check_listed(path: Path, config: SparseConfig, headers: Mapping[str, TensorHeader]) -> None:
    stored = {header.path.name for header in headers.values()}
    if config.shards is not None and set(config.shards) != stored:
        raise FormatError(
            f"{path}: {CONFIG_KEY} has digests of {clip(sorted(config.shards))}, but the shards are "
            f"{clip(sorted(stored))}; download or make the checkpoint again"
        )


def _check_masks(checkpoint: SparseCheckpoint) -> None:
    config = checkpoint.config

    def checked() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(config.targets):
            bitmask = checkpoint.tensor(name + BITMASK_SUFFIX)
            check_bits(bitmask, config.pattern, f"{checkpoint.path}: {name}")
            yield name, bitmask

    digest = digest_bitmasks(config.pattern, checked())
    if digest != config.mask_digest:
        raise FormatError(
            f"{checkpoint.path}: the stored masks have digest {digest}, but {CONFIG_KEY} says {config.mask_digest}; "
            "masks and manifest come from different runs: write the checkpoint again"
        )


def _check_values(checkpoint: SparseCheckpoint) -> None:
    if checkpoint.config.values == FLOAT and checkpoint.config.correction is None:
        return
    for name in checkpoint.config.targets:
        checkpoint.layer(name).verify_numbers(f"{checkpoint.path}: {name}")
