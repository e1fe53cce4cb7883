"""What torch may do to a TurboQuantTensor without making it dense: move it, copy it, cut it.

The tensor is cut by cutting its inner tensors, so only batch, heads and whole tiles of tokens can be cut.
`HANDLERS` maps aten ops to functions with torchao's signature (func, types, args, kwargs).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

from tq_ao.packing import TILE

if TYPE_CHECKING:
    from tq_ao.tensor import TurboQuantTensor

aten = torch.ops.aten

ATTENTION_NAME = "turboquant"
# Other implementations (eager, sdpa, flash) begin with one of the operations refused here.
IN_A_MODEL = (
    f"in a model: a packed cache needs the attention implementation {ATTENTION_NAME!r}, which quantize_kv_ sets"
)

_PER_TOKEN = ("codes", "scales", "sinks", "recent", "new")  # [B, H, ...]
_PER_HEAD = ("encode_map", "decode_map", "shift")  # [H, ...]


def _map_dim(
    x: "TurboQuantTensor", dim: int, fn: Callable[[torch.Tensor, int], torch.Tensor], op: str
) -> "TurboQuantTensor":
    """Apply fn(tensor, dim) to every inner tensor that has logical dimension `dim`, batch or heads."""
    axis = dim % x.dim() + 4 - x.dim()
    if axis > 1:
        raise NotImplementedError(
            f"{type(x).__name__} does not implement {op} along dim {dim} of {tuple(x.shape)}; only the batch and head "
            "dimensions are stored apart, call .dequantize() to get a dense tensor"
        )
    dims = dict.fromkeys(_PER_TOKEN, dim % x.dim())
    dims |= {"start": 0} if axis == 0 else dict.fromkeys(_PER_HEAD, 0)
    return x.replace(**{name: fn(t, d) for name, d in dims.items() if (t := getattr(x, name)) is not None})


def _slice_tokens(x: "TurboQuantTensor", start: int, end: int) -> "TurboQuantTensor":
    if x.length is not None:
        raise NotImplementedError(
            f"{type(x).__name__} of a cache cannot be sliced along the sequence: its sinks and ring sit at fixed "
            "positions; crop the cache, or call .dequantize() and slice the dense tensor"
        )
    start, end = (start, end) if start < end else (0, 0)
    if start % TILE or (end % TILE and end != x.seq_len):
        raise NotImplementedError(
            f"{type(x).__name__} is packed in tiles of {TILE} tokens: slice along the sequence at multiples of "
            f"{TILE} (got {start}:{end}), or call .dequantize() and slice the dense tensor"
        )
    tiles, dim = slice(start // TILE, -(-end // TILE)), x.dim() - 2
    narrowed = {n: aten.slice.Tensor(getattr(x, n), dim, tiles.start, tiles.stop) for n in ("codes", "scales")}
    return x.replace(**narrowed, seq_len=end - start)


def slice_(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x: TurboQuantTensor = args[0]
    given: list[Any] = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
    dim, start, end, step = given
    size = x.shape[dim]
    start, end, step = slice(start, end, step).indices(size)
    end = max(start, end)
    if (start, end, step) == (0, size, 1):
        out = x._apply_fn_to_data(aten.alias.default)
    elif dim % x.dim() == x.dim() - 2 and step == 1:
        out = _slice_tokens(x, start, end)
    else:
        out = _map_dim(x, dim, lambda t, d: aten.slice.Tensor(t, d, start, end, step), "slice")
    return return_and_correct_aliasing(func, args, kwargs, out)


def select(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dim, index = args
    if x.dim() != 4 or dim % x.dim():
        raise NotImplementedError(
            f"{type(x).__name__} selects along the batch dimension of [B, H, S, D] only, got dim {dim} of "
            f"{tuple(x.shape)}; use a slice of length 1, or call .dequantize()"
        )
    out = _map_dim(x, 0, lambda t, d: aten.select.int(t, d, index), "select")
    return return_and_correct_aliasing(func, args, kwargs, out)


def unsqueeze(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dim = args
    if x.dim() != 3 or dim not in (0, -4):
        raise NotImplementedError(
            f"{type(x).__name__} unsqueezes [H, S, D] at dim 0 only, got dim {dim} of {tuple(x.shape)}; "
            f"call .dequantize() to get a dense tensor; {IN_A_MODEL}"
        )
    per_batch = (name for name in (*_PER_TOKEN, "start") if getattr(x, name) is not None)
    out = x.replace(**{name: getattr(x, name).unsqueeze(0) for name in per_batch})
    return return_and_correct_aliasing(func, args, kwargs, out)


def index_select(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dim, index = args
    return _map_dim(x, dim, lambda t, d: t.index_select(d, index), "index_select")


def to(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Device moves everything; dtype changes the logical dtype and the exact tokens, never codes or maps."""
    x = args[0]
    dtype = kwargs.get("dtype") or x.dtype
    if not dtype.is_floating_point:
        raise NotImplementedError(f"{type(x).__name__} is floating point, got dtype {dtype}; call .dequantize() first")
    where = {"device": kwargs.get("device") or x.device, "non_blocking": kwargs.get("non_blocking", False)}
    copy = func is aten._to_copy.default
    moved: dict[str, Any] = {}
    for name in x.__tensor_flatten__()[0]:
        exact = {"dtype": dtype} if name in ("sinks", "recent", "new") else {}
        moved[name] = getattr(x, name).to(**where, **exact, copy=copy)
    return return_and_correct_aliasing(func, args, kwargs, x.replace(**moved, dtype=dtype))


def copy_(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, source = args[:2]
    if not hasattr(x, "__tensor_flatten__"):
        raise NotImplementedError(
            f"{type(source).__name__} {tuple(source.shape)} cannot be copied into a dense tensor; call .dequantize() "
            "first"
        )
    names, attributes = x.__tensor_flatten__()
    if type(source) is not type(x) or source.__tensor_flatten__() != (names, attributes):
        raise ValueError(
            f"expected copy_ from a packed tensor like {x!r}, got {_describe(source, type(x))}; use from_hp"
        )
    for name in names:
        if getattr(x, name).shape != getattr(source, name).shape:
            shapes = tuple(getattr(x, name).shape), tuple(getattr(source, name).shape)
            raise ValueError(f"expected copy_ between equal shapes, {name!r} has {shapes[0]} and {shapes[1]}")
    for name in names:
        getattr(x, name).copy_(getattr(source, name), *args[2:], **kwargs)
    return x


def _describe(x: torch.Tensor, packed: type) -> str:
    return repr(x) if isinstance(x, packed) else f"{type(x).__name__} {x.dtype} {tuple(x.shape)}"


HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.slice.Tensor: slice_,
    aten.select.int: select,
    aten.unsqueeze.default: unsqueeze,
    aten.index_select.default: index_select,
    aten._to_copy.default: to,
    aten.to.dtype_layout: to,
    aten.copy_.default: copy_,
}
