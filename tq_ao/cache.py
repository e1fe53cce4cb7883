"""The KV cache transformers sees: packed layers where the schedule says so, the model's own kinds elsewhere."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    StaticLayer,
    StaticSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from tq_ao.cache_layer import TurboQuantLayer
from tq_ao.config import TurboQuantConfig
from tq_ao.rotation import MapSource

# What transformers calls a model's KV cache: 5.24 renamed the second to the first, in forwards, outputs and `generate`.
CACHE_NAMES = ("cache", "past_key_values")
SLIDING = "sliding_attention"  # the layer type
_STATIC_STEP = 128


def _name_in_generate() -> str:
    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise ImportError(
        f"expected transformers' generate to take the KV cache as one of {CACHE_NAMES}, got {list(parameters)}; "
        "install a transformers version in the range tq_ao requires"
    )


# The name in the installed transformers: that of `generate`, of outputs, and of every model of its own.
GENERATE_CACHE = _name_in_generate()


def cache_argument(module: torch.nn.Module) -> str:
    """Name of the parameter by which a module's forward takes the KV cache.

    Code on the Hub may still have the old name where transformers has the new one. Not the reverse: before the
    renaming, a parameter `cache` was something else (XLM's, for one).

    Raises:
        ValueError: a forward without that parameter.
    """
    forward: Callable = module.forward
    parameters = inspect.signature(forward).parameters
    for name in dict.fromkeys((GENERATE_CACHE, "past_key_values")):
        if name in parameters:
            return name
    raise ValueError(
        f"{type(module).__name__}: expected a forward that takes the KV cache as {GENERATE_CACHE!r}, got "
        f"{list(parameters)}; a cache cannot reach this model, give its forward that parameter"
    )


def takes_cache(module: torch.nn.Module) -> bool:
    """Whether `cache_argument` has a name."""
    try:
        cache_argument(module)
    except ValueError:
        return False
    return True


def find_decoder(model: PreTrainedModel) -> torch.nn.Module:
    """The part of a model that reads the cache.

    It is what transformers calls the decoder, unless that is something else of this name that takes no cache
    (modernbert-decoder's maps hidden states to logits): then the base model.
    """
    decoder = model.get_decoder()
    return decoder if takes_cache(decoder) else model.base_model


def quantizable_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of the layers a schedule may pack: full attention, in name or in effect, with a KV cache of their own."""
    types, _ = _layer_types(config)
    return [i for i, kind in enumerate(types) if kind == "full_attention"]


def layer_types(config: PreTrainedConfig) -> list[str]:
    """The kinds of the layers' caches, sorted and each once."""
    return sorted({*_layer_types(config)[0]})


def sliding_windows(config: PreTrainedConfig) -> list[int]:
    """The windows of the layers that really slide, in tokens, ascending and each once."""
    return sorted(
        {extra["sliding_window"] for kind, extra in zip(*_layer_types(config), strict=True) if kind == SLIDING}
    )


def _layer_types(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """Kind of every layer's cache and what to make it with; a window that no text outgrows is full attention.

    Phi-3.5-mini and Phi-4-mini declare 262144 tokens in every layer and read 131072.  All sliding layers or none:
    transformers makes one mask for them all, as long as the first of them that slides in the cache, else as layer 0;
    so every layer must be of one of the two kinds, too.
    """
    text = config.get_text_config(decoder=True)
    types, kwargs = get_layer_types_and_kwargs(text)
    types = types[: text.num_hidden_layers]  # which transformers lowers for the drafts of an early exit, not the types
    kwargs = kwargs if isinstance(kwargs, list) else [kwargs] * len(types)
    windows = [extra["sliding_window"] for kind, extra in zip(types, kwargs, strict=True) if kind == SLIDING]
    if windows and {*types} <= {SLIDING, "full_attention"} and min(windows) >= longest_text(text):
        return ["full_attention"] * len(types), [{}] * len(types)
    return list(types), kwargs


def longest_text(text_config: PreTrainedConfig) -> float:
    """Tokens a text may have: max_position_embeddings, or what its positions are stretched to; inf if not known.

    Some configs keep max_position_embeddings when a stretching of positions (YaRN, linear) is written into them.
    """
    stated = getattr(text_config, "max_position_embeddings", None)
    if stated is None:
        return math.inf
    rope = getattr(text_config, "rope_parameters", None) or {}
    reach = [stated]
    for part in (rope, *rope.values()):  # one set of parameters, or one by layer type
        if isinstance(part, dict) and part.get("factor"):
            reach.append(part["factor"] * (part.get("original_max_position_embeddings") or stated))
    return max(reach)


def static_length(tokens: int) -> int:
    """Tokens that the static cache of a text of `tokens` is allocated for."""
    return -(-tokens // _STATIC_STEP) * _STATIC_STEP


class TurboQuantCache(Cache):
    """KV cache of a whole model: packed layers by schedule, every other layer as the model wants it.

    Args:
        config: the model's config.
        quantization: the schedule.
        maps: source of the layers' maps; None: random rotations of `quantization`.
        max_cache_len: static cache of that many tokens (compiles), or None for a growing one.

    Raises:
        ValueError: a schedule for another number of layers or another head_dim.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        quantization: TurboQuantConfig | None = None,
        maps: MapSource | None = None,
        max_cache_len: int | None = None,
    ) -> None:
        quantization = quantization or TurboQuantConfig()
        maps = maps or MapSource(quantization.rotation, quantization.seed)
        text_config = config.get_text_config(decoder=True)
        check_shape(text_config, quantization)
        layers: list[Any] = []
        types, kwargs = _layer_types(config)
        for i, (kind, extra) in enumerate(zip(types, kwargs, strict=True)):
            scheme = quantization.layer(i)
            if kind == "full_attention" and not scheme.exact:
                layers.append(TurboQuantLayer(i, scheme, maps, quantization.window, quantization.sinks, max_cache_len))
            elif max_cache_len is None:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**extra))
            else:
                layers.append(STATIC_LAYER_TYPE_MAPPING[kind](max_cache_len=max_cache_len, **extra))
        super().__init__(layers=layers)
        try:
            heads = kv_heads(text_config)
        except RuntimeError:  # configs with a value for each layer: their maps are drawn when keys come
            heads = 0
        for packed in self.packed_layers() if heads else ():
            maps.draw(packed.index, heads, head_dim(text_config))
        self.quantization = quantization
        self._kinds, self._room = list(zip(types, kwargs, strict=True)), max_cache_len
        for layer in self.packed_layers()[:1]:
            layer.guards_length = max_cache_len is not None
        self._mask_faults: torch.Tensor | None = None  # bool [4], on a GPU looked at when the next mask arrives

    def reset(self) -> None:
        """Empty every layer, keeping the buffers."""
        super().reset()
        self._mask_faults = None

    def make_room(self, tokens: int) -> None:
        """Let a static cache hold at least `tokens` tokens, what it holds included: half as many again at a time.

        A growing cache has room anyway.  Compiled programs that read the cache compile anew.

        Raises:
            ValueError: layers of a kind that cannot be made longer.
        """
        have = self._room
        if have is None or tokens <= have:
            return
        size = static_length(max(tokens, have + have // 2))
        others = []
        for layer, (kind, extra) in zip(self.layers, self._kinds, strict=True):
            longer = STATIC_LAYER_TYPE_MAPPING[kind](max_cache_len=size, **extra)
            if isinstance(layer, TurboQuantLayer) or not hasattr(longer, "max_cache_len"):  # the latter hold a state
                continue
            if longer.max_cache_len != layer.max_cache_len and type(layer) not in (
                StaticLayer,
                StaticSlidingWindowLayer,
            ):
                raise ValueError(
                    f"expected at most {have} tokens in a static cache with layers of type {type(layer).__name__}, got "
                    f"{tokens}; make a longer cache, or pass cache_implementation='dynamic'"
                )
            others.append((layer, longer))
        for packed in self.packed_layers():
            packed.make_room(size)
        for layer, longer in others:
            more = longer.max_cache_len - layer.max_cache_len
            for name in ("keys", "values") if more and layer.is_initialized else ():
                setattr(layer, name, torch.nn.functional.pad(getattr(layer, name), (0, 0, 0, more)))
                torch._dynamo.mark_static_address(getattr(layer, name))
            layer.max_cache_len = longer.max_cache_len
            if hasattr(longer, "_is_croppable"):  # transformers 5.24: whether a text never outgrows a sliding window
                layer._is_croppable = longer._is_croppable
        self._room = size

    def packed_layers(self) -> list[TurboQuantLayer]:
        """The layers that hold packed K and V."""
        return [layer for layer in self.layers if isinstance(layer, TurboQuantLayer)]

    def observe_mask(self, attention_mask: Any, batch_size: int, query_length: int) -> None:
        """Learn each row's left padding from the model's attention mask, before its keys arrive.

        Args:
            attention_mask: what the model was called with: None, [B, kv], bool or additive [B, 1, q, kv], or a
                dict of those by layer type; one of a single row holds for all.
            batch_size: rows.
            query_length: new tokens per row.

        Raises:
            ValueError: a mask of the new tokens only; padding after a row's first token, or that is not what it had
                been; or, for tokens that continue a cache, a mask that is not causal.  On a GPU the last three are
                raised by the next call (looking sooner would stall it), and so is padding in the first call, which may
                be the only one.
        """
        padding_only = False
        if self._mask_faults is not None and not torch.compiler.is_compiling():
            padding_only = _only_padding(self._mask_faults)
            self._mask_faults = None
        layers = self.packed_layers()
        if isinstance(attention_mask, dict):  # where no layer is full attention by name, packed ones slide by name only
            attention_mask = attention_mask.get("full_attention", attention_mask.get(SLIDING))
        if attention_mask is None or not layers:
            return
        if query_length == 1 and not layers[0].is_empty and not padding_only:
            return  # a decode step: nothing new to learn
        if attention_mask.shape[0] == 1:
            attention_mask = attention_mask.expand(batch_size, *attention_mask.shape[1:])
        seen = layers[0].get_seq_length()
        mask = attention_mask if attention_mask.dim() == 2 else attention_mask[:, 0, -1]
        if isinstance(seen, int) and mask.shape[-1] < seen + query_length:
            raise ValueError(
                f"expected an attention_mask that covers all {seen + query_length} tokens, cached ones included, "
                f"got {mask.shape[-1]}; pass the mask of the whole text"
            )
        valid = _visible(mask, attention_mask)
        begun = valid.cumsum(-1) > 0
        start = (~begun).sum(-1).clamp(max=seen + query_length)  # a row of padding so far: after these tokens
        if not torch.compiler.is_compiling():
            key = torch.arange(valid.shape[-1], device=valid.device)
            holes = (begun & ~valid & (key < seen + query_length)).any()
            old = layers[0].start.to(start.device) if layers[0].is_initialized else start
            changed = ((start != old) & (old < seen)).any() if old.shape == start.shape else holes
            custom = torch.zeros_like(holes)
            if attention_mask.dim() == 4 and query_length > 1 and not layers[0].is_empty:
                query = seen + torch.arange(query_length, device=valid.device)[:, None]
                causal = (key >= start[:, None, None]) & (key <= query)  # [B, q, kv]
                custom = (
                    (_visible(attention_mask, attention_mask) != causal[:, None]).any(1)
                    & (query >= start[:, None, None])
                ).any()
            faults = torch.stack([holes, changed, custom, (start == seen + query_length).any()])
            if not (start.is_cuda or layers[0].is_empty):
                _only_padding(faults)
            self._mask_faults = faults
        for layer in layers:
            layer.set_start(start)

    def nbytes(self) -> dict[str, int]:
        """Bytes of the packed layers, counted from the tensors: {"packed", "exact"}."""
        parts = [layer.nbytes() for layer in self.packed_layers()]
        return {key: sum(part[key] for part in parts) for key in ("packed", "exact")}


def _visible(mask: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Where `mask`, of which `attention_mask` is the whole, lets attention through: bool."""
    return mask > -1 if mask.is_floating_point() and attention_mask.dim() == 4 else mask != 0


def _only_padding(faults: torch.Tensor) -> bool:
    """Whether a row was padding only, from what `observe_mask` saw: bool [4].

    Raises:
        ValueError: holes, a first token that has moved, or a mask that is not causal.
    """
    holes, changed, custom, only_padding = faults.tolist()
    if holes:
        raise ValueError(
            "expected left padding, got a mask with padding after a row's first token; set "
            "tokenizer.padding_side='left', or pass attention_mask if the text itself has the pad token: without one, "
            "generate takes every pad token for padding. Soft prompts (of PEFT) stand before the padding: give them "
            "rows of one length"
        )
    if changed:
        raise ValueError(
            "expected the same left padding in every call, got a mask that moves the first token of a row "
            "that had begun; pass one mask that grows with the text, or a new cache"
        )
    if custom:
        raise ValueError(
            "expected a causal mask for tokens that continue a packed cache, got one that hides or shows others; "
            "packed tokens are attended to causally: pass the padding mask [batch, tokens], or a new cache"
        )
    return bool(only_padding)


def check_shape(text_config: PreTrainedConfig, quantization: TurboQuantConfig) -> None:
    """Raise ValueError unless the schedule was made for a model of this many layers and this head_dim."""
    have = text_config.num_hidden_layers
    if quantization.num_layers not in (None, have):
        raise ValueError(
            f"expected a schedule for {have} layers, got one for {quantization.num_layers}; convert this model again"
        )
    dim = head_dim(text_config)
    if quantization.head_dim not in (None, dim):
        raise ValueError(
            f"expected a schedule for head_dim {dim}, got one for {quantization.head_dim}; convert this model again"
        )


def head_dim(text_config: PreTrainedConfig) -> int:
    """The model's attention head_dim."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def kv_heads(text_config: PreTrainedConfig) -> int:
    """The model's KV heads; as many as query heads where the config does not say (GPT-NeoX, GPT-2, OPT)."""
    return getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
