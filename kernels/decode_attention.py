"""Attention of one query per row and head, or a few, over packed K and V: three launches, no waiting of the host.

    query.py            rotate the queries
    decode_gluon.py     packed tiles, split over the sequence, and a share of the exact tokens
    combine_gluon.py    merge, un-rotate once, add the exact part

On other GPUs query.py attends to the exact tokens, and decode_portable.py and combine.py do the rest.

A few queries (`few_queries`: drafts that are verified) all see the same packed tokens and window, so they are more
query heads to the Gluon kernels; the new tokens, which they see causally, are one more exact part.

Row lengths are read from device memory; the grids depend on shapes and the number of SMs only, so a
captured CUDA graph replays correctly while the cache grows.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from .chip import is_nvidia, launches_early, multiprocessors, shared_kib
from .combine import combine_kernel
from .decode_portable import portable_splits_kernel
from .encode import operand_type
from .operands import contiguous
from .query import prepare_few_kernel, prepare_kernel

LOG2E = 1.4426950408889634
MAX_SPLITS = 512
PORTABLE_PARTS = 8  # splits that combine.py merges at a time
MIN_STEPS, MIN_TILES = 3, 4  # softmax steps, and tiles, that are worth a program and a partial result
# Of a split, on average.  It adds up codes counted from zero and takes the middle level off at its end: what is left
# of a flat softmax over n tokens is 1 / sqrt(n) of the sum, so float32 rounding grows with n.
MAX_SPLIT_TOKENS = 8192
MAX_PAIRS = 65535  # programs along the second axis of a grid
TILE = 32
EXACT_COST = 0.9  # of an exact token against packed ones of as many bytes
MAX_TILES = 1 << 18  # to a row of a few queries: what `_first_step` counts in 32 bits, with any number of splits
# To a split of a long row, that are not dealt out.  Programs that share one run of tiles read it slower than each its
# own (half of all tiles claimed: H200 +4 to +10 %), but end together.
CLAIMED_TILES = 4


def _gluon_obstacle(device: torch.device) -> str | None:
    """Why the Gluon kernel cannot run on `device`, or None."""
    if not is_nvidia(device):
        return "it needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0, this GPU has {major}.{minor}"


def _has_whole_heads(x: torch.Tensor) -> bool:
    """Whether x [B, H, ...] is contiguous from its third dimension on."""
    expected = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _head_strides(name: str, x: torch.Tensor) -> tuple[int, int]:
    """Batch and head strides of x, whose heads must be whole."""
    if not _has_whole_heads(x):
        raise ValueError(
            f"expected {name} contiguous from its third dimension on, got strides {x.stride()}; call contiguous()"
        )
    return x.stride(0), x.stride(1)


class Config(NamedTuple):
    """How the Gluon kernel is launched.

    Tiles of 8 query heads to a program, packed tiles to a softmax step, register cap, programs to a multiprocessor,
    exact tokens to a chunk at least.
    """

    head_tiles: int
    tiles: int
    registers: int
    resident: int
    chunk: int


def configure(head_dim: int, head_tiles: int, tile_bytes: int, *, row_tiles: int, work: int, shared: int) -> Config:
    """The launch of the Gluon kernel for a shape.

    The four schedulers of a multiprocessor have as many programs each: others were 15 to 30 % slower.  Two tiles to a
    step keep more bytes under way and take fewer instructions; one shares short rows out more evenly.  What is short
    was measured on an H100.

    Args:
        head_tiles: tiles of 8 query heads to a KV head.
        tile_bytes: codes and scales of a tile, keys and values.
        row_tiles: packed tiles that a row has room for.
        work: tiles to a multiprocessor, of all rows, KV heads and pairs of head tiles.
        shared: KiB of shared memory in a multiprocessor.
    """
    together = min(head_tiles, 2 if head_dim <= 128 else 1)
    registers, resident = (255, 8) if together == 2 or head_dim > 128 else (168, 12)
    # Exact tokens pass through shared memory in turns; more turns to a program make fewer partial results.
    chunk = 96 if head_dim <= 64 else 64 if head_dim <= 128 else 32

    def fitting(tiles: int) -> int:
        exact = 4 * head_dim * (32 if head_dim <= 128 else 16)  # keys and values, before the ring takes their place
        fit = min(resident, 1024 * shared // (max(2 * tiles * tile_bytes, exact) + 1024))  # CUDA takes 1 KiB of each
        return max(1, fit // 4 * 4 or fit)

    if head_dim > 128:
        two = False
    elif together == 2:  # with fewer bits than 5 of both at D = 128 two tiles spill
        two = min(row_tiles, work // resident) >= 24 and (head_dim < 128 or tile_bytes >= 2500)
    else:
        two = tile_bytes < 2400 or row_tiles > (128 if tile_bytes < 4096 else 256)
    tiles = 2 if two and fitting(2) == fitting(1) else 1
    return Config(together, tiles, registers, fitting(tiles), chunk)


class MergeConfig(NamedTuple):
    """How `combine_gluon_kernel` is launched.

    Output columns and queries to a program, warps that share the dimensions of a query, partial results at a time.
    """

    columns: int
    queries: int
    dim_warps: int
    parts: int


@lru_cache
def merge_config(head_dim: int, rows: int, splits: int, multiprocessors: int) -> MergeConfig:
    """The launch of the merge for `rows` = B * Hq queries: one for each SM, of eight warps, sixteen of many rows."""
    padded = triton.next_power_of_2(head_dim)
    if padded == 128 and rows // 8 >= 0.95 * multiprocessors:  # the map is read fewer times
        return MergeConfig(128, 16 if rows // 16 >= 0.95 * multiprocessors else 8, 1, 8)
    columns, queries = min(64, padded) if padded <= 256 else 32, 8
    while queries > 1 and rows // queries * triton.cdiv(head_dim, columns) < 0.95 * multiprocessors:
        queries //= 2
    if padded == 128 and queries >= 4 and 8 < splits <= 32:  # all at once, by half the programs
        return MergeConfig(columns, 8, 1, 32)
    dim_warps = min(8 // queries, padded // 16)
    parts = 8 if splits <= 8 else 2048 * dim_warps // padded  # at most 64 numbers of them to a thread
    programs = triton.cdiv(rows, queries) * triton.cdiv(head_dim, columns)
    if padded <= 256 and splits > parts > 16 and programs > multiprocessors:
        parts //= 2  # in 128 registers, so that two programs share a multiprocessor and all run at once
    return MergeConfig(columns, queries, dim_warps, parts)


def map_columns(head_dim: int, dtype: torch.dtype, blocks: int, multiprocessors: int) -> int:
    """Columns of the query map to a program, which holds them in registers, for `blocks` blocks of 16 queries.

    Fewer columns, more programs: a map is ready earlier, until the programs outnumber what runs at once.
    """
    if head_dim in (128, 256) and dtype == torch.bfloat16 and blocks > multiprocessors // 2:
        return 16384 // head_dim
    return 32 if head_dim <= (256 if dtype == torch.bfloat16 else 128) else 16


def _readable_by_gluon(*exact: torch.Tensor) -> bool:
    """Whether tensors of exact tokens have one 16-bit dtype and rows on 16-byte boundaries."""
    return all(
        x.dtype == exact[0].dtype and x.dtype.itemsize == 2 and x.data_ptr() % 16 == 0
        and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0
        for x in exact
    )  # fmt: skip


def plan(
    programs: int, tiles: int, exact_tokens: int, slots: int, config: Config, at_once: Callable[[int], int]
) -> tuple[int, int]:
    """How the work of a (row, KV head, head tile) is shared among `slots / programs` programs that run at once.

    Args:
        at_once: how many of so many splits the merge takes at a time.  A last turn for a few of them takes it as long
            as a split takes for three tiles: they are left out if the others get no more than that.

    Returns:
        Splits of the sequence, and exact tokens to a chunk; the first splits take a chunk each, and fewer tiles.
    """
    room = max(1, slots // programs)
    least = triton.cdiv(tiles * TILE + 16 * exact_tokens, MAX_SPLIT_TOKENS)  # in bytes an exact token is 16 of 1 bit
    useful = triton.cdiv(tiles, max(MIN_TILES, MIN_STEPS * config.tiles)) + triton.cdiv(exact_tokens, TILE)
    splits = max(1, min(room, useful, MAX_SPLITS))
    few = splits % at_once(splits)
    if few <= splits // 5 and tiles * few <= 3 * splits * (splits - few):
        splits -= few
    splits = max(least, splits)
    return splits, max(config.chunk, TILE * triton.cdiv(exact_tokens, TILE * splits))


def decode_attention(
    q: torch.Tensor, k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor,
    k_sinks: torch.Tensor, v_sinks: torch.Tensor, k_recent: torch.Tensor, v_recent: torch.Tensor,
    length: torch.Tensor, start: torch.Tensor, query_map: torch.Tensor, key_shift: torch.Tensor,
    output_map: torch.Tensor, value_shift: torch.Tensor, window: int, scale: float, softcap: float,
    sink_logits: torch.Tensor | None, k_bits: int, v_bits: int, impl: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """Attention of one query token per row over a packed cache; the meaning of every argument is reference.attention's.

    Args:
        q: [B, Hq, 1, D] in bfloat16, float16 or float32.
        v_scales: up to 4094 for "gluon", which multiplies probabilities by them in float16; beyond, the result is
            not finite.
        v_sinks, v_recent: entries up to 65504 at head_dim above 64 if they are 16-bit: "gluon" keeps partial outputs in
            float16.  Of values with a root mean square of 1e-4 that costs up to .4 %, of 1e-5 up to 3 %.
        k_bits, v_bits: code widths of k_codes and v_codes.
        impl: "gluon" (NVIDIA, compute capability 8.0 and newer), "triton" (portable), "auto": the first that runs.

    Returns:
        [B, Hq, 1, D] in q's dtype.  Of long rows "gluon" adds up in an order, and so rounds in a way, that differs
        from run to run, unless `torch.use_deterministic_algorithms` is on.

    Raises:
        ValueError: more than one query token, a layout the kernels do not read, or an `impl` that does not run here.
            That shapes agree is `tq_ao.ops`' to see to.
    """
    if q.shape[2] != 1:
        raise ValueError(f"expected one query token per row, got {q.shape[2]}; use extend_attention")
    if not q.shape[0]:
        return torch.empty_like(q)
    if impl not in ("auto", "gluon", "triton"):
        raise ValueError(f"expected impl 'auto', 'gluon' or 'triton', got {impl!r}")
    obstacle = _gluon_obstacle(q.device)
    if impl == "gluon" and obstacle:
        raise ValueError(f"impl='gluon' does not run on {q.device}: {obstacle}; use impl='triton'")
    return _launch(
        q, None, k_codes, k_scales, v_codes, v_scales, k_sinks, v_sinks, k_recent, v_recent, length, start,
        query_map, key_shift, output_map, value_shift, window, scale, softcap, sink_logits, k_bits, v_bits,
        use_gluon=impl != "triton" and obstacle is None,
    )  # fmt: skip


def few_obstacle(q: torch.Tensor, packed: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> str | None:
    """Why `few_queries` does not take q [B, Hq, q_len, D] with such codes and scales, sinks and ring, or None."""
    heads = packed[0].shape[1]
    rows = q.shape[1] // heads * q.shape[2]
    most = 48 if q.shape[3] <= 128 else 32  # with more, extend_attention's own kernels are faster
    if rows > most:
        return f"it takes up to {most} queries to a KV head, of all its query heads, these are {rows}"
    if q.shape[0] * padded_group(rows) > 4 * MAX_PAIRS:
        return f"a batch of {q.shape[0]} is more than its grids hold"
    if packed[0].shape[2] > MAX_TILES:
        return f"it takes rows with room for {MAX_TILES * TILE} tokens, these have {packed[0].shape[2] * TILE}"
    if not _readable_by_gluon(*exact):
        return "sinks and recent tokens are not 16-bit numbers of one type on 16-byte boundaries"
    if not all(map(_has_whole_heads, packed + exact)):
        return "a tensor of the cache is not contiguous from its third dimension on"
    return _gluon_obstacle(q.device)


def padded_group(rows: int) -> int:
    """Rows to a KV head, up to a number that kernels are compiled for: 8 or a multiple of 16."""
    return 8 if rows <= 8 else 16 * triton.cdiv(rows, 16)


def few_queries(
    q: torch.Tensor, k_new: torch.Tensor, v_new: torch.Tensor, *cache, k_bits: int, v_bits: int
) -> torch.Tensor:
    """`reference.attention` of q [B, Hq, q_len, D] and k_new, v_new [B, H, q_len, D]; `few_obstacle` must be None.

    What `decode_attention` says of large values and of rounding holds here, and of entries of v_new as of v_recent.
    """
    return _launch(q, (k_new, v_new), *cache, k_bits=k_bits, v_bits=v_bits, use_gluon=True)


def _launch(
    q: torch.Tensor, new: tuple[torch.Tensor, torch.Tensor] | None, k_codes: torch.Tensor, k_scales: torch.Tensor,
    v_codes: torch.Tensor, v_scales: torch.Tensor, k_sinks: torch.Tensor, v_sinks: torch.Tensor,
    k_recent: torch.Tensor, v_recent: torch.Tensor, length: torch.Tensor, start: torch.Tensor,
    query_map: torch.Tensor, key_shift: torch.Tensor, output_map: torch.Tensor, value_shift: torch.Tensor,
    window: int, scale: float, softcap: float, sink_logits: torch.Tensor | None, k_bits: int, v_bits: int,
    use_gluon: bool,
) -> torch.Tensor:  # fmt: skip
    """The three launches; new: keys and values of the tokens of a few queries."""
    batch, q_heads, q_len, dim = q.shape
    heads, tiles = k_codes.shape[1:3]
    group, device = q_heads // heads, q.device
    per_head = group if new is None else padded_group(group * q_len)
    if batch * heads > MAX_PAIRS:
        raise ValueError(
            f"expected at most {MAX_PAIRS} pairs of row and KV head, got {batch} x {heads}; split the batch"
        )
    if batch * per_head > 4 * MAX_PAIRS:
        raise ValueError(
            f"expected at most {4 * MAX_PAIRS} queries to a KV head, got {batch} rows of {per_head}; split the batch"
        )
    padded = triton.next_power_of_2(dim)
    head_tiles = triton.cdiv(per_head, 8)
    if q.stride(3) != 1:
        q = q.contiguous()
    key_strides = (*_head_strides("k_codes", k_codes), *_head_strides("k_scales", k_scales))
    value_strides = (*_head_strides("v_codes", v_codes), *_head_strides("v_scales", v_scales))
    sink_strides, recent_strides = _head_strides("k_sinks", k_sinks), _head_strides("k_recent", k_recent)
    pairs = ((k_sinks, v_sinks), (k_recent, v_recent))
    if any(k.stride() != v.stride() and k.numel() for k, v in pairs):
        raise ValueError("expected the same strides for the keys and the values of sinks and recent tokens")
    start, sink_logits = start.contiguous(), contiguous(sink_logits)
    maps = [x.contiguous() for x in (query_map, key_shift, output_map, value_shift)]
    query_map, key_shift, output_map, value_shift = maps

    factor = scale * LOG2E
    cap = softcap * LOG2E
    if softcap:
        factor *= 2.0 / softcap
    rows = batch * heads * per_head
    sinks, capacity = k_sinks.shape[2], k_recent.shape[2]
    sms = multiprocessors(device)
    tile_bytes = TILE * dim * (k_bits + v_bits) // 8 + 4 * TILE
    work = batch * heads * triton.cdiv(head_tiles, 2) * tiles // sms
    config = configure(dim, head_tiles, tile_bytes, row_tiles=tiles, work=work, shared=shared_kib(device))
    programs = batch * heads * triton.cdiv(head_tiles, config.head_tiles)
    # The Gluon kernel attends to a 16-bit window itself, at the same time as to the packed tiles.
    separate = not use_gluon or not _readable_by_gluon(k_sinks, v_sinks, k_recent, v_recent)
    # Exact tokens a row can have: the sinks, the window, and what waits for its tile to fill.
    exact_tokens = max(1, sinks + (min(window + TILE, capacity) if capacity else 0))
    slots = sms * config.resident
    half_precision = q.dtype.itemsize == 2 and k_recent.dtype.itemsize == 2
    splits, chunk = plan(
        programs, tiles, 0 if separate else exact_tokens, slots, config,
        lambda splits: merge_config(dim, rows, splits, sms).parts if use_gluon else PORTABLE_PARTS,
    )  # fmt: skip
    if separate:
        chunk = 64 if half_precision or padded <= 128 else 32  # what shared memory holds
    chunks = triton.cdiv(exact_tokens, chunk)
    here = 0 if separate else chunks
    parts = chunks + (new is not None)  # exact ones
    # What an exact chunk is worth in quarters of a step over packed tiles.
    exact_quarters = round(4 * EXACT_COST * 4 * chunk * dim / (config.tiles * tile_bytes))
    if use_gluon and splits * (4 * triton.cdiv(tiles, config.tiles) + exact_quarters * here) >= 2**31:
        most = 2**29 // splits * config.tiles * TILE  # what decode_gluon._first_step can count in 32 bits
        raise ValueError(
            f"expected room for about {most} tokens to a row at most, got {tiles * TILE}; use impl='triton' beyond that"
        )

    f32 = torch.float32
    rotated = torch.empty(rows * dim, dtype=f32, device=device)
    bias = torch.empty(rows, dtype=f32, device=device)
    counters = programs if use_gluon else 0
    claims = torch.empty(counters, dtype=torch.int32, device=device)
    # The Gluon kernel can leave partial outputs in 16 bits; short ones are merged faster in 32.
    partial = f32 if separate or dim <= 64 else torch.float16
    exact_o = torch.empty(rows * parts * dim, dtype=partial, device=device)
    exact_ml = torch.empty(rows * parts, 2, dtype=f32, device=device)
    split_o = torch.empty(rows * splits * dim, dtype=partial, device=device)
    split_ml = torch.empty(rows * splits, 2, dtype=f32, device=device)
    out = torch.empty(batch, q_heads, q_len, dim, dtype=q.dtype, device=device)

    # Programmatic dependent launch: each launch starts while the one before it ends.
    pdl = use_gluon and launches_early(device)
    unit = 127.0 if k_bits == 8 else 1.0
    precision = "ieee" if torch.version.hip else "tf32" if half_precision else "tf32x3"
    blocks = heads * triton.cdiv(batch * per_head, 16)
    columns = map_columns(dim, q.dtype, blocks, sms)
    map_programs, exact_programs = blocks * (dim // columns), batch * heads * triton.cdiv(per_head, 16)
    shape = {"G": per_head, "D": dim, "DP": padded}
    how = {
        **shape, "COLUMNS": columns, "OPERAND": operand_type(), "SOFTCAP": softcap > 0, "PRECISION": precision,
        "PDL": pdl, **({"launch_pdl": True} if pdl else {}),
    }  # fmt: skip
    if new is None:
        prepare_kernel[(map_programs + (exact_programs * chunks if separate else 0),)](
            q, k_sinks, v_sinks, k_recent, v_recent, length, start, query_map, key_shift, rotated, bias, claims,
            exact_o, exact_ml, q.stride(0), q.stride(1), *sink_strides, *recent_strides, batch, heads, counters, sinks,
            window, capacity, chunks, factor, 1.0 / unit, cap, EXACT=separate, CHUNK=chunk if separate else TILE,
            num_warps=8 if separate else 4, **how,
        )  # fmt: skip
    else:
        k_new, v_new = (x if x.stride(3) == 1 else x.contiguous() for x in new)
        prepare_few_kernel[(map_programs + exact_programs,)](
            q, k_new, v_new, length, start, query_map, key_shift, rotated, bias, claims, exact_o, exact_ml,
            *q.stride()[:3], *k_new.stride()[:3], *v_new.stride()[:3], batch, heads, group, q_len, counters, chunks,
            factor, 1.0 / unit, cap, NEW=max(16, triton.next_power_of_2(q_len)), num_warps=4, **how,
        )  # fmt: skip
    if use_gluon:
        from .decode_gluon import gluon_splits_kernel
        from .fragments import constraints, key_asm, value_asm

        to_claim = 0 if torch.are_deterministic_algorithms_enabled() else CLAIMED_TILES // config.tiles
        # Tensors that are not read must not make the kernel reserve shared memory for their type.
        exact = (k_scales,) * 4 if separate else (k_sinks, v_sinks, k_recent, v_recent)
        gluon_splits_kernel[(splits, batch * heads, triton.cdiv(head_tiles, config.head_tiles))](
            rotated, bias, claims, k_codes.view(torch.int8), k_scales, v_codes.view(torch.int8), v_scales,
            q, *exact, length, start, split_o, split_ml, exact_o, exact_ml,
            *key_strides, *value_strides, *q.stride()[:3], *sink_strides, *recent_strides,
            heads, group, q_len, sinks, window, capacity, splits, here, chunk, exact_quarters, to_claim, factor, cap,
            G=per_head, D=dim, K_BITS=k_bits, V_BITS=v_bits, HT=config.head_tiles,
            TILES=config.tiles, SOFTCAP=softcap > 0, FEW=new is not None, PDL=pdl,
            K_ASM=key_asm(k_bits), K_CONSTRAINTS=constraints(8, k_bits),
            V_ASM=value_asm(v_bits), V_CONSTRAINTS=constraints(16, v_bits),
            num_warps=1, maxnreg=config.registers, launch_pdl=pdl,
        )  # fmt: skip
    else:
        k_strides = (key_strides[0] // 4, key_strides[1] // 4, *key_strides[2:])
        v_strides = (value_strides[0] // 4, value_strides[1] // 4, *value_strides[2:])
        portable_splits_kernel[(splits, batch * heads, triton.cdiv(per_head, 16))](
            rotated, bias, k_codes.view(torch.int32), k_scales, v_codes.view(torch.int32), v_scales,
            length, start, split_o, split_ml, *k_strides, *v_strides, heads, sinks, window, capacity, splits,
            cap, 1 / 127 if v_bits == 8 else 1.0, **shape, K_BITS=k_bits, V_BITS=v_bits, SOFTCAP=softcap > 0,
            num_warps=8, num_stages=1,
        )  # fmt: skip
    sink = sink_logits if sink_logits is not None else bias
    arguments = (output_map, value_shift, sink, out, batch, heads, splits, parts)
    shape["HAS_SINK"] = sink_logits is not None
    if use_gluon:
        from .combine_gluon import combine_gluon_kernel

        merge = merge_config(dim, rows, splits, sms)
        combine_gluon_kernel[(heads, triton.cdiv(batch * per_head, merge.queries), triton.cdiv(dim, merge.columns))](
            split_o, split_ml.view(torch.int64), exact_o, exact_ml.view(torch.int64), *arguments, group, q_len, **shape,
            COLUMNS=merge.columns, R=merge.queries, WD=merge.dim_warps, PARTS=merge.parts, MORE=splits > merge.parts,
            E_PARTS=min(8, triton.next_power_of_2(parts)), E_MORE=parts > 8, FEW=new is not None, PDL=pdl,
            num_warps=merge.queries * merge.dim_warps, launch_pdl=pdl,
        )  # fmt: skip
    else:
        columns, queries, most = min(32, padded), 4, PORTABLE_PARTS
        combine_kernel[(heads, triton.cdiv(batch * per_head, queries), triton.cdiv(dim, columns))](
            split_o, split_ml, exact_o, exact_ml, *arguments, **shape, COLUMNS=columns, R=queries, PARTS=most,
            MORE=max(splits, parts) > most, num_warps=4,
        )  # fmt: skip
    return out
