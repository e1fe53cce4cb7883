"""Rows times a map on tensor cores, in bf16 parts.

Two parts (high + remainder, 17 bits) make a number: map = m_hi + m_lo, and x = x_hi + x_lo unless x is bf16 already;
x_lo m_lo is left out.  `mapped_here` is for maps without a remainder: those of the cache are bf16 numbers
(`rotation.in_one_part`), or +-c as a randomised Hadamard matrix, which `operands.py` has divided by c.  Under the
Triton interpreter, whose bf16 product is wrong, the same parts are multiplied as float32 (OPERAND).
"""

import triton
import triton.language as tl

from .pack import arrange


@triton.jit
def two_parts(x, OPERAND: tl.constexpr):
    """float32 x as high part (truncated, so a bf16 x has no remainder) and remainder, both dot operands."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16).to(OPERAND), (x - high).to(tl.bfloat16).to(OPERAND)


@triton.jit
def high_part(m):
    """m with 8 significant bits (rounded), float32."""
    return (m.to(tl.int32, bitcast=True) + 32768 & -65536).to(tl.float32, bitcast=True)


@triton.jit
def map_operands(m, OPERAND: tl.constexpr):
    """m as high part and remainder, both dot operands."""
    high = high_part(m)
    return high.to(tl.bfloat16).to(OPERAND), (m - high).to(tl.bfloat16).to(OPERAND)


@triton.jit
def load_map(map, first, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """Rows first .. first + ROWS - 1 of a map, float32 [ROWS, DP], zero beyond D."""
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, DP)
    inside = (rows < D)[:, None] & (columns < D)[None, :]
    return tl.load(map + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)


@triton.jit
def arranged(
    map, first, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, KEY: tl.constexpr, FEEDBACK: tl.constexpr
):
    """`load_map` with its columns in the order of the product's."""
    return arrange(load_map(map, first, D, DP, ROWS), KEY, FEEDBACK)


@triton.jit
def load_rows(rows, ok, first, D: tl.constexpr, K: tl.constexpr):
    """Dims first .. first + K - 1 of the vectors at pointers rows [N], zero where not ok (None: all are)."""
    dims = first + tl.arange(0, K)
    at = rows[:, None] + dims[None, :]
    if ok is not None:
        x = tl.load(at, mask=ok[:, None] & (dims < D)[None, :], other=0.0)
    elif D % K:
        x = tl.load(at, mask=(dims < D)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def shift_rows(minus, row):
    """minus float32 [DP] as three bf16 numbers below each other, the first of the rows, row int32 [16, 1]."""
    high, _rest = two_parts(minus, tl.float32)
    middle, low = two_parts(minus - high, tl.float32)
    rows = tl.where(row == 0, high[None, :], tl.where(row == 1, middle[None, :], low[None, :]))
    return tl.where(row < 3, rows, 0.0).to(tl.bfloat16)


@triton.jit
def minus_shift(shift, ROWS: tl.constexpr, OPERAND: tl.constexpr):
    """Minus the mapped shift, float32 [ROWS, DP]: a product, as a vector would take up to 64 registers."""
    ones = tl.where(tl.arange(0, 16)[None, :] < 3 + tl.zeros([ROWS, 1], tl.int32), 1.0, 0.0)
    return tl.dot(ones.to(tl.bfloat16).to(OPERAND), shift, input_precision="ieee")


@triton.jit
def add_product(x, m, y, OPERAND: tl.constexpr):
    """y + x @ m, float32, for a dot operand m and x in any type."""
    if x.dtype == tl.bfloat16:
        y = tl.dot(x.to(OPERAND), m, y, input_precision="ieee")
    else:
        high, low = two_parts(x.to(tl.float32), OPERAND)
        y = tl.dot(low, m, y, input_precision="ieee")
        y = tl.dot(high, m, y, input_precision="ieee")
    return y


@triton.jit
def mapped_here(rows, minus, m, m2, D: tl.constexpr, DP: tl.constexpr, OPERAND: tl.constexpr):
    """`mapped`, all rows, by a map in one part that stays in shared memory, m its first 128 rows, m2 the others.

    minus: minus the mapped shift, float32 [DP], or as `shift_rows` makes it, an operand.
    """
    K: tl.constexpr = min(DP, 128)
    if len(minus.shape) == 1:
        y = tl.broadcast_to(minus[None, :], [rows.shape[0], DP])
    else:
        y = minus_shift(minus, rows.shape[0], OPERAND)
    y = add_product(load_rows(rows, None, 0, D, K), m, y, OPERAND)
    if DP > 128:
        y = add_product(load_rows(rows, None, 128, D, 128), m2, y, OPERAND)
    return y


@triton.jit
def mapped(
    rows, ok, map, shift,
    D: tl.constexpr, DP: tl.constexpr, KEY: tl.constexpr, FEEDBACK: tl.constexpr, KC: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """y [N, DP] = (rows - shift) @ map, zero where not ok, columns as `arrange`d; KC rows of the map at a time."""
    y = tl.zeros([rows.shape[0], DP], tl.float32)
    for first in tl.range(0, DP, KC, num_stages=1):
        x = load_rows(rows, ok, first, D, KC)
        offset = tl.load(shift + first + tl.arange(0, KC), mask=first + tl.arange(0, KC) < D, other=0.0)
        delta = tl.where(ok[:, None], x.to(tl.float32) - offset[None, :], 0.0)
        x_high, x_low = two_parts(delta, OPERAND)
        m_high, m_low = map_operands(arranged(map, first, D, DP, KC, KEY, FEEDBACK), OPERAND)
        y = tl.dot(x_low, m_high, y, input_precision="ieee")
        y = tl.dot(x_high, m_low, y, input_precision="ieee")
        y = tl.dot(x_high, m_high, y, input_precision="ieee")
    return y
