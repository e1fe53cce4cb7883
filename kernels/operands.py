"""What `encode` multiplies by, made once of a layer's maps: one int16 tensor [H, size], the bits of each head's

    map          bf16 [DP, DP]      high part of map / unit, columns as `arrange`d, zero beyond D
    feedback     bf16 [DP/2, DP/2]  rows and columns in the order of half a product's; not there without feedback
    minus shift  float32 [DP]       minus the mapped shift / unit, as `arrange`d
    unit         float32            c of a map of +-c, else 1
    remainder    int32              1 if an entry of map / unit has a second bf16 part, else 0
    zeros        to 32 bytes

DP is D rounded up to a power of two.  Every section begins at a multiple of 32 bytes: `feedback_at`, `shift_at` and
`unit_at` say where, in bf16 numbers, to kernels as well.  int16, because a half of a float32 may be NaN as bf16.
"""

import torch
import triton
import triton.language as tl

from .mapped import arranged, high_part, load_map
from .pack import arrange, load_feedback

ROWS, WARPS = 32, 16  # rows of the map at a time


@triton.constexpr_function
def feedback_at(padded):
    return padded * padded


@triton.constexpr_function
def shift_at(padded, feedback):
    return padded * padded + (padded // 2 * (padded // 2) if feedback else 0)


@triton.constexpr_function
def unit_at(padded, feedback):
    return shift_at(padded, feedback) + 2 * padded


@triton.constexpr_function
def size(padded, feedback):
    return unit_at(padded, feedback) + 16


@triton.jit
def survey(map, shift, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """One look at a map, ROWS rows at a time.

    Returns:
        c if all entries are +-c, else 1; whether an entry / that has a second bf16 part; shift @ map, float32 [DP].
    """
    first = tl.load(map).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    more = tl.zeros([ROWS, DP], tl.int32)
    other = tl.zeros([ROWS, DP], tl.int32)
    products = tl.zeros([ROWS, DP], tl.float32)
    TOGETHER: tl.constexpr = max(1, min(DP // ROWS, 512 // DP))  # what registers hold
    for k in tl.range(0, DP, ROWS, num_stages=1, loop_unroll_factor=TOGETHER):
        m = load_map(map, k, D, DP, ROWS)
        bits = m.to(tl.int32, bitcast=True)
        more |= bits & 0xFFFF
        other |= (bits & 0x7FFFFFFF) ^ first
        row = k + tl.arange(0, ROWS)
        products += tl.load(shift + row, mask=row < D, other=0.0)[:, None] * m
    tl.static_assert(ROWS * DP < 32768)  # both counts in one sum
    counts = tl.sum(tl.where(more != 0, 1, 0) + tl.where(other != 0, 65536, 0))
    alike = (D == DP) & (counts < 65536) & (first > 0)
    unit = tl.where(alike, first.to(tl.float32, bitcast=True), 1.0)
    return unit, (counts % 65536 > 0) & (alike == 0), tl.sum(products, axis=0)


@triton.jit
def operands_kernel(
    map, shift, feedback, operands,
    D: tl.constexpr, DP: tl.constexpr, KEY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (H,).  feedback: of all heads, or None."""
    h = tl.program_id(0).to(tl.int64)
    FEEDBACK: tl.constexpr = feedback is not None
    map += h * D * D
    operands += h * size(DP, FEEDBACK)
    unit, remainder, shifted = survey(map, shift + h * D, D, DP, ROWS)
    inverse = 1.0 / unit
    column = tl.arange(0, DP)
    MORE: tl.constexpr = min(DP, 2 * ROWS)
    for k in tl.range(0, DP, MORE, num_stages=1):
        high = high_part(arranged(map, k, D, DP, MORE, KEY, FEEDBACK) * inverse)
        at = (k + tl.arange(0, MORE))[:, None] * DP + column[None, :]
        tl.store(operands + at, high.to(tl.bfloat16))
    if FEEDBACK:
        HALF: tl.constexpr = DP // 2
        f = load_feedback(feedback, h, D, DP, KEY, tl.bfloat16)
        at = tl.arange(0, HALF)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        tl.store(operands + feedback_at(DP) + at, f)
    minus = tl.reshape(arrange((-shifted * inverse)[None, :], KEY, FEEDBACK), [DP])
    tl.store((operands + shift_at(DP, FEEDBACK)).to(tl.pointer_type(tl.float32)) + column, minus)
    i = tl.arange(0, 8)
    last = tl.where(i == 0, unit.to(tl.int32, bitcast=True), tl.where((i == 1) & remainder, 1, 0))
    tl.store((operands + unit_at(DP, FEEDBACK)).to(tl.pointer_type(tl.int32)) + i, last)


@triton.jit
def load_square(at, N: tl.constexpr, COLUMNS: tl.constexpr, OPERAND: tl.constexpr):
    """N rows of a section of matrices as dot operand [N, COLUMNS]."""
    return tl.load(at + tl.arange(0, N)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]).to(OPERAND)


@triton.jit
def load_shift(operands, DP: tl.constexpr, FEEDBACK: tl.constexpr):
    """Of one head: minus the mapped shift / unit, float32 [DP]; unit."""
    minus = tl.load((operands + shift_at(DP, FEEDBACK)).to(tl.pointer_type(tl.float32)) + tl.arange(0, DP))
    return minus, tl.load((operands + unit_at(DP, FEEDBACK)).to(tl.pointer_type(tl.float32)))


@triton.jit
def load_remainder(operands, DP: tl.constexpr, FEEDBACK: tl.constexpr):
    """Of one head: 1 if its map has a second bf16 part, else 0."""
    return tl.load((operands + unit_at(DP, FEEDBACK)).to(tl.pointer_type(tl.int32)) + 1)


def padded_dim(dim: int) -> int:
    return max(32, triton.next_power_of_2(dim))


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def prepare(map: torch.Tensor, shift: torch.Tensor, role: str, feedback: torch.Tensor | None = None) -> torch.Tensor:
    """Operands of the maps of one side, as `reference.prepare`.

    Args:
        map, shift: float32 [H, D, D] and [H, D].
        role: "key" or "value".
        feedback: float32 [H, D / 2, D / 2] or None.

    Returns:
        int16 [H, size(padded_dim(D), feedback is not None)].
    """
    heads, dim = shift.shape
    padded = padded_dim(dim)
    operands = torch.empty(heads, size(padded, feedback is not None), dtype=torch.int16, device=map.device)
    operands_kernel[(heads,)](
        map.contiguous(), shift.contiguous(), contiguous(feedback), operands.view(torch.bfloat16),
        D=dim, DP=padded, KEY=role == "key", ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip
    return operands


def prepared(
    operands: torch.Tensor | None, map: torch.Tensor, shift: torch.Tensor, feedback: torch.Tensor | None, role: str
) -> torch.Tensor:
    """The operands given, or those of the maps, as the bfloat16 tensor that kernels read.

    Raises:
        ValueError: operands of another shape or type than those of the maps.
    """
    if operands is None:
        operands = prepare(map, shift, role, feedback)
    check(operands, shift, feedback, role)
    return operands.contiguous().view(torch.bfloat16)


def check(operands: torch.Tensor, shift: torch.Tensor, feedback: torch.Tensor | None, role: str) -> None:
    """Raise ValueError unless operands have the shape and type of those of such maps."""
    want = (shift.shape[0], size(padded_dim(shift.shape[1]), feedback is not None))
    if tuple(operands.shape) != want or operands.dtype != torch.int16:
        raise ValueError(
            f"expected {role} operands of int16 {want}, got {operands.dtype} {tuple(operands.shape)}; make them of "
            "these maps and this feedback with ops.prepare, or give none"
        )
