"""Conversion: load, calibrate, choose, verify, write.  The output is a checkpoint plain transformers can load too."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache

from tq_ao import __version__, fold, hf
from tq_ao.cache import GENERATE_CACHE, TurboQuantCache, head_dim, kv_heads, quantizable_layers, static_length
from tq_ao.calibration.allocation import MIB
from tq_ao.calibration.calibrate import calibrate
from tq_ao.calibration.target import LOSSES, losses, missed
from tq_ao.checkpoint import check_output, other_weights, write
from tq_ao.codebook import BITS
from tq_ao.config import LayerScheme
from tq_ao.evaluation.decode_kl import evaluate_caches, prove_packed
from tq_ao.evaluation.setup import name_of, provenance
from tq_ao.footprint import count
from tq_ao.loading import Conversion, context_of, load
from tq_ao.measure.metrics import Metrics
from tq_ao.recipe import UNIFORM, Recipe
from tq_ao.rotation import MapSource

SAMPLE_PROMPT, SAMPLE_TOKENS = 256, 48


def convert(
    recipe: Recipe,
    output: str | Path,
    *,
    token: str | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    command: str = "",
    repo_id: str | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Convert a model and write it to `output`, which appears complete or not at all.

    Args:
        recipe: what to do.
        output: folder to create.
        token: Hub token for gated and private models.
        device, dtype: to calibrate on; default CUDA and bfloat16 where there is a GPU, else CPU and float32.
        command: recorded in the model card.
        repo_id: where it is to be published, which the card's example loads; None: `output`.
        progress: tqdm bars.  say: receives one-line messages.

    Returns:
        The report (also `tq_ao_config.json` in the output).

    Raises:
        TurboQuantError, ValueError, OSError: one-line messages; nothing is left behind but the measurements of a
            calibration that was cut off or missed `max_kl` or `max_ppl`, which the next run takes up.  A note on the
            exception says where they are (`__notes__`).
    """
    shown, output = output, Path(output).resolve()
    check_output(output)
    began = time.monotonic()
    job = load(recipe, token=token, device=device, dtype=dtype, say=say)
    journal = journal_path(output) if job.recipe.schedule == "auto" else None
    with noting(journal, shown):
        choose(job, journal=journal, progress=progress, say=say)
        verify(job, progress=progress, say=say)
        job.report.update(
            repo_id=repo_id or Path(shown).as_posix(), command=command, seconds=round(time.monotonic() - began, 1)
        )
        changed = {} if job.folded is None else {job.stored[name]: w for name, w in job.folded.weights.items()}
        if changed and (left := [file.name for file in other_weights(job.folder)]):
            say(f"left out {', '.join(left)}: not the weights that the value maps are folded into")
        write(
            output, job.folder, job.model.turboquant.quantization, maps=job.maps, recipe=job.recipe.to_yaml(),
            report=job.report, changed=changed,
        )  # fmt: skip
    journal_path(output).unlink(missing_ok=True)
    say(f"written to {shown}")
    return job.report


def journal_path(output: Path) -> Path:
    """Where a killed calibration left its measurements: beside the output."""
    return output.with_name(f".{output.name}.calibration")


@contextmanager
def noting(journal: Path | None, shown: str | Path) -> Iterator[None]:
    """Add to an exception where the measurements of a calibration are, if there is one, and what takes them up.

    Without measurements nothing is left: the journal is removed.  One that another run left, and this one has not
    written to, is none of its business.
    """
    written = _written(journal)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if journal is None or _written(journal) in (None, written):
            pass
        elif journal.read_text(encoding="utf-8").count("\n") > 1:  # the first line says what it is about
            error.add_note(
                f"what was measured is kept in {journal}: the same command goes on from there, and so does one with "
                f"other limits and --output-dir {shown}; to start afresh remove that file"
            )
        else:
            journal.unlink()
        raise


def _written(file: Path | None) -> int | None:
    """When it was, in nanoseconds; None if there is no such file."""
    return file.stat().st_mtime_ns if file is not None and file.exists() else None


def choose(job: Conversion, *, journal: Path | None = None, progress: bool = False, say: Callable[[str], None]) -> None:
    """Fill in the schedule and the maps."""
    recipe, layers = job.recipe, quantizable_layers(job.model.config)
    if not isinstance(recipe.schedule, str):
        job.schedule = {i: recipe.schedule[i] for i in layers}
    elif recipe.schedule == "uniform":
        scheme = recipe.uniform()
        job.schedule = dict.fromkeys(layers, (scheme.k_bits, scheme.v_bits))
    else:
        config = job.model.config.get_text_config(decoder=True)
        source, heads = MapSource(recipe.rotation, recipe.seed), kv_heads(config)
        plain = {i: source(i, heads, head_dim(config), torch.device("cpu")) for i in layers}
        context = job.report["context"] = context_of(recipe, config)
        offered = BITS[:4] if recipe.bits is not None and recipe.bits <= 4 else BITS
        result = calibrate(
            job.model, job.calibration, plain, recall=job.recall, bits=recipe.bits, memory=job.memory,
            limits=recipe.limits, widths=offered, window=recipe.window, sinks=recipe.sinks,
            context=context, maps="auto" if recipe.maps == "auto" else "plain", seed=recipe.seed, journal=journal,
            repair_evaluations=recipe.repair and recipe.repair + 1, progress=progress, report=say,
        )  # fmt: skip
        job.schedule, job.maps = dict(result.schedule), result.maps
        job.report["sensitivity"] = {f"{i}.{side}.{bits}": value for (i, side, bits), value in result.table.items()}
        job.report["variants"] = {str(i): list(pair) for i, pair in result.variants.items()}
        if (fixed := result.repair) is not None:
            trials = [{"move": move, "kl": kl, "kept": kept} for move, kl, kept in fixed.trials]
            job.report["repair"] = {"kl_before": fixed.start, "kl_after": fixed.value, "trials": trials}


def cache_bytes(job: Conversion) -> dict[str, int]:
    """Bytes of the attached model's cache for a text of `context` tokens, counted from its tensors (see `count`)."""
    cache = job.model.turboquant.make_cache(static_length(job.report["context"]))
    parts = count(cache, job.model.config)
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def baseline(job: Conversion) -> LayerScheme:
    """What the attached schedule has to beat: the widest uniform one, with random rotations, that takes no more.

    Where bits were chosen without limits on the loss, no more than the budget.
    """
    recipe, layers = job.recipe, list(job.schedule)
    if job.memory is None:
        average = job.model.turboquant.quantization.average_bits(layers)
        return recipe.uniform_below(average if recipe.limits else recipe.bits)
    room = job.memory.room(sum(cache_bytes(job).values()) / MIB if recipe.limits else job.memory.mib)
    pairs = ((scheme, dict.fromkeys(layers, (scheme.k_bits, scheme.v_bits))) for scheme in UNIFORM)
    return [scheme for scheme, schedule in pairs if job.memory.total(schedule) <= room][-1]


def fold_values(job: Conversion) -> None:
    """Fold the value maps of the packed layers into the model, and say so in `maps`: none are left to a seed."""
    config = job.model.config.get_text_config(decoder=True)
    source, heads = MapSource(job.recipe.rotation, job.recipe.seed, job.maps), kv_heads(config)
    packed = [i for i, pair in job.schedule.items() if not LayerScheme(*pair).exact]
    maps = {i: source(i, heads, head_dim(config), torch.device("cpu")) for i in packed}
    job.folded = fold.fold_(job.model, maps, job.stored)
    job.maps = job.folded.maps


def measure(job: Conversion, makers: dict[str, Callable[[], Cache]], progress: bool) -> dict[str, Metrics]:
    """Metrics of caches against the exact one of the model as it was: with folded values, those of that as well.

    Raises:
        ModelError: folding changed what the model computes.
    """
    if job.folded is None:
        return evaluate_caches(job.model, job.verification, makers, progress=progress)
    makers = {**makers, "folded": lambda: DynamicCache(config=job.model.config)}
    found = evaluate_caches(job.model, job.verification, makers, progress=progress, reference=job.folded.original)
    job.report["fold_kl"] = fold.within_limit(found.pop("folded").kl)
    return found


def verify(job: Conversion, *, progress: bool = False, say: Callable[[str], None]) -> None:
    """Measure schedule and uniform baseline through the real cache on held-out text; drop a schedule that loses."""
    recipe, config, layers = job.recipe, job.model.config, quantizable_layers(job.model.config)
    chosen, calibrated = recipe.config(job.schedule), job.maps is not None
    if recipe.fold_values:
        fold_values(job)
    hf.attach(job.model, chosen, job.maps)
    base = baseline(job)
    uniform = recipe.config(dict.fromkeys(layers, (base.k_bits, base.v_bits)))
    plain, maps = MapSource(recipe.rotation, recipe.seed), job.model.turboquant.maps
    if job.folded is not None:
        plain = fold.seen_through(plain, job.folded.by)
    makers: dict[str, Callable[[], Cache]] = {"chosen": lambda: TurboQuantCache(config, chosen, maps)}
    if recipe.schedule != "uniform":
        makers["uniform"] = lambda: TurboQuantCache(config, uniform, plain)
    measured = measure(job, makers, progress)
    fell_back = recipe.schedule == "auto" and not measured["chosen"].kl < measured["uniform"].kl  # NaN loses
    if fell_back:
        say(
            f"the measured schedule (KL {measured['chosen'].kl:.5f}) does not beat uniform {_name(base)} "
            f"(KL {measured['uniform'].kl:.5f}) on held-out text: falling back to uniform"
        )
        job.schedule, job.maps, chosen = dict.fromkeys(layers, (base.k_bits, base.v_bits)), None, uniform
        calibrated = False
        if job.folded is not None:  # with other maps: other weights, which are measured as they will be written
            job.folded.undo()
            fold_values(job)
        hf.attach(job.model, chosen, job.maps)
        if job.folded is not None:
            again: Callable[[], Cache] = job.model.turboquant.make_cache
            measured["uniform"] = measure(job, {"chosen": again}, progress)["chosen"]
        measured["chosen"] = measured["uniform"]
    result = measured["chosen"]
    held_out = losses(result)
    for name in missed(recipe.limits, held_out):
        say(
            f"on held-out text {LOSSES[name].text(held_out[name])} exceeds the {recipe.limits[name]:g} asked for; "
            "for a margin ask for less"
        )
    dim, cache = head_dim(config.get_text_config(decoder=True)), job.model.turboquant.make_cache()
    sample = _sample(job, cache)
    table = job.report.get("sensitivity", {})
    rows = [
        {"layer": i, "k_bits": k, "v_bits": v, "sensitivity": _sensitivity(table, i, k, v)}
        for i, (k, v) in sorted(job.schedule.items())
    ]
    size, origin = _bytes_per_token(job, prove_packed(cache)), provenance(job.model.device)
    origin["versions"] = {"tq_ao": __version__, **origin["versions"]}
    job.report.update(
        name=job.source.name, base_model=job.source.base_model, license=job.source.license, schedule=rows,
        average_bits=chosen.average_bits(layers), stored_bits=16 * size["packed"] / size["bfloat16"], head_dim=dim,
        kl=result.kl, kl_stderr=_known(result.kl_stderr), ppl_before=result.ppl_exact, ppl_after=result.ppl,
        top1=result.top1, ppl_rise=held_out["max_ppl"], ppl_rise_stderr=_known(100 * result.ppl_ratio_stderr),
        text=f"{recipe.verification.source}, {recipe.verification.windows} x {recipe.verification.length} tokens "
        "of articles not used to choose",
        window=recipe.window, sinks=recipe.sinks, fell_back=fell_back, memory=recipe.memory,
        **{name: getattr(recipe, name) for name in LOSSES},
        calibrated_maps=calibrated, sample=sample,
        bytes_per_token=size, **origin, dtype=name_of(job.model.dtype),
    )  # fmt: skip
    if job.memory is not None:
        job.report["cache"] = {"tokens": static_length(job.report["context"]), "bytes": cache_bytes(job)}
        if (held := sum(job.report["cache"]["bytes"].values())) > job.memory.mib * MIB:
            raise RuntimeError(f"expected a cache of {job.memory.mib:g} MiB, counted {held / MIB:.3f}; report this")
    if "uniform" in measured:
        job.report["baseline_uniform"] = {
            "bits": base.average_bits, "stored_bits": base.average_bits + 16 / dim, "ppl": measured["uniform"].ppl,
            "kl": measured["uniform"].kl, "kl_stderr": _known(measured["uniform"].kl_stderr),
        }  # fmt: skip


def _known(error: float) -> float | None:
    """JSON has no NaN, which is the standard error of a single chunk of text."""
    return None if math.isnan(error) else error


def _name(scheme: Any) -> str:
    return f"K {scheme.k_bits} V {scheme.v_bits}" if scheme.k_bits != scheme.v_bits else f"{scheme.k_bits}"


def _sensitivity(table: Mapping[str, float], layer: int, k_bits: int, v_bits: int) -> float | None:
    parts = [table.get(f"{layer}.key.{k_bits}"), table.get(f"{layer}.value.{v_bits}")]
    return None if None in parts else sum(p for p in parts if p is not None)


def _bytes_per_token(job: Conversion, stored_bits: float) -> dict[str, float]:
    config = job.model.config.get_text_config(decoder=True)
    values = 2 * kv_heads(config) * head_dim(config)  # of one layer
    exact = sum(LayerScheme(*pair).exact for pair in job.schedule.values())
    packed = stored_bits * (len(job.schedule) - exact) + 16.0 * exact
    return {"bfloat16": 2.0 * values * len(job.schedule), "packed": packed * values / 8}


@torch.no_grad()
def _sample(job: Conversion, cache: TurboQuantCache) -> dict[str, str]:
    """Greedy text after a prompt long enough that most of it is read from packed tiles."""
    prompt = max(SAMPLE_PROMPT, job.recipe.window + job.recipe.sinks + 64)
    ids = job.verification[:1, :prompt].to(job.model.device)
    options = {"max_new_tokens": SAMPLE_TOKENS, "do_sample": False, GENERATE_CACHE: cache}
    out = job.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    tail = job.tokenizer.decode(ids[0, -32:], skip_special_tokens=True)
    return {"prompt": tail, "text": job.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)}
