"""Damaged and hostile checkpoints of other tools: one error each, and nothing is written."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.errors import FormatError, ModelError, NumericalError, SparseError
from maskgen.core.pattern import NMPattern
from maskgen.export.convert import convert
from maskgen.export.foreign.maskllm import MaskArchive
from tests import foreign_files, models
from tests.directories import edit_config, edit_tensors
from tests.foreign_files import npy
from tests.maskgen.export.test_convert import SHAPE, STORED, make_masked

Tensors = dict[str, Tensor]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    make_masked(root / "masked", intermediate_size=128)
    for kind in ("leftover", "bitmask", "bitmask-int8", "bitmask-fp8", "marlin-w4", "marlin-w8"):
        foreign_files.rewrite(root / "masked", root / kind, *STORED[kind][:2])
    models.save("llama", root / "dense", **SHAPE)
    return root


def refused(source: Path, message: str, kind: type[SparseError] = FormatError, masks: Path | None = None) -> None:
    out = source.parent / "out"
    with pytest.raises(kind, match=message) as caught:
        convert(source, out, NMPattern(2, 4), masks)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    assert not out.exists() and not list(source.parent.glob(".out*"))


def put(suffix: str, value: float, *at: int) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[Q + suffix][at] = value

    return edit


def change(suffix: str, how: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[Q + suffix] = how(tensors[Q + suffix]).contiguous()

    return edit


def drop(suffix: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        del tensors[Q + suffix]

    return edit


def add(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


def nan_code(tensors: Tensors) -> None:
    tensors[Q + ".compressed"].view(torch.uint8)[0, 0] = 0x7F


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("bitmask", put(".bitmask", 0x37, 2, 1), f"{Q}: row 2, columns 8..11 keep 3"),
        ("bitmask", put(".bitmask", 0x13, 2, 1), f"{Q}: row 2, columns 12..15 keep 1"),
        ("bitmask", change(".bitmask", lambda t: t[:, :-1]), f"{Q}: values .* do not match bitmask"),
        ("bitmask", change(".compressed", lambda t: t[:-1]), f"{Q}: values .* do not match bitmask"),
        ("bitmask", change(".compressed", lambda t: t.reshape(-1)), f"{Q}: values .*: expected two non-empty matrices"),
        ("bitmask", change(".compressed", Tensor.double), f"{Q}: compressed F64"),
        ("bitmask", change(".bitmask", lambda t: t.to(torch.int8)), f"{Q}: compressed F32, bitmask I8"),
        ("bitmask", put(".shape", 1 << 40, 0, 0), rf"{Q}: shape says \[1099511627776, 128\], but values"),
        ("bitmask", change(".shape", Tensor.int), f"{Q}: shape is I32"),
        ("bitmask", change(".shape", lambda t: t.repeat(2, 1)), rf"{Q}: shape is I64 \[4, 1\]"),
        ("bitmask", put(".compressed", float("nan"), 0, 0), f"{Q}: the values hold NaN"),
        ("bitmask", drop(".shape"), rf"no tensor {Q}\.shape"),
        ("bitmask", drop(".bitmask"), rf"no tensor {Q}\.bitmask"),
        ("bitmask", add(Q + ".weight", torch.zeros(128, 128)), f"{Q} is stored in two ways"),
        ("bitmask", add(Q + ".weight_scale", torch.ones(1)), f"{Q}: compressed F32 with a weight_scale"),
        ("bitmask-int8", drop(".weight_scale"), f"{Q}: compressed I8 without a weight_scale"),
        ("bitmask-int8", put(".weight_scale", float("nan"), 3, 0), f"{Q}: scale of row 3 is nan"),
        ("bitmask-int8", put(".weight_scale", 0.0, 3, 0), f"{Q}: scale of row 3 is 0.0"),
        ("bitmask-int8", put(".weight_scale", -1.0, 3, 0), f"{Q}: scale of row 3 is -1.0"),
        ("bitmask-int8", change(".weight_scale", lambda t: t[:5]), rf"{Q}: weight_scale BF16 \[5, 1\]"),
        ("bitmask-int8", change(".weight_scale", Tensor.int), f"{Q}: weight_scale I32"),
        ("bitmask-int8", add(Q + ".weight_zero_point", torch.ones(128, 1, dtype=torch.int8)), f"{Q}: zero points"),
        ("bitmask-int8", add(Q + ".weight_g_idx", torch.zeros(128)), "weight_g_idx'.*actorder"),
        ("bitmask-fp8", nan_code, f"{Q}: values: code 0 of row 0 is NaN"),
        ("bitmask-fp8", put(".weight_scale", float("inf"), 0), f"{Q}: scale of row 0 is inf"),
        ("marlin-w4", put(".meta", 0, 0, 0), f"{Q}: meta: row 0, columns 0..7 have the code 0"),
        ("marlin-w4", put(".meta", 0x4445, 1, 3), f"{Q}: meta: row .* have the code 69"),
        (
            "marlin-w4",
            change(".meta", lambda t: t[:, :-2]),
            f"{Q}: weight_packed, meta and scale_packed .* of no weight",
        ),
        ("marlin-w4", change(".meta", lambda t: t[:-1]), f"{Q}: weight_packed, meta and scale_packed .* of no weight"),
        ("marlin-w4", change(".meta", Tensor.int), f"{Q}: weight_packed I32, meta I32"),
        ("marlin-w4", change(".weight_packed", lambda t: t[:, :-1]), rf"{Q}: weight_packed \[4, 255\] .* do not fit"),
        ("marlin-w4", change(".scale_packed", lambda t: t.repeat(2, 1)), rf"{Q}: .*scale_packed \[2, 128\] do not fit"),
        ("marlin-w4", change(".scale_packed", lambda t: t[:, 1:]), rf"{Q}: .*scale_packed \[1, 127\] do not fit"),
        ("marlin-w4", put(".scale_packed", float("nan"), 0, 7), rf"{Q}: scale_packed \[0, 7\] is nan"),
        ("marlin-w4", put(".scale_packed", 0.0, 0, 7), rf"{Q}: scale_packed \[0, 7\] is 0.0"),
        ("marlin-w8", put(".scale_packed", -1.0, 0, 7), rf"{Q}: scale_packed \[0, 7\] is -1.0"),
        ("marlin-w8", drop(".meta"), f"{Q}.weight_packed' has no meta beside it"),
        ("marlin-w8", drop(".scale_packed"), f"no tensor {Q}.scale_packed"),
        ("marlin-w8", add(Q + ".g_idx", torch.zeros(128)), "g_idx'.*actorder"),
        ("leftover", change(".weight", lambda t: t.to(torch.int8)), f"{Q}.weight' is I8 without a weight_scale"),
        ("leftover", add(Q + ".weight_scale", torch.ones(1)), f"{Q}.weight' is F32 with a weight_scale"),
        ("leftover", change(".weight", Tensor.double), rf"{Q} is stored as F64 \[128, 128\], expected .*BF16.*convert"),
        ("leftover", change(".weight", lambda t: t.to(torch.float8_e5m2)), f"{Q} is stored as F8_E5M2"),
        ("leftover", change(".weight", lambda t: t.to(torch.int32)), f"{Q} is stored as I32"),
        ("leftover", change(".weight", lambda t: t[:, None]), rf"{Q} is stored as F32 \[128, 1, 128\]"),
        ("leftover", add(Q + ".values", torch.ones(4)), rf"tensor '{Q}.values', F32 \[4\], belongs to no layer"),
        ("leftover", add(Q + ".bitmask", torch.ones(4)), f"tensor '{Q}.bitmask', .*remove it"),
        ("leftover", add(Q + ".scale", torch.ones(4)), f"tensor '{Q}.scale', .*remove it"),
        ("leftover", add(Q + ".correction_out", torch.ones(4)), f"tensor '{Q}.correction_out', .*remove it"),
        ("bitmask", add(Q + ".values", torch.ones(4)), f"tensor '{Q}.values', .*remove it"),
        ("bitmask-fp8", add("lm_head.scale", torch.ones(4)), "tensor 'lm_head.scale', .*remove it"),
        ("marlin-w8", add(Q + ".values", torch.ones(4)), f"tensor '{Q}.values', .*remove it"),
        ("marlin-w8", add("model.norm.bitmask", torch.ones(4)), "tensor 'model.norm.bitmask', .*remove it"),
    ],
)
def test_tensors(sources: Path, tmp_path: Path, kind: str, edit: Callable[[Tensors], None], message: str) -> None:
    victim = Path(shutil.copytree(sources / kind, tmp_path / "victim"))
    edit_tensors(victim, edit)
    refused(victim, message)


def test_a_tensor_of_a_block_itself_is_no_layer(sources: Path, tmp_path: Path) -> None:
    """A name that is that of a block's own weight, which no block has: the engine says so when it loads it."""
    victim = Path(shutil.copytree(sources / "masked", tmp_path / "victim"))
    edit_tensors(victim, add("model.layers.0.weight", torch.ones(128, 128)))
    convert(victim, tmp_path / "out", NMPattern(2, 4))
    assert "model.layers.0" not in SparseCheckpoint.open(tmp_path / "out").config.targets


def test_masked_weights_that_are_no_numbers(sources: Path, tmp_path: Path) -> None:
    victim = Path(shutil.copytree(sources / "masked", tmp_path / "victim"))
    edit_tensors(victim, put(".weight", float("nan"), 3, 0))
    refused(victim, f"{Q}: kept weights hold NaN", NumericalError)


def weights(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda section: section["config_groups"]["group_0"]["weights"].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.update(quant_method="gptq"), "quant_method 'gptq', expected 'compressed-tensors'"),
        (lambda s: s.update(quant_method=["x"]), r"quant_method \['x'\]"),
        (lambda s: s.update(format="pack-quantized"), "format 'pack-quantized', expected one of"),
        (lambda s: s.update(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (lambda s: s.update(format={}), "format {}, expected"),
        (lambda s: s.update(auto_map={"x": "y"}), r"unknown keys \['auto_map'\]"),
        (lambda s: s.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme .* is not supported"),
        (lambda s: s.update(transform_config={"a": 1}), "transform_config .* is not supported"),
        (lambda s: s.update(sparsity_config={"format": "sparse-bitmask"}), "sparsity_config: format 'sparse-bitmask'"),
        (lambda s: s.update(sparsity_config=[1]), r"sparsity_config \[1\], expected an object"),
        (lambda s: s["sparsity_config"].update(code="x"), r"sparsity_config: unknown keys \['code'\]"),
        (lambda s: s.update(config_groups=[]) or s.update(config_groups=["x"]), r"config_groups \['x'\], expected"),
        (lambda s: s["config_groups"].update(group_1=None), "'group_1' None, expected an object"),
        (lambda s: s["config_groups"]["group_0"].update(output_activations={"a": 1}), "output_activations"),
        (lambda s: s["config_groups"]["group_0"].update(weights=None), "weights: None, expected an object"),
        (weights(num_bits=2), "num_bits 2 is not supported"),
        (weights(num_bits=8.0), r"num_bits 8\.0 is not supported"),
        (weights(symmetric=False), "symmetric False is not supported"),
        (weights(strategy="block"), "strategy 'block' is not supported"),
        (weights(group_size=64), "group_size 64 is not supported"),
        (weights(actorder="group"), "actorder 'group' is not supported"),
        (weights(actorder=True), "actorder True is not supported"),
        (weights(type="nf4"), "type 'nf4' is not supported"),
        (weights(dynamic=True), "dynamic True is not supported"),
        (weights(secret=1), r"weights: unknown keys \['secret'\]"),
    ],
)
def test_sections(sources: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    victim = Path(shutil.copytree(sources / "bitmask-int8", tmp_path / "victim"))
    edit_config(victim, lambda config: edit(config["quantization_config"]))
    refused(victim, message)


@pytest.mark.parametrize(
    ("members", "kind", "message"),
    [
        (
            {f"{Q}.weight.mask.npy": npy(b"\x33" * 2047, "(2047,)")},
            FormatError,
            rf"{Q}: uint8 \[2047\] in 2175 bytes, expected uint8 \[2048\]",
        ),
        (
            {f"{Q}.weight.mask.npy": npy(b"\x33" * 2048, "(16, 128)")},
            FormatError,
            r"uint8 \[16, 128\] in .* expected uint8",
        ),
        (
            {f"{Q}.weight.mask.npy": npy(b"\x33" * 2048, "(256,)", "<f8")},
            FormatError,
            r"float64 \[256\] in .* expected",
        ),
        ({f"{Q}.weight.mask.npy": npy(b"\x37" * 2048, "(2048,)")}, FormatError, f"{Q}: the mask keeps more than 2:4"),
        ({f"{Q}.weight.mask.npy": npy(b"\x80\x04N.", "(1,)", "|O")}, FormatError, r"object \[1\] in .* expected uint8"),
        ({f"{Q}.weight.mask.npy": b"\0" * (1 << 24)}, FormatError, f"{Q}: 16777216 bytes for a mask"),
        (
            {f"{Q}.weight.mask.npy": npy(b"\x33" * 2048, "(999999999999999,)")},
            FormatError,
            r"uint8 \[999999999999999\] in 2176 bytes, expected uint8",
        ),
        ({f"{Q}.weight.mask.npy": npy(b"\x33" * 2048, "(2048,")}, FormatError, f"{Q}: not a NumPy array"),
        ({f"{Q}.weight.mask.npy": b"garbage"}, FormatError, f"{Q}: .*download the masks again"),
        ({"x/../../etc.weight.mask.npy": b""}, ModelError, "no dense weight 'x/../../etc', for which there is a mask"),
        ({f"{Q}.mask.npy": b""}, FormatError, "holds .*expected names such as"),
        ({f"\x1b[2J{Q}.weight.mask.npy": b""}, FormatError, r"holds '\\x1b\[2J.*expected names such as"),
        ({f"{'x' * 300}.weight.mask.npy": b""}, FormatError, "holds 'xxx.*expected names such as"),
        ({}, FormatError, "is empty; expected names such as"),
    ],
)
def test_archives(
    sources: Path, tmp_path: Path, members: dict[str, bytes], kind: type[SparseError], message: str
) -> None:
    dense = Path(shutil.copytree(sources / "dense", tmp_path / "dense"))
    with zipfile.ZipFile(tmp_path / "masks.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    refused(dense, message, kind, tmp_path / "masks.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@given(at=st.integers(0, 700), byte=st.integers(0, 255), cut=st.integers(0, 40) | st.none())
def test_a_damaged_archive_has_masks_or_one_error(method: int, at: int, byte: int, cut: int | None) -> None:
    """Of any compression: every byte of the member's header and data, of the directory behind it, and no end."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        archive.writestr(f"{Q}.weight.mask.npy", npy(b"\x33" * 64, "(64,)"))
    data = bytearray(content.getvalue())
    data[at % len(data)] = byte
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        file.write(data[: len(data) - cut] if cut else data)
        file.flush()
        try:
            masks = MaskArchive(Path(file.name))
            for module in masks.modules:
                assert masks.mask(module, (4, 128)).shape == (4, 128)
        except FormatError as error:
            assert str(error).isprintable() and len(str(error)) < 600


def test_archives_that_are_none(sources: Path, tmp_path: Path) -> None:
    dense = Path(shutil.copytree(sources / "dense", tmp_path / "dense"))
    (tmp_path / "masks.npz").write_bytes(b"\x80\x04N.")
    refused(dense, r"masks.npz: not a .npz archive of masks", FormatError, tmp_path / "masks.npz")
    refused(dense, r"missing.npz: not a .npz archive of masks", FormatError, tmp_path / "missing.npz")
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for _ in range(2):
            archive.writestr(f"{Q}.weight.mask.npy", npy(b"\x33" * 2048, "(2048,)"))
    refused(dense, r"twice.npz: holds two masks of one name", FormatError, tmp_path / "twice.npz")


def test_a_configuration_of_another_model(sources: Path, tmp_path: Path) -> None:
    victim = Path(shutil.copytree(sources / "marlin-w8", tmp_path / "victim"))
    edit_config(victim, lambda config: config.update(hidden_size=1 << 20))
    refused(victim, "hidden_size 1048576 is not a dimension of any stored tensor")
    edit_config(victim, lambda config: config.update(hidden_size=128, architectures=-1))
    refused(victim, "architectures is -1, expected a list of names")
    (victim / "config.json").write_text(json.dumps({"quantization_config": 1}))
    refused(victim, "quant_method 1, expected")
