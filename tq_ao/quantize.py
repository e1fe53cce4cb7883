"""The torchao entry: `quantize_(model, TurboQuantKVCacheConfig(...), filter_fn=...)`.

torchao hands a config to modules, not to weights, here: either the whole model (`filter_fn=whole_model`), which
is attached at once, or chosen attention modules (`filter_fn=is_attention`, or narrower), which only take note;
`attach_recorded(model)` then makes a schedule of the notes.  Both compose with torchao's weight configs.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from tq_ao.config import EXACT, LayerScheme, TurboQuantConfig

VERSION = 1


@dataclass(frozen=True)
class TurboQuantKVCacheConfig(AOBaseConfig):
    """Packed KV cache for the modules it is applied to.

    Attributes:
        k_bits, v_bits: code widths, each 1, 2, 3, 4 or 8, or both 16 (kept exact).
        window, sinks, rotation, seed: as in `TurboQuantConfig`; the same for all layers of a model.
        version: of this config, written by torchao's `config_to_dict`.

    Raises:
        ValueError: a field out of range, or another version.
    """

    k_bits: int = 3
    v_bits: int = 3
    window: int = 128
    sinks: int = 4
    rotation: str = "hadamard"
    seed: int = 0
    version: int = VERSION

    def __post_init__(self) -> None:
        torch._C._log_api_usage_once("tq_ao.TurboQuantKVCacheConfig")
        if self.version != VERSION:
            raise ValueError(
                f"expected version {VERSION} of this config, got {self.version!r}; upgrade tq_ao to read it"
            )
        self.to_config()

    def to_config(self) -> TurboQuantConfig:
        """The model-wide config with these widths in every layer."""
        return TurboQuantConfig(
            k_bits=self.k_bits,
            v_bits=self.v_bits,
            window=self.window,
            sinks=self.sinks,
            rotation=self.rotation,
            seed=self.seed,
        )


def whole_model(module: torch.nn.Module, fqn: str) -> bool:
    """A `filter_fn` that picks the model itself."""
    return fqn == ""


def is_attention(module: torch.nn.Module, fqn: str) -> bool:
    """A `filter_fn` that picks the attention module of every layer."""
    return "Attention" in type(module).__name__ and _layer(module) is not None


def _layer(module: torch.nn.Module) -> int | None:
    index = getattr(module, "layer_idx", None)
    return index if isinstance(index, int) else None


@register_quantize_module_handler(TurboQuantKVCacheConfig)
def _apply(module: torch.nn.Module, config: TurboQuantKVCacheConfig) -> torch.nn.Module:
    if hasattr(module, "_prepare_cache_for_generation"):
        from tq_ao.hf import quantize_kv_

        return quantize_kv_(module, config)
    if not is_attention(module, ""):
        raise ValueError(
            f"expected a transformers model or one of its attention modules, got {type(module).__name__}; pass "
            "filter_fn=tq_ao.quantize.whole_model or tq_ao.quantize.is_attention to torchao's quantize_"
        )
    if _record(module) is None:
        module.extra_repr = types.MethodType(partial(_extra_repr, describe=module.extra_repr), module)  # type: ignore[method-assign]
    module.turboquant = config
    return module


def _record(module: torch.nn.Module) -> TurboQuantKVCacheConfig | None:
    record = getattr(module, "turboquant", None)
    return record if isinstance(record, TurboQuantKVCacheConfig) else None


def _extra_repr(module: torch.nn.Module, describe: Callable[[], str]) -> str:
    record = _record(module)
    note = None if record is None else f"kv_cache=turboquant(k_bits={record.k_bits}, v_bits={record.v_bits})"
    return ", ".join(filter(None, (describe(), note)))


def has_records(model: torch.nn.Module) -> bool:
    """Whether `quantize_` left a config on any attention module."""
    return any(_record(m) is not None for m in model.modules())


def attach_recorded(model: torch.nn.Module) -> torch.nn.Module:
    """Attach the schedule that `quantize_` left on the model's attention modules; layers without one stay exact.

    Raises:
        ValueError: no attention module has a config, or their windows, sinks, rotations or seeds differ.
    """
    found = {_layer(m): record for m in model.modules() if (record := _record(m)) is not None}
    if not found:
        raise ValueError(
            "no attention module carries a TurboQuantKVCacheConfig; call torchao's quantize_ with one first"
        )
    shared = {(c.window, c.sinks, c.rotation, c.seed) for c in found.values()}
    if len(shared) > 1:
        raise ValueError(
            f"expected one (window, sinks, rotation, seed) in all layers, got {sorted(shared)}; only bits vary"
        )
    window, sinks, rotation, seed = shared.pop()
    layers = {i: LayerScheme(c.k_bits, c.v_bits) for i, c in found.items() if i is not None}
    from tq_ao.hf import attach

    config = TurboQuantConfig(bits=EXACT, layers=layers, window=window, sinks=sinks, rotation=rotation, seed=seed)
    return attach(model, config)


ALLOWED_AO_MODULES.add("tq_ao")
