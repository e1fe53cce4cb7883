"""torch.library ops `torch.ops.tq_ao.*`: schemas, fakes, and which implementation runs where.

CPU tensors run `reference`; CUDA tensors run `tq_ao.kernels.*`, imported when the op first runs.  `impl`
names a path: "auto" is the fastest that supports the device and shape, any other name is that path or an
error, never a fallback.  Argument meanings are those of `reference.append_` and `reference.attention`; operands are
what `prepare` makes of a map, its shift and feedback, for kernels, which otherwise make them at each call.  The
reference does not read them.
"""

import torch

from tq_ao import reference
from tq_ao.codebook import Codebook, codebook
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


def _books(k_codes: torch.Tensor, v_codes: torch.Tensor, head_dim: int) -> tuple[Codebook, Codebook]:
    return codebook(bits_of(k_codes, head_dim)), codebook(bits_of(v_codes, head_dim))


def _encode_cpu(x, map, shift, bits, role, *, feedback=None, operands=None, impl="auto"):
    _named(impl, x.device, "reference")
    return reference.encode(x, map, shift, bits, role, feedback)


def _encode_cuda(x, map, shift, bits, role, *, feedback=None, operands=None, impl="auto"):
    if _named(impl, x.device, "triton", "reference") == "reference":
        return reference.encode(x, map, shift, bits, role, feedback)
    from tq_ao.kernels import encode as kernel

    with torch.cuda.device(x.device):  # Triton launches on the current one
        return kernel.encode(x, map, shift, codebook(bits), role, feedback, operands)


def _encode_fake(x, map, shift, bits, role, *, feedback=None, operands=None, impl="auto"):
    tiles = -(-x.shape[2] // TILE)
    codes = x.new_empty(*x.shape[:2], tiles, tile_bytes(bits, x.shape[3]), dtype=torch.uint8)
    return codes, x.new_empty(*x.shape[:2], tiles, TILE, dtype=torch.float16)


def _prepare_cpu(map, shift, role, *, feedback=None):
    return reference.prepare(map, shift, role, feedback)


def _prepare_cuda(map, shift, role, *, feedback=None):
    from tq_ao.kernels import operands as kernel

    with torch.cuda.device(map.device):
        return kernel.prepare(map, shift, role, feedback)


def _prepare_fake(map, shift, role, *, feedback=None):
    size = reference.operands_size(shift.shape[1], feedback is not None)
    return map.new_empty(shift.shape[0], size, dtype=torch.int16)


def _dense(codes, scales, head_dim, role):
    return reference.decode(codes, scales, head_dim, role).contiguous()


def _dense_fake(codes, scales, head_dim, role):
    return scales.new_empty(*scales.shape[:-2], scales.shape[-2] * TILE, head_dim, dtype=torch.float32)


def _append_cpu(*args, key_feedback=None, value_feedback=None, key_operands=None, value_operands=None, impl="auto"):
    _named(impl, args[0].device, "reference")
    reference.append_(*args, key_feedback, value_feedback)


def _append_cuda(*args, key_feedback=None, value_feedback=None, key_operands=None, value_operands=None, impl="auto"):
    if _named(impl, args[0].device, "triton", "reference") == "reference":
        reference.append_(*args, key_feedback, value_feedback)
        return
    from tq_ao.kernels import append as kernel

    with torch.cuda.device(args[0].device):
        kernel.append_(
            *args, *_books(args[0], args[2], args[8].shape[-1]), key_feedback, value_feedback, key_operands,
            value_operands,
        )  # fmt: skip


def _append_fake(*args, key_feedback=None, value_feedback=None, key_operands=None, value_operands=None, impl="auto"):
    return None


def _decode_cpu(q, *args, softcap=0.0, sink_logits=None, impl="auto"):
    _named(impl, q.device, "reference")
    return reference.attention(q, *args, softcap, sink_logits)


def _decode_cuda(q, *args, softcap=0.0, sink_logits=None, impl="auto"):
    if _named(impl, q.device, "gluon", "triton", "reference") == "reference":
        return reference.attention(q, *args, softcap, sink_logits)
    from tq_ao.kernels import decode_attention as kernel

    bits = (bits_of(codes, q.shape[-1]) for codes in (args[0], args[2]))
    with torch.cuda.device(q.device):
        return kernel.decode_attention(q, *args, softcap, sink_logits, *bits, impl)


def _decode_fake(q, *args, softcap=0.0, sink_logits=None, impl="auto"):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _extend_cpu(q, k_new, v_new, *args, softcap=0.0, sink_logits=None, impl="auto"):
    _named(impl, q.device, "reference")
    return reference.attention(q, *args, softcap, sink_logits, k_new, v_new)


def _extend_cuda(q, k_new, v_new, *args, softcap=0.0, sink_logits=None, impl="auto"):
    if _named(impl, q.device, "triton", "reference") == "reference":
        return reference.attention(q, *args, softcap, sink_logits, k_new, v_new)
    from tq_ao.kernels import extend_attention as kernel

    books = _books(args[0], args[2], q.shape[-1])
    with torch.cuda.device(q.device):
        return kernel.extend_attention(q, k_new, v_new, *args, softcap, sink_logits, *books)


def _extend_fake(q, k_new, v_new, *args, softcap=0.0, sink_logits=None, impl="auto"):
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
