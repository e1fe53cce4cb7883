"""Value maps folded into the weights: v_proj makes v_f = v @ V itself, and o_proj takes it back.

Row vectors, per KV head h and each query head q that reads it, V = LayerMaps.value (QuaRot, arXiv 2404.00456,
SpinQuant's R2, arXiv 2405.16406, where V is orthogonal; here it is any invertible matrix):

    W_v,h := V.T @ W_v,h      b_v,h := b_v,h @ V      W_o,q := W_o,q @ V^-T

The model computes what it did, up to the rounding of those weights.  In what it computes, the layer's maps become
value = I, output = O @ V (nearly I; it keeps what was fitted into O) and value_shift = s @ V: codes stay the same.
The cache holds balanced values then, whichever cache that is.

The algebra is float64, from the weights as they are stored, and its result has their dtype: what is in memory, and
is measured, is what is written.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tq_ao.cache import find_decoder, head_dim, kv_heads
from tq_ao.calibration.statistics import PROJECTIONS
from tq_ao.checkpoint import read_stored
from tq_ao.errors import ModelError
from tq_ao.measure.capture import AttentionCall, exact, intercept
from tq_ao.models import auto_class
from tq_ao.rotation import LayerMaps, MapSource, one_by_one

LIMIT = 1e-3  # nats: rounding to bfloat16 costs a hundredth of it, a wrong formula a thousand times as much
_LEAVE_OUT = "leave --fold-values out"


@dataclass(frozen=True)
class Attention:
    """The attention of a layer: the module, its value and its output projection, and the names of their parameters."""

    module: nn.Module
    v_proj: nn.Linear
    o_proj: nn.Linear
    v_name: str
    o_name: str

    def parameters(self) -> dict[str, torch.Tensor]:
        """Those that folding changes, by name."""
        named = {f"{self.v_name}.weight": self.v_proj.weight, f"{self.o_name}.weight": self.o_proj.weight}
        return named if self.v_proj.bias is None else {**named, f"{self.v_name}.bias": self.v_proj.bias}


def find(model: PreTrainedModel, layers: Iterable[int]) -> dict[int, Attention]:
    """The attention of layers whose values can be folded, as far as modules show it (`check_path` runs them).

    Args:
        model: may be on the meta device.
        layers: full-attention layers.

    Raises:
        ModelError: a layer without v_proj and o_proj as plain linear layers of the shapes of its heads, with weights of
            their own; a norm on values; keys and values that several layers share; or clipped values.
    """
    config, kind = model.config.get_text_config(decoder=True), model.config.model_type
    for option, what in (("num_kv_shared_layers", "layers that share keys and values"), ("clip_qkv", "clipped values")):
        if value := getattr(config, option, None):
            raise _refused(kind, f"values that go from v_proj to o_proj of one layer, got {what} ({option} {value})")
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    modules = {id(module): name for name, module in model.named_modules()}
    attention: dict[int, nn.Module] = {}
    for module in find_decoder(model).modules():
        layer: Any = getattr(module, "layer_idx", None)
        if layer is not None and any(hasattr(module, name) for name in PROJECTIONS):
            attention.setdefault(layer, module)
    found, dim, heads = {}, head_dim(config), (kv_heads(config), config.num_attention_heads)
    for i in layers:
        if i not in attention:
            raise _refused(kind, f"v_proj and one of {', '.join(PROJECTIONS)} in layer {i}, found neither")
        module = attention[i]
        children = {name: type(child).__name__ for name, child in module.named_children()}
        if norms := [name for name in children if name.startswith("v") and "norm" in name]:
            raise _refused(kind, f"values as v_proj makes them in layer {i}, got a norm on them ({norms[0]})")
        o_name = next(name for name in PROJECTIONS if hasattr(module, name))
        v: Any = getattr(module, "v_proj", None)
        o: Any = getattr(module, o_name)
        if not (_plain(v) and _plain(o)):
            raise _refused(kind, f"v_proj and {o_name} as plain nn.Linear in layer {i}, got {children}")
        wanted, got = (heads[0] * dim, heads[1] * dim), (v.out_features, o.in_features)
        if got != wanted:
            raise _refused(kind, f"v_proj to make and {o_name} to read {wanted} values in layer {i}, got {got}")
        found[i] = Attention(module, v, o, modules[id(v)], modules[id(o)])
        for name, parameter in found[i].parameters().items():
            if len(names[id(parameter)]) > 1:
                raise _refused(kind, f"{name} to be one layer's own, got a tensor tied as {names[id(parameter)]}")
    return found


def _plain(module: object) -> bool:
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.is_floating_point()


def _refused(kind: str, why: str) -> ModelError:
    return ModelError(f"{kind}: to fold values expected {why}; {_LEAVE_OUT}")


def check_config(config: PreTrainedConfig, layers: Iterable[int]) -> tuple[list[str], str]:
    """What folding will change in a model of this config, before any weight is loaded.

    Returns:
        Names of the parameters; the model's `base_model_prefix`.

    Raises:
        ModelError: see `find`; also quantised weights.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise _refused(config.model_type, "weights in a plain dtype, got quantised ones")
    with torch.device("meta"):
        model = auto_class(config).from_config(deepcopy(config))
    return [name for a in find(model, layers).values() for name in a.parameters()], model.base_model_prefix


@torch.no_grad()
def check_path(model: PreTrainedModel, layers: Iterable[int], ids: torch.Tensor) -> None:
    """Run a short text, and look whether values go untouched from v_proj to attention and from there to o_proj.

    Args:
        model: in eval mode.
        ids: int64 [1, N].

    Raises:
        ModelError: they do not: a norm, a gate or a clip lies between, or another layer reads them too.
    """
    parts, kind = find(model, layers), model.config.model_type
    calls: list[AttentionCall] = []
    outputs: dict[int, torch.Tensor] = {}
    made: dict[int, torch.Tensor] = {}
    read: dict[int, torch.Tensor] = {}

    def handler(call: AttentionCall) -> torch.Tensor:
        calls.append(call)
        outputs[call.layer] = exact(call)
        return outputs[call.layer]

    hooks = []
    for i, a in parts.items():
        hooks.append(a.v_proj.register_forward_hook(lambda module, args, out, i=i: made.__setitem__(i, out)))
        hooks.append(a.o_proj.register_forward_pre_hook(lambda module, args, i=i: read.__setitem__(i, args[0])))
    try:
        with intercept(model, handler):
            model(ids.to(model.device), use_cache=False)
    except TypeError as error:
        raise ModelError(f"{kind}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    for i, a in parts.items():
        values = [call.v for call in calls if call.module is a.module]
        if len(values) != 1 or i not in made or not _same_heads(values[0], made[i]):
            raise _refused(kind, f"attention of layer {i} to read what v_proj makes, got other values")
        if i not in read or not _same_heads(outputs[i], read[i]):
            raise _refused(kind, f"o_proj of layer {i} to read what attention gives, got something else")
        if others := [call.layer for call in calls if call.layer != i and torch.equal(call.v, values[0])]:
            raise _refused(kind, f"values of layer {i} to be read by it alone, got layers {others} that read them too")


def _same_heads(heads: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether [B, H, N, D] and [B, N, H * D] hold the same numbers."""
    return torch.equal(heads.transpose(1, 2).flatten(), rows.flatten())


def fold_value(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """v_proj's weight [H * D, hidden] or bias [H * D], made to give v @ value; the same dtype.

    Args:
        value: [H, D, D].
    """
    per_head = weight.double().unflatten(0, value.shape[:2])
    return torch.einsum("hd...,hde->he...", per_head, value.double()).flatten(0, 1).to(weight.dtype)


def fold_output(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """o_proj's weight [out, Hq * D], made to read outputs that are o @ value; the same dtype.

    Args:
        value: [H, D, D], invertible; query head q has KV head q // (Hq / H).
    """
    heads, dim, _ = value.shape
    per_head = weight.double().unflatten(1, (heads, -1, dim))  # [out, H, G, D]
    inverse = one_by_one(torch.linalg.inv, value.double())
    return torch.einsum("ohgd,hed->ohge", per_head, inverse).flatten(1).to(weight.dtype)


def folded_maps(maps: LayerMaps, by: torch.Tensor) -> LayerMaps:
    """What `maps` become in a model whose values are v @ by: the same codes, and outputs that are o @ by.

    Args:
        by: [H, D, D], invertible; with `maps.value` the new `value` is exactly I.
    """
    by = by.double()
    value = one_by_one(torch.linalg.solve, by, maps.value.double())
    if torch.equal(by, maps.value.double()):
        value = torch.eye(by.shape[-1], device=by.device).expand_as(by)
    shift = (maps.value_shift.double()[:, None] @ by)[:, 0]
    return replace(
        maps, value=value.float().contiguous(), output=(maps.output.double() @ by).float(), value_shift=shift.float()
    )


def seen_through(plain: MapSource, by: Mapping[int, torch.Tensor]) -> MapSource:
    """The maps of a model as they become once the values of some layers are v @ by (see `folded_maps`).

    Args:
        plain: of the model as it was.
        by: layer -> [H, D, D] on the CPU.
    """
    maps = {i: folded_maps(plain(i, b.shape[0], b.shape[-1], b.device), b) for i, b in by.items()}
    return MapSource(plain.kind, plain.seed, {**plain.calibrated, **maps})


class Folded:
    """A model whose values are folded, and the way back.

    Attributes:
        maps: layer -> its maps now, value = I.
        by: layer -> what its values are multiplied by.
        weights: parameter -> what is to be stored, on the CPU and in the dtype it was stored in.
    """

    def __init__(self, maps: dict[int, LayerMaps], by: dict[int, torch.Tensor]) -> None:
        self.maps, self.by = maps, by
        self.weights: dict[str, torch.Tensor] = {}
        self._other: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _put(self, name: str, parameter: torch.Tensor, weight: torch.Tensor) -> None:
        self.weights[name] = weight
        self._other.append((parameter, parameter.data))
        parameter.data = weight.to(parameter.device, parameter.dtype)

    def _swap(self) -> None:
        for n, (parameter, other) in enumerate(self._other):
            self._other[n] = (parameter, parameter.data)
            parameter.data = other

    @contextmanager
    def original(self) -> Iterator[None]:
        """While active, the model has the weights it had before."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def undo(self) -> None:
        """Give the model back the weights it had; this object is used up."""
        self._swap()
        self._other.clear()


def fold_(model: PreTrainedModel, maps: Mapping[int, LayerMaps], where: Mapping[str, tuple[Path, str]]) -> Folded:
    """Fold the value maps of layers into a model, in place.

    Args:
        model: see `find`.
        maps: layer -> its maps (CPU), for exactly the layers to fold.
        where: parameter (names of `Attention.parameters`) -> the safetensors file and the key that it is stored as.

    Raises:
        ModelError: see `find`; or a stored tensor that is not the parameter.
    """
    by = {i: m.value for i, m in maps.items()}
    folded = Folded({i: folded_maps(m, m.value) for i, m in maps.items()}, by)
    changes = []
    for i, a in find(model, maps).items():
        for name, parameter in a.parameters().items():
            stored, loaded = read_stored(*where[name]), parameter.detach().cpu()
            if stored.shape != loaded.shape or not torch.equal(stored.to(loaded.dtype), loaded):
                raise _refused(model.config.model_type, f"{name} as the checkpoint stores it, got other numbers")
            change = fold_output if parameter is a.o_proj.weight else fold_value
            changes.append((name, parameter, change(stored, by[i])))
    for found in changes:
        folded._put(*found)
    return folded


def within_limit(kl: float) -> float:
    """The KL of the folded model to the original, both with an exact cache.

    Raises:
        ModelError: more than `LIMIT` nats, or NaN: something in the architecture breaks the algebra.
    """
    if not kl <= LIMIT:
        raise ModelError(
            f"folding the value maps changed the model: expected a KL below {LIMIT:g} to the original with an exact "
            f"cache, got {kl:.3g}; {_LEAVE_OUT}"
        )
    return kl
