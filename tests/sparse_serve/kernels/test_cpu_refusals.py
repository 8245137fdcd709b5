"""What the native CPU kernel's operators refuse, and that their errors say what was given and what was expected."""

from __future__ import annotations

import pytest
import torch

from sparse_serve.kernels import cpu
from tests.sparse_serve.kernels.test_cpu import HERE, packed_weight, product


def test_what_does_not_fit_together_is_refused() -> None:
    """By an error that says what was given and what was expected."""
    tensors, x_TI = cpu.prepare(packed_weight(32, 256, torch.float32, "float")), torch.randn(3, 256)
    columns = r"expected \[..., 256\]: the weight is \[32, 256\]"
    for wrong, message in (
        (torch.randn(3, 512), rf"x is Float \[3, 512\], {columns}"),
        (torch.tensor(1.0), rf"x is Float \[\], {columns}"),
        (torch.randn(3, 256).int(), "x is Int, expected BFloat16, Half or Float"),
        (torch.randn(3, 256).double(), "x is Double, expected BFloat16, Half or Float"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cpu.linear(wrong, tensors, None)
    for bias_O, shown in (
        (torch.randn(31), r"Float \[31\]"),
        (torch.randn(32).bfloat16(), r"BFloat16 \[32\]"),
        (torch.randn(64)[::2], r"Float \[32\], not contiguous"),
    ):
        with pytest.raises(RuntimeError, match=rf"bias is {shown}, expected contiguous Float \[32\]"):
            cpu.linear(x_TI, tensors, bias_O)
    blocks = tensors["blocks"]
    of = rf"expected contiguous Byte \[{len(blocks)}\] for a form of Float \[32, 0, 256\]"
    for wrong, shown in (
        (blocks[:-1].clone(), rf"Byte \[{len(blocks) - 1}\]"),
        (blocks.view(torch.int8), rf"Char \[{len(blocks)}\]"),
    ):
        with pytest.raises(RuntimeError, match=f"blocks are {shown}, {of}"):
            cpu.linear(x_TI, {**tensors, "blocks": wrong}, None)
    with pytest.raises(RuntimeError, match=r"form is Float \[32, 256\], expected \[rows, 0, columns\]"):
        cpu.linear(x_TI, {**tensors, "form": torch.empty(32, 256)}, None)
    with pytest.raises(RuntimeError, match=r"scale is Float \[31\], expected contiguous Float \[32\]"):
        cpu.linear(x_TI, {**tensors, "scale": torch.ones(31)}, None)
    codes = cpu.prepare(packed_weight(32, 256, torch.float32, "int8"))
    with pytest.raises(RuntimeError, match=r"scale is BFloat16 \[32\], expected contiguous Float \[32\]"):
        cpu.linear(x_TI, {**codes, "scale": torch.ones(32).bfloat16()}, None)
    with pytest.raises(RuntimeError, match=r"scale is missing, expected Float \[32\]: values are Char"):
        cpu.linear(x_TI, {"blocks": codes["blocks"], "form": codes["form"]}, None)


def test_what_cannot_be_packed_is_refused() -> None:
    pack, packed = torch.ops.sparse_serve_cpu.pack, packed_weight(32, 256, torch.float32, "float")
    for values, bitmask, message in (
        (packed.values.double(), packed.bitmask, "values are Double, expected BFloat16, Half, Float, Char or Byte"),
        (packed.values[:31], packed.bitmask, r"values are Float \[31, 128\], expected contiguous \[32, 128\]"),
        (packed.values.T.contiguous().T, packed.bitmask, r"values are Float \[32, 128\], not contiguous, expected"),
        (packed.values, packed.bitmask.int(), r"bitmask is Int \[32, 32\], expected contiguous Byte \[rows"),
        (packed.values, packed.bitmask[0], r"bitmask is Byte \[32\], expected contiguous Byte \[rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            pack(values, bitmask)
    with pytest.raises(RuntimeError, match=r"bytes are Float \[64\], expected contiguous Byte"):
        torch.ops.sparse_serve_cpu.read(torch.ones(64))


@pytest.mark.parametrize("isa", [-2, *range(HERE.stop, len(cpu.ISAS) + 1), 1 << 40])
def test_an_instruction_set_that_is_not_here_is_refused(isa: int) -> None:
    """Those of other processors are refused likewise, see `check_refusals` of sanitize.cpp."""
    tensors, x_TI = cpu.prepare(packed_weight(32, 256, torch.float32, "float")), torch.randn(3, 256)
    name = rf" \({cpu.ISAS[isa]}\), which this processor lacks" if 0 <= isa < len(cpu.ISAS) else ", which is none"
    best = rf"expected -1 \(the best here\) or 0 to {HERE.stop - 1} \({cpu.isa()}\)"
    with pytest.raises(RuntimeError, match=f"isa is {isa}{name}; {best}"):
        product(x_TI, tensors, None, isa)
