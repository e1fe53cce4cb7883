"""Levels of packed tiles as operands of `tl.dot`: codes are made numbers in registers, two at a time.

Levels are halves of odd numbers, exact in fp16 and bf16.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl


@triton.jit
def _levels8(words, BITS: tl.constexpr, KEY: tl.constexpr, ASM: tl.constexpr, OPERAND: tl.constexpr):
    """Levels of the lowest code of each nibble (at 3 bits of the highest): int32 [...] -> OPERAND [..., 2, 2, 2].

    The new digits are (i1 byte1 byte0) of keys, (m1 m0 b0) or (m1 b1 b0) of values: neighbours in the operand are
    neighbours in registers.  With ASM levels are in units of `level_unit`, else whole.
    """
    if ASM is not None:
        x0, x1, x2, x3, x4, x5, x6, x7 = tl.inline_asm_elementwise(
            ASM, "=h,=h,=h,=h,=h,=h,=h,=h,r", [words],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=1,
        )  # fmt: skip
        x = tl.join(
            tl.join(tl.join(x0, x4), tl.join(x2, x6)),
            tl.join(tl.join(x1, x5), tl.join(x3, x7)),
        )
        if OPERAND == tl.float32:
            y = x.to(tl.float16, bitcast=True).to(tl.float32)
        else:
            y = x.to(OPERAND, bitcast=True)
    else:
        x = tl.join(words, words >> 4)
        x = tl.join(x, x >> (16 if KEY else 8))
        x = tl.join(x, x >> (8 if KEY else 16))
        x = (x >> (BITS == 3)) & ((1 << BITS) - 1)
        y = (x.to(tl.float32) - ((1 << BITS) - 1) * 0.5).to(OPERAND)
    return y


@triton.jit
def _plane(words, tile_stride, tile, ok, w, group, G: tl.constexpr):
    """Words of plane w, int32 [TILES, 32 lanes, len(group)]; group [1, 1, groups]."""
    lane = tl.arange(0, 32)[None, :, None]
    at = words + tile[:, None, None] * tile_stride + (w * 32 + lane) * G + group
    return tl.load(at, mask=ok[:, None, None] & (group < G), other=0)


@triton.jit
def unpack(
    words, tile_stride, tile, ok, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr,
    ASM: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Levels of whole tiles from layout v2 (packing.py), in units of `level_unit`; tile int64 [TILES].

    Keys: OPERAND [TILES * 32 tokens, DP].  Values: OPERAND [DP, TILES * 32 tokens], the order their words hold.
    """
    TILES: tl.constexpr = tile.shape[0]
    R: tl.constexpr = DP // 32
    G: tl.constexpr = D // 32
    if BITS == 8:
        p = tl.arange(0, 8 * R)[None, None, :]
        w = _plane(words, tile_stride, tile, ok, p % 8, p // 8, G)
        x = tl.join(tl.join(w << 24, w << 8), tl.join(w << 16, w)) >> 24
        x = tl.reshape(x.to(OPERAND), [TILES, 8, 4, R, 2, 2, 2, 4])
        if KEY:  # tile g t group i1 i0 jj byte -> tile i1 i0 g, group jj t byte
            x = tl.permute(x, (0, 4, 5, 1, 3, 6, 2, 7))
        else:  # tile g t group m1 m0 j0 (b1 b0) -> group m1 m0 g, tile j0 b1 t b0
            x = tl.permute(tl.reshape(x, [TILES, 8, 4, R, 4, 2, 2, 2]), (3, 4, 1, 0, 5, 6, 2, 7))
    else:
        # Words s of eight nibbles, tile lane group and the digits of s, with the highest bit of keys as in a code.
        group = tl.arange(0, R)[None, None, :]
        w0 = _plane(words, tile_stride, tile, ok, 0, group, G)
        FLIP: tl.constexpr = -2139062144 if KEY and BITS > 1 else 0  # 0x80808080
        if BITS == 1:
            s = tl.join(tl.join(w0, w0 >> 2), tl.join(w0 >> 1, w0 >> 3))
        else:
            w1 = _plane(words, tile_stride, tile, ok, 1, group, G)
            if BITS == 2:
                w = tl.join(w0, w1) ^ FLIP
                s = tl.join(w, w >> 2)
            else:
                w2 = _plane(words, tile_stride, tile, ok, 2, group, G)
                if BITS == 3:
                    w3 = ((w0 & 0x11111111) << 3) | ((w1 & 0x11111111) << 2) | ((w2 & 0x11111111) << 1)
                else:
                    w3 = _plane(words, tile_stride, tile, ok, 3, group, G)
                s = tl.join(tl.join(w0, w2), tl.join(w1, w3)) ^ FLIP
        x = tl.reshape(_levels8(s, BITS, KEY, ASM, OPERAND), [TILES, 8, 4, R, 2, 2, 2, 2, 2])
        if KEY:  # tile g t group jj i0 i1 byte1 byte0 -> tile i1 i0 g, group jj t byte
            x = tl.permute(x, (0, 6, 5, 1, 3, 4, 2, 7, 8))
        elif BITS >= 3:  # tile g t group j0 b1 m1 m0 b0 -> group m1 m0 g, tile j0 b1 t b0
            x = tl.permute(x, (3, 6, 7, 1, 0, 4, 5, 2, 8))
        else:  # tile g t group j0 m0 m1 b1 b0 -> group m1 m0 g, tile j0 b1 t b0
            x = tl.permute(x, (3, 6, 5, 1, 0, 4, 7, 2, 8))
    return tl.reshape(x, [TILES * 32, DP] if KEY else [DP, TILES * 32])


def level_unit(bits: int, dtype: torch.dtype, asm: bool) -> float:
    """What `unpack` gives for one level step (at 8 bits: the code itself is given, a level is 1 / 127 of it)."""
    if bits == 8:
        return 127.0
    return 2.0 ** -_SHRINK[_half(dtype)] if asm else 1.0


# A field is read as a subnormal number and made normal by one multiply-add, whose factor must fit the type.
_SHRINK = {torch.float16: 9, torch.bfloat16: 6}


def _half(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type levels are made in: float32 operands are converted from fp16."""
    return torch.float16 if dtype == torch.float32 else dtype


@lru_cache
def levels_asm(bits: int, key: bool, dtype: torch.dtype) -> str | None:
    """PTX that turns a word into eight levels, as `_levels8` orders them; None at 8 bits.

    Two codes at once: word & mask is a pair of subnormal numbers code * 2**(s - 24) in fp16 (2**(s - 133) in bf16), s
    being the place of the code in its half, also where it ends in the lowest exponent bit; one multiply-add makes them
    code - (2**bits - 1) / 2 in units of `level_unit`.  Pairs are bytes of keys, nibbles n and n + 4 of values.
    """
    if bits == 8:
        return None
    dtype = _half(dtype)
    shrink = _SHRINK[dtype]
    kind, smallest = ("f16x2", 24) if dtype == torch.float16 else ("bf16x2", 133)

    def pair(value: float) -> str:
        half = int(torch.tensor(value, dtype=torch.float64).to(dtype).view(torch.int16)) & 0xFFFF
        return f"{half << 16 | half:#010x}"

    lines = [".reg .b32 w, x, m, c;", f"mov.b32 c, {pair(-((1 << bits) - 1) / 2 * 2.0**-shrink)};"]
    for part in (0, 1):
        if key:  # bytes 2 part and 2 part + 1 to the low byte of each half
            lines += [f"prmt.b32 w, $8, 0, {0x4342 if part else 0x4140:#06x};"]
        else:
            lines += ["shr.u32 w, $8, 8;" if part else "mov.b32 w, $8;"]
        for high in (0, 1):
            start = 4 * high + (bits == 3)
            mask = ((1 << bits) - 1) << start
            lines += [
                f"and.b32 x, w, {mask << 16 | mask:#010x};",
                f"mov.b32 m, {pair(2.0 ** (smallest - shrink - start))};",
            ]
            lines += [
                f"fma.rn.{kind} x, x, m, c;",
                f"mov.b32 {{${4 * high + 2 * part}, ${4 * high + 2 * part + 1}}}, x;",
            ]
    return "{ " + " ".join(lines) + " }"
