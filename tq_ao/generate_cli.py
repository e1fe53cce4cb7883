"""Generate from a converted model and show that its cache is packed.

tq-ao-generate DIR --prompt "Once upon a time"
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, TextStreamer

import tq_ao.quiet  # noqa: F401 - importing tq_ao registers the packed cache with transformers
from tq_ao import devices
from tq_ao.cache import GENERATE_CACHE, TurboQuantCache, head_dim, kv_heads
from tq_ao.embedded import EMBEDDED
from tq_ao.errors import one_line
from tq_ao.models import ALIASES, auto_class

PROGRAM = "tq-ao-generate"


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Generate as the flags say.

    Args:
        argv: the flags; None takes those of this process.
        program: how it was started, for the help.

    Returns:
        Exit status: 0, or 1 for a mistake (said in one line): a model that does not load or is not converted, a device
        that this machine has not, no prompt, no tokens wanted.
    """
    p = argparse.ArgumentParser(
        prog=program, description=(__doc__ or "").replace(PROGRAM, program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("model", help="converted folder or Hub id")
    p.add_argument("--prompt", required=True)
    p.add_argument("--max-new-tokens", type=int, default=200)
    p.add_argument("--sample", action="store_true", help="sample at temperature 0.8 instead of greedy")
    p.add_argument("--device", help="default: cuda if there is one, else cpu")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)

    def refuse(why: str) -> int:
        print(f"error: {why}", file=sys.stderr)
        return 1

    if args.max_new_tokens < 1:
        return refuse(f"expected --max-new-tokens to be 1 or more, got {args.max_new_tokens}")
    convert = program.replace("generate", "convert")
    if args.model.lower() in {*EMBEDDED, *ALIASES} and not Path(args.model).exists():
        return refuse(
            f"expected a converted folder or Hub id, got the short name {args.model}; convert it first, with "
            f"{convert} {args.model}, and give the folder that it writes"
        )
    try:
        device = devices.named(args.device)
    except ValueError as error:
        return refuse(one_line(error))
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        kind = auto_class(AutoConfig.from_pretrained(args.model))
        model = kind.from_pretrained(args.model, dtype="auto").to(device).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        return refuse(f"cannot load {args.model}, expected a converted folder or Hub id: {one_line(error)}")
    if not hasattr(model, "turboquant"):
        return refuse(f"{args.model} carries no KV-cache schedule; make one with: {convert} {args.model}")
    torch.manual_seed(args.seed)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(device)
    if not inputs["input_ids"].shape[1]:
        return refuse("expected a --prompt of at least one token, got none")
    print(args.prompt, end="", flush=True)
    began = time.perf_counter()
    out = model.generate(
        **inputs, max_new_tokens=args.max_new_tokens, do_sample=args.sample, temperature=0.8 if args.sample else None,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), return_dict_in_generate=True,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    new = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    print(f"\n{new} tokens in {seconds:.1f} s: {new / seconds:.1f} tokens/s (prefill included)")
    prove(model, out[GENERATE_CACHE])
    return 0


def prove(model: torch.nn.Module, cache: object) -> None:
    """Say what the cache held, counted from its tensors."""
    if not isinstance(cache, TurboQuantCache):
        raise TypeError(f"expected generation to use a TurboQuantCache, got {type(cache).__name__}")
    layers, config = cache.packed_layers(), model.config.get_text_config(decoder=True)
    length, quantization = int(cache.get_seq_length()), cache.quantization
    packed = max(0, length - quantization.sinks - quantization.window) // 32 * 32
    vectors = sum(2 * layer.k_scales.numel() for layer in layers)
    held = sum(layer.nbytes()["packed"] for layer in layers)
    dim, sides = head_dim(config), 2 * kv_heads(config) * len(layers)
    if not layers:
        print(f"cache: {type(cache).__name__}, the schedule keeps every layer exact")
        return
    stated = sum((x.scheme.k_bits + x.scheme.v_bits) * dim / 16 + 2 for x in layers) / len(layers)
    per_vector = held / vectors if vectors else stated
    pairs = [layer.tensors() for layer in layers]
    kinds = sorted({f"K {k.codes.dtype} V {v.codes.dtype}".replace("torch.", "") for k, v in pairs})
    print(
        f"cache: {type(cache).__name__}, {len(layers)} packed layers ({', '.join(kinds)} codes), "
        f"{quantization.average_bits([x.index for x in layers]):.2f} bits per value"
    )
    first = min(length, quantization.sinks)
    print(
        f"  {packed} of {length} tokens packed at {per_vector * sides:.0f} bytes per token, {2 * dim * sides} in "
        f"bfloat16 ({2 * dim / per_vector:.2f}x smaller); the newest {length - packed - first} and the first {first} "
        "are exact"
    )
    if not packed:
        print(
            "  nothing is packed yet: the text is shorter than sinks + window + one tile = "
            f"{quantization.sinks + quantization.window + 32} tokens"
        )
