"""Attention of several queries per row over packed K and V, the exact window and sinks, and causally over new tokens.

A few queries are left to the kernels of decode_attention.py, which share a long row among more programs; what follows
is for more.

Four launches.  `exact_kernel` is flash attention over sinks, ring and new tokens; beside it `rotate_kernel` maps the
queries once.  `packed_kernel` is flash attention whose K and V operands are unpacked in registers once per block of
query rows (all G query heads of a KV head share a block).  Both attentions leave normalised partial outputs and the
log2 of their softmax sums; `merge_kernel` weighs them, maps the packed part back and adds the value shift:

    out = w_exact o_exact + (sum_s w_s o_s) @ output_map + (sum_s w_s) value_shift

Queries are divided by their largest entry to be safe in fp16, whose 11 bits matter more here than range.  Scales of
keys multiply scores, those of values multiply probabilities.
"""

import torch
import triton
import triton.language as tl

from .chip import launches_early, multiprocessors, shared_kib
from .decode_attention import MAX_PAIRS, few_obstacle, few_queries
from .encode import WIDE, padded_dim
from .extend_ends import merge_kernel, rotate_kernel
from .extend_flash import exact_kernel, packed_kernel
from .levels import level_unit, levels_asm
from .operands import contiguous


def operand_types(dtype: torch.dtype, interpreted: bool) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Dot operand types for packed keys, packed values and exact tokens.  The interpreter's bf16 product is wrong."""
    if dtype == torch.float32 or (interpreted and dtype == torch.bfloat16):
        return torch.float32, torch.float32, torch.float32
    return torch.float16, dtype, dtype


def product_precision(dtype: torch.dtype, dim: int, shared: int, tf32: bool) -> str:
    """Triton's input_precision of products; float32 has three tf32 parts where they fit `shared` KiB.

    tf32: whether the chip multiplies them.
    """
    return "tf32x3" if dtype == torch.float32 and tf32 and (padded_dim(dim) <= 128 or shared >= 160) else "ieee"


_TL = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def launch_options(
    dim: int, rows: int, dtype: torch.dtype, shared: int, small_grid: bool = False
) -> dict[str, dict[str, int]]:
    """Block sizes of the four kernels for `rows` = G * q_len query rows per KV head.

    shared: KiB of shared memory in a multiprocessor.  small_grid: blocks of 128 rows would leave multiprocessors idle.
    """
    padded, wide = padded_dim(dim), shared >= WIDE
    small = padded <= 128
    both = {"ROWS": 32 if small else 16, "num_warps": 4, "num_stages": 1}
    merge = {**both, "COLUMNS": 64 if small else 32, "TOGETHER": 4 if small else 2}
    ends = {"rotate": {**both, "KC": 32}, "merge": merge}
    m = min(128, max(16, triton.next_power_of_2(rows)))
    if dtype == torch.float32:
        block = {"M": 16, "num_warps": 4, "num_stages": 1}
        return {**ends, "packed": {**block, "TILES": 1}, "exact": {**block, "N": 32}}
    if padded > 128 or not wide:
        m = min(m, 64 if padded <= 256 or shared >= 160 else 32)
    if wide:
        packed = {"M": min(m, 64), "TILES": 4 if padded <= 128 else 2, "num_warps": 4, "num_stages": 2}
    else:  # fewer registers hold one tile when the operands of mma.sync come from them
        narrow = padded <= 64
        packed = {"M": min(m, 64 if narrow else 32), "TILES": 2 if narrow else 1, "num_warps": 4, "num_stages": 2}
    if small_grid:
        m = min(m, 64)
    exact = {"M": m, "N": 64 if padded <= 128 and not small_grid else 32, "num_warps": 8 if m == 128 else 4}
    stages = 3 if padded <= 128 and wide else 2 if padded <= 256 or shared >= 160 else 1
    return {**ends, "packed": packed, "exact": {**exact, "num_stages": stages}}


def extend_attention(
    q: torch.Tensor, k_new: torch.Tensor, v_new: torch.Tensor,
    k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor,
    k_sinks: torch.Tensor, v_sinks: torch.Tensor, k_recent: torch.Tensor, v_recent: torch.Tensor,
    length: torch.Tensor, start: torch.Tensor, query_map: torch.Tensor, key_shift: torch.Tensor,
    output_map: torch.Tensor, value_shift: torch.Tensor, window: int, scale: float, softcap: float,
    sink_logits: torch.Tensor | None, k_bits: int, v_bits: int, impl: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """Attention of q [B, Hq, q_len, D] over a packed cache of `length` tokens and causally over k_new, v_new.

    Arguments and result are those of `reference.attention`.  For few queries what `decode_attention` says of large and
    small values and of rounding holds, and for k_new and v_new as for the ring.

    Args:
        k_bits, v_bits: code widths of k_codes and v_codes.
        impl: "gluon" (`decode_attention.few_queries`: few queries, NVIDIA GPUs), "triton" (any number of queries),
            "auto": the first that takes them.

    Raises:
        ValueError: strides that a kernel cannot follow, an unknown impl, or impl="gluon" where it does not run.  That
            shapes agree is `tq_ao.ops`' to see to.
    """
    batch, q_heads, q_len, dim = q.shape
    if not q.numel():
        return torch.empty_like(q)
    if impl not in ("auto", "gluon", "triton"):
        raise ValueError(f"expected impl 'auto', 'gluon' or 'triton', got {impl!r}")
    heads, capacity, sinks = k_codes.shape[1], k_recent.shape[2], k_sinks.shape[2]
    group = q_heads // heads
    if batch * heads > MAX_PAIRS:
        raise ValueError(
            f"expected at most {MAX_PAIRS} pairs of row and KV head, got {batch} x {heads}; split the batch"
        )
    if (k_sinks.stride() != v_sinks.stride() and sinks) or (k_recent.stride() != v_recent.stride() and capacity):
        raise ValueError("expected sinks (and rings) of keys and values to have equal strides; allocate them alike")
    if any(t.stride(-1) != 1 for t in (k_codes, v_codes, k_scales, v_scales)):
        raise ValueError("expected codes and scales contiguous along their last dimension; call .contiguous() on them")
    exact = (k_sinks, v_sinks, k_recent, v_recent)
    obstacle = few_obstacle(q, (k_codes, k_scales, v_codes, v_scales), exact)
    if impl == "gluon" and obstacle:
        raise ValueError(f"impl='gluon' does not run here: {obstacle}; use impl='triton'")
    if impl != "triton" and obstacle is None:
        return few_queries(
            q, k_new, v_new, k_codes, k_scales, v_codes, v_scales, *exact, length, start, query_map, key_shift,
            output_map, value_shift, window, scale, softcap, sink_logits,
            k_bits=k_bits, v_bits=v_bits,
        )  # fmt: skip
    interpreted = triton.knobs.runtime.interpret
    k_type, v_type, exact_type = operand_types(q.dtype, interpreted)
    asm = not interpreted and torch.version.hip is None
    precision = product_precision(q.dtype, dim, shared_kib(q.device), tf32=asm)
    split_operand = tl.float32 if interpreted else tl.bfloat16
    padded = padded_dim(dim)
    cores = multiprocessors(q.device)
    small_grid = triton.cdiv(group * q_len, 128) * batch * heads < cores
    options = launch_options(dim, group * q_len, q.dtype, shared_kib(q.device), small_grid)
    k_words, v_words = k_codes.view(torch.int32), v_codes.view(torch.int32)
    query_map, output_map = query_map.contiguous(), output_map.contiguous()
    key_shift, value_shift = key_shift.contiguous(), value_shift.contiguous()
    start, sink_logits = start.contiguous(), contiguous(sink_logits)

    def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    # The first two launches run side by side: programmatic dependent launch, sm_90.
    pdl = launches_early(q.device)
    per_head = (batch * q_heads, triton.cdiv(q_len, options["merge"]["ROWS"]))
    rotated, unit, bias = buffer(batch, q_heads, q_len, dim, dtype=k_type), buffer(*q.shape[:3]), buffer(*q.shape[:3])
    o_exact, lse_exact = buffer(*q.shape), buffer(*q.shape[:3])
    exact_kernel[(triton.cdiv(group * q_len, options["exact"]["M"]), batch * heads)](
        q, k_new, v_new, k_sinks, v_sinks, k_recent, v_recent, o_exact, lse_exact, length, start,
        *q.stride(), *k_new.stride(), *v_new.stride(), *k_sinks.stride(), *k_recent.stride(),
        heads, group, q_len, capacity, sinks, window, scale, softcap,
        D=dim, DP=padded, CAP=softcap > 0, OPERAND=_TL[exact_type], PRECISION=precision, PDL=pdl,
        **options["exact"],
    )  # fmt: skip

    rotate_kernel[per_head](
        q, rotated, unit, bias, query_map, key_shift, *q.stride(), q_heads, group, q_len,
        D=dim, DP=padded, OPERAND=split_operand, PDL=pdl, **options["rotate"],
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip

    blocks = triton.cdiv(group * q_len, options["packed"]["M"])
    splits = max(1, min(2 * cores // (blocks * batch * heads), k_codes.shape[2] // 8, 64))
    o_packed, lse_packed = buffer(splits, *q.shape), buffer(splits, *q.shape[:3])
    packed_kernel[(blocks, batch * heads, splits)](
        rotated, unit, bias, k_words, k_scales, v_words, v_scales, o_packed, lse_packed, length, start,
        *k_words.stride()[:3], *k_scales.stride()[:3], *v_words.stride()[:3], *v_scales.stride()[:3],
        heads, group, q_len, capacity, sinks, window, scale, 1 / level_unit(k_bits, k_type, asm),
        1 / level_unit(v_bits, v_type, asm), softcap,
        D=dim, DP=padded, K_BITS=k_bits, V_BITS=v_bits,
        K_ASM=levels_asm(k_bits, True, k_type) if asm else None,
        V_ASM=levels_asm(v_bits, False, v_type) if asm else None,
        CAP=softcap > 0, V_OPERAND=_TL[v_type], PRECISION=precision, **options["packed"],
    )  # fmt: skip

    out = buffer(*q.shape, dtype=q.dtype)
    merge_kernel[per_head](
        o_exact, lse_exact, o_packed, lse_packed, sink_logits, out, output_map, value_shift, length, start,
        q_heads, group, q_len, splits, capacity, sinks, window,
        D=dim, DP=padded, LOGITS=sink_logits is not None, OPERAND=split_operand, **options["merge"],
    )  # fmt: skip
    return out
