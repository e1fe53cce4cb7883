"""The packed cache in a model on a GPU: kernels, compiled decode under CUDA graphs, left padding."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import layer_state
import pytest
import tiny
import torch
from transformers import DynamicCache

from tq_ao import TurboQuantCache, TurboQuantConfig, ops, quantize_kv_
from tq_ao.cache_layer import TurboQuantLayer
from tq_ao.config import LayerScheme
from tq_ao.rotation import MapSource


def built(cuda: torch.device, **shape: int) -> torch.nn.Module:
    return tiny.model(vocab_size=512, num_hidden_layers=2, **shape).to(cuda, torch.bfloat16)


def forced(model, ids, cache, chunks):
    out, at = [], 0
    with torch.no_grad():
        for size in chunks:
            out.append(model(ids[:, at : at + size], **{tiny.CACHE: cache}, use_cache=True).logits)
            at += size
    return torch.cat(out, 1)


def follow(one, i: int, other, j: int) -> int:
    """Row i of one run has the logits of row j of another for as long as both have chosen the same tokens: how long.

    With random weights the best tokens often tie within the rounding of bfloat16, so the tokens may part.
    """
    steps = len(one.logits)
    ours, theirs = (run.sequences[row, -steps:].tolist() for run, row in ((one, i), (other, j)))
    same = next((n for n in range(steps) if ours[n] != theirs[n]), steps - 1) + 1
    a, b = (torch.stack([x[row] for x in run.logits[:same]]).float() for run, row in ((one, i), (other, j)))
    error = (a - b).norm(dim=-1) / b.norm(dim=-1)  # of another context it would be 1.4
    assert error.median().item() < 0.05
    assert error.max().item() < 0.3
    return same


@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(64, 8, 2), (96, 4, 4), (128, 8, 2), (256, 8, 1)])
def test_8_bits_follow_the_exact_cache(cuda, dim, heads, kv_heads):
    model = built(cuda, head_dim=dim, num_attention_heads=heads, num_key_value_heads=kv_heads)
    ids, chunks = torch.randint(2, 512, (2, 700), device=cuda), [600, *[1] * 20, 80]
    exact = forced(model, ids, DynamicCache(config=model.config), chunks)
    quantize_kv_(model, TurboQuantConfig(bits=8))
    for max_len in (None, 1024):
        packed = forced(model, ids, model.turboquant.make_cache(max_len), chunks)
        assert ((packed - exact).float().norm() / exact.float().norm()).item() < 0.1


def test_tensors_of_another_gpu_than_the_current_one(cuda):
    """Triton launches on the current one: every op has to change it."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    model = built(cuda, head_dim=128, num_attention_heads=8, num_key_value_heads=2)
    quantize_kv_(model, TurboQuantConfig(bits=4))
    ids, chunks = torch.randint(2, 512, (2, 500), device=cuda), [400, *[1] * 40, 60]
    found = []
    for device in ("cuda:0", "cuda:1"):
        model, ids = model.to(device), ids.to(device)
        found.append(forced(model, ids, model.turboquant.make_cache(), chunks).cpu())
    assert torch.cuda.current_device() == 0
    assert ((found[1] - found[0]).float().norm() / found[0].float().norm()).item() < 0.02


def test_generate_compiles_decode_and_padded_rows_are_their_own_runs(cuda):
    model = built(cuda, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    quantize_kv_(model, TurboQuantConfig(bits=4))
    ids = torch.randint(2, 512, (3, 500), device=cuda)
    mask = torch.ones_like(ids)
    mask[1, :100], mask[2, :300] = 0, 0
    options = {"max_new_tokens": 60, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    torch._dynamo.utils.counters.clear()
    out = model.generate(ids, attention_mask=mask, **options)
    assert isinstance(out[tiny.CACHE], TurboQuantCache) and out[tiny.CACHE].is_compileable
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    eager = model.generate(ids, attention_mask=mask, disable_compile=True, **options)
    alone = model.generate(ids[1:2, 100:], attention_mask=mask[1:2, 100:], **options)
    assert sum(follow(out, row, eager, row) for row in range(3)) + follow(out, 1, alone, 0) > 20


def test_a_chat_goes_on_beyond_the_static_cache_of_its_last_turn(cuda):
    """The buffers move, so the compiled step has to be another."""
    model = built(cuda, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    quantize_kv_(model, TurboQuantConfig(bits=4))
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    text, caches, steps = torch.randint(2, 512, (1, 300), device=cuda), {"static": None, "dynamic": None}, 0
    for turn in range(3):
        outs = {}
        for kind, cache in caches.items():
            given = {"cache_implementation": kind} if cache is None else {tiny.CACHE: cache}
            mask = torch.ones_like(text)
            outs[kind] = model.generate(text, attention_mask=mask, max_new_tokens=40, **given, **options)
        static, dynamic = outs["static"], outs["dynamic"]
        steps += follow(static, 0, dynamic, 0)
        same = (static.sequences[0] == dynamic.sequences[0]).long().cumprod(0).sum().item()
        for kind, out in outs.items():
            caches[kind] = out[tiny.CACHE]
            if held := int(caches[kind].get_seq_length()) - min(same, out.sequences.shape[1] - 1):
                caches[kind].crop(-held)  # what they do not agree on is taken back
        text = torch.cat([static.sequences[:, :same], torch.randint(2, 512, (1, 150), device=cuda)], 1)
        assert caches["static"].is_compileable and (turn == 0) == (caches["static"].get_max_length() == 384)
    assert steps > 10


@pytest.mark.parametrize("calibrated", [False, True])
def test_layers_prepare_their_maps_once_and_encode_the_same_codes(cuda, rng, calibrated):
    maps = layer_state.maps(2, 128, rng, feedback=True)
    maps = replace(maps, key=maps.key.bfloat16().float(), value=maps.value.bfloat16().float())  # in one part
    source = MapSource("hadamard", 0, {0: maps} if calibrated else None)
    k, v = (layer_state.tokens(2, 2, 700, 128, rng, torch.bfloat16).to(cuda) for _ in range(2))
    layers = [TurboQuantLayer(0, LayerScheme(3, 4), source, 32, 4, max_len) for max_len in (1024, 1024, None)]
    for i, layer in enumerate(layers):
        layer.lazy_initialization(k, v)
        for role, made in (("key", layer.key_operands), ("value", layer.value_operands)):
            map, shift = getattr(layer.layer_maps, role), getattr(layer.layer_maps, f"{role}_shift")
            feedback = getattr(layer.layer_maps, f"{role}_feedback")
            assert torch.equal(made, ops.prepare(map, shift, role, feedback=feedback))
        if i == 1:
            layer.key_operands = layer.value_operands = None
        at = layer.key_operands
        layer.update(k, v)
        layer.reset()
        layer.update(k, v)
        assert layer.key_operands is at
    tiles = [[t[:, :, :20] if n < 4 else t for n, t in enumerate(layer.buffers())] for layer in layers]
    assert all(torch.equal(a, b) for other in tiles[1:] for a, b in zip(tiles[0], other, strict=True))


def test_a_compiled_step_reads_prepared_maps_where_they_are(cuda):
    """As inputs of a captured graph that do not move: nothing copies them from step to step."""
    model = built(cuda, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    quantize_kv_(model, TurboQuantConfig(bits=4))
    out = model.generate(torch.randint(2, 512, (1, 300), device=cuda), max_new_tokens=20, return_dict_in_generate=True)
    for layer in out[tiny.CACHE].packed_layers():
        assert layer.key_operands._dynamo_static_input_type == layer.k_codes._dynamo_static_input_type


PAST_THE_END = """
import tiny, torch
from tq_ao import TurboQuantConfig, quantize_kv_
model = tiny.model(vocab_size=512, num_hidden_layers=2).to("cuda", torch.bfloat16)
quantize_kv_(model, TurboQuantConfig(bits=3))
cache = model.turboquant.make_cache(256)
ids = torch.randint(2, 512, (1, 257), device="cuda")
step = STEP
with torch.no_grad():
    model(ids[:, :250], CACHE=cache)
    for i in range(250, 257):
        if i == 256:
            torch.cuda.synchronize()
            print("fits")
        step(ids[:, i : i + 1].clone(), CACHE=cache)
    torch.cuda.synchronize()
print("too far")
"""


@pytest.mark.parametrize("step", ["model", 'torch.compile(model, fullgraph=True, mode="reduce-overhead")'])
def test_a_static_cache_run_past_its_end_stops_the_program(cuda, step):
    """In a process of its own: the device is lost to it."""
    code = PAST_THE_END.replace("STEP", step).replace("CACHE", tiny.CACHE)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["fits"], done.stderr
    assert "max_cache_len tokens, got more" in done.stdout + done.stderr
