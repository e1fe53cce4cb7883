"""From packed words to tensor-core operands in registers: the PTX that unpacks, the layouts it ends in (Gluon).

packing.py puts the codes of a lane in the order in which that lane feeds them to the tensor cores, and gives them even
levels, so unpacking neither moves data between lanes nor looks anything up: one AND cuts a field out of four bytes
(keys) or two halves (values), and what is left is the operand register, a power of two too large.  Every function here
works on planes: tensors of 4 * D bytes, D / 8 consecutive bytes per lane of the single warp.  `pack=4` hands the
assembly one 32-bit register per four bytes; a group is the same register of all planes.
"""

from functools import lru_cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SUBNORMAL = gl.constexpr(2.0**24)  # what an fp16 field of values is too small by, beside its unit
FIELD = {1: 0x1, 2: 0x3, 3: 0xE, 4: 0xF}  # of a code in its nibble


@gluon.constexpr_function
def units(bits: int) -> tuple[int, int, int, int]:
    """The power of two by which a field is too large: of keys for token tile i = 0..3, of values for dim block m."""
    if bits == 8:
        return (1, 1, 1, 1)
    even, odd = {1: (1, 2), 2: (1, 4), 3: (2, 2), 4: (1, 1)}[bits]
    return even, odd, 16 * even, 16 * odd


@gluon.constexpr_function
def double_starts(bits: int) -> tuple[int, int, int, int]:
    """Twice what a score starts at, in sums of the integer query, so that fields count from the middle level.

    A field of unit u holds u * code = u * (level + (2**bits - 1) / 2), or u * (level - 1/2) where its highest bit is
    the sign of the byte (packing.KEY_FLIP).
    """
    if bits == 8:
        return (0, 0, 0, 0)
    a, b, c, d = (u if u << bits == 256 else -((1 << bits) - 1) * u for u in units(bits))
    return a, b, c, d


def _spare(words: list[str]) -> list[str]:
    """x = the nibbles of the fourth word at 3 bits; bit 0 of each nibble is rubbish."""
    return [
        f"shl.b32 x, {words[2]}, 1;", f"shl.b32 y, {words[1]}, 2;", "lop3.b32 x, 0x44444444, y, x, 0xCA;",
        f"shl.b32 y, {words[0]}, 3;", "lop3.b32 x, 0x88888888, y, x, 0xCA;",
    ]  # fmt: skip


@lru_cache
def key_asm(bits: int) -> str:
    """PTX: `bits` words -> 8 registers 2 i + jj of four int8 fields.  Operands: $0-$7 results, then the words."""
    if bits == 8:
        return ""  # the bytes are the operands
    w = [f"${8 + n}" for n in range(bits)]
    body = _spare(w) if bits == 3 else []
    source = {4: w, 3: [*w, "x"]}.get(bits, [])
    if bits == 1:
        body.append(f"shr.b32 x, {w[0]}, 2;")
    for i in range(4):
        for jj in range(2):
            word, shift = (source[2 * jj + i % 2], 0) if bits >= 3 else ([w[0], "x" if bits == 1 else w[-1]][jj], i % 2)
            mask = FIELD[bits] << (bits * shift + 4 * (i // 2))
            body.append(f"and.b32 ${2 * i + jj}, {word}, {mask * 0x01010101:#x};")
    return "{\n.reg .b32 x, y;\n" + "\n".join(body) + "\n}"


@lru_cache
def value_asm(bits: int) -> str:
    """PTX: `bits` words -> 16 registers 2 (2 m + j0) + b1 of two fp16 fields, subnormal: field * 2 ** -24.

    Operands: $0-$15 results, then the words.
    """
    if bits == 8:
        return ""
    w = [f"${16 + n}" for n in range(bits)]
    body = _spare(w) if bits == 3 else []
    source = {4: w, 3: [*w, "x"]}.get(bits, [])
    for shift in range(0, 16, 2) if bits == 1 else (0, 8):
        for j0 in range(2):
            for b1 in range(2):
                if bits >= 3:
                    word, blocks = source[2 * j0 + b1], [(m, 4 * (m // 2)) for m in range(4) if 8 * (m % 2) == shift]
                elif shift == 8 * b1 + (2 * j0 if bits == 1 else 0):
                    word, blocks = w[j0 if bits == 2 else 0], [(m, 4 * (m // 2) + bits * (m % 2)) for m in range(4)]
                else:
                    continue
                if shift:
                    body.append(f"shr.b32 y, {word}, {shift};")
                for m, at in blocks:
                    mask = (FIELD[bits] << at) * 0x00010001
                    body.append(f"and.b32 ${2 * (2 * m + j0) + b1}, {'y' if shift else word}, {mask:#x};")
    return "{\n.reg .b32 x, y;\n" + "\n".join(body) + "\n}"


@lru_cache
def constraints(results: int, bits: int) -> str:
    return ",".join(["=&r"] * results + ["r"] * bits)


# Adding 128 to a byte and putting 0x64 above it makes the fp16 number 1024 + 128 + byte.
INT8_TO_FP16 = gl.constexpr(
    "{\n.reg .b32 a, u;\nxor.b32 a, $2, 0x80808080;\nmov.b32 u, 0x64646464;\nprmt.b32 $0, a, u, 0x4140;\n"
    "prmt.b32 $1, a, u, 0x4342;\nmov.b32 u, 0xE480E480;\nadd.rn.f16x2 $0, $0, u;\nadd.rn.f16x2 $1, $1, u;\n}"
)


@gluon.jit
def _join8(r):
    """Eight tensors -> trailing dimension of 8."""
    a = gl.join(gl.join(r[0], r[1]), gl.join(r[2], r[3]))
    b = gl.join(gl.join(r[4], r[5]), gl.join(r[6], r[7]))
    # [..., r0, r1, r2] -> [..., r2, r1, r0]
    return gl.permute(gl.join(a, b), (0, 3, 2, 1))


@gluon.jit
def unpack_key(planes, ASM: gl.constexpr, CONSTRAINTS: gl.constexpr, BITS: gl.constexpr):
    """Planes int8 [bytes] -> 8 int8 tensors, register r = 0..7 of every group."""
    if BITS == 8:
        return planes
    return gl.inline_asm_elementwise(
        ASM, CONSTRAINTS, planes, is_pure=True, pack=4,
        dtype=(gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8),
    )  # fmt: skip


@gluon.jit
def unpack_value(planes, ASM: gl.constexpr, CONSTRAINTS: gl.constexpr, BITS: gl.constexpr):
    """Planes int8 [bytes] -> 8 fp16 tensors, register r = 0..7 of every group."""
    half = ()
    if BITS == 8:
        for i in gl.static_range(8):
            x = gl.inline_asm_elementwise(
                INT8_TO_FP16, "=&r,=&r,r", [planes[i]], dtype=gl.float16, is_pure=True, pack=4
            )
            half = half + (x,)
    else:
        half = gl.inline_asm_elementwise(
            ASM, CONSTRAINTS, planes, is_pure=True, pack=4,
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16),
        )  # fmt: skip
    return half


@gluon.constexpr_function
def _inverse_unit(bits, i):
    return 1.0 / units(bits)[i]


@gluon.constexpr_function
def _double_start(bits, i):
    return double_starts(bits)[i]


@gluon.constexpr_function
def middle(bits):
    """The middle level, counted from code 0."""
    return 0.0 if bits == 8 else (2**bits - 1) / 2


@gluon.jit
def _choose(i, a, b, c, d):
    """a, b, c or d where i is 0, 1, 2 or 3."""
    return gl.where(i < 2, gl.where(i == 0, a, b), gl.where(i == 2, c, d))


@gluon.jit
def inverse_units(i, BITS: gl.constexpr):
    """1 / units(BITS) of token tiles or dimension blocks i."""
    return _choose(i, _inverse_unit(BITS, 0), _inverse_unit(BITS, 1), _inverse_unit(BITS, 2), _inverse_unit(BITS, 3))


@gluon.jit
def starts(i, BITS: gl.constexpr):
    """double_starts(BITS) of token tiles i."""
    return _choose(i, _double_start(BITS, 0), _double_start(BITS, 1), _double_start(BITS, 2), _double_start(BITS, 3))


@gluon.jit
def key_operand(r, GROUPS: gl.constexpr):
    """Registers of GROUPS groups -> K^T int8 [32 GROUPS, 32]."""
    # g t group byte i jj -> (group jj t byte) (i g)
    x = gl.reshape(_join8(r), [8, 4, GROUPS, 4, 4, 2])
    return gl.reshape(gl.permute(x, (2, 5, 1, 3, 4, 0)), [32 * GROUPS, 32])


@gluon.jit
def value_operand(r, GROUPS: gl.constexpr):
    """Registers of GROUPS groups, fp16 -> V^T [32 GROUPS, 32]."""
    # g t group b1 b0 m j0 -> (group m g) (j0 b1 t b0)
    x = gl.reshape(_join8(r), [8, 4, GROUPS, 2, 2, 4, 2])
    return gl.reshape(gl.permute(x, (2, 5, 0, 6, 3, 1, 4)), [32 * GROUPS, 32])
