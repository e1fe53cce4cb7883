"""What every quality experiment starts from: a model, its quantised layers, and text split by article."""

import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tq_ao.calibration.allocation import Shape
from tq_ao.rotation import LayerMaps, MapSource


@dataclass(frozen=True)
class Setup:
    """One model and its text.

    Attributes:
        name: short name for files.
        model: float32 transformers causal LM in eval mode.
        calibration, evaluation: int64 [n, N] windows of disjoint articles.
        recall: int64 [m, N] windows made of the calibration articles (see `tq_ao.recall`).
        plain: layer -> the maps the cache uses uncalibrated, on the model's device.
        shape: sizes of the quantised layers.
        text: what the text is, in words.
    """

    name: str
    model: torch.nn.Module
    calibration: torch.Tensor
    recall: torch.Tensor
    evaluation: torch.Tensor
    plain: dict[int, LayerMaps]
    shape: Shape
    text: str


def plain_maps(
    model: torch.nn.Module, layers: list[int], seed: int = 0, kind: str = "hadamard"
) -> dict[int, LayerMaps]:
    """The random rotations the cache gives these layers, on the model's device."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    source, device = MapSource(kind, seed), next(model.parameters()).device
    return {i: source(i, heads, dim, device) for i in layers}


def prepare(
    name: str,
    *,
    length: int,
    calibration: int,
    evaluation: int,
    recall: int = 0,
    text: str = "enwiki",
    seed: int = 0,
    all_layers: bool = False,
) -> Setup:
    """Load a model in float32 (on the GPU if there is one) and cut its text.

    Args:
        name: anything `tq_ao.models.resolve` knows.
        length: tokens per window.
        calibration, evaluation, recall: windows of each.
        all_layers: also quantise sliding-window layers, which the cache normally leaves to the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tq_ao.cache import quantizable_layers
    from tq_ao.models import resolve
    from tq_ao.recall import recall_windows
    from tq_ao.text import articles, split_articles, windows

    found = resolve(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(found.path_or_id, dtype=torch.float32).eval().to(device)
    model.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(found.path_or_id)
    halves = split_articles(articles(text), seed)
    chosen_on = windows(tokenizer, halves[0], length, calibration)
    recalled = recall_windows(tokenizer, halves[0], length, recall, seed)
    measured_on = windows(tokenizer, halves[1], length, evaluation)
    config = model.config.get_text_config(decoder=True)
    layers = list(range(config.num_hidden_layers)) if all_layers else quantizable_layers(model.config)
    plain = plain_maps(model, layers, seed)
    shape = Shape({i: tuple(m.key_shift.shape) for i, m in plain.items()})  # type: ignore[misc]
    source = text if text == "enwiki" else Path(text).name
    what = f"{source}, split by article (seed {seed}), {evaluation} x {length} tokens held out"
    return Setup(found.name, model, chosen_on, recalled, measured_on, plain, shape, what)


def provenance() -> dict[str, Any]:
    """Versions, commit and device, for result files."""
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers")} | {
        "python": platform.python_version()
    }
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"versions": versions, "commit": done.stdout.strip() or None, "device": device}
