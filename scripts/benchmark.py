"""Time decode attention over packed K and V against the bf16 kernels on this GPU, and decode steps of a whole model.

    python scripts/benchmark.py attention [--output FILE] [--rows NAME ...]    measure, print and write JSON
    python scripts/benchmark.py model NAME [--length N] [--output FILE]        eager decode step of a model, CPU or GPU
    python scripts/benchmark.py plot FILE ... [--output FILE.svg]              speed-up against length, a panel per GPU

One process.  Every attention figure is the whole operation of one decode step (query preparation, packed tiles, exact
window, merge, un-rotation), replayed from a CUDA graph that rotates among input copies larger together than the L2
cache.  The baselines read the same number of tokens in bf16 from contiguous memory.
"""

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import bf16_kernels  # type: ignore[import-not-found]
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
WINDOW, SINKS, RING = 128, 4, 256


class Row(NamedTuple):
    name: str
    batch: int
    kv_heads: int
    group: int
    head_dim: int
    length: int


ROWS = [
    Row("Llama-3-8B, 32 rows", 32, 8, 4, 128, 8192),
    Row("Llama-3-8B, 8 long rows", 8, 8, 4, 128, 32768),
    Row("70B class, 8 rows", 8, 8, 8, 128, 131072),
    Row("Llama-3-8B, one long row", 1, 8, 4, 128, 131072),
    Row("Llama-3-8B, one row", 1, 8, 4, 128, 32768),
    Row("Llama-3-8B, 8 short rows", 8, 8, 4, 128, 4096),
    Row("30B MoE class, 64 short rows", 64, 4, 8, 128, 2048),
    Row("Qwen2.5-7B", 16, 4, 7, 128, 16384),
    Row("Gemma-2B, short", 32, 1, 8, 256, 2048),
    Row("Gemma-2B, long", 32, 1, 8, 256, 16384),
    Row("TinyLlama, short", 32, 4, 8, 64, 2048),
    Row("TinyLlama, long", 32, 4, 8, 64, 16384),
    Row("no grouping", 8, 32, 1, 128, 8192),
    Row("16 heads to a KV head", 16, 2, 16, 128, 16384),
]


def packed_inputs(row: Row, bits: int, seed: int) -> tuple:
    """A cache of random codes and scales, and the other arguments of tq_ao.ops.decode_attention."""
    from tq_ao.codebook import codebook
    from tq_ao.packing import TILE, tile_bytes
    from tq_ao.reference import packed_tokens

    g = torch.Generator("cuda").manual_seed(seed)
    b, h, d = row.batch, row.kv_heads, row.head_dim
    tiles = -(-packed_tokens(row.length, SINKS, WINDOW, RING) // TILE) + 1

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda", dtype=dtype)

    def codes() -> torch.Tensor:
        shape = (b, h, tiles, tile_bytes(bits, d))
        return torch.randint(0, 256, shape, generator=g, device="cuda", dtype=torch.uint8)

    # What vectors of unit variance have: the spacing of levels, at 8 bits about three standard deviations.
    unit = codebook(bits).step if bits < 8 else 3.0

    def scales() -> torch.Tensor:
        return torch.rand(b, h, tiles, TILE, generator=g, device="cuda").add_(0.5).mul_(unit).half()

    cache = (codes(), scales(), codes(), scales())
    exact = (normal(b, h, SINKS, d), normal(b, h, SINKS, d), normal(b, h, RING, d), normal(b, h, RING, d))
    position = (torch.tensor(row.length, device="cuda"), torch.zeros(b, dtype=torch.int64, device="cuda"))
    f32 = torch.float32
    maps = [normal(h, d, d, dtype=f32) / d**0.5, normal(h, d, dtype=f32)]
    maps += [normal(h, d, d, dtype=f32) / d**0.5, normal(h, d, dtype=f32)]
    return (normal(b, h * row.group, 1, d), *cache, *exact, *position, *maps, WINDOW, d**-0.5)


def own_bytes(row: Row, bits: int) -> int:
    """Bytes of K and V a step reads: codes and scales of packed tokens, bf16 of the others; at 16 bits all are."""
    from tq_ao.reference import packed_tokens

    packed = packed_tokens(row.length, SINKS, WINDOW, RING) if bits < 16 else 0
    exact = (row.length - packed) * row.head_dim * 2
    return 2 * row.batch * row.kv_heads * (packed * (row.head_dim * bits // 8 + 2) + exact)


def replayed(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """A graph of all calls in turn: each call of the result replays it and returns microseconds of one of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    repeats = max(1, 8 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()

    def replay() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / (repeats * len(calls))

    return replay


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    deciles = statistics.quantiles(values, n=10)
    return {f"{name}_median": statistics.median(values), f"{name}_p10": deciles[0], f"{name}_p90": deciles[-1]}


def time_calls(calls: Sequence[Callable[[], object]], replays: int = 30) -> dict[str, float]:
    """Microseconds of one call: `spread` over replays of a graph of all calls in turn."""
    replay = replayed(calls)
    return spread("us", [replay() for _ in range(replays + 3)][3:])


def time_in_turn(
    ones: Sequence[Callable[[], object]], others: Sequence[Callable[[], object]], rounds: int = 30
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Microseconds of a call of each, replayed in turn, and how many times as long the others take, round by round.

    Timed one after the other, a kernel starts with the clock that whichever ran before it has left.
    """
    one, other = replayed(ones), replayed(others)
    pairs = [(one(), other()) if turn % 2 else (other(), one())[::-1] for turn in range(rounds + 10)]
    first, second = map(list, zip(*pairs[10:], strict=True))  # ten rounds of warm-up
    return spread("us", first), spread("us", second), spread("times", [b / a for a, b in pairs[10:]])


def copies_beyond_cache(size: int) -> int:
    """How many input copies of `size` bytes it takes to exceed the L2 cache three times."""
    return max(1, min(16, -(-3 * torch.cuda.get_device_properties(0).L2_cache_size // size)))


class Baseline(NamedTuple):
    """A bf16 kernel: what `time_calls` says, its relative error, and the calls, which hold their caches."""

    times: dict[str, float]
    error: float
    calls: list[bf16_kernels.Call]


def time_baselines(row: Row, q_len: int = 1) -> dict[str, Baseline]:
    """The bf16 kernels that are installed and run on this shape; wrong ones are left out."""
    b, h, d, n = row.batch, row.kv_heads, row.head_dim, row.length
    q = torch.randn(b, h * row.group, q_len, d, device="cuda", dtype=torch.bfloat16)
    copies = range(copies_beyond_cache(own_bytes(row, 16)))
    caches = [torch.randn(2, b, h, n, d, device="cuda", dtype=torch.bfloat16) for _ in copies]
    k, v = caches[0][:, :1].float()
    seen = torch.ones(q_len, n, dtype=torch.bool, device="cuda").tril(n - q_len)
    exact = torch.nn.functional.scaled_dot_product_attention(q[:1].float(), k, v, seen, enable_gqa=True).flatten()
    del k, v
    measured = {}
    for name, calls in bf16_kernels.calls(q, caches).items():
        try:
            error = ((calls[0]()[:1].flatten().float() - exact).norm() / exact.norm()).item()
            if error < 0.01:  # rounding to bf16 alone is 0.002
                measured[name] = Baseline(time_calls(calls), error, calls)
            else:
                print(f"  {name} is wrong by {error:.1e}: left out", file=sys.stderr)
        except RuntimeError as refused:
            print(f"  {name} does not run: {str(refused).splitlines()[0][:90]}", file=sys.stderr)
    return measured


def relative_error(arguments: tuple, impl: str) -> float:
    """Error of row 0 against float64 on the same codes, from a float32 query so that no output rounding is counted."""
    from tq_ao import ops, reference

    first = [x[:1] if isinstance(x, torch.Tensor) and (i < 9 or i == 10) else x for i, x in enumerate(arguments)]
    first[0] = first[0].float()
    exact = reference.attention(first[0].double(), *first[1:], dtype=torch.float64)  # type: ignore[misc, arg-type]
    out = ops.decode_attention(arguments[0].float(), *arguments[1:], impl=impl)[:1].double()
    return ((out - exact).norm() / exact.norm()).item()


def read_ceiling() -> float:
    """GB/s of a reduction over 8 GB."""
    x = torch.ones(2 << 30, device="cuda")
    y = x.view(1 << 15, -1)
    return x.nbytes / time_calls([lambda: torch.amax(y, 1)], 10)["us_median"] / 1e3


def warm(row: Row, bits: int) -> None:
    """Compile the kernels of a row in a process of its own; Triton's disk cache hands them on."""
    from tq_ao import ops

    query, *cache = packed_inputs(row, bits, 0)
    for impl in ("gluon", "triton") if bits == 3 else ("gluon",):
        ops.decode_attention(query, *cache, impl=impl)
        ops.decode_attention(query.float(), *cache, impl=impl)  # as relative_error has it


def measure(rows: list[Row], jobs: int, save: Callable[[list[dict]], object]) -> None:
    """Measure row by row; `save` gets all results so far after each, so that an interrupted run keeps what it has."""
    from tq_ao import ops

    widths = (2, 3, 4)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(warm, row, bits) for row in rows for bits in widths]:
            done.result()
    ceiling = read_ceiling()
    print(f"read ceiling {ceiling:.0f} GB/s", flush=True)
    results = []

    def add(row: Row, impl: str, bits: int, times: dict[str, float], best: float, error: float) -> None:
        rate = own_bytes(row, bits) / times["us_median"] / 1e3
        entry = {"impl": impl, **row._asdict(), "k_bits": bits, "v_bits": bits}
        entry |= {key: round(value, 2) for key, value in times.items()}
        entry |= {"gb_s": round(rate, 1), "percent_of_read_ceiling": round(100 * rate / ceiling, 1)}
        entry["speedup_vs_best_bf16"] = round(best / times["us_median"], 3)
        entry["rel_error"] = error
        results.append(entry)
        speed = f"{entry['speedup_vs_best_bf16']:.2f}x, error {error:.1e}"
        print(f"  {impl:24} {bits:2} bits {times['us_median']:9.1f} us {rate:7.0f} GB/s {speed}", flush=True)

    for row in rows:
        print(
            f"{row.name}: {row.batch} x {row.length}, Hkv {row.kv_heads}, G {row.group}, D {row.head_dim}", flush=True
        )
        measured = time_baselines(row)
        best = min(kernel.times["us_median"] for kernel in measured.values())
        for name, kernel in measured.items():
            add(row, name, 16, kernel.times, best, kernel.error)
        del measured, kernel  # and their caches
        torch.cuda.empty_cache()
        for bits in widths:
            inputs = [packed_inputs(row, bits, seed) for seed in range(copies_beyond_cache(own_bytes(row, bits)))]
            impls = ["gluon", "triton"] if bits == 3 else ["gluon"]
            if bits == 3 and row.batch * row.kv_heads * row.length <= 1 << 18:
                impls.append("reference")
            for impl in impls:
                error = relative_error(inputs[0], impl)
                if impl == "reference":  # reads lengths on the host: no graph
                    times = time_eager(partial(ops.decode_attention, *inputs[0], impl=impl))
                else:
                    times = time_calls([partial(ops.decode_attention, *x, impl=impl) for x in inputs])
                add(row, impl, bits, times, best, error)
            del inputs
            torch.cuda.empty_cache()
        save(results)


def time_eager(call: Callable[[], object]) -> dict[str, float]:
    """Microseconds of one call outside a graph."""
    times = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    times = sorted(times[1:])
    return {"us_median": statistics.median(times), "us_p10": times[0], "us_p90": times[-1]}


def versions() -> dict[str, str]:
    found = {"cuda": str(torch.version.cuda)}
    for name in ("tq_ao", "torch", "triton", "fa3-fwd", "flashinfer-python"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_slug() -> str:
    """h100, h200, ...: the model of this GPU in the names of result files."""
    words = torch.cuda.get_device_name(0).lower().split()
    return words[1] if len(words) > 1 else words[0]


def commit() -> str | None:
    try:
        root = Path(__file__).parent
        return subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def attention(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmark.py attention needs a CUDA device, and none is available here")
    rows = [row for row in ROWS if not args.rows or any(name in row.name for name in args.rows)]
    result = {"device": torch.cuda.get_device_name(0), "versions": versions(), "commit": args.commit or commit()}
    output = args.output or RESULTS / f"attention_{device_slug()}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    measure(rows, args.jobs, lambda done: output.write_text(json.dumps(result | {"rows": done}, indent=1) + "\n"))
    print(f"wrote {output}")


def model(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM

    from tq_ao import quantize_kv_
    from tq_ao.evaluation.speed import decode_speed
    from tq_ao.models import resolve

    source, device = resolve(args.name), "cuda" if torch.cuda.is_available() else "cpu"
    network = AutoModelForCausalLM.from_pretrained(source.path_or_id, dtype=torch.bfloat16).to(device).eval()
    rows = decode_speed(quantize_kv_(network), args.length, args.bits)
    for row in rows:
        print(
            f"{row['cache']:8} {row['ms_median']:8.2f} ms a step, {row['ratio_median']:.2f}x the exact cache "
            f"(p10 {row['ratio_p10']:.2f}, p90 {row['ratio_p90']:.2f})"
        )
    where = torch.cuda.get_device_name(0) if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    result = {"device": where, "versions": versions(), "commit": commit(), "model": source.name, "length": args.length}
    output = args.output or RESULTS / f"decode_{source.name}_{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")
    print(f"wrote {output}")


def plot(args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "tq_ao"  # the same figures, the same file
    from matplotlib import pyplot

    size = (1 + 5 * len(args.files), 4)
    figure, panels = pyplot.subplots(1, len(args.files), figsize=size, sharey=True, squeeze=False)
    for axes, file in zip(panels[0], args.files, strict=True):
        result = json.loads(file.read_text())
        for bits, colour in ((2, "tab:green"), (3, "tab:blue"), (4, "tab:orange")):
            entries = [e for e in result["rows"] if e["impl"] == "gluon" and e["k_bits"] == bits]
            axes.scatter(
                [e["length"] for e in entries],
                [e["speedup_vs_best_bf16"] for e in entries],
                color=colour,
                label=f"{bits} bits",
            )
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="tokens in the cache", ylim=(0, None), title=result["device"])
    panels[0][0].set_ylabel("decode attention, times the best bf16 kernel")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(args.output, metadata={"Date": None} if args.output.suffix == ".svg" else None)
    print(f"wrote {args.output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    of_attention = commands.add_parser("attention", help="measure on this GPU and write JSON")
    of_attention.add_argument("--output", type=Path, help="default: benchmarks/results/attention_<device>.json")
    of_attention.add_argument("--rows", nargs="*", help="only rows whose name contains one of these")
    of_attention.add_argument("--jobs", type=int, default=8, help="processes that compile ahead")
    of_attention.add_argument("--commit", help="recorded in the JSON; default: git rev-parse HEAD")
    of_attention.set_defaults(run=attention)
    of_model = commands.add_parser("model", help="time decode steps of a whole model and write JSON")
    of_model.add_argument("name", help="alias, embedded model, folder or Hub id")
    of_model.add_argument("--length", type=int, default=1024, help="tokens in the cache")
    of_model.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    of_model.add_argument("--output", type=Path)
    of_model.set_defaults(run=model)
    drawing = commands.add_parser("plot", help="draw JSON files")
    drawing.add_argument("files", type=Path, nargs="+")
    drawing.add_argument("--output", type=Path, default=ROOT / "docs/attention.svg")
    drawing.set_defaults(run=plot)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
