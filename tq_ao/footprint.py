"""The bytes of a whole cache: counted from its tensors, and as a budget for schedules.

Counted is a new static cache for one text in bfloat16, what `generate` allocates on an accelerator, with the maps that
its layers read and what its kernels make of them; on the "meta" device, whose tensors have every property but their
numbers.  A growing cache holds the same and reserves up to half as many tiles again.
"""

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from tq_ao.cache import TurboQuantCache, head_dim, kv_heads, quantizable_layers
from tq_ao.cache_layer import TurboQuantLayer
from tq_ao.calibration.allocation import Memory, offered, rounded_up, smallest
from tq_ao.codebook import BITS
from tq_ao.config import EXACT, TurboQuantConfig
from tq_ao.packing import TILE
from tq_ao.reference import operands_size
from tq_ao.rotation import LayerMaps

_CODES = ("k_codes", "k_scales", "v_codes", "v_scales")
_OPERANDS = ("key_operands", "value_operands")


def count(cache: TurboQuantCache, config: PreTrainedConfig) -> list[dict[str, int]]:
    """Bytes of each layer of a static cache that is still empty, once it is allocated for one text.

    Returns:
        By layer: "codes" (with scales), "maps" (with shifts, feedback and operands), "exact": all its other tensors.

    Raises:
        ValueError: a layer that allocates only what it is given (linear attention, for one).
    """
    text = config.get_text_config(decoder=True)
    heads, meta = kv_heads(text), torch.device("meta")
    cache.early_initialization(1, heads, head_dim(text), torch.bfloat16, meta)
    if late := [i for i, layer in enumerate(cache.layers) if not getattr(layer, "is_initialized", False)]:
        kinds = ", ".join(sorted({type(cache.layers[i]).__name__ for i in late}))
        raise ValueError(
            f"expected layers whose size is known beforehand, got {kinds} at {late}; set the size by bits instead"
        )
    return [_held(layer) for layer in cache.layers]


def _held(layer: object) -> dict[str, int]:
    tensors = {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    parts = {"codes": 0, "exact": 0, "maps": layer.layer_maps.nbytes if isinstance(layer, TurboQuantLayer) else 0}
    for name, tensor in tensors.items():
        parts["codes" if name in _CODES else "maps" if name in _OPERANDS else "exact"] += tensor.nbytes
    return parts


def maps_bytes(maps: LayerMaps) -> int:
    """Bytes of a layer's maps, shifts and feedback, and of the operands that a packed layer keeps of them on a GPU."""
    heads, dim = maps.key_shift.shape
    numbers = sum(operands_size(dim, f is not None) for f in (maps.key_feedback, maps.value_feedback))
    return maps.nbytes + heads * numbers * torch.int16.itemsize


def memory_budget(
    config: PreTrainedConfig, mib: float, tokens: int, *, window: int, sinks: int, calibrated: bool
) -> Memory:
    """A budget for the cache of one text of `tokens`, with the maps of random rotations.

    Args:
        config: the model's.
        mib: MiB for all layers, those that keep their own small cache included.
        window, sinks: of packed layers.
        calibrated: the maps may come with error feedback; the budget must have room for that in every layer.

    Raises:
        ValueError: too small a budget, one that the exact cache fits, or see `count`.
    """
    text = config.get_text_config(decoder=True)
    layers, heads, dim = quantizable_layers(config), kv_heads(text), head_dim(text)
    packed, exact = (TurboQuantConfig(bits=bits, window=window, sinks=sinks) for bits in (BITS[0], EXACT))
    cache = TurboQuantCache(config, packed, max_cache_len=tokens)
    parts = count(cache, config)
    whole = [sum(part.values()) for part in count(TurboQuantCache(config, exact, max_cache_len=tokens), config)]
    memory = Memory(
        dict.fromkeys(layers, (heads, dim)), mib,
        packed=cache.packed_layers()[0].k_scales.shape[2] * TILE,
        around={i: parts[i]["exact"] for i in layers},
        maps={i: parts[i]["maps"] for i in layers},
        exact={i: whole[i] for i in layers},
        beside=sum(size for i, size in enumerate(whole) if i not in layers),
    )  # fmt: skip
    feedback = 2 * heads * (dim // 2) ** 2 * torch.float32.itemsize
    feedback += 2 * heads * (operands_size(dim, True) - operands_size(dim, False)) * torch.int16.itemsize
    with_feedback = replace(memory, maps={i: size + feedback * calibrated for i, size in memory.maps.items()})
    least = smallest(with_feedback, offered(BITS, exact=True))
    all_exact = memory.needed(sum(memory.exact.values()))
    if least >= all_exact:
        raise ValueError(
            f"expected a context that packing makes smaller, got {tokens} tokens: their exact cache takes "
            f"{all_exact:.3f} MiB, packed layers with their maps no less; give a longer context"
        )
    if mib < least:
        raise ValueError(
            f"expected memory of at least {rounded_up(least)} MiB, got {mib:g}: the least that a cache for {tokens} "
            "tokens of this model takes; give more, or a shorter context"
        )
    if mib >= all_exact:
        raise ValueError(
            f"expected memory below {all_exact:.3f} MiB, got {mib:g}: the exact cache for {tokens} tokens fits; "
            "use the model as it is, or give a longer context"
        )
    return memory
