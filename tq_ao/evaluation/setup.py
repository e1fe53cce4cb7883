"""What every quality experiment starts from: a model, its quantised layers, and text split by article."""

import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tq_ao.cache import head_dim, kv_heads, quantizable_layers
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
    source, device = MapSource(kind, seed), next(model.parameters()).device
    return {i: source(i, kv_heads(config), head_dim(config), device) for i in layers}


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
    dtype: torch.dtype = torch.float32,
) -> Setup:
    """Load a model (on the GPU if there is one) and cut its text.

    Args:
        name: anything `tq_ao.models.resolve` knows.
        length: tokens per window.
        calibration, evaluation, recall: windows of each.
        all_layers: also quantise sliding-window layers, which the cache normally leaves to the model.
        dtype: to compute in.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tq_ao.models import resolve
    from tq_ao.recall import recall_windows
    from tq_ao.text import articles, split_articles, windows

    found = resolve(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(found.path_or_id, dtype=dtype).eval().to(device)
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
    what = f"{source}, split by article (seed {seed}), {evaluation} x {length} tokens held out, {name_of(dtype)}"
    return Setup(found.name, model, chosen_on, recalled, measured_on, plain, shape, what)


def name_of(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, commit (None outside a git checkout of this package) and device, for result files.

    Args:
        device: what was measured on; None: the GPU if there is one.
    """
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers")} | {
        "python": platform.python_version()
    }
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return {"versions": versions, "commit": _commit(), "device": name}


def _commit() -> str | None:
    """HEAD of the checkout this file is in; a package installed inside another project's has none."""
    here = Path(__file__).resolve()
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD", "--show-toplevel"], cwd=here.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return None
    commit, top = done.stdout.splitlines()
    return commit if Path(top).resolve() == here.parents[2] else None
