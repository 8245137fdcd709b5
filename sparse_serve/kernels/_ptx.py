"""Inline PTX of the `skinny` kernel for what Triton does not expose: the sparse matrix product (`mma.sp`) and the
conversion of codes of 8 and 4 bits to floats.

Each piece runs in every lane of a warp on that lane's registers, words of 32 bits that hold two 16-bit floats, four
8-bit codes or eight int4 ones; `$0` is its first register. It is text, so no GPU and no Triton is needed to read it or
to test it.

Codes become floats in registers, two at a time, one in each half of a word, and without rounding. The
conversion ends in one instruction on both halves, `bits * factor + addend`, which GPUs have for bfloat16 too from sm_80
on:

    int8           Stored as code + 128, 0 to 255, and laid into the low bits of a zero. As a bfloat16 that is
                   2^-133 * (code + 128), also from 128 on, where the lowest bit of the exponent is set, because
                   exponents 0 and 1 mean the same power. As a float16, all mantissa, it is 2^-24 * (code + 128). Times
                   a power of two, minus a quarter, it is code / 512; the finished sum is multiplied by 512.
    int4           Likewise code + 8, 0 to 15, in the lowest 4 bits or in the next 4, where it counts 16 times as much
                   and the power of two is a 16th. Minus 8 / 512 it is code / 512.
    e4m3 to bf16   Sign, 4 bits of exponent and 3 of mantissa go where bf16 has them. Its exponents count from -127 and
                   those of e4m3 from -7, so what stands there is 2^-120 times the code.
    e4m3 to f16    Likewise from -15: 2^-8 times the code.

Before they are multiplied, most codes of int8 and int4 and the smallest of e4m3 are thus subnormal floats; `fma`
without `.ftz` takes those for what they are (PTX ISA). To e4m3 it adds a negative zero, which leaves -0 as it is. NaN
is no code that a checkpoint may hold.
"""

from __future__ import annotations

from typing import NamedTuple

from maskgen.core.values import FLOAT, FP8, INT4, INT8

TILES = 8
"""Products of 16 rows by 32 columns in a chunk."""

_MULTIPLY = (
    "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{dtype}.{dtype}.f32 "
    "{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$16,$17,$18,$19}}, ${codes}, 0x{half};"
)
MULTIPLY_OPERANDS = "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f"
"""4 sums out, 4 of A, 4 of B, 4 words of column codes of which one is used, 4 sums in."""

WORDS_OPERANDS = "=&r,=&r,=&r,=&r,r,r,r,r"
"""Of all others: 4 words out, 4 in."""

SWAP = """{
.reg .pred odd; .reg .b32 lane, first, second;
mov.u32 lane, %laneid;
and.b32 lane, lane, 1;
setp.ne.b32 odd, lane, 0;
selp.b32 first, $4, $5, odd;
selp.b32 second, $6, $7, odd;
shfl.sync.bfly.b32 first, first, 1, 0x1f, 0xffffffff;
shfl.sync.bfly.b32 second, second, 1, 0x1f, 0xffffffff;
selp.b32 $0, first, $4, odd;
selp.b32 $1, second, $6, odd;
selp.b32 $2, $5, first, odd;
selp.b32 $3, $7, second, odd;
}"""
"""8 neighbours of a token in 4 registers, to the B fragment: even lanes end with first halves, odd with second."""

FENCE = "bar.warp.sync 0xffffffff; mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;"
"""Loads before it stay before it; products come after it, because they take their column codes from it."""


RESCALE = tuple(
    f"""{{
.reg .b32 first, second;
mov.b32 first, ${8 + 2 * group};
mov.b32 second, ${9 + 2 * group};
fma.rn.f32 $0, $4, first, $12;
fma.rn.f32 $1, $5, first, $13;
fma.rn.f32 $2, $6, second, $14;
fma.rn.f32 $3, $7, second, $15;
}}"""
    for group in (0, 1)
)
"""For each group of a chunk: a lane's 4 sums times the scales of its two rows, added to what the groups before gave."""
RESCALE_OPERANDS = "=&f,=&f,=&f,=&f,f,f,f,f,r,r,r,r,f,f,f,f"
"""4 sums out, the 4 of the group, 4 scales of which two are used, 4 sums in."""


class _Expansion(NamedTuple):
    """From a word to `bits`, once for each register that it holds; the other two operands in hex, of each or of all."""

    bits: tuple[str, ...]
    factors: tuple[str, ...]
    addend: str


def _e4m3_bits(shift: int, fields: str) -> tuple[str, str]:
    """Codes go to the high bytes; their signs stay there, and exponent and mantissa go `shift` down, to `fields`."""
    rest = f"""
shr.b32 bits, codes, {shift};
and.b32 bits, bits, 0x{fields * 2};
and.b32 codes, codes, 0x80008000;
or.b32 bits, bits, codes;"""
    return "shl.b32 codes, {word}, 8;" + rest, "mov.b32 codes, {word};" + rest


_INT8_BITS = ("prmt.b32 bits, {word}, 0, 0x4240;", "prmt.b32 bits, {word}, 0, 0x4341;")
_INT4_BITS = (
    "and.b32 bits, {word}, 0x000f000f;",
    "and.b32 bits, {word}, 0x00f000f0;",
    "shr.b32 codes, {word}, 8;\nand.b32 bits, codes, 0x000f000f;",
    "shr.b32 codes, {word}, 8;\nand.b32 bits, codes, 0x00f000f0;",
)
_EXPANSIONS = {
    (INT8, "bf16"): _Expansion(_INT8_BITS, factors=("7d80",), addend="be80"),  # 2^124, -1/4
    (INT8, "f16"): _Expansion(_INT8_BITS, factors=("7800",), addend="b400"),  # 2^15, -1/4
    (INT4, "bf16"): _Expansion(_INT4_BITS, factors=("7d80", "7b80"), addend="bc80"),  # 2^124 and 2^120, -1/64
    (INT4, "f16"): _Expansion(_INT4_BITS, factors=("7800", "6800"), addend="a400"),  # 2^15 and 2^11, -1/64
    (FP8, "bf16"): _Expansion(_e4m3_bits(4, "07f0"), factors=("7b80",), addend="8000"),  # 2^120, -0
    (FP8, "f16"): _Expansion(_e4m3_bits(1, "3f80"), factors=("5c00",), addend="8000"),  # 2^8, -0
}
UNITS = {FLOAT: 1.0, INT8: 512.0, FP8: 1.0, INT4: 512.0}
"""What sums of expanded codes have to be multiplied by."""
OFFSETS = {INT8: -128, INT4: 8}
"""A code, exclusive or this, has the bits of code + 128, or of int4 code + 8, without a sign."""


def multiplies(dtype: str) -> tuple[str, ...]:
    """The instruction for each tile of a chunk: which word of column codes, and from which half of the lanes."""
    return tuple(_MULTIPLY.format(dtype=dtype, codes=12 + tile // 2, half=tile % 2) for tile in range(TILES))


def expansions(values: str, dtype: str) -> tuple[str, ...]:
    """Of 4 words of codes, which are two tiles, or four of int4, the A fragment of each; none for floats.

    Two words of 8-bit codes are a tile: bytes 0 and 2 of the first word are register 0, bytes 1 and 3 are register 1,
    and so on. Of int4 a word is one.
    """
    if values == FLOAT:
        return ()
    how = _EXPANSIONS[values, dtype]
    return tuple(_expansion(how, dtype, tile) for tile in range(len(how.bits)))


def _expansion(how: _Expansion, dtype: str, tile: int) -> str:
    lines = [".reg .b32 codes, bits, factor, addend;", f"mov.b32 addend, 0x{how.addend * 2};"]
    for register in range(4):
        word, part = divmod(4 * tile + register, len(how.bits))
        lines.append(f"mov.b32 factor, 0x{how.factors[part % len(how.factors)] * 2};")
        lines.append(how.bits[part].format(word=f"${4 + word}"))
        lines.append(f"fma.rn.{dtype}x2 ${register}, bits, factor, addend;")
    return "\n".join(["{", *lines, "}"])
