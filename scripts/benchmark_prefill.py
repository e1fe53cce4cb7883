"""Time what a prefill costs on this GPU: packing it, and attending to a packed cache with several queries.

    python scripts/benchmark_prefill.py [--output FILE]

One process, CUDA-graph replays.  `encode` packs 32768 tokens of 8 KV heads, its operands prepared ahead as a cache does
it; its rate counts the bf16 bytes read and the packed bytes written, against a copy measured beside it.  `extend`
attends with q_len new tokens, causally, to a packed cache of `length` tokens; beside it flash SDPA in bf16 over as many
dense keys.  `verify` does it with the few new tokens of a draft; beside it the bf16 kernel that was fastest when each
was timed alone.  What stands beside ours is replayed in turn with it, and the ratio taken round by round.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark import (  # type: ignore[import-not-found]
    Row,
    commit,
    copies_beyond_cache,
    device_slug,
    own_bytes,
    packed_inputs,
    time_baselines,
    time_calls,
    time_in_turn,
    versions,
)
from torch.nn.attention import SDPBackend, bias, sdpa_kernel

from tq_ao import ops, reference
from tq_ao.codebook import ROLES, Role
from tq_ao.packing import unpack
from tq_ao.rotation import rotation_maps

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results"
TOKENS, HEADS, GROUP = 32768, 8, 4


def copy_bandwidth() -> float:
    """GB/s of a kernel that reads 2 GB and writes as many, bytes read plus bytes written.

    Not of `copy_`: in a graph that is a memcpy node, 2.8 TB/s on an H200 where kernels, and `copy_` outside, do 4.3.
    """
    x = torch.empty(1 << 29, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / time_calls([lambda: torch.neg(x, out=y)], 10)["us_median"] / 1e3


def encode_row(head_dim: int, bits: int, role: Role, kind: str, shifted: bool, fed: bool, copy: float) -> dict:
    maps = rotation_maps(kind, HEADS, head_dim, 0).to("cuda")
    shift = torch.randn(HEADS, head_dim, device="cuda") if shifted else maps.key_shift
    square = torch.randn(HEADS, head_dim // 2, head_dim // 2, device="cuda") / head_dim**0.5
    feedback = square.bfloat16().float() if fed else None
    x = [torch.randn(1, HEADS, TOKENS, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    given = {"feedback": feedback, "operands": ops.prepare(maps.key, shift, role, feedback=feedback)}
    times = time_calls([partial(ops.encode, one, maps.key, shift, bits, role, **given) for one in x])
    codes, scales = ops.encode(x[0], maps.key, shift, bits, role, **given)
    first = None if feedback is None else feedback[:1]
    want, _ = reference.encode(x[0][:, :1], maps.key[:1], shift[:1], bits, role, first)
    differ = (unpack(codes[:, :1], bits, head_dim, role) != unpack(want, bits, head_dim, role)).float().mean().item()
    rate = (x[0].nbytes + codes.nbytes + scales.nbytes) / times["us_median"] / 1e3
    return {
        "head_dim": head_dim, "bits": bits, "role": role, "map": kind, "shifted": shifted, "feedback": fed,
        "tokens": TOKENS, "kv_heads": HEADS, **times, "gb_s": round(rate, 1),
        "percent_of_copy": round(100 * rate / copy, 1), "codes_differing": differ,
    }  # fmt: skip


def new_tokens(batch: int, q_len: int) -> list[torch.Tensor]:
    """Queries, keys and values, as a model has them."""
    shapes = [(batch, q_len, HEADS * n, 128) for n in (GROUP, 1, 1)]
    return [torch.randn(*shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for shape in shapes]


def extend_row(length: int, q_len: int, bits: int) -> dict:
    cache = packed_inputs(Row("", 1, HEADS, GROUP, 128, length), bits, 0)
    new = new_tokens(1, q_len)
    k, v = (torch.randn(1, HEADS * GROUP, length + q_len, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    mask = bias.causal_lower_right(q_len, length + q_len)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash, ours, ratio = time_in_turn(
            [lambda: F.scaled_dot_product_attention(new[0], k, v, attn_mask=mask)],
            [partial(ops.extend_attention, *new, *cache[1:])],
        )
    return {
        "length": length, "q_len": q_len, "bits": bits, "kv_heads": HEADS, "group": GROUP, "head_dim": 128, **ours,
        "flash_us_median": flash["us_median"], "times_of_flash": round(ratio["times_median"], 3),
        "times_of_flash_p10_p90": [round(ratio["times_p10"], 3), round(ratio["times_p90"], 3)],
        "rel_error": relative_error(new, cache),
    }  # fmt: skip


def relative_error(new: list[torch.Tensor], cache: tuple) -> float:
    """Of the first row and KV head, against float64 on the same codes."""
    out = ops.extend_attention(*new, *cache[1:])[:1, :GROUP].double()
    # Of the cache's tensors 1 to 8 have batch and heads first, start (10) the batch, the maps (11 to 14) the heads.
    head = [x[:1, :1] if 1 <= i <= 8 else x[:1] if 10 <= i <= 14 else x for i, x in enumerate(cache)]
    q, k_new, v_new = new[0][:1, :GROUP].double(), new[1][:1, :1].double(), new[2][:1, :1].double()
    exact = reference.attention(q, *head[1:], 0.0, None, k_new, v_new, torch.float64)  # type: ignore[call-arg]
    return ((out - exact).norm() / exact.norm()).item()


def verify_row(batch: int, length: int, q_len: int, bits: int) -> dict:
    row = Row("", batch, HEADS, GROUP, 128, length)
    kernels = time_baselines(row, q_len)
    measured = {name: kernel.times["us_median"] for name, kernel in kernels.items()}
    best = min(measured, key=measured.__getitem__)
    caches = [packed_inputs(row, bits, seed) for seed in range(copies_beyond_cache(own_bytes(row, bits)))]
    new = new_tokens(batch, q_len)
    ours, theirs, ratio = time_in_turn(
        [partial(ops.extend_attention, *new, *cache[1:]) for cache in caches], kernels[best].calls
    )
    return {
        "batch": batch, "length": length, "q_len": q_len, "bits": bits, "kv_heads": HEADS, "group": GROUP,
        "head_dim": 128, **ours, "bf16_us_median": measured | {best: theirs["us_median"]}, "best_bf16": best,
        "speedup_vs_best_bf16": round(ratio["times_median"], 3),
        "speedup_p10_p90": [round(ratio["times_p10"], 3), round(ratio["times_p90"], 3)],
        "rel_error": relative_error(new, caches[0]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/prefill_<device>.json")
    parser.add_argument("--commit", help="recorded in the JSON; default: git rev-parse HEAD")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmark_prefill.py needs a CUDA device, and none is available here")
    copy = copy_bandwidth()
    result = {"device": torch.cuda.get_device_name(0), "versions": versions(), "commit": args.commit or commit()}
    result |= {"copy_gb_s": round(copy, 1), "encode": [], "extend": [], "verify": []}
    output = args.output or RESULTS / f"prefill_{device_slug()}.json"
    output.parent.mkdir(parents=True, exist_ok=True)

    def add(kind: str, row: dict) -> dict:
        """Keep a row, in the file too: a run cut short loses nothing it has timed."""
        result[kind].append(row)
        output.write_text(json.dumps(result, indent=1) + "\n")
        return row

    print(f"{result['device']}: copy {copy:.0f} GB/s")
    shapes = [(head_dim, bits, "hadamard", False, False) for head_dim in (128, 256) for bits in (1, 2, 3, 4, 8)]
    shapes += [(64, 3, "hadamard", False, False)]
    # What a calibrated model has.
    shapes += [(head_dim, 3, "dense", True, fed) for fed in (False, True) for head_dim in (64, 128, 256)]
    for head_dim, bits, kind, shifted, fed in shapes:
        for role in ROLES:
            row = add("encode", encode_row(head_dim, bits, role, kind, shifted, fed, copy))
            what = f"{head_dim} {bits} bits {role:5} {kind + ' shifted' * shifted + ' feedback' * fed:25}"
            print(
                f"encode D {what} {row['us_median']:7.1f} us "
                f"{row['percent_of_copy']:5.1f} % of copy, {row['codes_differing']:.1e} of the codes differ"
            )
    for length, q_len in ((8192, 128), (8192, 1024), (32768, 1024), (32768, 4096)):
        row = add("extend", extend_row(length, q_len, 3))
        print(
            f"extend {q_len} queries over {length} tokens {row['us_median']:8.1f} us, {row['times_of_flash']:.2f} times"
            f" flash in bf16 ({row['flash_us_median']:.1f} us), error {row['rel_error']:.1e}"
        )
    for batch, length in ((8, 4096), (32, 8192), (8, 32768), (1, 131072)):
        for q_len in (2, 4, 8):
            row = add("verify", verify_row(batch, length, q_len, 3))
            torch.cuda.empty_cache()
            best, speed = row["best_bf16"], row["speedup_vs_best_bf16"]
            print(
                f"verify {q_len} tokens, {batch} x {length} {row['us_median']:8.1f} us, {speed:.2f}x {best} "
                f"({row['bf16_us_median'][best]:.1f} us), error {row['rel_error']:.1e}"
            )
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
