"""The manifest of a checkpoint as vLLM's quantization config: how each linear layer that vLLM builds is stored.

vLLM asks about its own layers under its own names. A name is looked up in the manifest as it is, and if it is not
there, as the group of layers that vLLM makes one of: query, key and value, for instance. So a checkpoint whose own
layer is what others' groups become (`gate_up_proj` of Phi-3 and GLM-4) is served as it is stored. A fused layer is
packed if all its parts are; a mixed group is refused by name.

Nothing is served that the manifest and the files do not explain. A linear layer that is neither target nor ignored must
be stored dense (some models have a router that is a linear layer to vLLM, but no `nn.Linear`); a target that no layer
claims, and a mask digest that differs, end the start with an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.model_loader.utils import get_model_cls

from maskgen.core.checkpoint import WEIGHT_SUFFIX, SparseCheckpoint, read_headers
from maskgen.core.config import QUANT_METHOD, SparseConfig
from maskgen.core.digest import digest_json
from maskgen.core.errors import FormatError
from maskgen.core.settings import changed_companions, check_recorded_config
from maskgen.core.values import FLOAT
from sparse_serve.plugin.head import Int8HeadMethod, head_method
from sparse_serve.plugin.linear import SparseNMLinearMethod
from sparse_serve.plugin.options import OPTIONS_KEY, read_options
from sparse_serve.runtime import environment
from sparse_serve.runtime.startup_error import record_startup_error

logger = init_logger("vllm.sparse_serve")  # vLLM prints only loggers below its own name

_BLOCK_INDEX = re.compile(r"\.(\d+)\.")


class AnyDevice(QuantizationConfig):
    """What a quantization config of this plugin answers vLLM whatever it does with the layers."""

    def get_name(self) -> str:
        """The `quant_method` of `config.json`."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Activation dtypes at least one kernel takes."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: the reference kernel needs no special hardware."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No separate file: everything is in `config.json`."""
        return []


class SparseNMConfig(AnyDevice):
    """The manifest of a checkpoint, as vLLM's quantization config. Module names follow vLLM's renaming."""

    def __init__(self, config: SparseConfig) -> None:
        super().__init__()
        self.pattern, self.values, self.correction = config.pattern, config.values, config.correction
        self.group = config.group
        self.targets = {name: name for name in config.targets}  # by vLLM's name, the manifest's
        self.ignored = set(config.ignored)
        self.dense: set[str] | None = None  # what has a `weight` in the files, if these can be looked at
        self.attached: set[str] = set()
        self.head: Int8HeadMethod | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparseNMConfig:
        """From `config.json`'s `quantization_config`, strictly."""
        return cls(SparseConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Verify the checkpoint before vLLM builds a model from what its `config.json` claims.

        vLLM calls this where it builds the engine's configuration, and not again in the engine or its workers.
        """
        if Path(model_name).is_dir():
            verify(model_name)
            headers = read_headers(Path(model_name))
            self.dense = {name.removesuffix(WEIGHT_SUFFIX) for name in headers if name.endswith(WEIGHT_SUFFIX)}
        else:
            logger.warning(
                "%s is not a directory, so its files and mask digest are not verified, only each layer's bits when it "
                "is loaded; `sparse-serve serve` verifies models of the hub too",
                model_name,
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follow vLLM's renaming of modules, as it renames their weights."""

        def renamed(name: str) -> str:
            tensor: str = hf_to_vllm_mapper.map_name(name + WEIGHT_SUFFIX) or ""
            return tensor.removesuffix(WEIGHT_SUFFIX) if tensor.endswith(WEIGHT_SUFFIX) else name

        self.targets = {renamed(name): stored for name, stored in self.targets.items()}
        self.ignored = set(map(renamed, self.ignored))
        self.dense = None if self.dense is None else set(map(renamed, self.dense))

    @record_startup_error()
    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        """Packed, dense, or (for anything but a linear layer, such as the experts of a mixture) vLLM's default, but for
        an output layer that is wanted in int8."""
        if not isinstance(layer, LinearBase):
            options = read_options(get_current_vllm_config().additional_config)
            head = head_method(layer, prefix, options)
            self.head = head or self.head
            return head
        names = self._stored_names(prefix)
        packed = [name for name in names if name in self.targets]
        if len(packed) == len(names):
            _check_only_multiplied(prefix)
            stored = [self.targets[name] for name in names]
            self.attached.update(stored)
            return SparseNMLinearMethod(self, prefix, stored)
        if packed:
            raise FormatError(
                f"{prefix} is one layer in vLLM, but only {packed} of {names} are stored packed; make all of them "
                "sparse or none"
            )
        unknown = [name for name in names if not self._is_known(name)]
        if unknown and self.dense is not None:
            raise FormatError(
                f"{prefix}: {unknown} are neither targets nor ignored in the checkpoint's manifest, nor stored dense; "
                "it was made for another model or another model class"
            )
        return UnquantizedLinearMethod()

    @record_startup_error()
    def get_checkpoint_weight_mapper(self) -> Any:
        """No renaming. vLLM asks when it has built the model and begins to load: the time to miss a layer."""
        self.check_all_attached()
        self._check_head()
        return super().get_checkpoint_weight_mapper()

    def _check_head(self) -> None:
        """Raise `FormatError` if the output layer is wanted in int8, and there is none, or vLLM would not use it."""
        config = get_current_vllm_config()
        options, model = read_options(config.additional_config), config.model_config
        if options.lm_head != FLOAT and model.head_dtype != model.dtype:
            raise FormatError(
                f"--additional-config {OPTIONS_KEY}: lm_head {options.lm_head!r}, but the output layer is asked for in "
                f"{model.head_dtype} (head_dtype), with a model in {model.dtype}; leave one of them out"
            )
        if options.lm_head != FLOAT and self.head is None and get_pp_group().is_last_rank:
            raise FormatError(
                f"--additional-config {OPTIONS_KEY}: lm_head {options.lm_head!r}, but vLLM's class of this model has "
                "no output layer of its own: it multiplies by the embedding, or does not generate; leave lm_head out"
            )

    def check_all_attached(self) -> None:
        """Raise `FormatError` if the model has no layer for some target of this rank."""
        here = {stored for name, stored in self.targets.items() if _on_this_rank(name)}
        missing = sorted(here - self.attached)
        if missing:
            raise FormatError(
                f"{len(missing)} of {len(self.targets)} sparse layers of the manifest are not in the model vLLM built, "
                f"first {missing[0]}; refusing to serve less than the checkpoint holds; prune it again with these "
                f"layers dense: --set 'ignore=[\"*.{missing[0].rpartition('.')[2]}\"]'"
            )

    def _is_known(self, name: str) -> bool:
        return name in self.targets or name in self.ignored or name in (self.dense or ())

    def _stored_names(self, prefix: str) -> list[str]:
        """What the checkpoint may hold of one of vLLM's layers, under vLLM's names for it."""
        groups = [[prefix], self._packed_modules(prefix), _stacked_modules(prefix)]
        found = next((names for names in groups if any(map(self._is_known, names))), None)
        return found or self._same_block(groups[1] or groups[0])

    def _same_block(self, names: list[str]) -> list[str]:
        """The known layers of the same block with the same last names, if there is one of each.

        Some classes leave a level out of what they call a layer: `layers.0.qkv_proj` is in `layers.0.self_attn`.
        """
        block = _BLOCK_INDEX.search(names[0])
        if block is None:
            return names
        inside = [
            name
            for name in {*self.targets, *self.ignored, *(self.dense or ())}
            if name.startswith(names[0][: block.end()])
        ]
        found = [[name for name in inside if name.rpartition(".")[2] == want.rpartition(".")[2]] for want in names]
        return [name for (name,) in found] if all(len(same) == 1 for same in found) else names

    def _packed_modules(self, prefix: str) -> list[str]:
        parent, dot, leaf = prefix.rpartition(".")
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(leaf, ())]


def _stacked_modules(prefix: str) -> list[str]:
    """The same from how the model class loads its weights: not every one has a `packed_modules_mapping`."""
    mapper = getattr(get_model_cls(get_current_vllm_config().model_config), "hf_to_vllm_mapper", None)
    stacked = {} if mapper is None else mapper.orig_to_new_stacked
    return [
        prefix.removesuffix(whole.rstrip(".")) + part.rstrip(".")
        for part, (whole, _) in stacked.items()
        if prefix.endswith(whole.rstrip("."))
    ]


def _check_only_multiplied(prefix: str) -> None:
    """Raise `FormatError` for a layer whose dense weight vLLM reads for other ends than to multiply by it."""
    if prefix.endswith(".kv_b_proj") and get_current_vllm_config().model_config.use_mla:
        raise FormatError(
            f"{prefix}: vLLM's attention with a latent cache (MLA) reads its dense weight, so it cannot be served "
            "packed; prune again with it dense: --set 'ignore=[\"*.kv_b_proj\"]'"
        )


def verify(directory: str) -> None:
    """Verify a checkpoint, every bit of its masks included. Raises `FormatError`.

    `config.json` has to be as it was written, where there is a record of that: with another number in it the model
    would answer, and wrongly. A tokenizer or a chat template may have been changed on purpose: that is logged.

    Name, size and time of the files that were verified last stay in the environment, so that a checkpoint is read once
    by a server that checks early, and not by each of several API servers.
    """
    files = [(file.name, file.stat()) for file in sorted(Path(directory).iterdir()) if file.is_file()]
    facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    digest = digest_json({"directory": str(Path(directory).resolve()), "files": facts})
    if environment.verified_files() != digest:
        SparseCheckpoint.open(directory)
        check_recorded_config(directory)
        for line in changed_companions(directory):
            logger.warning("%s/%s", directory, line)
        environment.set_verified_files(digest)


def register() -> None:
    """Add `sparse_nm` to vLLM's quantization methods, once per process."""
    try:
        get_quantization_config(QUANT_METHOD)
    except ValueError:
        register_quantization_config(QUANT_METHOD)(SparseNMConfig)


def _on_this_rank(module: str) -> bool:
    """Whether a module belongs to this rank's pipeline stage."""
    group = get_pp_group()
    match = _BLOCK_INDEX.search(module)
    if group.world_size == 1 or match is None:
        return True
    layers = get_current_vllm_config().model_config.hf_text_config.num_hidden_layers
    start, stop = get_pp_indices(layers, group.rank_in_group, group.world_size)
    return start <= int(match[1]) < stop
