"""TurboQuantTensor: the packed keys or values of one layer, as a torch tensor subclass.

The subclass is a view put together from plain buffers: a cache writes its buffers with `ops.append_` and
builds the wrapper *after* the write.  Under torch.compile the order matters: writing an inner tensor of a
wrapper that already exists and then reading through the wrapper reads the old data (tests/test_compile.py).
"""

import hashlib
from typing import Any, ClassVar

import torch
from torchao.prototype.safetensors import safetensors_utils
from torchao.utils import TorchAOBaseTensor

from tq_ao import ops, tensor_ops
from tq_ao.codebook import ROLES, Role
from tq_ao.packing import LAYOUT_VERSION, TILE, tile_bytes
from tq_ao.reference import bits_of, in_place
from tq_ao.rotation import LayerMaps, rotation_maps


class TurboQuantTensor(TorchAOBaseTensor):
    """Packed K or V of one layer: logically [B, H, S, D] in `dtype`, stored as codes and scales.

    The geometry (sinks, packed tiles, ring) is that of `reference`.  `select(0, b)` drops the batch
    dimension; such a tensor is [H, S, D] and every B below is absent until `unsqueeze(0)`.

    Tensor data:
        codes: uint8 [B, H, T, tile_bytes], layout v2 of `packing`.
        scales: float16 [B, H, T, 32], one per token.
        encode_map: float32 [H, D, D], `LayerMaps.key` or `.value`: applied before quantising.
        decode_map: float32 [H, D, D], `LayerMaps.query` (keys) or `.output` (values).
        shift: float32 [H, D], subtracted before `encode_map`.
        sinks: dtype [B, H, S0, D], the first tokens, exact.
        recent: dtype [B, H, C, D], the ring of exact recent tokens.
        new: dtype [B, H, q, D], exact tokens that follow the cache and are not in it yet.
        length: int64 0-d, tokens in the cache, padding included, `new` excluded.
        start: int64 [B], position of each row's first real token.
        (sinks, recent, length and start are all None in a standalone tensor made by `from_hp`: all S tokens
        are packed, the last tile may be partial, there is no padding.)
    Attributes:
        role: "key" or "value".
        seq_len: S; for a static cache the most tokens it can hold.
        window: tokens kept exact behind the newest; 0 when standalone.
        dtype: logical dtype.
        layout_version: version of the bit layout of `codes`; anything but this library's is refused.

    Not differentiable.  Operations that would need dense data raise NotImplementedError.
    """

    tensor_data_names: ClassVar[list[str]] = ["codes", "scales", "encode_map", "decode_map", "shift"]
    tensor_attribute_names: ClassVar[list[str]] = ["role", "seq_len", "window", "dtype"]
    optional_tensor_data_names: ClassVar[list[str]] = ["sinks", "recent", "new", "length", "start"]
    optional_tensor_attribute_names: ClassVar[list[str]] = ["layout_version"]

    codes: torch.Tensor
    scales: torch.Tensor
    encode_map: torch.Tensor
    decode_map: torch.Tensor
    shift: torch.Tensor
    role: Role
    seq_len: int
    window: int
    sinks: torch.Tensor | None
    recent: torch.Tensor | None
    new: torch.Tensor | None  # shadows the legacy constructor Tensor.new
    length: torch.Tensor | None
    start: torch.Tensor | None
    layout_version: int

    def __new__(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        encode_map: torch.Tensor,
        decode_map: torch.Tensor,
        shift: torch.Tensor,
        role: Role,
        seq_len: int,
        window: int,
        dtype: torch.dtype,
        *_: Any,
        **__: Any,
    ) -> "TurboQuantTensor":
        shape = (*codes.shape[:-2], seq_len, shift.shape[-1])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device, requires_grad=False)

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        encode_map: torch.Tensor,
        decode_map: torch.Tensor,
        shift: torch.Tensor,
        role: Role,
        seq_len: int,
        window: int,
        dtype: torch.dtype,
        sinks: torch.Tensor | None = None,
        recent: torch.Tensor | None = None,
        new: torch.Tensor | None = None,
        length: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
        layout_version: int = LAYOUT_VERSION,
    ) -> None:
        super().__init__()
        if role not in ROLES:
            raise ValueError(f"expected role in {ROLES}, got {role!r}; keys and values are laid out differently")
        if len({t is None for t in (sinks, recent, length, start)}) > 1:
            raise ValueError("expected all or none of sinks, recent, length and start; a cache has all of them")
        _check_layout(layout_version)
        self.codes = codes
        self.scales = scales
        self.encode_map = encode_map
        self.decode_map = decode_map
        self.shift = shift
        self.role = role
        self.seq_len = seq_len
        self.window = window
        self.sinks = sinks
        self.recent = recent
        self.new = new
        self.length = length
        self.start = start
        self.layout_version = layout_version

    @classmethod
    def from_hp(
        cls,
        x: torch.Tensor,
        bits: int = 3,
        role: Role = "key",
        maps: LayerMaps | None = None,
        rotation: str = "hadamard",
        seed: int = 0,
    ) -> "TurboQuantTensor":
        """Quantise dense keys or values.

        A vector's scale is a float16 number, so a width is as good as it can be between two lengths of the mapped
        vector (x - shift) @ map only.  A longer vector is cut down to the longest one, a shorter one's scale loses
        digits, both silently.  Root mean square of the entries where the error of normally distributed ones has grown
        by 1 % (it has by 10 % at about a third of the lower and at 1.1 to 1.4 times the upper end):

            bits     1                2                3                4                  8
            RMS      1e-7 .. 4e4      4e-7 .. 6e4      1e-6 .. 1e5      4e-6 .. 1.6e5      8e-6 .. 1.3e4

        The fastest attention on CUDA takes values only up to a sixteenth of the upper end, and loses digits of those
        below an RMS of 1e-4: `kernels/decode_attention.py`.

        Args:
            x: floating point [B, H, S, D], D a multiple of 32; B and S may be 0.
            bits: 1, 2, 3, 4 or 8.
            role: "key" or "value".
            maps: the layer's maps; None: `rotation_maps(rotation, H, D, seed)`.

        Raises:
            ValueError: wrong rank or dtype of x, unsupported bits, role or head dim, no heads, maps of another shape.
        """
        if x.dim() != 4 or not x.is_floating_point() or not x.shape[1]:
            raise ValueError(
                f"expected floating point x [B, H, S, D], H > 0, got {x.dtype} {tuple(x.shape)}; reshape it first"
            )
        if role not in ROLES:
            raise ValueError(f"expected role in {ROLES}, got {role!r}; keys and values are laid out differently")
        _, heads, tokens, dim = x.shape
        tile_bytes(bits, dim)  # refuses what has no layout, in one line where the op's schema has many
        maps = rotation_maps(rotation, heads, dim, seed) if maps is None else maps
        if tuple(maps.key_shift.shape) != (heads, dim):
            raise ValueError(
                f"expected maps of {heads} KV heads and head_dim {dim}, got {tuple(maps.key_shift.shape)}; "
                "pass the maps of the layer x comes from"
            )
        maps = maps.to(x.device)
        if role == "key":
            encode_map, decode_map, shift, feedback = maps.key, maps.query, maps.key_shift, maps.key_feedback
        else:
            encode_map, decode_map, shift, feedback = maps.value, maps.output, maps.value_shift, maps.value_feedback
        codes, scales = ops.encode(x.detach(), encode_map, shift, bits, role, feedback=feedback)
        return cls(codes, scales, encode_map, decode_map, shift, role, tokens, 0, x.dtype)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Dense [B, H, S, D] in original space; row b's token t sits at position start[b] + t.

        Packed tokens are reconstructed, exact ones (sinks, ring, new) copied; padding and the positions after
        the last token are zeros.  For inspection and tests: attention never calls this.
        """
        if self.dim() == 3:
            return self.unsqueeze(0).dequantize(output_dtype)[0]
        _, _, tokens, dim = self.shape
        y = ops.decode(self.codes, self.scales, dim, self.role)
        inverse = self.decode_map.mT if self.role == "key" else self.decode_map
        x = (y @ inverse + self.shift[:, None]).to(output_dtype or self.dtype)
        if self.length is None or self.start is None or self.sinks is None or self.recent is None:
            return x[:, :, :tokens]
        return in_place(x, self.sinks, self.recent, self.new, self.length, self.start, tokens, self.window)

    @property
    def bits(self) -> int:
        """Code width."""
        return bits_of(self.codes, self.shape[-1])

    @property
    def nbytes_packed(self) -> int:
        """Bytes of codes and scales, counted from the tensors."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def bits_per_value(self) -> float:
        """Stored bits (codes and scales) per coordinate of a packed vector; one scale belongs to each vector."""
        return 8 * (self.codes.shape[-1] / TILE + self.scales.itemsize) / self.shape[-1]

    def __repr__(self) -> str:
        per_vector = self.bits_per_value * self.shape[-1] / 8
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"bits={self.bits}, role={self.role!r}, bytes_per_vector={per_vector:g})"
        )

    def _stable_hash_for_caching(self) -> str:
        """Key of the compile cache: everything but the data, the same in every process."""
        names, attributes = self.__tensor_flatten__()
        parts = [type(self).__qualname__, str(tuple(self.shape)), str(attributes)]
        for name in names:
            t = getattr(self, name)
            parts.append(f"{name}:{t.dtype}:{tuple(t.shape)}:{t.stride()}:{t.device}")
        return hashlib.blake2b("|".join(parts).encode(), digest_size=16).hexdigest()

    def replace(self, **changes: Any) -> "TurboQuantTensor":
        """The same tensor with some of its data or attributes exchanged."""
        required = (getattr(self, name) for name in self.tensor_data_names + self.tensor_attribute_names)
        values = dict(zip(self.tensor_data_names + self.tensor_attribute_names, required, strict=True))
        for name in self.optional_tensor_data_names + self.optional_tensor_attribute_names:
            values[name] = getattr(self, name)
        return type(self)(**(values | changes))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = cls._ATEN_OP_TABLE[cls].get(func)
        if handler is None:
            raise NotImplementedError(
                f"{cls.__name__} does not implement {func}; call .dequantize() to get a dense tensor; "
                f"{tensor_ops.IN_A_MODEL}"
            )
        return handler(func, types, args, kwargs or {})


def _check_layout(version: int | None) -> None:
    if version != LAYOUT_VERSION:
        raise ValueError(
            f"expected codes in layout version {LAYOUT_VERSION}, got {version}; "
            "dequantize them with the tq_ao release that wrote them and quantise again"
        )


def _geometry(x: TurboQuantTensor) -> tuple[Any, ...]:
    """What the keys and the values of one layer have in common."""
    return x.codes.shape[:2], x.shift.shape, x.seq_len, x.window, x.new is None, x.length is None


def packed_attention(
    q: torch.Tensor,
    k: TurboQuantTensor,
    v: TurboQuantTensor,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Attention of q over packed keys and values, without making them dense.

    Args:
        q: [B, Hq, q_len, D], Hq a multiple of the KV heads.  q_len is 1 when `k.new` is None; otherwise it is
            the number of new tokens, and query i sees the cache and new tokens 0..i.
        k, v: the two tensors of one layer, with role "key" and "value".
        scale, softcap, sink_logits, impl: as in `reference.attention` and `ops`.

    Returns:
        [B, Hq, q_len, D] in q's dtype.

    Raises:
        ValueError: roles, shapes or state of k and v do not fit together or do not fit q.
    """
    # Reading .shape or .dtype of the wrappers costs microseconds in every layer and step: ask their parts.
    batch, heads, dim = k.codes.shape[0], k.codes.shape[1], k.shift.shape[1]
    for name, tensor, role in (("key", k, "key"), ("value", v, "value")):
        if tensor.role != role:
            raise ValueError(f"expected the {name} argument to have role {role!r}, got {tensor.role!r}; swap them")
        if tensor.codes.dim() != 4:
            raise ValueError(f"expected the {name} argument 4-d, got {tuple(tensor.shape)}; use unsqueeze(0)")
    if _geometry(k) != _geometry(v):
        raise ValueError(f"expected key and value of one layer, got {k!r} and {v!r}; build both from the same cache")
    if q.dim() != 4 or q.shape[0] != batch or q.shape[3] != dim or q.shape[1] % heads:
        raise ValueError(
            f"expected queries [{batch}, a multiple of {heads}, q_len, {dim}], got {tuple(q.shape)}; "
            "batch and head_dim must be those of the keys"
        )
    fresh = 1 if k.new is None else k.new.shape[2]
    if q.shape[2] != fresh:
        raise ValueError(
            f"expected {fresh} queries, got {q.shape[2]}; several queries need as many exact tokens in `new` "
            "(one query otherwise): append fewer tokens, or put the chunk in `new`"
        )
    exact: tuple[torch.Tensor | None, ...] = (k.sinks, v.sinks, k.recent, v.recent)
    length, start = k.length, k.start
    if length is None or start is None:
        exact = (k.codes.new_empty(batch, heads, 0, dim, dtype=k.dtype),) * 4
        length = torch.full((), k.seq_len, dtype=torch.int64, device=k.device)
        start = torch.zeros(batch, dtype=torch.int64, device=k.device)
    cache = (
        *(k.codes, k.scales, v.codes, v.scales, *exact, length, start),
        *(k.decode_map, k.shift, v.decode_map, v.shift, k.window, scale),
    )
    if k.new is None or v.new is None:
        return ops.decode_attention(q, *cache, softcap=softcap, sink_logits=sink_logits, impl=impl)
    return ops.extend_attention(q, k.new, v.new, *cache, softcap=softcap, sink_logits=sink_logits, impl=impl)


@TurboQuantTensor.implements_torch_function(torch.nn.functional.scaled_dot_product_attention)
def _scaled_dot_product_attention(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return _sdpa(*args, **kwargs)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """F.scaled_dot_product_attention with packed key and value; see `packed_attention`."""
    if isinstance(query, TurboQuantTensor):
        raise ValueError("expected a dense query, got a TurboQuantTensor; only key and value are packed")
    if not isinstance(key, TurboQuantTensor) or not isinstance(value, TurboQuantTensor):
        name = "value" if isinstance(key, TurboQuantTensor) else "key"
        raise ValueError(f"expected {name} to be a TurboQuantTensor like its partner, got a dense tensor; use from_hp")
    if attn_mask is not None:
        raise ValueError(
            f"expected attn_mask=None with packed keys, got {attn_mask.dtype} {tuple(attn_mask.shape)}; left padding "
            "is the tensor's `start` and causality its `new`; for any other mask dequantize() key and value; "
            f"{tensor_ops.IN_A_MODEL}"
        )
    if dropout_p:
        raise ValueError(f"expected dropout_p=0 with packed keys, got {dropout_p}; attention over a cache is inference")
    if query.dtype != key.dtype:
        raise ValueError(
            f"expected query in the keys' dtype {key.dtype}, got {query.dtype}; convert it with .to({key.dtype})"
        )
    if query.dim() == key.dim() == 4 and query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"expected {key.shape[1]} query heads, got {query.shape[1]}; pass enable_gqa=True to share key heads"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    several = query.dim() == 4 and query.shape[2] > 1
    if key.new is not None:
        if several and not is_causal:
            raise ValueError(
                "expected is_causal=True for the new tokens of a packed cache, got False; each of them sees the "
                "cache and the new tokens up to itself"
            )
        return packed_attention(query, key, value, scale)
    if is_causal:
        raise ValueError(
            "expected is_causal=False, got True: where the queries stand among these keys is unknown; keep the "
            "queries' own keys exact in `new` (a cache does), or drop is_causal: every query sees every key"
        )
    if not several or key.dim() != 4 or query.shape[1] % key.shape[1]:  # the last two are refused there
        return packed_attention(query, key, value, scale)
    # All queries see the same keys, so they are further heads of their KV head's group: 8, 16, 32, ..., because kernels
    # are compiled for a number of heads.
    batch, q_heads, q_len, dim = query.shape
    heads = key.shape[1]
    group = q_heads // heads * q_len
    more = -group % (8 if group <= 8 else 16)
    rows = torch.nn.functional.pad(query.reshape(batch, heads, group, dim), (0, 0, 0, more))
    out = packed_attention(rows.reshape(batch, heads * (group + more), 1, dim), key, value, scale)
    return out.view_as(rows)[:, :, :group].reshape_as(query)


_set_state = TurboQuantTensor.__setstate__


def _set_checked_state(self: TurboQuantTensor, state: Any) -> None:
    """Unpickling does not run __init__, so files of another layout are refused here."""
    _set_state(self, state)
    _check_layout(self.layout_version)


TurboQuantTensor.__setstate__ = _set_checked_state
for _op, _handler in tensor_ops.HANDLERS.items():
    TurboQuantTensor.implements(_op)(_handler)
torch.serialization.add_safe_globals([TurboQuantTensor])
safetensors_utils.ALLOWED_CLASSES[TurboQuantTensor.__name__] = TurboQuantTensor
safetensors_utils.ALLOWED_TENSORS_SUBCLASSES.append(TurboQuantTensor.__name__)
