"""torch.library ops `torch.ops.tq_ao.*`: schemas, fakes, and which implementation runs where.

CPU tensors run `reference`; CUDA tensors run `tq_ao.kernels.*`, imported when the op first runs.  `impl`
names a path: "auto" is the fastest that supports the device and shape, any other name is that path or an
error, never a fallback.  Argument meanings are those of `reference.append_` and `reference.attention`; operands are
what `prepare` makes of a map, its shift and feedback, for kernels, which otherwise make them at each call.  The
reference does not read them.

Shapes are checked here, for every implementation and for `torch.compile`.  That `length` tokens fit the buffers is the
caller's to see to: it is on the device.
"""

from collections.abc import Callable
from typing import Any

import torch

from tq_ao import reference
from tq_ao.codebook import ROLES, codebook
from tq_ao.packing import TILE, tile_bytes
from tq_ao.reference import bits_of

IMPLS = ("auto", "gluon", "triton", "reference")

_lib = torch.library.Library("tq_ao", "DEF")
_CACHE = (
    "Tensor k_codes, Tensor k_scales, Tensor v_codes, Tensor v_scales, "
    "Tensor k_sinks, Tensor v_sinks, Tensor k_recent, Tensor v_recent"
)
_CACHE_MUT = ", ".join(f"Tensor({chr(97 + i)}!) {part.split()[1]}" for i, part in enumerate(_CACHE.split(", ")))
_MAPS = "Tensor query_map, Tensor key_shift, Tensor output_map, Tensor value_shift"
_SCORE = 'int window, float scale, *, float softcap=0.0, Tensor? sink_logits=None, str impl="auto"'
_lib.define(
    "encode(Tensor x, Tensor map, Tensor shift, int bits, str role, *, Tensor? feedback=None, Tensor? operands=None, "
    'str impl="auto") -> (Tensor, Tensor)'
)
_lib.define("prepare(Tensor map, Tensor shift, str role, *, Tensor? feedback=None) -> Tensor")
_lib.define("decode(Tensor codes, Tensor scales, int head_dim, str role) -> Tensor")
_lib.define(
    f"append_({_CACHE_MUT}, Tensor k, Tensor v, Tensor length, Tensor start, Tensor key_map, Tensor key_shift, "
    "Tensor value_map, Tensor value_shift, int window, *, Tensor? key_feedback=None, Tensor? value_feedback=None, "
    'Tensor? key_operands=None, Tensor? value_operands=None, str impl="auto") -> ()'
)
_lib.define(f"decode_attention(Tensor q, {_CACHE}, Tensor length, Tensor start, {_MAPS}, {_SCORE}) -> Tensor")
_lib.define(
    f"extend_attention(Tensor q, Tensor k_new, Tensor v_new, {_CACHE}, Tensor length, Tensor start, {_MAPS}, {_SCORE}) "
    "-> Tensor"
)

encode = torch.ops.tq_ao.encode
prepare = torch.ops.tq_ao.prepare
decode = torch.ops.tq_ao.decode
append_ = torch.ops.tq_ao.append_
decode_attention = torch.ops.tq_ao.decode_attention
extend_attention = torch.ops.tq_ao.extend_attention


def _named(impl: str, device: torch.device, *supported: str) -> str:
    if impl not in IMPLS:
        raise ValueError(f"expected impl in {IMPLS}, got {impl!r}")
    if impl != "auto" and impl not in supported:
        raise ValueError(
            f"impl={impl!r} does not run on {device}; use one of {('auto', *supported)} or move the tensors"
        )
    return impl


def _expect(what: str, want: tuple[int, ...], got: tuple[int, ...]) -> None:
    if got != want:
        raise ValueError(f"expected {what} {list(want)}, got {list(got)}")


def _check_maps(side: str, map: torch.Tensor, shift: torch.Tensor, heads: int, dim: int) -> None:
    _expect(f"{side} map", (heads, dim, dim), map.shape)
    _expect(f"{side} shift", (heads, dim), shift.shape)


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise ValueError(f"expected role in {ROLES}, got {role!r}")


def _check_feedback(feedback: torch.Tensor | None, heads: int, dim: int) -> None:
    if feedback is not None:
        _expect("feedback", (heads, dim // 2, dim // 2), feedback.shape)


def _check_encode(x, map, shift, bits, role, feedback) -> None:
    _check_role(role)
    tile_bytes(bits, x.shape[-1])
    _check_maps(role, map, shift, x.shape[1], x.shape[-1])
    _check_feedback(feedback, x.shape[1], x.shape[-1])


def _check_append(
    k_codes, k_scales, v_codes, v_scales, k_sinks, v_sinks, k_recent, v_recent, k, v, length, start, key_map, key_shift,
    value_map, value_shift, window, key_feedback, value_feedback,
) -> tuple[int, int]:  # fmt: skip
    batch, heads, dim = k_recent.shape[0], k_recent.shape[1], k_recent.shape[3]
    _expect("new keys", (batch, heads, k.shape[2], dim), k.shape)
    _expect("new values", k.shape, v.shape)
    _expect("length", (), length.shape)
    _expect("start", (batch,), start.shape)
    _check_maps("key", key_map, key_shift, heads, dim)
    _check_maps("value", value_map, value_shift, heads, dim)
    _check_feedback(key_feedback, heads, dim)
    _check_feedback(value_feedback, heads, dim)
    if (slots := k_recent.shape[2]) < window + 2 * TILE:
        raise ValueError(f"expected a ring of at least window + 64 = {window + 64} slots, got {slots}; enlarge it")
    return _check_cache(batch, heads, dim, k_codes, k_scales, v_codes, v_scales, k_sinks, v_sinks, k_recent, v_recent)


def _check_cache(
    batch, heads, dim, k_codes, k_scales, v_codes, v_scales, k_sinks, v_sinks, k_recent, v_recent
) -> tuple[int, int]:
    """Returns the code widths of keys and values."""
    tiles = (batch, heads, k_codes.shape[2])
    _expect("tiles of value codes", tiles, v_codes.shape[:3])
    _expect("key scales", (*tiles, TILE), k_scales.shape)
    _expect("value scales", (*tiles, TILE), v_scales.shape)
    _expect("sinks", (batch, heads, k_sinks.shape[2], dim), k_sinks.shape)
    _expect("sinks of values", k_sinks.shape, v_sinks.shape)
    _expect("a ring", (batch, heads, k_recent.shape[2], dim), k_recent.shape)
    _expect("a ring of values", k_recent.shape, v_recent.shape)
    return bits_of(k_codes, dim), bits_of(v_codes, dim)


def _check_attention(q, new, cache, sink_logits) -> tuple[int, int]:
    """new: k_new and v_new, or () for one query; cache: as the ops take it, up to the window and the scale.

    Returns the code widths of keys and values.
    """
    batch, heads, dim = cache[0].shape[0], cache[0].shape[1], cache[11].shape[1]
    if q.dim() != 4 or not heads or q.shape[0] != batch or q.shape[1] % heads or q.shape[3] != dim:
        raise ValueError(
            f"expected queries of {batch} rows, a multiple of {heads} heads and head_dim {dim}, as in the cache, "
            f"got {list(q.shape)}"
        )
    if not new and q.shape[2] != 1:
        raise ValueError(f"expected one query token per row, got {q.shape[2]}; use extend_attention")
    for name, x in zip(("new keys", "new values"), new, strict=False):
        _expect(name, (batch, heads, q.shape[2], dim), x.shape)
    bits = _check_cache(batch, heads, dim, *cache[:8])
    _expect("length", (), cache[8].shape)
    _expect("start", (batch,), cache[9].shape)
    _check_maps("query", cache[10], cache[11], heads, dim)
    _check_maps("output", cache[12], cache[13], heads, dim)
    if sink_logits is not None:
        _expect("sink logits", (q.shape[1],), sink_logits.shape)
    return bits


def _by_itself(run: Callable, device: torch.device, *args: Any) -> Any:
    """Run plain torch as kernels run: no gradients, and not in the precision of an autocast around it."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return run(*args)


def _encode_cpu(x, map, shift, bits, role, *, feedback=None, operands=None, impl="auto"):
    _named(impl, x.device, "reference")
    _check_encode(x, map, shift, bits, role, feedback)
    return _by_itself(reference.encode, x.device, x, map, shift, bits, role, feedback)


def _encode_cuda(x, map, shift, bits, role, *, feedback=None, operands=None, impl="auto"):
    if _named(impl, x.device, "gluon", "triton", "reference") == "reference":
        return _encode_cpu(x, map, shift, bits, role, feedback=feedback)
    from tq_ao.kernels import encode as kernel

    _check_encode(x, map, shift, bits, role, feedback)
    with torch.cuda.device(x.device):  # Triton launches on the current one
        return kernel.encode(x, map, shift, codebook(bits), role, feedback, operands, impl)


def _encode_fake(x, map, shift, bits, role, *, feedback=None, operands=None, impl="auto"):
    _check_encode(x, map, shift, bits, role, feedback)
    tiles = -(-x.shape[2] // TILE)
    codes = x.new_empty(*x.shape[:2], tiles, tile_bytes(bits, x.shape[3]), dtype=torch.uint8)
    return codes, x.new_empty(*x.shape[:2], tiles, TILE, dtype=torch.float16)


def _check_prepare(map, shift, role, feedback) -> None:
    _check_role(role)
    if shift.dim() != 2:
        raise ValueError(f"expected {role} shift [heads, head_dim], got {list(shift.shape)}")
    _check_maps(role, map, shift, *shift.shape)
    _check_feedback(feedback, *shift.shape)


def _prepare_cpu(map, shift, role, *, feedback=None):
    _check_prepare(map, shift, role, feedback)
    return _by_itself(reference.prepare, map.device, map, shift, role, feedback)


def _prepare_cuda(map, shift, role, *, feedback=None):
    from tq_ao.kernels import operands as kernel

    _check_prepare(map, shift, role, feedback)
    with torch.cuda.device(map.device):
        return kernel.prepare(map, shift, role, feedback)


def _prepare_fake(map, shift, role, *, feedback=None):
    _check_prepare(map, shift, role, feedback)
    size = reference.operands_size(shift.shape[1], feedback is not None)
    return map.new_empty(shift.shape[0], size, dtype=torch.int16)


def _check_decode(codes, scales, head_dim, role) -> None:
    _check_role(role)
    bits_of(codes, head_dim)
    _expect("scales", (*codes.shape[:-1], TILE), scales.shape)


def _dense(codes, scales, head_dim, role):
    _check_decode(codes, scales, head_dim, role)
    return _by_itself(reference.decode, codes.device, codes, scales, head_dim, role).contiguous()


def _dense_fake(codes, scales, head_dim, role):
    _check_decode(codes, scales, head_dim, role)
    return scales.new_empty(*scales.shape[:-2], scales.shape[-2] * TILE, head_dim, dtype=torch.float32)


def _append_cpu(*args, key_feedback=None, value_feedback=None, key_operands=None, value_operands=None, impl="auto"):
    _named(impl, args[0].device, "reference")
    _check_append(*args, key_feedback, value_feedback)
    _by_itself(reference.append_, args[0].device, *args, key_feedback, value_feedback)


def _append_cuda(*args, key_feedback=None, value_feedback=None, key_operands=None, value_operands=None, impl="auto"):
    if _named(impl, args[0].device, "triton", "reference") == "reference":
        _append_cpu(*args, key_feedback=key_feedback, value_feedback=value_feedback)
        return
    from tq_ao.kernels import append as kernel

    books = map(codebook, _check_append(*args, key_feedback, value_feedback))
    with torch.cuda.device(args[0].device):
        kernel.append_(*args, *books, key_feedback, value_feedback, key_operands, value_operands, impl)


def _append_fake(*args, key_feedback=None, value_feedback=None, key_operands=None, value_operands=None, impl="auto"):
    _check_append(*args, key_feedback, value_feedback)


def _decode_cpu(q, *args, softcap=0.0, sink_logits=None, impl="auto"):
    _named(impl, q.device, "reference")
    _check_attention(q, (), args, sink_logits)
    return _by_itself(reference.attention, q.device, q, *args, softcap, sink_logits)


def _decode_cuda(q, *args, softcap=0.0, sink_logits=None, impl="auto"):
    if _named(impl, q.device, "gluon", "triton", "reference") == "reference":
        return _decode_cpu(q, *args, softcap=softcap, sink_logits=sink_logits)
    from tq_ao.kernels import decode_attention as kernel

    bits = _check_attention(q, (), args, sink_logits)
    with torch.cuda.device(q.device):
        return kernel.decode_attention(q, *args, softcap, sink_logits, *bits, impl)


def _decode_fake(q, *args, softcap=0.0, sink_logits=None, impl="auto"):
    _check_attention(q, (), args, sink_logits)
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _extend_cpu(q, k_new, v_new, *args, softcap=0.0, sink_logits=None, impl="auto"):
    _named(impl, q.device, "reference")
    _check_attention(q, (k_new, v_new), args, sink_logits)
    return _by_itself(reference.attention, q.device, q, *args, softcap, sink_logits, k_new, v_new)


def _extend_cuda(q, k_new, v_new, *args, softcap=0.0, sink_logits=None, impl="auto"):
    if _named(impl, q.device, "gluon", "triton", "reference") == "reference":
        return _extend_cpu(q, k_new, v_new, *args, softcap=softcap, sink_logits=sink_logits)
    from tq_ao.kernels import extend_attention as kernel

    bits = _check_attention(q, (k_new, v_new), args, sink_logits)
    with torch.cuda.device(q.device):
        return kernel.extend_attention(q, k_new, v_new, *args, softcap, sink_logits, *bits, impl)


def _extend_fake(q, k_new, v_new, *args, softcap=0.0, sink_logits=None, impl="auto"):
    _check_attention(q, (k_new, v_new), args, sink_logits)
    return torch.empty_like(q, memory_format=torch.contiguous_format)


# Unpacking for inspection, on any device: plain torch, but opaque to torch.compile like the ops around it.
_lib.impl("decode", _dense, "CompositeExplicitAutograd")
torch.library.register_fake("tq_ao::decode", _dense_fake, lib=_lib)

for _name, _cpu, _cuda, _fake in (
    ("encode", _encode_cpu, _encode_cuda, _encode_fake),
    ("prepare", _prepare_cpu, _prepare_cuda, _prepare_fake),
    ("append_", _append_cpu, _append_cuda, _append_fake),
    ("decode_attention", _decode_cpu, _decode_cuda, _decode_fake),
    ("extend_attention", _extend_cpu, _extend_cuda, _extend_fake),
):
    _lib.impl(_name, _cpu, "CPU")
    _lib.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"tq_ao::{_name}", _fake, lib=_lib)
