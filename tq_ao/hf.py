"""Making a transformers model use a packed cache: in `generate`, in plain calls, and across save and load."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.utils import logging

from tq_ao import attention, devices
from tq_ao.attention import check_supported, exchange_attention
from tq_ao.cache import (
    CACHE_NAMES,
    GENERATE_CACHE,
    TurboQuantCache,
    cache_argument,
    check_shape,
    find_decoder,
    head_dim,
    longest_text,
    quantizable_layers,
    static_length,
    takes_cache,
)
from tq_ao.config import FORMAT, TRANSFORMS_FILE, TurboQuantConfig
from tq_ao.quantizer import TurboQuantQuantizationConfig
from tq_ao.rotation import LayerMaps, MapSource
from tq_ao.transforms_file import find_transforms, load_transforms, save_transforms

if TYPE_CHECKING:
    from tq_ao.quantize import TurboQuantKVCacheConfig

# Times the energy of what varies in keys.  Qwen2.5-Coder-1.5B has 7700 and 290 in its first layers, below 3 in others.
_KEY_BIAS = 10.0
logger = logging.get_logger(__name__)


class _Slot:
    """Holds one object and knows how often it is referred to, read the same way on every Python."""

    def __init__(self, item: object) -> None:
        self.item = item

    def references(self) -> int:
        return sys.getrefcount(self.item)


_OURS_ALONE = _Slot(object()).references()


class Attachment:
    """What `model.turboquant` holds: the resolved schedule and the maps, and how to make caches from them.

    Attributes:
        quantization: the schedule, every packed layer spelled out.
        maps: source of the layers' maps.
    """

    def __init__(self, model_config: PreTrainedConfig, quantization: TurboQuantConfig, maps: MapSource) -> None:
        self._model_config, self.quantization, self.maps = model_config, quantization, maps
        self._last = _Slot(None)
        self._last_kind: tuple[torch.device, torch.dtype, bool] | None = None
        cache = self.make_cache()  # draws random maps, which a compiled program could not
        self._all_packed = len(cache.packed_layers()) == len(cache.layers)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a model go without its last cache."""
        return self.__dict__ | {"_last": _Slot(None), "_last_kind": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.make_cache()

    def make_cache(self, max_cache_len: int | None = None) -> TurboQuantCache:
        """A new cache: growing, or static for `max_cache_len` tokens."""
        # Whether the schedule is this model's was checked; drafts of an early exit have fewer layers for a while.
        return TurboQuantCache(
            self._model_config, replace(self.quantization, num_layers=None), self.maps, max_cache_len
        )

    def static_cache(
        self, max_cache_len: int, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> TurboQuantCache:
        """A static cache for `generate`: the last one, emptied, if it fits and nobody else kept it.

        The same buffers mean the same captured graphs.  "Nobody kept it" is its reference count.
        """
        size = static_length(max_cache_len)
        # Buffers of layers that are not ours, made under inference mode, could not be emptied after it.
        kind = device, dtype, not self._all_packed and torch.is_inference_mode_enabled()
        alone = self._last.references() <= _OURS_ALONE  # before the next line refers to it too
        last = self._last.item
        if (
            alone
            and isinstance(last, TurboQuantCache)
            and self._last_kind == kind
            and last.get_max_length() >= size
            and last.batch_size in (-1, batch_size)
        ):
            last.reset()
            return last
        new = self.make_cache(size)
        self._last, self._last_kind = _Slot(new), kind
        return new


def attach(
    model: PreTrainedModel, quantization: TurboQuantConfig, calibrated: Mapping[int, LayerMaps] | None = None
) -> PreTrainedModel:
    """Give a model a packed KV cache, in place.

    Args:
        model: a decoder-only transformers model.
        quantization: the schedule.
        calibrated: layer index -> maps; None: random rotations.

    Returns:
        The model; `model.turboquant` is its Attachment.

    Raises:
        ValueError: no transformers model, but what wraps one; a model whose attention cannot read packed K and V or
            whose forward takes no cache, a head_dim that is not a multiple of 32, a device without kernels, a schedule
            for another shape, or a window that no text of the model outgrows.
    """
    _check_model(model)
    check_supported(model.config)
    devices.check(model.device)
    decoder = find_decoder(model)
    for module in (model, decoder):
        cache_argument(module)
    config = model.config.get_text_config(decoder=True)
    dim, layers = head_dim(config), quantizable_layers(config)
    check_shape(config, quantization)
    if quantization.window >= (longest := longest_text(config)):
        raise ValueError(
            f"expected a window of fewer than the {longest:g} tokens that this model reads, got {quantization.window}; "
            "no text would ever leave it, and nothing be packed"
        )
    if stray := [i for i in quantization.layers if i not in layers]:
        raise ValueError(
            f"the schedule names layers {stray}, which are not full-attention layers of this model; those are {layers}"
        )
    resolved = quantization.resolve(layers, config.num_hidden_layers, dim)
    if resolved.transforms and not calibrated:
        raise ValueError(
            f"the schedule names transforms {resolved.transforms!r}, but no maps came with it; "
            "pass them as `calibrated`"
        )
    if calibrated:
        resolved = replace(resolved, transforms=resolved.transforms or TRANSFORMS_FILE)
    attachment = Attachment(model.config, resolved, MapSource(resolved.rotation, resolved.seed, calibrated))
    attention.register()
    asked = decoder.config._attn_implementation
    if asked and (asked.startswith(("flash", "flex")) or (asked == "eager" and model._supports_sdpa)):
        logger.warning(
            "attn_implementation=%r gives way to the attention that reads packed keys and values; prompts use SDPA",
            asked,
        )
    exchange_attention(model, attention.ATTENTION_NAME)
    attached = isinstance(getattr(model, "turboquant", None), Attachment)
    model.turboquant = attachment
    existing = getattr(model.config, "quantization_config", None)
    # A dict is what transformers leaves of a method that it did not know: a checkpoint loaded before `import tq_ao`.
    method = existing.get("quant_method") if isinstance(existing, dict) else getattr(existing, "quant_method", None)
    if method in (None, FORMAT):
        model.config.quantization_config = TurboQuantQuantizationConfig(resolved.to_scheme())
    elif method == "torchao" and not isinstance(existing, dict):  # which transformers knows and makes an object of
        existing.kv_cache_scheme = resolved.to_scheme()
    else:
        logger.warning(
            "%s weights have no place for a KV-cache schedule in their config: this model packs its cache now, "
            "but a copy saved with save_pretrained will not",
            method,
        )
    random_maps = [i for i in layers if not (calibrated and i in calibrated) and not resolved.layer(i).exact]
    if bias := _key_bias(model, random_maps):
        logger.warning(
            "the bias of k_proj has %.0f times the energy of what varies in the keys (layer %d), and a random rotation "
            "spreads it over all dims: expect wrong text even at 4 bits. Convert the model: its maps subtract the bias",
            *bias,
        )
    if not attached:
        model._prepare_cache_for_generation = _Method(_prepare_cache_for_generation, model)
        model.save_pretrained = _Method(_save_pretrained, model)
        if model.base_model is not decoder and takes_cache(model.base_model):  # some make their cache before it
            model.base_model.register_forward_pre_hook(_BeforeCall(model, model.base_model), with_kwargs=True)
        decoder.register_forward_pre_hook(_BeforeDecoder(model, decoder), with_kwargs=True)
    return model


def _key_bias(model: PreTrainedModel, layers: list[int]) -> tuple[float, int] | None:
    """Energy of k_proj's bias over that of W x for x of unit variance, and the layer where it is largest; None below
    _KEY_BIAS."""
    found = []
    for module in find_decoder(model).modules():
        projection, layer = getattr(module, "k_proj", None), getattr(module, "layer_idx", None)
        bias, weight = getattr(projection, "bias", None), getattr(projection, "weight", None)
        readable = isinstance(bias, torch.Tensor) and type(weight) is torch.nn.Parameter
        if layer in layers and readable and not (weight.is_meta or bias.is_meta):
            energy, varying = (x.detach().float().square().sum() for x in (bias, weight))
            found.append((float(energy / varying.clamp_min(1e-30)), layer))
    largest = max(found, default=(0.0, 0))
    return largest if largest[0] > _KEY_BIAS else None


def _check_model(model: object) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"expected a transformers model, got {type(model).__name__}; attach before wrapping it, or pass what it "
            "wraps: model.get_base_model() of PEFT, model._orig_mod of torch.compile, the model of a pipeline"
        )


def quantize_kv_(
    model: PreTrainedModel, config: "TurboQuantConfig | TurboQuantKVCacheConfig | None" = None
) -> PreTrainedModel:
    """Give a model a packed KV cache, in place and without a checkpoint.

    Args:
        model: a decoder-only transformers model.
        config: the schedule; None takes what torchao's `quantize_` recorded on its attention modules, else what the
            model has already, of a converted checkpoint or an earlier call, else uniform 3 bits.

    Raises:
        ValueError: see `attach`; also a config that names a transforms file, which only a checkpoint has.
    """
    _check_model(model)
    attached = getattr(model, "turboquant", None)
    if not isinstance(config, TurboQuantConfig):
        from tq_ao.quantize import TurboQuantKVCacheConfig, attach_recorded, has_records

        if config is None:
            if has_records(model):
                return attach_recorded(model)
            if isinstance(attached, Attachment):
                return model
            if scheme := _scheme_of(model.config):  # loaded before `import tq_ao`
                return attach_checkpoint(model, scheme)
            config = TurboQuantConfig()
        elif isinstance(config, TurboQuantKVCacheConfig):
            config = config.to_config()
        else:
            raise ValueError(
                f"expected a TurboQuantConfig, got {type(config).__name__}; write quantize_kv_(model, "
                "TurboQuantConfig(bits=3))"
            )
    if isinstance(attached, Attachment) and attached.maps.calibrated:
        logger.warning(
            "this model's calibrated maps are replaced by random rotations; quantize_kv_(model) keeps them, and "
            "converting it again makes new ones"
        )
    if config.transforms is not None:
        raise ValueError(
            f"expected transforms=None without a checkpoint, got {config.transforms!r}; "
            "load the converted model with from_pretrained"
        )
    return attach(model, config)


def _scheme_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The schedule in a checkpoint's config, whether its quantization_config was understood or left a dict."""
    found = getattr(config, "quantization_config", None)
    values = found if isinstance(found, dict) else vars(found) if found is not None else {}
    return values.get("kv_cache_scheme") if values.get("quant_method") in (FORMAT, "torchao") else None


def attach_checkpoint(model: PreTrainedModel, scheme: Mapping[str, Any], folder: Path | None = None) -> PreTrainedModel:
    """`attach` for a model just loaded from a converted checkpoint; finds its transforms file, local or on the Hub.

    Args:
        model: the model.
        scheme: JSON form of its TurboQuantConfig.
        folder: where its weights were found; None: not known.

    Raises:
        ValueError: see `TurboQuantConfig.from_scheme`, `load_transforms` and `attach`.
        OSError: no transforms file.
    """
    quantization = TurboQuantConfig.from_scheme(scheme)
    calibrated = None
    if quantization.transforms is not None:
        calibrated = load_transforms(find_transforms(model.config, quantization.transforms, folder))
    return attach(model, quantization, calibrated)


class _Method:
    """A function in place of a model's method.  (A bound method would be looked up in the class when unpickled.)"""

    def __init__(self, function: Callable, model: PreTrainedModel) -> None:
        self.function, self.model = function, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.model, *args, **kwargs)


def _save_pretrained(self: PreTrainedModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    attached = self.turboquant
    if attached.maps.calibrated:
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "save_pretrained(push_to_hub=True) would upload the model without its transforms file; "
                "use model.push_to_hub(repo_id)"
            )
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        save_transforms(Path(save_directory) / attached.quantization.transforms, attached.maps.calibrated)
    return type(self).save_pretrained(self, save_directory, *args, **kwargs)


def _prepare_cache_for_generation(
    self: PreTrainedModel,
    generation_config: Any,
    model_kwargs: dict,
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Our cache unless the caller passed one, wants none, or names another kind; static where generate compiles."""
    asked, given = generation_config.cache_implementation, model_kwargs.get(GENERATE_CACHE)
    if generation_config.is_assistant and (mask := model_kwargs.get("attention_mask")) is not None:
        # Where the caller gave none, `generate` takes pad tokens inside the text, guesses or not, for padding.
        model_kwargs["attention_mask"] = (mask.cumsum(-1) > 0).to(mask.dtype)
    guessed = generation_config.is_assistant or generation_mode == GenerationMode.ASSISTED_GENERATION
    wanted = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
    if guessed:
        wanted += max(generation_config.prompt_lookup_num_tokens or 0, generation_config.num_assistant_tokens or 0)
    if isinstance(given, TurboQuantCache):  # on a GPU the one that the last call returned is static: a chat goes on
        given.make_room(wanted)
    if given is not None or not generation_config.use_cache or asked not in (None, "dynamic", "static"):
        type(self)._prepare_cache_for_generation(
            self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        return
    # Guesses reach beyond the last token and are taken back, which static sliding layers cannot do: a growing cache.
    if asked == "static" or (asked is None and self.device.type == "cuda" and not guessed):
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        cache = self.turboquant.static_cache(wanted, rows, self.device, self.dtype)
    else:
        cache = self.turboquant.make_cache()
    if generation_config.is_assistant:  # its guesses are taken back: sliding layers must keep what has left them
        cache.activate_past_recording()
    model_kwargs[GENERATE_CACHE] = cache


class _BeforeCall:
    """Pre-hook of a module that would make its own cache: a packed one for plain calls."""

    def __init__(self, model: PreTrainedModel, module: torch.nn.Module) -> None:
        self.model, self.name = model, cache_argument(module)
        self.others = [other for other in CACHE_NAMES if other != self.name]

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        name = self.name
        for other in self.others:  # a forward would take it for one more keyword and never read it
            if other in kwargs and (given := kwargs.pop(other)) is not None:
                if kwargs.get(name) is not None:
                    raise ValueError(f"expected one cache, got both {name!r} and {other!r}; pass {name!r} only")
                kwargs[name] = given
        use_cache = kwargs.get("use_cache")
        use_cache = getattr(module.config, "use_cache", None) if use_cache is None else use_cache
        if kwargs.get(name) is None and use_cache:
            if not torch.is_grad_enabled():
                kwargs[name] = self.model.turboquant.make_cache()
            elif not module.training and not torch.compiler.is_compiling():
                logger.warning_once(
                    "this call gets an exact KV cache, not a packed one: gradients are enabled and codes have none; "
                    "call the model under torch.no_grad()"
                )
        return args, kwargs


class _BeforeDecoder(_BeforeCall):
    """The same of the decoder, which also tells the cache each row's padding."""

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        args, kwargs = super().__call__(module, args, kwargs)
        cache = kwargs.get(self.name)
        if isinstance(cache, TurboQuantCache):
            tokens = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
            tokens = args[0] if tokens is None else tokens
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            cache.observe_mask(mask, *tokens.shape[:2])
            if kwargs.get("output_attentions") and not torch.compiler.is_compiling():
                logger.warning_once(
                    "output_attentions: attention to a packed cache keeps no weights and returns none; for them, load "
                    "the original model with attn_implementation='eager'"
                )
        return args, kwargs
