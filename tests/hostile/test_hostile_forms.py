"""Hostile codes, scales and corrections: refused by name before any kernel sees them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.correction import LowRankCorrection, PooledCorrection
from tests.directories import TARGETS, corrected_dir, edit_config, edit_tensors, refused, sparse_dir

UP = "model.layers.1.mlp.up_proj"
FIXED, TRAINED = PooledCorrection(8, "fixed"), PooledCorrection(16, "trained")
LOW_RANK = LowRankCorrection(4)
Edit = Callable[[dict[str, Tensor]], Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("forms")
    return {
        "float": sparse_dir(root / "float"),
        "int8": corrected_dir(root / "int8", "int8", TRAINED),
        "fp8": corrected_dir(root / "fp8", "fp8_e4m3", FIXED),
        "corrected": corrected_dir(root / "corrected", "float", FIXED),
        "low": corrected_dir(root / "low", "int8", LOW_RANK),
        "int4": corrected_dir(root / "int4", "int4", group=64),
    }


def put(suffix: str, value: Any, index: tuple[int, ...] = (3,)) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[UP + suffix][index] = value

    return edit


def replace(suffix: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors: tensors.update({UP + suffix: change(tensors[UP + suffix]).contiguous()})


def add(suffix: str, tensor: Tensor) -> Edit:
    return lambda tensors: tensors.update({UP + suffix: tensor})


def drop(suffix: str) -> Edit:
    return lambda tensors: tensors.pop(UP + suffix)


def nan_code(tensors: dict[str, Tensor]) -> None:
    tensors[UP + ".values"].view(torch.uint8)[7, 2] = 0xFF


def overflow(tensors: dict[str, Tensor]) -> None:
    """A scale that is finite times 127, and a code of -128."""
    tensors[UP + ".scale"][3] = torch.finfo(torch.float32).max / 127.5
    tensors[UP + ".values"][3, 2] = -128


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("int8", put(".scale", 0.0), rf"{UP}: scale of row 3 is 0\.0"),
        ("int8", put(".scale", -1e-3), rf"{UP}: scale of row 3 is -0\.001"),
        ("int8", put(".scale", float("nan")), rf"{UP}: scale of row 3 is nan"),
        ("fp8", put(".scale", float("inf")), rf"{UP}: scale of row 3 is inf"),
        ("fp8", put(".scale", 1e36), rf"{UP}: scale of row 3 is .*, expected above 0 and finite times 448"),
        ("int8", overflow, rf"{UP}: scale of row 3 is 2\.6\d+e\+36, expected above 0 and finite times"),
        ("fp8", nan_code, rf"{UP}: values: code 2 of row 7 is NaN"),
        ("fp8", put(".correction_out", float("nan"), (3, 2)), f"{UP}: the correction holds NaN or infinity"),
        ("int8", put(".correction_pool", float("-inf"), (1, 2)), f"{UP}: the correction holds NaN or infinity"),
        ("int4", put(".scale", 0.0), rf"{UP}: scale of row 3, group 0 is 0\.0, expected above 0 and finite times 8"),
        ("int4", put(".scale", -1e-3), rf"{UP}: scale of row 3, group 0 is -0\.001"),
        ("int4", put(".scale", float("nan")), rf"{UP}: scale of row 3, group 0 is nan"),
        ("int4", put(".scale", float("inf")), rf"{UP}: scale of row 3, group 0 is inf"),
        ("int4", put(".scale", 1e38), rf"{UP}: scale of row 3, group 0 is"),
        ("int4", drop(".scale"), rf"target {UP}: expected exactly \.values, \.bitmask, \.scale.*, found"),
        ("int4", replace(".scale", lambda t: t[:, 0]), rf"{UP}\.scale: F32 \[64\], expected F32 \[64, 1\]"),
        ("int4", replace(".scale", lambda t: t.repeat(1, 2)), rf"{UP}\.scale: F32 \[64, 2\], expected F32 \[64, 1\]"),
        ("int4", replace(".scale", Tensor.half), rf"{UP}\.scale: F16"),
        ("int4", replace(".values", lambda t: t.view(torch.int8)), rf"{UP}: values I8, .*expected one of \['U8'\]"),
        ("int4", replace(".values", lambda t: t[:, :7]), rf"{UP}: values \[64, 7\] do not match .*, 2 in a byte"),
        ("int4", replace(".values", lambda t: t.repeat(1, 2)), rf"{UP}: values \[64, 16\] do not match"),
        ("int8", drop(".scale"), rf"target {UP}: expected exactly \.values, \.bitmask, \.scale.*, found"),
        ("float", add(".scale", torch.ones(64)), rf"target {UP}: expected exactly \.values, \.bitmask, found"),
        ("int8", replace(".scale", Tensor.double), rf"{UP}\.scale: F64 \[64\], expected F32 \[64\]"),
        ("int8", replace(".scale", Tensor.bfloat16), rf"{UP}\.scale: BF16"),
        ("int8", replace(".scale", lambda t: t[:63]), rf"{UP}\.scale: F32 \[63\], expected F32 \[64\]"),
        ("int8", replace(".scale", lambda t: t[:, None]), rf"{UP}\.scale: F32 \[64, 1\]"),
        ("int8", replace(".scale", lambda t: t[0]), rf"{UP}\.scale: F32 \[\]"),
        ("int8", replace(".values", lambda t: t.view(torch.uint8)), rf"{UP}: values U8, .*expected one of \['I8'\]"),
        ("int8", replace(".values", Tensor.float), rf"{UP}: values F32, bitmask U8; expected one of \['I8'\]"),
        ("int8", replace(".values", lambda t: t.view(torch.float8_e4m3fn)), f"{UP}: values F8_E4M3, bitmask U8"),
        ("fp8", replace(".values", lambda t: t.view(torch.float8_e5m2)), f"{UP}: values F8_E5M2, bitmask U8"),
        ("fp8", replace(".values", lambda t: t.view(torch.int8)), rf"{UP}: values I8, .*expected one of \['F8_E4M3'\]"),
        ("float", replace(".values", Tensor.char), rf"{UP}: values I8, bitmask U8"),
        ("fp8", drop(".correction_out"), rf"target {UP}: expected exactly .*\.correction_out, found"),
        ("int8", drop(".correction_pool"), rf"target {UP}: expected exactly .*\.correction_pool, found"),
        (
            "fp8",
            add(".correction_pool", torch.ones(4, 32)),
            rf"target {UP}: expected exactly .*, found .*correction_pool",
        ),
        (
            "float",
            add(".correction_out", torch.ones(64, 4)),
            rf"target {UP}: expected exactly .*, found .*correction_out",
        ),
        ("fp8", replace(".correction_out", lambda t: t[:, :3]), rf"{UP}\.correction_out: BF16 \[64, 3\], .* \[64, 4\]"),
        ("fp8", replace(".correction_out", lambda t: t.T), rf"{UP}\.correction_out: BF16 \[4, 64\]"),
        ("fp8", replace(".correction_out", Tensor.double), rf"{UP}\.correction_out: F64"),
        (
            "corrected",
            replace(".correction_out", Tensor.float),
            rf"{UP}\.correction_out: F32 .*, expected BF16 \[64, 4\]",
        ),
        ("int8", replace(".correction_pool", lambda t: t.T), rf"{UP}\.correction_pool: BF16 \[32, 2\], .* \[2, 32\]"),
        ("int8", replace(".correction_pool", lambda t: t[:1]), rf"{UP}\.correction_pool: BF16 \[1, 32\]"),
        ("low", drop(".correction_pool"), rf"target {UP}: expected exactly .*\.correction_pool, found"),
        ("low", drop(".correction_out"), rf"target {UP}: expected exactly .*\.correction_out, .*, found"),
        ("low", put(".correction_out", float("nan"), (3, 2)), f"{UP}: the correction holds NaN or infinity"),
        ("low", put(".correction_pool", float("inf"), (1, 2)), f"{UP}: the correction holds NaN or infinity"),
        (
            "low",
            replace(".correction_out", lambda t: t[:, :3]),
            rf"{UP}\.correction_out: BF16 \[64, 3\], .* \[64, 4\]",
        ),
        (
            "low",
            replace(".correction_pool", lambda t: t[:3]),
            rf"{UP}\.correction_pool: BF16 \[3, 32\], .* \[4, 32\]",
        ),
        (
            "low",
            replace(".correction_pool", lambda t: t.T),
            rf"{UP}\.correction_pool: BF16 \[32, 4\], .* \[4, 32\]",
        ),
        ("low", replace(".correction_pool", Tensor.double), rf"{UP}\.correction_pool: F64"),
        ("int8", lambda t: t.update({"x.scale": torch.ones(3)}), r"tensor 'x\.scale' belongs to no target"),
        ("fp8", lambda t: t.update({"x.correction_out": torch.ones(3)}), r"'x\.correction_out' belongs to no target"),
    ],
)
def test_tensors(sound: dict[str, Path], tmp_path: Path, kind: str, edit: Edit, message: str) -> None:
    victim = Path(shutil.copytree(sound[kind], tmp_path / "victim"))
    SparseCheckpoint.open(victim)
    edit_tensors(victim, edit)
    refused(SparseCheckpoint.open, victim, message)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("float", {"values": "int8"}, rf"target {TARGETS[0]}: expected exactly \.values, \.bitmask, \.scale, found"),
        ("int8", {"values": "fp8_e4m3"}, f"{TARGETS[0]}: values I8, bitmask U8"),
        ("int8", {"values": "float"}, f"target {TARGETS[0]}: expected exactly"),
        ("int8", {"values": "__import__('os')"}, "values .* expected one of"),
        ("float", {"correction": {"kind": "pooled", "segment": 8, "pool": "fixed"}}, f"target {TARGETS[0]}: expected"),
        ("fp8", {"correction": None}, f"target {TARGETS[0]}: expected exactly .*found .*correction_out"),
        ("fp8", {"correction": {"kind": "pooled", "segment": 16, "pool": "fixed"}}, r"correction_out: BF16 \[32, 8\]"),
        ("fp8", {"correction": {"kind": "pooled", "segment": 24, "pool": "fixed"}}, "no multiple of .* segment of 24"),
        ("fp8", {"correction": {"kind": "pooled", "segment": 2**20, "pool": "fixed"}}, "no multiple of"),
        ("fp8", {"correction": {"kind": "pooled", "segment": 0, "pool": "fixed"}}, "correction.segment 0"),
        ("fp8", {"correction": {"kind": "pooled", "segment": 10**100, "pool": "fixed"}}, "correction.segment 1000"),
        ("fp8", {"correction": {"kind": "os.system", "segment": 8, "pool": "fixed"}}, "correction.kind 'os.system'"),
        ("fp8", {"correction": {"kind": "lowrank", "rank": 4}}, f"target {TARGETS[0]}: expected exactly"),
        ("int8", {"correction": {"kind": "lowrank", "rank": 4}}, r"correction_out: BF16 \[64, 2\], .* \[64, 4\]"),
        ("low", {"correction": {"kind": "lowrank", "rank": 5}}, r"correction_out: BF16 \[32, 4\], .* \[32, 5\]"),
        (
            "low",
            {"correction": {"kind": "lowrank", "rank": 33}},
            r"rank of 33 is too large .* at most 32",
        ),
        (
            "low",
            {"correction": {"kind": "lowrank", "rank": 2**20}},
            f"{TARGETS[0]}: .* rank of 1048576 is too large",
        ),
        (
            "low",
            {"correction": {"kind": "lowrank", "rank": 0}},
            "correction.rank 0, expected a whole number",
        ),
        ("low", {"correction": {"kind": "lowrank", "rank": True}}, "correction.rank True, expected a whole"),
        (
            "low",
            {"correction": {"kind": "pooled", "segment": 8, "pool": "fixed"}},
            f"target {TARGETS[0]}: expected",
        ),
        ("fp8", {"correction": [8]}, "correction .*expected an object or null"),
    ],
)
def test_manifests(sound: dict[str, Path], tmp_path: Path, kind: str, changes: dict[str, Any], message: str) -> None:
    victim = Path(shutil.copytree(sound[kind], tmp_path / "victim"))
    edit_config(victim, lambda config: config["quantization_config"].update(changes))
    refused(SparseCheckpoint.open, victim, message)


def test_names_that_other_checkpoints_reserve_are_free_here(sound: dict[str, Path], tmp_path: Path) -> None:
    """A norm may call its weight `scale` where no target has one."""
    victim = Path(shutil.copytree(sound["float"], tmp_path / "victim"))
    edit_tensors(victim, lambda tensors: tensors.update({"model.norm.scale": torch.ones(32)}))
    SparseCheckpoint.open(victim)
