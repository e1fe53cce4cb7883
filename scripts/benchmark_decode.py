"""Time a decode step of a whole model of Llama-3-8B's shape: packed caches against an exact bf16 one of as many tokens.

    python scripts/benchmark_decode.py [--rows 32x4096 ...] [--bits 4 3 2] [--output FILE]      on a GPU
    python scripts/benchmark_decode.py --compile [--rows 8x32768 ...]                           with torch.compile
    python scripts/benchmark_decode.py --layers 2 --hidden 64 --rows 2x400 --replays 8          tries it on a CPU

Random weights, and caches of random K and V; packed ones are written by their layers' own prefill.  A step is the whole
forward of one token per row, plain or compiled, replayed from a CUDA graph (called on a CPU).  The exact cache is full:
its kernels need no mask and read K and V where they lie; the faster counts.  Each packed figure comes with a proof that
codes were read.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmark import commit, device_slug, versions  # type: ignore[import-not-found]
from benchmark_calibration import HEAD_DIM, KV_HEADS, RESULTS, build  # type: ignore[import-not-found]
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, Cache, LlamaForCausalLM
from transformers.cache_utils import StaticLayer

from tq_ao import TurboQuantConfig, quantize_kv_
from tq_ao.cache import cache_argument
from tq_ao.evaluation.decode_kl import prove_packed

SIZES = "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size"
WARM_UP, SPARE = 3, 2 << 30  # steps; bytes for all but weights and cache
GPU = torch.cuda.is_available()
KERNELS = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION} if GPU else {}
KERNELS["sdpa flash"] = SDPBackend.FLASH_ATTENTION


class FullLayer(StaticLayer):
    """A cache layer without room: a new token replaces the last one, and attention reads all there are."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple:
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values


def exact_cache(layers: int, batch: int, length: int, device: str) -> tuple[Cache, int]:
    """A full bf16 cache of random K and V, and its bytes; on the device "meta" its bytes alone."""
    cache = Cache(layers=[FullLayer(length) for _ in range(layers)])
    cache.early_initialization(batch, KV_HEADS, HEAD_DIM, torch.bfloat16, torch.device(device))
    for layer in cache.layers:
        layer.cumulative_length.fill_(length - 1)  # the new token's position
    return cache, sum(x.normal_().nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def attend(
    backend: SDPBackend, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention as transformers calls it, by one kernel, which itself shares a KV head among its query heads."""
    if attention_mask is not None:
        raise ValueError("expected no mask for a full cache, got one")
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def stepper(model: LlamaForCausalLM, batch: int, cache: Cache, compiled: bool) -> Callable[[], torch.Tensor]:
    """A call that runs one decode step and gives its logits; on a GPU the replay of a graph."""
    token = torch.arange(batch, device=model.device)[:, None]
    torch.compiler.reset()  # every cache is a new program
    call = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return call(token, **{cache_argument(model): cache}).logits

    if not GPU:
        return forward
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(WARM_UP):
            forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # waits for the warm-up
        logits = forward()

    held = token, logits  # the graph reads an address: its input has to live as long

    def replay() -> torch.Tensor:
        graph.replay()
        return held[1]

    return replay


def time_steps(step: Callable[[], torch.Tensor], replays: int) -> dict[str, float]:
    """Milliseconds from the end of a step to the end of the next: median, 10th and 90th percentile."""
    ends: list[Any] = []
    for _ in range(WARM_UP + replays):
        logits = step()
        ends.append(torch.cuda.Event(enable_timing=True) if GPU else time.perf_counter())
        if GPU:
            ends[-1].record()
    if not torch.isfinite(logits).all():
        raise RuntimeError("expected finite logits, got inf or NaN")
    pairs = zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)
    times = [a.elapsed_time(b) if GPU else 1e3 * (b - a) for a, b in pairs]
    low, *_, high = statistics.quantiles(times, n=10, method="inclusive")
    return {"ms_median": statistics.median(times), "ms_p10": low, "ms_p90": high}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative; 1 to 1.4 between logits from unlike caches, 0.01 to 0.04 between two kernels on one cache."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def time_exact(model: LlamaForCausalLM, batch: int, length: int, replays: int, compiled: bool) -> list[dict[str, Any]]:
    """An entry for every kernel, or one without times where the cache does not fit beside the model."""
    shape = model.config.num_hidden_layers, batch, length
    _, size = exact_cache(*shape, "meta")
    row = {"cache": "bf16", "kernel": None, "bits": 16, "batch": batch, "length": length, "cache_gib": size / 2**30}
    torch.cuda.empty_cache()
    if GPU and torch.cuda.mem_get_info()[0] < size + SPARE:
        return [row | dict.fromkeys(("ms_median", "ms_p10", "ms_p90"))]
    cache, _ = exact_cache(*shape, model.device)
    entries, logits = [], []
    for kernel, backend in KERNELS.items():
        AttentionInterface.register("one_kernel", partial(attend, backend))
        model.set_attn_implementation("one_kernel")  # no mask is made for it; "flash" in a name would need a package
        step = stepper(model, batch, cache, compiled)
        entries.append(row | {"kernel": kernel} | time_steps(step, replays))
        logits.append(step().clone())
    if (error := difference(logits[0], logits[-1])) > 0.2:
        raise RuntimeError(f"expected the same logits from {list(KERNELS)}, got a difference of {error:.2f}")
    return entries


def time_packed(
    model: LlamaForCausalLM, batch: int, length: int, bits: int, replays: int, compiled: bool
) -> dict[str, Any]:
    """An entry for a static packed cache, once its step is proven to read the codes."""
    torch.cuda.empty_cache()
    quantize_kv_(model, TurboQuantConfig(bits=bits))
    cache = model.turboquant.make_cache(length + replays + 2 * WARM_UP + 1)
    k, v = torch.empty(2, batch, KV_HEADS, length, HEAD_DIM, dtype=torch.bfloat16, device=model.device)
    for layer in cache.layers:
        layer.update(k.normal_(), v.normal_())
    del k, v
    prove_packed(cache)
    step = stepper(model, batch, cache, compiled)
    times = time_steps(step, replays)
    logits = [step().clone()]
    for flipped in (False, True):  # the same step again: with the same codes, then with others
        cache.crop(-1)
        for layer in cache.layers if flipped else ():
            layer.k_codes.bitwise_not_()
            layer.v_codes.bitwise_not_()
        logits.append(step().clone())
    repeated, changed = (difference(other, logits[0]) for other in logits[1:])
    if changed < max(0.05, 10 * repeated):
        raise RuntimeError(f"expected the step to read the codes: they changed, its logits by {changed:.1e} only")
    row = {"cache": "packed", "kernel": "gluon" if GPU else "reference", "bits": bits, "batch": batch, "length": length}
    return row | {"cache_gib": sum(cache.nbytes().values()) / 2**30} | times


def warm(batch: int, length: int, bits: int, replays: int) -> None:
    """Compile the kernels of a packed row in a process of its own; Triton's disk cache hands them on."""
    time_packed(build(1, 64, "cuda"), batch, length, bits, replays, compiled=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rows", nargs="+", default="32x4096 8x32768 1x131072 32x16384".split())
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--replays", type=int, default=64, help="steps timed; one in 32 packs a tile")
    parser.add_argument("--compile", action="store_true", help="compile the forward: a minute for each figure")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/decode_llama-3-8b_DEVICE[_compiled].json"
    )
    parser.add_argument("--commit", help="recorded in the JSON; default: git rev-parse HEAD")
    args = parser.parse_args()
    rows = [tuple(map(int, row.split("x"))) for row in args.rows]
    if not GPU and args.hidden >= 4096:
        parser.error("Llama-3-8B's shape needs a CUDA device, and none is available here; give --layers and --hidden")
    if GPU:
        with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
            list(pool.map(warm, *zip(*[(*row, bits, args.replays) for bits in args.bits for row in rows], strict=True)))
    torch.manual_seed(0)
    model = build(args.layers, args.hidden, "cuda" if GPU else "cpu")
    sizes = {name: getattr(model.config, name) for name in SIZES.split()}
    sizes["weights_gib"] = round(sum(p.nbytes for p in model.parameters()) / 2**30, 2)
    where = torch.cuda.get_device_name(0) if GPU else f"CPU, {torch.get_num_threads()} threads"
    result = {"device": where, "versions": versions() | {"transformers": transformers.__version__}}
    result |= {"commit": args.commit or commit(), "compiled": args.compile, "model": sizes, "rows": []}
    name = f"decode_llama-3-8b_{device_slug() if GPU else 'cpu'}{'_compiled' * args.compile}.json"
    output = args.output or RESULTS / name
    output.parent.mkdir(parents=True, exist_ok=True)
    for batch, length in rows:
        entries = time_exact(model, batch, length, args.replays, args.compile)
        best = min((e["ms_median"] for e in entries if e["kernel"]), default=None)
        entries += [time_packed(model, batch, length, bits, args.replays, args.compile) for bits in args.bits]
        for entry in entries:
            ms = entry["ms_median"]
            entry["tokens_per_s"] = 1e3 * batch / ms if ms else None
            entry["speedup_vs_bf16"] = best / ms if ms and best else None
            result["rows"].append({k: round(x, 4) if isinstance(x, float) else x for k, x in entry.items()})
            print(*(f"{k} {x}" for k, x in result["rows"][-1].items()), sep=", ", flush=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
