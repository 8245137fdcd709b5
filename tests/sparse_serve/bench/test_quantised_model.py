"""Dense models with integer weights, as the library whose format it is reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from maskgen.core.checkpoint import SparseCheckpoint
from sparse_serve.bench import quantised_model
from sparse_serve.bench.quantised_model import Scheme
from sparse_serve.plugin.quantised import GROUPS, common_group, to_words
from tests import models

LIBRARY = pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")
"""Of tests that import compressed-tensors, which has torch's compiler import what torch itself has given up."""


@given(st.lists(st.integers(1, 40).map(lambda blocks: 32 * blocks), min_size=1, max_size=6))
def test_the_group_is_the_longest_that_is_whole_everywhere(inputs: list[int]) -> None:
    group = common_group(inputs)
    assert group is not None and all(size % group == 0 for size in inputs)
    assert not any(longer > group and all(size % longer == 0 for size in inputs) for longer in GROUPS)
    assert common_group([*inputs, 33]) is None


@LIBRARY
@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_words_are_unpacked_by_the_library(rows: int, words: int, data: st.DataObject) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes = data.draw(st.lists(st.integers(-8, 7), min_size=rows * words * 8, max_size=rows * words * 8))
    codes_OI = torch.tensor(codes, dtype=torch.int8).view(rows, words * 8)
    packed_OW = to_words(codes_OI)
    assert torch.equal(unpack_from_int32(packed_OW, 4, codes_OI.shape), codes_OI)


@LIBRARY
@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 32)])
def test_a_section_is_one_of_the_library(scheme: Scheme, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    models.save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    models.save_sparse(tmp_path / "dense", tmp_path / "sparse")
    layers = set(SparseCheckpoint.open(tmp_path / "sparse").config.targets) - {"model.layers.0.mlp.up_proj"}
    quantised_model.write(tmp_path / "dense", tmp_path / "out", scheme, layers)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    section = QuantizationConfig.model_validate(config["quantization_config"])
    weights = section.config_groups["group_0"].weights
    assert weights is not None and (weights.num_bits, weights.group_size) == (scheme.bits, scheme.group)
    ignored = set(config["quantization_config"]["ignore"])
    assert ignored == {"lm_head", "model.embed_tokens", "model.layers.0.mlp.up_proj"}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {
        name.removesuffix("_scale").removesuffix(".weight") for name in tensors if name.endswith("_scale")
    } == layers
    assert (tmp_path / "out" / "tokenizer.json").exists() and not (tmp_path / "out.part").exists()
