"""Time the calibration of a model of Llama-3-8B's shape with random weights, and the memory it takes beside them.

    python scripts/benchmark_calibration.py [--layers N] [--hidden N] [--output FILE]

What it chooses means nothing, what it costs does not depend on the weights: statistics, maps, sensitivities and
allocation on random tokens, as `scripts/convert.py` does them, without loading and verification.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from benchmark import commit, device_slug, versions  # type: ignore[import-not-found]
from transformers import LlamaConfig, LlamaForCausalLM

from tq_ao.calibration.calibrate import calibrate
from tq_ao.rotation import MapSource

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results"
KV_HEADS, HEAD_DIM = 8, 128


def build(layers: int, hidden: int, device: str) -> LlamaForCausalLM:
    """Llama-3-8B at `layers` 32 and `hidden` 4096, bfloat16, random weights."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=layers, head_dim=HEAD_DIM,
        num_attention_heads=32, num_key_value_heads=KV_HEADS, vocab_size=128256, max_position_embeddings=8192,
        rope_theta=5e5,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=9, help="of text; convert.py takes 6 and 3 of recall text")
    parser.add_argument("--length", type=int, default=2048, help="tokens per window")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/calibration_<device>.json")
    parser.add_argument("--commit", help="recorded in the JSON; default: git rev-parse HEAD")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    torch.manual_seed(0)
    model = build(args.layers, args.hidden, device)
    tokens = torch.randint(0, 128256, (args.windows, args.length))
    source = MapSource("hadamard", 0)
    plain = {i: source(i, KV_HEADS, HEAD_DIM, torch.device("cpu")) for i in range(args.layers)}
    begin = time.perf_counter()
    calibrate(model, tokens, plain, bits=3.0, progress=True)
    seconds = time.perf_counter() - begin
    row = {
        "layers": args.layers, "hidden": args.hidden, "windows": args.windows, "length": args.length,
        "seconds": round(seconds, 1), "weights_gib": round(sum(p.nbytes for p in model.parameters()) / 2**30, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None,
    }  # fmt: skip
    where = torch.cuda.get_device_name(0) if gpu else f"CPU, {torch.get_num_threads()} threads"
    result = {"device": where, "versions": versions(), "commit": args.commit or commit(), **row}
    output = args.output or RESULTS / f"calibration_{device_slug() if gpu else 'cpu'}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{row}\nwrote {output}")


if __name__ == "__main__":
    main()
