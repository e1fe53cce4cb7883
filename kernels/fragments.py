"""From packed words to tensor-core operands in registers: the PTX that unpacks, and the layouts it ends in (Gluon).

packing.py puts the codes of a lane in the order in which that lane feeds them to the tensor cores, so unpacking never
moves data between lanes.  Every function here works on planes: tensors of 4 * D bytes, D / 8 consecutive bytes
per lane of the single warp.  `pack=4` hands the assembly one 32-bit register per four bytes; a group is the
same register of all planes.  After a shift and a mask each nibble selects a byte of the 8-byte
table in two registers (PRMT), four codes at once; eight such results, r = 0..7, are the 32 codes of a group.
"""

from functools import lru_cache

from triton.experimental.gluon import language as gl


def _half(register: str, low: int, table: str) -> list[str]:
    """PRMT of nibbles 0-3 and 4-7 of `register` into outputs low and low + 1."""
    return [
        f"prmt.b32 ${low}, {table}, {register};",
        f"shr.b32 u, {register}, 16;",
        f"prmt.b32 ${low + 1}, {table}, u;",
    ]


@lru_cache
def unpack_asm(bits: int, value: bool) -> str:
    """PTX: `bits` words -> 8 registers of four table bytes (4 bits: with the sign applied).

    Operands: $0-$7 results, then the words, then four copies each of the low and the high half of the table.
    """
    w = [f"${8 + i}" for i in range(bits)]
    table = f"${8 + bits}, ${12 + bits}"
    body: list[str] = []
    if bits == 8:
        return ""  # the bytes are the operands
    if bits == 1:
        body += [f"and.b32 a, {w[0]}, 0x11111111;", *_half("a", 0, table)]
        for s in (1, 2, 3):
            body += [f"shr.b32 a, {w[0]}, {s};", "and.b32 a, a, 0x11111111;", *_half("a", 2 * s, table)]
    elif bits == 2:
        for i in range(2):
            body += [f"and.b32 a, {w[i]}, 0x33333333;", *_half("a", 4 * i, table)]
            body += [f"shr.b32 b, {w[i]}, 2;", "and.b32 b, b, 0x33333333;", *_half("b", 4 * i + 2, table)]
    elif bits == 3:
        for i in range(3):
            body += [f"and.b32 a, {w[i]}, 0x77777777;", *_half("a", 2 * i, table)]
        body += [f"shr.b32 a, {w[0]}, 3;", "and.b32 a, a, 0x11111111;"]
        body += [f"shr.b32 b, {w[1]}, 2;", "lop3.b32 a, b, 0x22222222, a, 0xEA;"]
        body += [f"shr.b32 b, {w[2]}, 1;", "lop3.b32 a, b, 0x44444444, a, 0xEA;", *_half("a", 6, table)]
    else:
        for i in range(4):
            body += [f"and.b32 a, {w[i]}, 0x77777777;", *_half("a", 2 * i, table), f"shl.b32 b, {w[i]}, 4;"]
            # Selectors 8 + n replicate the top bit of byte n: the sign bits of four codes become byte masks.
            for r, selector in ((2 * i, "0xD9C8"), (2 * i + 1, "0xFBEA")):
                body.append(f"prmt.b32 s, b, {w[i]}, {selector};")
                # Values: OR the e4m3 sign bit.  Keys: complement, which is minus on the half-integer grid.
                body.append(f"lop3.b32 ${r}, s, 0x80808080, ${r}, 0xEA;" if value else f"xor.b32 ${r}, ${r}, s;")
    return "{\n.reg .b32 a, b, u, s;\n" + "\n".join(body) + "\n}"


@lru_cache
def unpack_constraints(bits: int) -> str:
    return ",".join(["=&r"] * 8 + ["r"] * (bits + 8))


# Adding 128 to a byte and putting 0x64 above it makes the fp16 number 1024 + 128 + byte.
INT8_TO_FP16 = gl.constexpr(
    "{\n.reg .b32 a, u;\nxor.b32 a, $2, 0x80808080;\nmov.b32 u, 0x64646464;\nprmt.b32 $0, a, u, 0x4140;\n"
    "prmt.b32 $1, a, u, 0x4342;\nmov.b32 u, 0xE480E480;\nadd.rn.f16x2 $0, $0, u;\nadd.rn.f16x2 $1, $1, u;\n}"
)
