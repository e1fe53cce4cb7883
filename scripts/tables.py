"""Write the speed tables of README.md and docs/kernels.md from the result files they show.

    python scripts/tables.py            writes benchmarks/results/STEM.json between <!-- STEM --> and <!-- end -->
    python scripts/tables.py --check    writes nothing; exits with 1 and the names of the tables that differ

STEM begins with the script that measured: attention (of scripts/benchmark.py), decode or prefill.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
DOCUMENTS = ("README.md", "docs/kernels.md")


def attention(result: dict) -> Iterator[str]:
    """Of scripts/benchmark.py attention: the best bf16 kernel and ours, a shape to a line."""
    yield "| shape (B x L, Hkv, G, D) | best bf16, µs | 4 bits | 3 bits | 2 bits | error at 3 bits |"
    yield "|---|---|---|---|---|---|"
    for name, group in groupby(result["rows"], key=lambda row: row["name"]):
        rows = list(group)
        bf16 = min((row for row in rows if row["k_bits"] == 16), key=lambda row: row["us_median"])
        own = {row["k_bits"]: row for row in rows if row["impl"] == "gluon"}
        shape = "{batch} x {length}, {kv_heads}, {group}, {head_dim}".format(**rows[0])
        cells = [f"{own[b]['us_median']:.1f} µs, {own[b]['speedup_vs_best_bf16']:.2f}x" for b in (4, 3, 2)]
        cells = [f"{bf16['us_median']:.1f} ({bf16['impl']})", *cells, f"{own[3]['rel_error']:.1e}"]
        yield f"| {name}: {shape} | {' | '.join(cells)} |"


def decode(result: dict) -> Iterator[str]:
    """Of scripts/benchmark_decode.py: a whole model's step with a bf16 cache and with ours."""
    widths = list(dict.fromkeys(row["bits"] for row in result["rows"] if row["cache"] == "packed"))
    yield f"| rows x tokens | bf16 cache | {' | '.join(f'{bits} bits' for bits in widths)} |"
    yield "|---" * (2 + len(widths)) + "|"
    for (batch, length), group in groupby(result["rows"], key=lambda row: (row["batch"], row["length"])):
        rows = list(group)
        timed = [row for row in rows if row["cache"] == "bf16" and row["ms_median"] is not None]
        exact = min(timed, key=lambda row: row["ms_median"], default=None)
        size = f"{rows[0]['cache_gib']:.1f} GiB"
        cells = [f"{exact['ms_median']:.2f} ms, {size}" if exact else f"{size}: does not fit"]
        for row in rows:
            if row["cache"] == "packed":
                speed = f" {exact['ms_median'] / row['ms_median']:.2f}x," if exact else ""
                cells.append(f"{row['ms_median']:.2f} ms,{speed} {row['cache_gib']:.1f} GiB")
        yield f"| {batch} x {length} | {' | '.join(cells)} |"


def prefill(result: dict) -> Iterator[str]:
    """Of scripts/benchmark_prefill.py: packing, then attention of many queries and of a few."""
    first = result["encode"][0]
    yield f"| encode {first['tokens']} tokens, {first['kv_heads']} KV heads | µs, keys / values | of a copy |"
    yield "|---|---|---|"
    for keys, values in zip(result["encode"][::2], result["encode"][1::2], strict=True):
        what = f"D {keys['head_dim']}, {keys['bits']} bits, {keys['map']}"
        what += ", shifted" * keys["shifted"] + ", feedback" * keys["feedback"]
        times = f"{keys['us_median']:.1f} / {values['us_median']:.1f}"
        yield f"| {what} | {times} | {keys['percent_of_copy']:.0f} / {values['percent_of_copy']:.0f} % |"
    yield ""
    yield "| attention to packed tokens, 3 bits, Hkv 8, G 4, D 128 | µs | flash bf16, µs | ratio | error |"
    yield "|---|---|---|---|---|"
    for row in result["extend"]:
        times = f"{row['us_median']:.1f} | {row['flash_us_median']:.1f} | {row['times_of_flash']:.2f}"
        yield f"| {row['q_len']} queries over {row['length']} tokens | {times} | {row['rel_error']:.1e} |"
    yield ""
    yield "| a few queries, 3 bits, Hkv 8, G 4, D 128 | 2 queries | 4 queries | 8 queries |"
    yield "|---|---|---|---|"
    for (batch, length), group in groupby(result["verify"], key=lambda row: (row["batch"], row["length"])):
        cells = []
        for row in group:
            bf16 = f"{row['bf16_us_median'][row['best_bf16']]:.1f} ({row['best_bf16']})"
            cells.append(f"{row['us_median']:.1f} µs for {bf16}, {row['speedup_vs_best_bf16']:.2f}x")
        yield f"| {batch} x {length} | {' | '.join(cells)} |"


KINDS = {"attention": attention, "decode": decode, "prefill": prefill}


def filled(document: str, differing: list[str]) -> str:
    """The text with its tables written anew; the names of those that were others are added to `differing`."""

    def table(match: re.Match[str]) -> str:
        stem, before = match.groups()
        body = "\n".join(KINDS[stem.split("_")[0]](json.loads((RESULTS / f"{stem}.json").read_text())))
        if body != before:
            differing.append(stem)
        return f"<!-- {stem} -->\n{body}\n<!-- end -->"

    return re.sub(rf"<!-- ((?:{'|'.join(KINDS)})_\S+) -->\n(.*?)\n?<!-- end -->", table, document, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is not its file's")
    args = parser.parse_args()
    differing: list[str] = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        anew = filled(text, differing)
        if not args.check and anew != text:
            path.write_text(anew, encoding="utf-8")
    if args.check and differing:
        sys.exit(f"not what the result files say: {', '.join(differing)}; run python scripts/tables.py")
    print(f"tables written anew: {', '.join(differing) or 'none'}")


if __name__ == "__main__":
    main()
