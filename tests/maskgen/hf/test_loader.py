"""transformers reads sparse checkpoints: bit for bit the masked dense weights, or an error; never random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.correction import CorrectionConfig, LowRankCorrection, PooledCorrection
from maskgen.core.errors import FormatError
from maskgen.core.mask import MaskSet
from maskgen.export.compress import decompress
from maskgen.hf import loader, model
from tests import models

ModelDir = Callable[..., Path]


@pytest.fixture(autouse=True)
def _registered() -> None:
    loader.register()
    loader.register()


def masked(dense: nn.Module, masks: MaskSet) -> dict[str, Tensor]:
    state = dense.state_dict()
    for name in masks.names:
        weight = state[name + ".weight"]
        state[name + ".weight"] = torch.where(masks.mask(name), weight, torch.zeros_like(weight))
    return state


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name
        assert torch.equal(torch.signbit(tensor), torch.signbit(right[name])), name


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", models.BUILDERS)
def test_equals_the_masked_dense_model(
    kind: str, dtype: str | torch.dtype, model_dir: ModelDir, tmp_path: Path
) -> None:
    dense_dir = model_dir(kind, dtype=torch.bfloat16, max_shard_size="60KB")
    masks = models.save_sparse(dense_dir, tmp_path / "sparse", shard_bytes=60_000)
    assert len(list((tmp_path / "sparse").glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=dtype)
    dense = AutoModelForCausalLM.from_pretrained(dense_dir, dtype=dtype)
    assert_same_bits(loaded.state_dict(), masked(dense, masks))
    assert all(type(loaded.get_submodule(name)) is nn.Linear for name in masks.names)
    ids_BT = torch.tensor([[5, 9, 200, 33, 7]])
    dense.load_state_dict(masked(dense, masks))
    with torch.no_grad():
        assert torch.equal(loaded(ids_BT).logits, dense(ids_BT).logits)


def test_the_loaded_model_saves_as_an_ordinary_dense_one(model_dir: ModelDir, tmp_path: Path) -> None:
    masks = models.save_sparse(model_dir("qwen2"), tmp_path / "sparse", pattern="4:8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert_same_bits(again.state_dict(), masked(model.load(model_dir("qwen2")), masks))


FORMS = [None, PooledCorrection(8, "fixed"), PooledCorrection(16, "trained"), LowRankCorrection(6)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("values", ["float", "int8", "fp8_e4m3", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_decompressed_model(
    values: str, form: CorrectionConfig | None, dtype: torch.dtype, model_dir: ModelDir, tmp_path: Path
) -> None:
    """One function whoever reads it: ours folds and dequantises in float32, and rounds once."""
    models.save_corrected(model_dir("qwen2", dtype=dtype), tmp_path / "sparse", form, values)
    decompress(tmp_path / "sparse", tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert_same_bits(loaded.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict())
    assert loaded.dtype == dtype


def test_a_float32_load_of_bfloat16_tensors_is_exact(model_dir: ModelDir, tmp_path: Path) -> None:
    form = PooledCorrection(8, "fixed")
    models.save_corrected(model_dir("llama", dtype=torch.bfloat16), tmp_path / "sparse", form, "int8")
    layer = SparseCheckpoint.open(tmp_path / "sparse").layer(TARGET)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    assert torch.equal(loaded.state_dict()[TARGET + ".weight"], layer.dense(torch.float32))


@pytest.mark.parametrize("values", ["int8", "fp8_e4m3", "int4"])
def test_codes_are_never_taken_for_the_dtype_of_the_model(values: str, model_dir: ModelDir, tmp_path: Path) -> None:
    models.save_corrected(model_dir("llama", dtype=torch.bfloat16), tmp_path / "sparse", None, values)
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "sparse" / "config.json").write_text(json.dumps(config))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").dtype in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("suffix", [".scale", ".correction_out"])
def test_numbers_that_are_not_finite_are_an_error(suffix: str, model_dir: ModelDir, tmp_path: Path) -> None:
    models.save_corrected(model_dir("llama"), tmp_path / "sparse", PooledCorrection(8, "fixed"), "int8")
    rewrite(tmp_path / "sparse", lambda tensors: tensors[TARGET + suffix][2].fill_(float("nan")))
    with pytest.raises(FormatError, match=r"up_proj.*(scale of row 2 is nan|the correction holds NaN)"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def grow(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.zeros(96, *tensors[name].shape[1:])})


NORM = "model.layers.1.input_layernorm.weight"
TARGET = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), f"lacks 1 tensors of LlamaForCausalLM, such as {NORM}"),
        (lambda tensors: tensors.pop("lm_head.weight"), r"lacks 1 tensors .*lm_head\.weight"),
        (lambda tensors: tensors.pop(TARGET + ".values"), TARGET),
        (lambda tensors: tensors.update({"extra.weight": torch.ones(3)}), r"no place for 1 tensors.*extra\.weight"),
        (lambda tensors: tensors.update({TARGET + ".bias": torch.ones(96)}), r"no place for 1 .*up_proj\.bias"),
        (grow(NORM), rf"{NORM}: shape \(96,\), config.json implies \(64,\)"),
        (lambda tensors: tensors[TARGET + ".bitmask"][0, 0].bitwise_xor_(1), TARGET),
    ],
)
def test_damage_is_an_error(
    change: Callable[[dict[str, Tensor]], object], message: str, model_dir: ModelDir, tmp_path: Path
) -> None:
    models.save_sparse(model_dir("llama"), tmp_path / "sparse")
    rewrite(tmp_path / "sparse", change)
    with pytest.raises(FormatError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")


def test_a_config_that_disagrees_with_the_weights_is_an_error(model_dir: ModelDir, tmp_path: Path) -> None:
    models.save_sparse(model_dir("llama"), tmp_path / "sparse")
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    (tmp_path / "sparse" / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
    with pytest.raises(FormatError, match=r"k_proj\.weight: shape \(32, 64\), config\.json implies \(64, 64\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")


def test_other_heads_are_refused_because_they_would_be_random(model_dir: ModelDir, tmp_path: Path) -> None:
    models.save_sparse(model_dir("llama"), tmp_path / "sparse")
    with pytest.raises(FormatError, match=r"no place for 1 tensors .*lm_head.*AutoModelForCausalLM"):
        AutoModel.from_pretrained(tmp_path / "sparse")


def test_a_directory_copied_without_its_weights(model_dir: ModelDir, tmp_path: Path) -> None:
    models.save_sparse(model_dir("llama"), tmp_path / "sparse")
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "sparse" / "config.json", tmp_path / "moved")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
