"""scripts/benchmark_decode.py on a small model: what it times, what it refuses to, and what it writes."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface, DynamicCache

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import benchmark_decode as script


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(script, "GPU", False)
    monkeypatch.setattr(script, "KERNELS", {"sdpa flash": SDPBackend.FLASH_ATTENTION})


def test_what_it_writes(tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    options = "--layers 2 --hidden 64 --rows 2x400 1x600 --bits 4 2 --replays 4 --commit abc --output"
    monkeypatch.setattr(sys, "argv", ["benchmark_decode.py", *options.split(), str(out)])
    script.main()
    result = json.loads(out.read_text())
    assert result["commit"] == "abc" and result["model"]["num_hidden_layers"] == 2 and "CPU" in result["device"]
    rows = result["rows"]
    assert [(row["batch"], row["length"], row["bits"]) for row in rows] == [
        *((2, 400, bits) for bits in (16, 4, 2)),
        *((1, 600, bits) for bits in (16, 4, 2)),
    ]
    for exact, *packed in (rows[:3], rows[3:]):
        tokens = exact["batch"] * exact["length"]
        assert exact["cache_gib"] == pytest.approx(2 * 2 * tokens * 8 * 128 * 2 / 2**30, abs=1e-4)
        assert exact["speedup_vs_bf16"] == 1 and exact["cache"] == "bf16"
        for row in packed:
            assert row["cache"] == "packed" and 0 < row["cache_gib"] < exact["cache_gib"]
            assert row["speedup_vs_bf16"] == pytest.approx(exact["ms_median"] / row["ms_median"], rel=0.01)
            assert row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
            assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_median"], rel=0.01)


def test_the_whole_shape_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark_decode.py"])
    with pytest.raises(SystemExit):
        script.main()
    assert "needs a CUDA device, and none is available here; give --layers and --hidden" in capsys.readouterr().err


@pytest.mark.parametrize("compiled", [False, True])
def test_the_full_cache_gives_what_transformers_own_gives(compiled):
    model = script.build(2, 64, "cpu")
    full, _ = script.exact_cache(2, 3, 50, "cpu")
    own = DynamicCache(config=model.config)
    for i, layer in enumerate(full.layers):
        own.update(layer.keys[:, :, :-1], layer.values[:, :, :-1], i)
    with torch.no_grad():
        want = model(torch.arange(3)[:, None], **{tiny.CACHE: own}).logits
    AttentionInterface.register("one_kernel", partial(script.attend, SDPBackend.FLASH_ATTENTION))
    model.set_attn_implementation("one_kernel")
    step = script.stepper(model, 3, full, compiled)
    for _ in range(2):
        assert script.difference(step(), want) < 0.03
    torch.testing.assert_close(full.layers[1].keys[:, :, -1:], own.layers[1].keys[:, :, -1:], rtol=0.05, atol=0.02)


def test_a_cache_that_does_not_fit_is_an_entry_without_times(monkeypatch):
    monkeypatch.setattr(script, "GPU", True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    model = script.build(1, 64, "cpu")
    model.config.num_hidden_layers = 32
    (entry,) = script.time_exact(model, 64, 16384, 4, compiled=False)
    assert entry["cache_gib"] == 128 and entry["kernel"] is None and entry["ms_median"] is None


def test_a_step_that_does_not_read_the_codes_is_refused(monkeypatch):
    model = script.build(1, 64, "cpu")
    monkeypatch.setattr(script, "stepper", lambda model, batch, cache, compiled: lambda: torch.ones(1, 1, 5))
    with pytest.raises(RuntimeError, match="to read the codes"):
        script.time_packed(model, 1, 300, 3, 2, compiled=False)
