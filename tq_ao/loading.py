"""What a conversion starts from: the model, its text and the budget, with cheap checks before anything is loaded."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tq_ao import devices, fold, hf
from tq_ao.cache import longest_text, quantizable_layers, static_length
from tq_ao.calibration.allocation import Memory
from tq_ao.checkpoint import find_stored, was_folded
from tq_ao.config import FORMAT
from tq_ao.errors import ModelError, TextError
from tq_ao.fold import Folded
from tq_ao.footprint import memory_budget
from tq_ao.models import ResolvedModel, auto_class, resolve
from tq_ao.recall import recall_windows
from tq_ao.recipe import Recipe
from tq_ao.rotation import LayerMaps
from tq_ao.text import articles, split_articles, windows


@dataclass
class Conversion:
    """A model on its way: what was loaded and what has been decided about it.

    Attributes:
        recipe: the settings; a mapping of layers has them all.
        source: the resolved model.  folder: its files on this machine.
        model, tokenizer: loaded.
        schedule: layer -> (k_bits, v_bits).  maps: layer -> calibrated maps, or None.
        calibration, verification: int64 [n, N] windows.  recall: int64 [m, N] windows to calibrate on besides.
        memory: the recipe's `memory` in bytes, with the maps of random rotations; None: the budget is in bits.
        stored: parameter that `fold_values` will change -> the file and key it is stored as.
        folded: what `fold_values` has done, or None.
        report: everything measured, as written to JSON.
    """

    recipe: Recipe
    source: ResolvedModel
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: torch.Tensor
    recall: torch.Tensor
    verification: torch.Tensor
    memory: Memory | None = None
    schedule: dict[int, tuple[int, int]] = field(default_factory=dict)
    maps: dict[int, LayerMaps] | None = None
    stored: dict[str, tuple[Path, str]] = field(default_factory=dict)
    folded: Folded | None = None
    report: dict[str, Any] = field(default_factory=dict)


def load(
    recipe: Recipe, *, token: str | None, device: str | None, dtype: torch.dtype | None, say: Callable[[str], None]
) -> Conversion:
    """Resolve and load everything a conversion reads: cheap checks first, then text, then weights."""
    device = devices.named(device)
    source = _resolve(recipe, token)
    config = AutoConfig.from_pretrained(source.path_or_id, token=token)
    recipe = _whole(recipe, source, config)
    without_cache_schedule(config)
    kind = auto_class(config)
    if recipe.schedule == "auto":
        check_gradients(config)
    layers = quantizable_layers(config)
    longest = longest_text(config.get_text_config(decoder=True))
    length = max(recipe.verification.length, recipe.calibration.length if recipe.schedule == "auto" else 0)
    if length > longest:
        raise TextError(
            f"expected windows of at most {longest:g} tokens, what {source.name} can read, got {length}; "
            "give --max-seq-length (length in a recipe)"
        )
    memory = memory_of(recipe, config)
    changing, prefix = fold.check_config(config, layers) if recipe.fold_values else ([], "")
    tokenizer = AutoTokenizer.from_pretrained(source.path_or_id, token=token)
    text = articles(recipe.calibration.source)
    if recipe.verification.source == recipe.calibration.source:
        for_calibration, for_verification = split_articles(text, recipe.seed)
    else:
        for_calibration, for_verification = text, articles(recipe.verification.source)
    calibration = windows(tokenizer, for_calibration, recipe.calibration.length, recipe.calibration.windows)
    recalls = recipe.calibration.recall if recipe.schedule == "auto" else 0
    recall = recall_windows(tokenizer, for_calibration, recipe.calibration.length, recalls, recipe.seed)
    verification = windows(tokenizer, for_verification, recipe.verification.length, recipe.verification.windows)
    dtype = dtype or _dtype(config, device)
    say(f"loading {source.path_or_id} ({str(dtype).removeprefix('torch.')} on {device})")
    folder = Path(source.path_or_id)
    if not source.is_local:
        from huggingface_hub import snapshot_download

        unused = ["*.gguf", "*.bin", "*.pth", "original/*"]
        try:
            folder = Path(snapshot_download(source.path_or_id, token=token, ignore_patterns=unused))
        except Exception as error:  # of the Hub client, its HTTP library or the disk
            reason = " ".join(str(error).split())
            raise ModelError(
                f"the download of {source.path_or_id} broke off ({type(error).__name__}: {reason}); run again to go on"
            ) from error
    stored = find_stored(folder, changing, prefix) if changing else {}
    try:
        model = kind.from_pretrained(folder, config=config, dtype=dtype).to(device).eval()
    except SafetensorError as error:
        raise ModelError(f"{folder}: a safetensors file is damaged ({error}); copy or download it again") from error
    if changing:
        fold.check_path(model, layers, calibration[:1, :32])
    return Conversion(
        recipe, source, folder, model, tokenizer, calibration, recall, verification, memory, stored=stored,
        report={"folded_base": was_folded(folder), "loads_with": kind.__name__},
    )  # fmt: skip


def whole(recipe: Recipe, *, token: str | None) -> Recipe:
    """A recipe whose schedule maps layers, for all layers of its model (see `Recipe.whole`); reads only its config."""
    if isinstance(recipe.schedule, str):
        return recipe
    source = _resolve(recipe, token)
    return _whole(recipe, source, AutoConfig.from_pretrained(source.path_or_id, token=token))


def _resolve(recipe: Recipe, token: str | None) -> ResolvedModel:
    if recipe.model.lower().endswith(".gguf"):
        raise ModelError(
            f"{recipe.model}: expected a model in safetensors, got GGUF, which is not read; give that model"
        )
    return resolve(recipe.model, token)


def _whole(recipe: Recipe, source: ResolvedModel, config: PreTrainedConfig) -> Recipe:
    hf.check_supported(config)
    layers = quantizable_layers(config)
    if not isinstance(recipe.schedule, str) and (stray := sorted(set(recipe.schedule) - set(layers))):
        raise ValueError(
            f"the schedule names layers {stray}, which are not full-attention layers of {source.name}; "
            f"those are {layers}"
        )
    return recipe.whole(layers)


def without_cache_schedule(config: PreTrainedConfig) -> None:
    """Make the config of a model converted before that of its weights alone, in place.

    Raises:
        ModelError: weights quantised by a method whose config.json has no room for a schedule.
    """
    weights = getattr(config, "quantization_config", None)
    if weights is None:
        return
    method = weights.get("quant_method")
    if method == FORMAT:
        del config.quantization_config
    elif method == "torchao":
        weights.pop("kv_cache_scheme", None)
    else:
        raise ModelError(
            f"the weights are quantised with {method!r}: expected a model with plain or torchao weights; convert the "
            "unquantised model, or pack the cache of the loaded one with tq_ao.quantize_kv_"
        )


def check_gradients(config: PreTrainedConfig) -> None:
    """Raise ModelError for torchao weights that no gradient goes through, which schedule auto measures with."""
    weights = json.dumps(getattr(config, "quantization_config", {}), default=str)
    if kinds := sorted(set(re.findall(r'"_type": "(\w*Activation\w*)"', weights))):
        raise ModelError(
            f"expected weights that gradients go through with schedule auto, got {', '.join(kinds)}; convert with "
            "schedule uniform or a schedule file, or a model whose weights alone are quantised"
        )


def _dtype(config: PreTrainedConfig, device: str) -> torch.dtype:
    """To calibrate in: bfloat16 on a GPU, else float32; quantised weights multiply in the dtype they were made for."""
    stored = config.get_text_config(decoder=True).dtype or config.dtype
    if getattr(config, "quantization_config", None) is not None and isinstance(stored, torch.dtype):
        return stored
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def context_of(recipe: Recipe, text_config: Any) -> int:
    """Tokens that maps are to serve: the recipe's, or what the model can read (0 if its config does not say)."""
    reach = longest_text(text_config) if recipe.context is None else recipe.context
    return int(reach) if math.isfinite(reach) else 0


def memory_of(recipe: Recipe, config: PreTrainedConfig) -> Memory | None:
    """The recipe's `memory` in bytes, for the cache that `generate` allocates for a text of its context.

    Raises:
        ValueError: no context is known, or see `memory_budget`.
    """
    if recipe.memory is None:
        return None
    tokens = context_of(recipe, config.get_text_config(decoder=True))
    if not tokens:
        raise ValueError("expected a context with memory, got none, and the model's config has no limit; give one")
    return memory_budget(
        config, recipe.memory, static_length(tokens), window=recipe.window, sinks=recipe.sinks,
        calibrated=recipe.maps == "auto",
    )  # fmt: skip
