"""N:M sparse linear layers inside vLLM.

`SparseNMConfig` answers, for each linear layer vLLM builds, whether the checkpoint stores it packed;
`SparseNMLinearMethod` gives such a layer `values` and `bitmask` (and for 8-bit values `scale`) parameters instead of
`weight`, hands them to a kernel once they are loaded, and runs that kernel. The weights are never decompressed to a
dense copy. What a checkpoint adds to the product of its sparse weight is in `correction`.

Tensor parallelism needs no code here: values and bitmask keep dim 0 = out and dim 1 = in, so vLLM narrows them exactly
as it narrows a dense weight (in/tp must be a multiple of lcm(8, m)), and a scale goes with its row. Fused layers (QKV,
gate-up) concatenate along the outputs, so they are packed if all their parts are; a mixed group is refused by name.

Nothing is served that the manifest does not explain: a linear layer that is neither target nor ignored, a target that
no layer claims, a mask digest that differs, or a bitmask with a wrong bit count (also what a tensor that was never
loaded looks like) ends the start with an error.

Legend: T = tokens, O = out features, I = in features (per rank).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import get_quantization_config, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.config import QUANT_METHOD, SparseConfig
from maskgen.core.digest import digest_json
from maskgen.core.errors import FormatError
from maskgen.core.packed import PackedTensor
from maskgen.core.values import CODE_DTYPES, FLOAT
from sparse_serve.kernels import LinearSpec
from sparse_serve.plugin.correction import LayerCorrection
from sparse_serve.plugin.dense import dense_layers
from sparse_serve.runtime import environment
from sparse_serve.runtime.startup_error import record_startup_error
from sparse_serve.tuning.dispatch import Bound
from sparse_serve.tuning.selection import AUTO, Choice, choice_for

logger = init_logger("vllm.sparse_serve")  # vLLM prints only loggers below its own name

OPTIONS_KEY = "sparse_nm"
"""Key of our options in vLLM's `--additional-config`: `{"sparse_nm": {"kernel": "reference"}}`."""

_PLANS_KEY = "sparse_nm_plans"
_BLOCK_INDEX = re.compile(r"\.(\d+)\.")


class SparseNMConfig(QuantizationConfig):
    """The manifest of a checkpoint, as vLLM's quantization config. Module names follow vLLM's renaming."""

    def __init__(self, config: SparseConfig) -> None:
        super().__init__()
        self.pattern, self.values, self.correction = config.pattern, config.values, config.correction
        self.targets = set(config.targets)
        self.ignored = set(config.ignored)
        self.attached: set[str] = set()

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
        else:
            logger.warning(
                "%s is not a directory, so its files and mask digest are not verified, only each layer's bits when it "
                "is loaded; `sparse-serve serve` verifies models of the hub too",
                model_name,
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follow vLLM's renaming of modules."""
        self.targets = set(hf_to_vllm_mapper.apply_list(sorted(self.targets)))
        self.ignored = set(hf_to_vllm_mapper.apply_list(sorted(self.ignored)))

    @record_startup_error()
    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        """Packed, dense, or (for anything but a linear layer) vLLM's default."""
        if not isinstance(layer, LinearBase):
            return None
        names = self._stored_names(prefix)
        packed = [name for name in names if name in self.targets]
        if len(packed) == len(names):
            self.attached.update(names)
            return SparseNMLinearMethod(self, prefix, len(names))
        if packed:
            raise FormatError(
                f"{prefix} is one layer in vLLM, but only {packed} of {names} are stored packed; make all of them "
                "sparse or none"
            )
        unknown = [name for name in names if name not in self.ignored]
        if unknown:
            raise FormatError(
                f"{prefix}: {unknown} are neither targets nor ignored in the checkpoint's manifest; it was made for "
                "another model or another model class"
            )
        return UnquantizedLinearMethod()

    def check_all_attached(self) -> None:
        """Raise `FormatError` if the model has no layer for some target of this rank."""
        missing = {name for name in self.targets if _on_this_rank(name)} - self.attached
        if missing:
            raise FormatError(
                f"{len(missing)} of {len(self.targets)} sparse layers of the manifest are not in the model vLLM built, "
                f"first {sorted(missing)[0]}; refusing to serve less than the checkpoint holds"
            )

    def _stored_names(self, prefix: str) -> list[str]:
        parent, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{parent}.{part}" if parent else part for part in parts]


@register_weight_loader_v2_supported_method
class SparseNMLinearMethod(LinearMethodBase):
    """One packed linear layer, `parts` of the checkpoint's: creates its parameters, gives them to a kernel, runs it."""

    def __init__(self, config: SparseNMConfig, prefix: str, parts: int = 1) -> None:
        self.config = config
        self.prefix = prefix
        self.vllm_config = get_current_vllm_config()
        self.wanted = _kernel_option(self.vllm_config.additional_config)
        self.choice: Choice | None = None
        self.bound: Bound | None = None
        self.kernel_names: tuple[str, ...] = ()
        self.correction = None if config.correction is None else LayerCorrection(config.correction, prefix, parts)
        self.dtype = torch.float32
        self.dense_bytes = 0

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Parameters of the layer that stand for its weight: the kernels', and the correction's."""
        return self.kernel_names + (() if self.correction is None else self.correction.tensor_names)

    @record_startup_error()
    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register `values` `[O, I*n/m]`, `bitmask` uint8 `[O, I/8]` and what else there is; called by vLLM."""
        pattern, out_features = self.config.pattern, sum(output_partition_sizes)
        pattern.check_columns(input_size_per_partition, f"{self.prefix} (per tensor-parallel rank)")
        self.dtype, loader = params_dtype, extra_weight_attrs["weight_loader"]
        shapes = {
            "values": (
                CODE_DTYPES.get(self.config.values, params_dtype),
                pattern.kept_columns(input_size_per_partition),
            ),
            "bitmask": (torch.uint8, input_size_per_partition // 8),
        }
        for name, (dtype, columns) in shapes.items():
            # Zeros, not empty: a bitmask or scale that is never loaded must fail its check, not pass it by luck.
            data = torch.zeros(out_features, columns, dtype=dtype)
            layer.register_parameter(
                name, ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
            )
        if self.config.values != FLOAT:
            scale = torch.zeros(out_features, dtype=torch.float32)  # whatever the model's dtype is
            layer.register_parameter(
                "scale", ChannelQuantScaleParameter(data=scale, output_dim=0, weight_loader=loader)
            )
        if self.correction is not None:
            self.correction.create_weights(
                layer, input_size_per_partition, output_partition_sizes, input_size, params_dtype, loader
            )

    @record_startup_error()
    def process_weights_after_loading(self, layer: Module) -> None:
        """Verify what was loaded, choose kernels, and replace the stored form by their layouts."""
        self.config.check_all_attached()
        stored = {
            name: layer.get_parameter(name).data for name in ("values", "bitmask", "scale") if hasattr(layer, name)
        }
        packed = PackedTensor(stored["values"], stored["bitmask"], self.config.pattern, stored.get("scale"))
        packed.verify(self.prefix)
        spec = LinearSpec(*packed.shape, packed.pattern, self.dtype, packed.values.device.type, packed.kind)
        choice = choice_for(spec, self.wanted, dense_layers(spec.device_type))
        tensors, self.bound = choice.plan.prepare(packed), choice.plan.bind()
        _add_to_compile_key(self.vllm_config, self.prefix, choice)
        for name in stored:
            delattr(layer, name)
        for name, tensor in tensors.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        if self.correction is not None:
            self.correction.finish_loading(layer)
        self.choice, self.kernel_names, self.dense_bytes = choice, tuple(tensors), packed.dense_nbytes(self.dtype)
        logger.info_once("sparse_nm: %s", str(choice))
        if choice.is_last_resort:
            logger.warning_once(
                "sparse_nm: only the reference kernel serves this here, slower than dense: %s", str(choice)
            )
        if choice.slower:
            logger.warning_once("sparse_nm: slower than dense with %s tokens: %s", str(choice.slower), str(choice))

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[T, I] -> [T, O]`."""
        assert self.choice is not None and self.bound is not None
        tensors = {name: getattr(layer, name) for name in self.kernel_names}
        y = self.bound.linear(x, tensors, bias, self.choice.spec.out_features)
        return y if self.correction is None else y + self.correction.apply(layer, x)


def verify(directory: str) -> None:
    """Verify a checkpoint, every bit of its masks included. Raises `FormatError`.

    Name, size and time of the files that were verified last stay in the environment, so that a checkpoint is read once
    by a server that checks early, and not by each of several API servers.
    """
    files = [(file.name, file.stat()) for file in sorted(Path(directory).iterdir()) if file.is_file()]
    facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    digest = digest_json({"directory": str(Path(directory).resolve()), "files": facts})
    if environment.verified_files() != digest:
        SparseCheckpoint.open(directory)
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


def _add_to_compile_key(vllm_config: Any, prefix: str, choice: Choice) -> None:
    """Make the plan part of the key of vLLM's compiled code, which holds the plan as a constant and outlives it.

    vLLM computes that key from its configuration, after the model is loaded. Of what goes into the key only
    `additional_config` is for a plugin to fill, so the plans are added to it.
    """
    if isinstance(vllm_config.additional_config, dict):
        before = vllm_config.additional_config.get(_PLANS_KEY)
        vllm_config.additional_config[_PLANS_KEY] = digest_json([before, prefix, str(choice.plan)])


def _kernel_option(additional_config: Any) -> str:
    options = additional_config.get(OPTIONS_KEY, {}) if isinstance(additional_config, dict) else {}
    unknown = sorted(set(options) - {"kernel"})
    if unknown:
        raise FormatError(f"--additional-config {OPTIONS_KEY}: unknown keys {unknown}, expected only 'kernel'")
    return str(options.get("kernel", AUTO))
