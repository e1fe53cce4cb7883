"""The retrieval experiment on one model: its text, and the caches that are asked."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tq_ao import hf
from tq_ao.cache import TurboQuantCache, longest_text
from tq_ao.cache_layer import RING_SLACK
from tq_ao.config import EXACT, TurboQuantConfig
from tq_ao.errors import TextError
from tq_ao.evaluation.haystack import prompts
from tq_ao.evaluation.retrieval import Contender, retrieval
from tq_ao.evaluation.setup import name_of, provenance
from tq_ao.models import resolve
from tq_ao.reference import packed_tokens
from tq_ao.rotation import MapSource
from tq_ao.text import articles, split_articles, windows

UNIFORM = (3, 2, 1)  # 1 is the control: it must break


def contenders(model: PreTrainedModel) -> list[Contender]:
    """The exact cache, the model's own schedule, and uniform widths with random rotations.

    Args:
        model: with a schedule attached; it gives the window and the sinks of all.
    """
    own = model.turboquant
    layers, window, sinks = sorted(own.quantization.layers), own.quantization.window, own.quantization.sinks
    found = [Contender("exact", EXACT)]
    if model.dtype == torch.float32:
        found.append(Contender("exact, in bfloat16", EXACT, bfloat16=True))
    if own.maps.calibrated:
        found.append(Contender("schedule, calibrated", own.quantization.average_bits(layers), own.make_cache))
    for bits in UNIFORM:
        found.append(Contender("uniform, plain", bits, _maker(model, bits, window, sinks)))
    return found


def _maker(model: PreTrainedModel, bits: int, window: int, sinks: int) -> Callable[[], TurboQuantCache]:
    quantization = TurboQuantConfig(bits=bits, window=window, sinks=sinks)
    maps = MapSource(quantization.rotation, quantization.seed)
    return lambda: TurboQuantCache(model.config, quantization, maps)


def measure(
    name: str,
    lengths: Sequence[int],
    counts: Sequence[int],
    *,
    text: str = "enwiki",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Ask a model for facts in prompts of several lengths.

    Args:
        name: anything `tq_ao.models.resolve` knows; a model with calibrated maps is also asked with its own schedule.
        lengths: tokens of the prompts.
        counts: passkey prompts of each length, and twice as many as there are key-value prompts.
        text: what the facts are hidden in; of "enwiki" the articles that a conversion does not calibrate on.
        dtype: to compute in, and of the exact cache.

    Returns:
        {model, text, versions, commit, device, window, sinks, rows}.

    Raises:
        TextError: prompts longer than the model reads, or too little text.
    """
    found, origin = resolve(name), provenance()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(found.path_or_id, dtype=dtype).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(found.path_or_id)
    longest = longest_text(model.config.get_text_config(decoder=True))
    if max(lengths) > longest:
        raise TextError(
            f"expected prompts of at most {longest:g} tokens, what {found.name} can read, got {max(lengths)}"
        )
    if not hasattr(model, "turboquant"):
        report(f"{found.name} is not converted: asked with uniform schedules only")
        hf.attach(model, TurboQuantConfig())
    asked, own = contenders(model), model.turboquant.quantization
    held_out = split_articles(articles(text), seed)[1]
    rows = []
    for length, count in zip(lengths, counts, strict=True):
        filler = windows(tokenizer, held_out, length, count)
        last = own.sinks + packed_tokens(length, own.sinks, own.window, own.window + RING_SLACK)
        rows += retrieval(model, asked, prompts(tokenizer, filler, own.sinks, last, seed), report)
    source = text if text == "enwiki" else Path(text).name
    return {
        "model": _base_name(Path(found.path_or_id)) or found.name,
        "text": f"facts hidden in {source}, articles not calibrated on (seed {seed}), {name_of(dtype)}",
        **origin, "window": own.window, "sinks": own.sinks, "rows": rows,
    }  # fmt: skip


def _base_name(folder: Path) -> str | None:
    """What a converted folder was converted from: results are of that model, not of a folder's name."""
    report = folder / "tq_ao_config.json"
    return json.loads(report.read_text(encoding="utf-8"))["name"] if report.is_file() else None
