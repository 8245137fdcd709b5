"""An NVIDIA GPU small enough for a test: runs the PTX of one kernel in numpy, thread by thread, on any machine.

It knows the few instructions that Triton's output of `kernels/skinny.py` has, and raises on any other. All threads of a
program go through an instruction together, and branches must be uniform. Every global access is checked against its
buffer, so a wrong mask is an error and not luck, and so is a code for which the hardware's result is undefined. What it
cannot show is a missing barrier, and time.

`multiply_sparse` is the one piece of hardware in it, written from the PTX ISA's description of `mma.sp` m16n8k32. With
g = lane / 4 and t = lane % 4:

    A  16 x 16 kept values  register i: row g + 8 * (i % 2), the two kept values of group t + 4 * (i / 2) of that row
    B  32 x 8               register i: column g, rows 8 * i + 2 * t and the one below
    D  16 x 8               register i: row g + 8 * (i / 2), column 2 * t + i % 2
    codes of row g (bits 0..15) and g + 8 (16..31), 4 bits a group: groups 0..3 in lane t = 2 * half, 4..7 in the next
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[Any]
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4
SHARED_BYTES = 228 << 10
BASE = 40
"""A buffer's number is in the address bits from here on."""

UNSIGNED = {16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "neg": np.negative, "shl": np.left_shift, "shr": np.right_shift,
    "mul": np.multiply, "min": np.minimum, "max": np.maximum,
    "mad": lambda a, b, c: a * b + c, "fma": lambda a, b, c: a * b + c,
}  # fmt: skip


def to_float(halves: Words, kind: str) -> Words:
    """Bits of `bf16` or `f16` numbers to float32."""
    halves = halves.astype(np.uint16)
    if kind == "f16":
        return halves.view(np.float16).astype(np.float32)
    return (halves.astype(np.uint32) << 16).view(np.float32)


def from_float(numbers: Words, kind: str) -> Words:
    """float32 to bits of the nearest `bf16` or `f16`."""
    if kind == "f16":
        return numbers.astype(np.float16).view(np.uint16)
    bits = numbers.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def fma_pairs(a: Words, b: Words, c: Words, kind: str) -> Words:
    """`a * b + c` on both halves of words; only for results that the 16-bit type holds exactly."""
    results = []
    for shift in (0, 16):
        x, y, z = (to_float(word >> np.uint32(shift), kind).astype(np.float64) for word in (a, b, c))
        exact = x * y + z
        half = from_float(exact.astype(np.float32), kind)
        assert (to_float(half, kind) == exact).all(), "rounded: the kernel's comments say it never is"
        results.append(half.astype(np.uint32) << np.uint32(shift))
    return results[0] | results[1]


def multiply_sparse(a: Words, b: Words, codes: Words, sums: Words, half: int, kind: str) -> Words:
    """`sums + A B` for each warp: a, b `[warps, 32, 4]` words, codes `[warps, 32]` words, sums `[warps, 32, 4]`."""
    warps = len(a)
    dense_a, dense_b = np.zeros((warps, 16, 32), np.float32), np.zeros((warps, 32, 8), np.float32)
    every = np.arange(warps)[:, None]
    for register in range(4):
        row, group = G + 8 * (register % 2), T + 4 * (register // 2)
        code = codes[:, 4 * G + 2 * half + group // 4] >> (16 * (register % 2) + 4 * (group % 4)).astype(np.uint32) & 15
        first, second = (code & 3).astype(int), (code >> 2).astype(int)
        assert (first < second).all(), "the hardware's result is undefined for such a code"
        dense_a[every, row, 4 * group + first] = to_float(a[:, :, register] & 0xFFFF, kind)
        dense_a[every, row, 4 * group + second] = to_float(a[:, :, register] >> 16, kind)
        dense_b[:, 8 * register + 2 * T, G] = to_float(b[:, :, register] & 0xFFFF, kind)
        dense_b[:, 8 * register + 2 * T + 1, G] = to_float(b[:, :, register] >> 16, kind)
    product = dense_a.astype(np.float64) @ dense_b
    places = [product[:, G + 8 * (register // 2), 2 * T + register % 2] for register in range(4)]
    return (sums + np.stack(places, axis=-1)).astype(np.float32)


class Program:
    """The PTX of one kernel, ready to run."""

    def __init__(self, ptx: str) -> None:
        _, _, body = ptx.partition(".visible .entry")
        self.threads = int(re.findall(r"\.(?:reqntid|maxntid) (\d+)", body)[0])
        self.parameters = re.findall(r"\.param \.(u64|u32)", body.partition("{")[0])
        body = body[body.index("{") + 1 : body.index("$L__func_end")]
        body = "\n".join(line.partition("//")[0] for line in body.splitlines() if not line.strip().startswith(".loc"))
        self.statements: list[str] = []
        self.labels: dict[str, int] = {}
        for text in body.split(";"):
            statement = text.strip()
            while label := re.match(r"[{}]|(\$\w+):", statement):
                if label[1]:
                    self.labels[label[1]] = len(self.statements)
                statement = statement[label.end() :].strip()
            if statement and not statement.startswith(".reg"):
                self.statements.append(" ".join(statement.split()))

    def run(self, grid: tuple[int, int], arguments: Sequence[Words | int]) -> None:
        """All programs of the grid, one after the other; arrays are written in place. Hidden parameters are zero."""
        buffers = [value.reshape(-1).view(np.uint8) for value in arguments if not isinstance(value, int)]
        values: list[int] = []
        for value in arguments:
            values.append(value if isinstance(value, int) else sum(v >> BASE > 0 for v in values) + 1 << BASE)
        values += [0] * (len(self.parameters) - len(values))
        for y in range(grid[1]):
            for x in range(grid[0]):
                _Block(self, (x, y), values, buffers).run()


class _Block:
    """One program of the grid: registers by name, each an array over the threads."""

    def __init__(self, program: Program, place: tuple[int, int], values: list[int], buffers: list[Words]) -> None:
        self.program, self.values, self.buffers, self.count = program, values, buffers, program.threads
        self.shared = np.full(SHARED_BYTES, 0xFF, np.uint8)
        thread = np.arange(self.count, dtype=np.uint32)
        self.registers: dict[str, Words] = {"%tid.x": thread, "%laneid": thread % 32, "global_smem": thread * 0}
        for axis, number in zip("xy", place, strict=True):
            self.registers[f"%ctaid.{axis}"] = np.full(self.count, number, np.uint32)

    def run(self) -> None:
        at, statements = 0, self.program.statements
        with np.errstate(over="ignore"):
            while at < len(statements):
                guard, name, operands = re.fullmatch(r"(?:@(!?\S+) )?(\S+) ?(.*)", statements[at]).groups()  # type: ignore[union-attr]
                active = np.ones(self.count, bool)
                if guard:
                    active = self.predicate(guard.lstrip("!")) ^ guard.startswith("!")
                at += 1
                if name.startswith("bra"):
                    assert active.all() or not active.any(), "threads part ways"
                    at = self.program.labels[operands] if active.all() else at
                elif name == "ret":
                    return
                else:
                    self.step(name.split("."), _operands(operands), active)

    def step(self, name: list[str], operands: list[str], active: Words) -> None:
        """One instruction that is not a branch."""
        kind, bits = name[-1], int(re.sub(r"\D", "", name[-1]) or 32)
        match name[0]:
            case "bar" | "createpolicy":
                result = np.zeros(self.count, np.uint64)
            case "ld" if name[1] == "param":
                number = int(operands[1].strip("[]").rpartition("_")[2])
                result = np.full(self.count, self.values[number], UNSIGNED[bits])
            case "ld" | "st":
                self.access(name, operands, active)
                return
            case "mov" if operands[0].startswith("{"):
                self.split(self.read(operands[1], bits), operands[0], active)
                return
            case "mov":
                result = self.predicate(operands[1]) if kind == "pred" else self.read(operands[1], bits)
            case "mma":
                self.multiply(name, operands)
                return
            case "setp":
                kinds = SIGNED if kind[0] == "s" else UNSIGNED
                left, right = (self.read(operand, bits).view(kinds[bits]) for operand in operands[1:3])
                result = COMPARE[name[1]](left, right)
            case "selp":
                chosen, other = (self.read(operand, bits) for operand in operands[1:3])
                result = np.where(self.predicate(operands[3]), chosen, other)
            case "shfl":
                result = self.read(operands[1], 32)[np.arange(self.count) ^ int(operands[2], 0)]
            case "bfe":
                word, start, length = self.read(operands[1], bits), int(operands[2]), int(operands[3])
                result = word >> np.uint32(start) & np.uint32((1 << length) - 1)
            case "prmt":
                octets = np.stack([self.read(operand, 32) for operand in operands[1:3]], -1).view(np.uint8)
                picked = [int(operands[3], 0) >> 4 * place & 15 for place in range(4)]
                assert max(picked) < 8, "that would copy a sign"
                result = octets.take(picked, axis=1).view(np.uint32)[:, 0]
            case "cvt" if name[-2].endswith("x2"):
                halves = (self.read(operand, 32).view(np.float32) for operand in operands[1:3])
                high, low = (from_float(half, name[-2].removesuffix("x2")).astype(np.uint32) for half in halves)
                result = high << np.uint32(16) | low
            case "cvt":
                result = self.convert(name[-2], kind, operands[1])
            case _:
                result = self.compute(name, kind, bits, operands[1:])
        if name[0] != "bar":
            self.write(operands[0], result, active)

    def split(self, word: Words, parts: str, active: Words) -> None:
        """A word of 32 bits into the two registers `{low, high}`."""
        for number, part in enumerate(parts.strip("{}").split(",")):
            self.write(part.strip(), (word >> np.uint32(16 * number)).astype(np.uint16), active)

    def compute(self, name: list[str], kind: str, bits: int, operands: list[str]) -> Words:
        """Integer, predicate and float32 arithmetic, and `fma` on pairs of 16-bit floats."""
        function = ARITHMETIC[name[0]]
        if kind.endswith("x2"):
            assert name[:-1] == ["fma", "rn"], name
            return fma_pairs(*(self.read(operand, 32) for operand in operands), kind.removesuffix("x2"))
        if kind == "pred":
            return function(*(self.predicate(operand) for operand in operands))  # type: ignore[no-any-return]
        if kind == "f32":
            numbers = (self.read(operand, 32).view(np.float32).astype(np.float64) for operand in operands)
            return function(*numbers).astype(np.float32).view(np.uint32)  # type: ignore[no-any-return]
        wide = "wide" in name
        kinds = SIGNED if kind[0] == "s" else UNSIGNED
        values = [self.read(operand, bits).view(kinds[bits]) for operand in operands[: 2 if wide else 3]]
        if wide:
            values = [value.astype(kinds[64]) for value in values]
            values += [self.read(operand, 64).view(kinds[64]) for operand in operands[2:]]
        result: Words = function(*values)
        return result.view(UNSIGNED[64 if wide else bits])

    def convert(self, to: str, source: str, operand: str) -> Words:
        """Between float32 and 16-bit floats, or integers of two sizes."""
        if source in ("bf16", "f16"):
            return to_float(self.read(operand, 16), source).view(np.uint32)
        if to in ("bf16", "f16"):
            return from_float(self.read(operand, 32).view(np.float32), to)
        kinds = SIGNED if source[0] == "s" else UNSIGNED
        bits = int(source[1:])
        return self.read(operand, bits).view(kinds[bits]).astype(UNSIGNED[int(to[1:])])

    def multiply(self, name: list[str], operands: list[str]) -> None:
        warps = (-1, 32)
        out, a, b, sums = ([part.strip() for part in operand.strip("{}").split(",")] for operand in operands[:4])
        a_words, b_words = (np.stack([self.read(part, 32).reshape(warps) for part in side], -1) for side in (a, b))
        before = np.stack([self.read(part, 32).view(np.float32).reshape(warps) for part in sums], -1)
        codes, half = self.read(operands[4], 32).reshape(warps), int(operands[5], 0)
        result = multiply_sparse(a_words, b_words, codes, before, half, name[-2])
        for number, register in enumerate(out):
            self.write(register, result[..., number].reshape(-1).view(np.uint32), np.ones(self.count, bool))

    def access(self, name: list[str], operands: list[str], active: Words) -> None:
        """Load or store one to four words at `[register + offset]`."""
        address, register = (operands[1], operands[0]) if name[0] == "ld" else (operands[0], operands[1])
        parts = [part.strip() for part in register.strip("{}").split(",")]
        base, _, offset = address.strip("[] ").partition("+")
        size = int(name[-1][1:]) // 8
        start = self.read(base.strip(), 64 if "global" in name else 32).astype(np.int64) + int(offset or 0)
        assert not (start[active] % (size * len(parts))).any(), "not aligned"
        for thread in np.flatnonzero(active):
            memory, place = self.shared, int(start[thread])
            if "global" in name:
                memory, place = self.buffers[(place >> BASE) - 1], place & ((1 << BASE) - 1)
            assert place >= 0 and place + size * len(parts) <= len(memory), f"{name} outside its buffer"
            words = memory[place : place + size * len(parts)].view(UNSIGNED[size * 8])
            for number, part in enumerate(parts):
                if name[0] == "ld":
                    self.registers.setdefault(part, np.zeros(self.count, words.dtype))[thread] = words[number]
                else:
                    words[number] = self.read(part, size * 8)[thread]

    def read(self, operand: str, bits: int) -> Words:
        """A register, or a constant in every thread."""
        if operand in self.registers:
            value = self.registers[operand]
            return value if value.dtype == bool else value.astype(UNSIGNED[bits], copy=False)
        number = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
        return np.full(self.count, number % (1 << bits), UNSIGNED[bits])

    def predicate(self, operand: str) -> Words:
        if operand in self.registers:
            return self.registers[operand]
        return np.full(self.count, int(operand) != 0)

    def write(self, register: str, value: Words, active: Words) -> None:
        old = self.registers.get(register, value)
        self.registers[register] = np.where(active, value, old.astype(value.dtype, copy=False))


def _operands(text: str) -> list[str]:
    """Split at commas outside braces."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,{])+", text)]
