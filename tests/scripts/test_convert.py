"""The command that converts, on small random models: what it writes, what it says, and how it fails."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import layer_state
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BloomConfig,
    DeepseekV3Config,
    DynamicCache,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PhiConfig,
    TorchAoConfig,
)

import tq_ao.convert
from tq_ao import convert_cli as script
from tq_ao import fold, footprint, generate_cli, loading
from tq_ao.cache import static_length
from tq_ao.calibration.calibrate import CalibrationResult
from tq_ao.calibration.journal import Journal
from tq_ao.calibration.transforms import VALUE_CHOICES
from tq_ao.codebook import BITS
from tq_ao.config import TRANSFORMS_FILE, LayerScheme
from tq_ao.evaluation.setup import provenance
from tq_ao.measure.evaluator import Evaluator
from tq_ao.measure.metrics import SKIP, score, summarize
from tq_ao.recipe import Recipe, load
from tq_ao.text import articles, split_articles, windows

ROOT = Path(__file__).parents[2]
FAST = "--max-seq-length 256 --calibration-windows 3 --verification-windows 2 --window 32 --bits 3".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory, smollm2, seed):
    """A folder with a random 3-layer Llama and a real tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "small"
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    torch.manual_seed(seed)  # made before the seed of the test that asks first is set
    tiny.model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    """A file of five articles of random words."""
    generator = torch.Generator().manual_seed(1)
    words = "sea land river stone house tree light wind rain road bread salt king queen ship star".split()
    pick = torch.randint(len(words), (5, 900), generator=generator).tolist()
    path = tmp_path / "text.txt"
    path.write_text(
        "\n\n\n".join(f"= Part {i} =\n\n" + " ".join(words[j] for j in row) + "." for i, row in enumerate(pick))
    )
    return path


def run(base, text, tmp_path, *flags):
    out = tmp_path / "out"
    where = ["--calibration", str(text), "--output-dir", str(out), "--json", str(tmp_path / "r.json")]
    return script.main([str(base), *where, *(FAST if "--memory" not in flags else FAST[:-2]), *flags]), out


@pytest.mark.parametrize("schedule", ["auto", "uniform", "file"])
def test_converted_folder_is_a_checkpoint_that_packs_its_cache(schedule, base, text, tmp_path, capsys):
    name = schedule
    if schedule == "file":
        name = str(tmp_path / "schedule.yaml")
        Path(name).write_text(yaml.safe_dump({"layers": {0: [4, 2], 2: {"k_bits": 2, "v_bits": 1}}}))
    code, out = run(base, text, tmp_path, "--schedule", name)
    assert code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert json.loads((out / "tq_ao_config.json").read_text()) == report
    printed = capsys.readouterr().out
    assert "K bits" in printed and "smaller" in printed and "sample" in printed
    model = AutoModelForCausalLM.from_pretrained(out)
    pairs = {row["layer"]: (row["k_bits"], row["v_bits"]) for row in report["schedule"]}
    assert pairs == {i: (s.k_bits, s.v_bits) for i, s in model.turboquant.quantization.layers.items()}
    if schedule == "file":
        assert pairs == {0: (4, 2), 1: (3, 3), 2: (2, 1)}
    assert report["average_bits"] <= 3.0 and report["stored_bits"] == pytest.approx(report["average_bits"] + 16 / 32)
    assert load(out / "recipe.yaml").bits == (2.5 if schedule == "file" else 3.0)
    assert "base_model_relation: quantized" in (out / "README.md").read_text() or report["base_model"] is None
    ours, theirs = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    cache = model.generate(
        torch.arange(200)[None], attention_mask=torch.ones(1, 200), max_new_tokens=4, return_dict_in_generate=True
    )[tiny.CACHE]
    assert isinstance(cache, tq_ao.TurboQuantCache) and cache.packed_layers()[0].k_codes.any()
    assert (out / TRANSFORMS_FILE).exists() == report["calibrated_maps"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("given", "average", "name", "uniform"),
    [
        ({i: [4, 4] for i in range(3)}, 4.0, "small-tq4", "uniform 4, random"),
        (
            {0: [4, 2], 2: [3, 1]},
            8 / 3,
            "small-tq2.67",
            "uniform 2.5 (0.167 bits fewer: the widest that takes no more),",
        ),
        (
            {0: [16, 16], 1: [8, 4]},
            25 / 3,
            "small-tq8.33",
            "uniform 8 (0.333 bits fewer: the widest that takes no more),",
        ),
    ],
)
def test_a_schedule_file_is_named_recorded_and_compared_by_its_average(
    given, average, name, uniform, base, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("schedule.json").write_text(json.dumps(given))
    flags = ["--schedule", "schedule.json", "--calibration", str(text), *FAST]
    assert script.main([str(base), *flags]) == 0
    out = tmp_path / name
    report, recipe = json.loads((out / "tq_ao_config.json").read_text()), load(out / "recipe.yaml")
    assert report["average_bits"] == recipe.bits == pytest.approx(average)
    pairs = {i: tuple(given.get(i, (3, 3))) for i in range(3)}
    assert recipe.schedule == {row["layer"]: (row["k_bits"], row["v_bits"]) for row in report["schedule"]} == pairs
    assert recipe.whole(range(3)) == recipe
    assert f"  {uniform}" in capsys.readouterr().out and 0 <= average - report["baseline_uniform"]["bits"] < 0.5


def test_layers_that_a_schedule_does_not_name_are_packed():
    with pytest.raises(ValueError, match=r"expected bits between 1 and 8 for layers \[0, 2\], .* got 12"):
        Recipe("m", schedule={1: (4, 4)}, bits=12).whole(range(3))
    with pytest.raises(ValueError, match="expected bits between 1 and 8, got 12"):
        Recipe("m", bits=12)


def test_a_recipe_gives_the_same_checkpoint_as_the_flags(base, text, tmp_path):
    code, out = run(base, text, tmp_path, "--schedule", "uniform")
    assert code == 0
    assert script.main(["--recipe", str(out / "recipe.yaml"), "--output-dir", str(tmp_path / "again")]) == 0
    a, b = (json.loads((p / "config.json").read_text()) for p in (out, tmp_path / "again"))
    assert a == b


def test_recall_windows_are_calibrated_on_and_recorded(base, text, tmp_path):
    found = {}
    for count in (0, 2):
        (tmp_path / f"{count}").mkdir()
        code, out = run(base, text, tmp_path / f"{count}", "--recall-windows", f"{count}")
        assert code == 0 and load(out / "recipe.yaml").calibration.recall == count
        found[count] = json.loads((out / "tq_ao_config.json").read_text())
    assert found[0]["sensitivity"] != found[2]["sensitivity"]
    assert found[0]["ppl_before"] == pytest.approx(found[2]["ppl_before"]), "measured on the same text"


def test_maps_are_made_for_what_the_model_can_read_or_what_was_asked_for(base, text, tmp_path):
    found = {}
    for context in (None, 200, 100_000):
        folder = tmp_path / f"{context}"
        folder.mkdir()
        code, out = run(base, text, folder, *(() if context is None else ("--context", f"{context}")))
        assert code == 0 and load(out / "recipe.yaml").context == context
        found[context] = json.loads((out / "tq_ao_config.json").read_text())
    reach = json.loads((base / "config.json").read_text())["max_position_embeddings"]
    assert [found[c]["context"] for c in found] == [reach, 200, 100_000]
    assert found[200]["sensitivity"] != found[100_000]["sensitivity"]


def held(cache):
    """Bytes of all storages of a cache that has been used, of the maps its layers read, and of what kernels keep of
    those on a GPU."""
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    tensors += [t for layer in cache.packed_layers() for t in layer_state.with_operands(layer.layer_maps)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("mib", [0.3, 0.45])
def test_a_schedule_within_so_much_memory(mib, base, text, tmp_path, capsys):
    """900 tokens, for which `generate` allocates 1024."""
    code, out = run(base, text, tmp_path, "--memory", f"{mib}", "--context", "900")
    assert code == 0 and (load(out / "recipe.yaml").bits, load(out / "recipe.yaml").memory) == (None, mib)
    report = json.loads((tmp_path / "r.json").read_text())
    said = re.search(rf"a text of 1024 tokens takes ([\d.]+) MiB of {mib}, counted", capsys.readouterr().out)
    assert report["memory"] == mib and report["cache"]["tokens"] == 1024
    counted = sum(report["cache"]["bytes"].values())
    assert float(said[1]) == pytest.approx(counted / 2**20, abs=0.006) and not report["fell_back"]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    cache = model.generate(
        torch.arange(200)[None], attention_mask=torch.ones(1, 200), max_length=900, max_new_tokens=None,
        cache_implementation="static", stopping_criteria=[lambda ids, scores: ids.shape[1] > 201],
        return_dict_in_generate=True,
    )[tiny.CACHE]  # fmt: skip
    assert cache.get_max_length() == 1024 and 0.9 * counted < held(cache) <= counted <= mib * 2**20
    quantization, maps = model.turboquant.quantization, model.turboquant.maps
    packed = {i for i, scheme in quantization.layers.items() if not scheme.exact}
    assert set(maps.calibrated) == packed
    for i in packed:  # nothing better fits: widths one up on either side
        pair = {"key": quantization.layers[i].k_bits, "value": quantization.layers[i].v_bits}
        for side, bits in pair.items():
            wider = BITS[min(BITS.index(bits) + 1, len(BITS) - 1)]
            if report["sensitivity"][f"{i}.{side}.{wider}"] < report["sensitivity"][f"{i}.{side}.{bits}"]:
                better = LayerScheme(*{**pair, side: wider}.values())
                layers = {**quantization.layers, i: better}
                trial = tq_ao.TurboQuantCache(model.config, replace(quantization, layers=layers), maps, 1024)
                assert sum(sum(part.values()) for part in footprint.count(trial, model.config)) > mib * 2**20


def test_short_of_maps_memory_keeps_layers_exact(base, text, tmp_path):
    """At 384 tokens what is around the codes of a layer takes more than half of what it takes exact."""
    code, out = run(base, text, tmp_path, "--memory", "0.27", "--context", "384", "--window", "16")
    report = json.loads((tmp_path / "r.json").read_text())
    exact = [row for row in report["schedule"] if row["k_bits"] == 16]
    assert code == 0 and len(exact) in (1, 2) and all(row["v_bits"] == 16 for row in exact)
    assert report["stored_bits"] > 16 * len(exact) / 3
    maps = {name.split(".")[1] for name in load_file(out / TRANSFORMS_FILE)} if report["calibrated_maps"] else set()
    assert not maps & {str(row["layer"]) for row in exact}


def test_the_uniform_schedule_fits_the_memory_too(base, text, tmp_path, monkeypatch):
    def worst(model, windows, layers, *, memory, **kwargs):
        return CalibrationResult(dict.fromkeys(layers, (1, 1)), None, {}, {}, 1.0)

    monkeypatch.setattr(tq_ao.convert, "calibrate", worst)
    assert run(base, text, tmp_path, "--memory", "0.35", "--context", "1024")[0] == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["fell_back"] and 1 < report["average_bits"] == report["baseline_uniform"]["bits"]
    assert 0.31 < sum(report["cache"]["bytes"].values()) / 2**20 <= 0.35


def test_the_least_memory_that_meets_a_target(base, text, tmp_path):
    flags = ["--memory", "0.5", "--context", "1024", "--max-kl"]
    assert run(base, text, tmp_path, *flags, "1000")[0] == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["average_bits"] == 1 and sum(report["cache"]["bytes"].values()) < 0.32 * 2**20
    assert report["fell_back"] or report["baseline_uniform"]["bits"] == 1


def test_swaps_of_bits_are_measured_and_recorded(base, text, tmp_path, capsys):
    code, out = run(base, text, tmp_path, "--repair", "3")
    assert code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    repair = report["repair"]
    assert len(repair["trials"]) == 3 and repair["kl_after"] <= repair["kl_before"]
    kept = [trial["kl"] for trial in repair["trials"] if trial["kept"]]
    assert repair["kl_after"] == min(kept, default=repair["kl_before"])
    said = capsys.readouterr().err
    for trial in repair["trials"]:
        assert f"{trial['move']}: KL {trial['kl']:.5f} {'kept' if trial['kept'] else 'undone'}" in said
    assert report["average_bits"] <= 3 and load(out / "recipe.yaml").repair == 3


def test_a_converted_model_can_be_converted_again(base, text, tmp_path):
    code, out = run(base, text, tmp_path, "--schedule", "uniform", "--bits", "1")
    assert code == 0
    first = json.loads((tmp_path / "r.json").read_text())
    (out / TRANSFORMS_FILE).write_bytes(b"of the first conversion")
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "tool.jinja").write_text("x")
    code, _ = run(out, text, tmp_path, "--schedule", "uniform", "--output-dir", str(tmp_path / "again"))
    again = tmp_path / "again"
    assert code == 0 and not (again / TRANSFORMS_FILE).exists()
    second = json.loads((tmp_path / "r.json").read_text())
    assert second["ppl_before"] == pytest.approx(first["ppl_before"]) and second["average_bits"] == 3.0
    scheme = json.loads((again / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert scheme["num_bits"] == 3.0 and (again / "additional_chat_templates" / "tool.jinja").exists()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, base, seed):
    """The same Llama with a bias on values, in bfloat16 and several files, one of them of other software."""
    folder = tmp_path_factory.mktemp("sharded") / "small"
    torch.manual_seed(seed + 1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = tiny.model("qwen2", vocab_size=len(tokenizer))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.bias.normal_()
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"the weights as they were")
    return folder


@torch.no_grad()
def kl_between(a, b, ids):
    """Mean KL of two models' predictions, with exact caches."""
    p, q = (torch.log_softmax(model(ids, use_cache=False).logits, -1) for model in (a, b))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def packed_logits(model):
    """Of the last 40 of 200 tokens, read from packed storage, and what `generate` goes on with."""
    ids = torch.arange(200)[None]
    cache = model.turboquant.make_cache()
    with torch.no_grad():
        model(ids[:, :160], **{tiny.CACHE: cache}, use_cache=True)
        logits = model(ids[:, 160:], **{tiny.CACHE: cache}, use_cache=True).logits
    assert all(layer.v_codes.any() for layer in cache.packed_layers())
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert isinstance(out[tiny.CACHE], tq_ao.TurboQuantCache)
    return logits, out.sequences


CHANGED = re.compile(r"model\.layers\.\d\.self_attn\.(v_proj\.(weight|bias)|o_proj\.weight)")


@pytest.mark.parametrize("schedule", ["auto", "uniform"])
def test_values_folded_into_the_weights(schedule, sharded, text, tmp_path, capsys):
    code, out = run(sharded, text, tmp_path, "--schedule", schedule, "--fold-values")
    assert code == 0 and load(out / "recipe.yaml").fold_values is True
    report, (printed, told) = json.loads((tmp_path / "r.json").read_text()), capsys.readouterr()
    assert "left out pytorch_model.bin" in told
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "all files for the same readers"
    assert f"folded into v_proj and o_proj: with an exact cache KL {report['fold_kl']:.7f}" in printed
    assert report["calibrated_maps"] == (schedule == "auto" and not report["fell_back"])
    card = (out / "README.md").read_text()
    assert "unchanged: what this" not in card and "folded into the weights of `v_proj` and `o_proj`" in card

    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) > 3 and not (out / "pytorch_model.bin").exists()
    assert sorted(path.name for path in out.glob("*.safetensors")) == sorted([*shards, TRANSFORMS_FILE])
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (sharded / index).read_bytes()
    changed = set()
    for name in shards:
        ours, theirs = (load_file(folder / name) for folder in (out, sharded))
        length = 8 + int.from_bytes((sharded / name).read_bytes()[:8], "little")
        assert (out / name).read_bytes()[:length] == (sharded / name).read_bytes()[:length], "names, dtypes, metadata"
        differ = {key for key in ours if not torch.equal(ours[key], theirs[key])}
        assert differ or (out / name).read_bytes() == (sharded / name).read_bytes()
        changed |= differ
    assert len(changed) == 9 and all(CHANGED.fullmatch(key) for key in changed)

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for maps in model.turboquant.maps.calibrated.values():
        assert torch.equal(maps.value, torch.eye(32).expand(2, 32, 32))
        assert schedule == "auto" or (maps.output - maps.value).abs().max() < 1e-5
    assert len(model.turboquant.maps.calibrated) == 3
    original = AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32)
    assert 0 < kl_between(original, model, torch.arange(300)[None]) < 1e-3 > report["fold_kl"] > 0
    if schedule == "auto":
        check_reported_is_written(report, original, model, out, text)
    else:
        model.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        for a, b in zip(packed_logits(model), packed_logits(again), strict=True):
            assert torch.equal(a, b)


def test_a_folded_model_can_be_folded_again(sharded, text, tmp_path, capsys):
    assert run(sharded, text, tmp_path, "--schedule", "uniform", "--fold-values")[0] == 0
    capsys.readouterr()
    once, twice = tmp_path / "out", tmp_path / "twice"
    flags = ["--schedule", "uniform", "--seed", "1", "--fold-values", "--output-dir", str(twice)]
    assert run(once, text, tmp_path, *flags)[0] == 0
    assert "left out" not in capsys.readouterr().err, "its transforms file is no weights"
    folders = (sharded, once, twice)
    original, first, second = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders)
    assert max(kl_between(original, model, torch.arange(300)[None]) for model in (first, second)) < 1e-3
    weights = [model.model.layers[0].self_attn.v_proj.weight for model in (original, first, second)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert "are folded into the weights" in (twice / "README.md").read_text()


def check_reported_is_written(report, original, model, out, text):
    """Weights, maps and schedule as they load, measured once more against the model they came from."""
    recipe = load(out / "recipe.yaml")
    _, held_out = split_articles(articles(str(text)), recipe.seed)
    ids = windows(AutoTokenizer.from_pretrained(out), held_out, recipe.verification.length, recipe.verification.windows)
    exact, packed = DynamicCache(config=original.config), model.turboquant.make_cache()
    scores = []
    with torch.no_grad():
        for at in range(0, ids.shape[1], 32):
            logits = [
                m(ids[:, at : at + 32], **{tiny.CACHE: cache}, use_cache=True).logits
                for m, cache in ((original, exact), (model, packed))
            ]
            if at >= SKIP:
                scores.append(score(*logits, ids, torch.arange(at, at + logits[0].shape[1])))
    found = summarize(scores)
    assert found.kl == pytest.approx(report["kl"], rel=1e-3)
    assert found.ppl == pytest.approx(report["ppl_after"], rel=1e-4)
    assert found.ppl_exact == pytest.approx(report["ppl_before"], rel=1e-4)


def test_a_losing_schedule_is_folded_anew_as_uniform(base, text, tmp_path, monkeypatch, capsys):
    def worst(model, windows, layers, **kwargs):
        maps = {i: replace(m, value=2 * m.value, output=m.output / 2, query=0 * m.query) for i, m in layers.items()}
        return CalibrationResult(dict.fromkeys(layers, (1, 1)), maps, {}, {}, 1.0)

    monkeypatch.setattr(tq_ao.convert, "calibrate", worst)
    code, out = run(base, text, tmp_path, "--fold-values")
    report = json.loads((tmp_path / "r.json").read_text())
    assert code == 0 and report["fell_back"] and not report["calibrated_maps"]
    assert report["kl"] == report["baseline_uniform"]["kl"] and abs(report["fold_kl"]) < 1e-6
    capsys.readouterr()
    script.show({**report, "fold_kl": -1e-9})
    assert "with an exact cache KL 0.0000000 to" in capsys.readouterr().out
    code, _ = run(base, text, tmp_path, "--fold-values", "--schedule", "uniform", "--output-dir", str(tmp_path / "b"))
    uniform = json.loads((tmp_path / "r.json").read_text())
    assert code == 0 and uniform["kl"] == report["kl"] and uniform["fold_kl"] == report["fold_kl"]
    for name in ("model.safetensors", TRANSFORMS_FILE):
        assert (tmp_path / "b" / name).read_bytes() == (out / name).read_bytes()


def test_folding_leaves_the_baseline_as_it_was(base, text, tmp_path, monkeypatch):
    def stretched(model, windows, layers, **kwargs):
        by = torch.logspace(-1, 1, 32)
        maps = {i: replace(m, value=m.value * by, output=m.output / by[:, None]) for i, m in layers.items()}
        return CalibrationResult(dict.fromkeys(layers, (8, 8)), maps, {}, {}, 8.0)

    monkeypatch.setattr(tq_ao.convert, "calibrate", stretched)
    monkeypatch.setattr(tq_ao.convert, "SAMPLE_TOKENS", 1)
    kl = []
    for name, flags in (("plain", []), ("folded", ["--fold-values"])):
        flags += ["--verification-windows", "1", "--output-dir", str(tmp_path / name)]
        assert run(base, text, tmp_path, *flags)[0] == 0
        report = json.loads((tmp_path / "r.json").read_text())
        assert not report["fell_back"] and ("fold_kl" in report) == (name == "folded")
        kl.append(report["baseline_uniform"]["kl"])
    assert kl[1] == pytest.approx(kl[0], rel=0.02)


def test_a_fold_that_changes_the_model_is_not_written(base, text, tmp_path, capsys, monkeypatch):
    right = fold.fold_value
    monkeypatch.setattr(fold, "fold_value", lambda weight, value: right(weight, value.mT))
    before = sorted(tmp_path.iterdir())
    code, _ = run(base, text, tmp_path, "--schedule", "uniform", "--fold-values")
    said = capsys.readouterr().err
    assert code == 1 and "error: folding the value maps changed the model: expected a KL below 0.001" in said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["fused", "bin"])
def test_models_whose_values_cannot_be_folded(kind, base, text, tmp_path, capsys):
    model = tiny.model("phi4_mini" if kind == "fused" else "llama", vocab_size=49152)
    folder = tmp_path / "small"
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    model.config.save_pretrained(folder)
    if kind == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    code, out = run(folder, text, tmp_path, "--fold-values")
    said = capsys.readouterr().err
    wanted = {
        "fused": "v_proj and o_proj as plain nn.Linear",
        "bin": "weights in safetensors, model.safetensors missing",
    }
    assert code == 1 and not out.exists() and wanted[kind] in said and "Loading weights" not in said


def test_folding_by_flag_and_by_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nfold_values: true\n")
    for flags, wanted in (([], True), (["--no-fold-values"], False), (["--fold-values"], True)):
        assert script.settings(script.parse(["--recipe", str(path), *flags])).fold_values is wanted
    assert script.settings(script.parse(["m"])).fold_values is False
    assert script.settings(script.parse(["m", "--fold-values"])).fold_values is True


def test_a_window_longer_than_the_sample_and_json_on_standard_output(base, text, tmp_path, capsys):
    flags = ["--schedule", "uniform", "--window", "300", "--max-seq-length", "512", "--json", "-"]
    code, _ = run(base, text, tmp_path, *flags)
    assert code == 0 and json.loads(capsys.readouterr().out)["window"] == 300


def test_torchao_weights_are_calibrated_in_the_dtype_they_were_made_for(base, text, tmp_path, capsys):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    folder = tmp_path / "ao"
    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    code, out = run(folder, text, tmp_path)
    report = json.loads((tmp_path / "r.json").read_text())
    assert code == 0 and report["dtype"] == "bfloat16" and len(report["variants"]) == 3
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "torchao" and len(stored["kv_cache_scheme"]["layers"]) == 3

    dynamic = TorchAoConfig(Int8DynamicActivationInt8WeightConfig()).to_dict()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": dynamic}))
    capsys.readouterr()
    assert run(folder, text, tmp_path, "--output-dir", str(tmp_path / "again"))[0] == 1
    said = capsys.readouterr().err
    assert "gradients go through with schedule auto, got Int8DynamicActivationInt8WeightConfig" in said
    assert "loading" not in said


@pytest.mark.parametrize("schedule", ["auto", "uniform"])
def test_models_that_see_images_are_converted_by_their_text(schedule, base, text, tmp_path, capsys):
    folder, tokenizer = tmp_path / "vlm", AutoTokenizer.from_pretrained(base)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CONFIG_MAPPING["smolvlm"](
        text_config=tiny.config("llama", vocab_size=len(tokenizer)).to_dict(), vision_config=vision
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    code, out = run(folder, text, tmp_path, "--schedule", schedule)
    assert code == 0
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert len(model.turboquant.quantization.layers) == 3
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "model = AutoModelForImageTextToText.from_pretrained" in card
    capsys.readouterr()
    flags = ["--prompt", "sea land river " * 40, "--max-new-tokens", "3", "--device", "cpu"]
    assert generate_cli.main([str(out), *flags]) == 0
    assert "packed at" in capsys.readouterr().out


def test_damaged_weights_get_one_line(base, text, tmp_path, capsys):
    folder = shutil.copytree(base, tmp_path / "damaged")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    code, out = run(folder, text, tmp_path, "--schedule", "uniform")
    said = capsys.readouterr().err
    assert code == 1 and not out.exists() and f"error: {folder}: a safetensors file is damaged (" in said
    assert generate_cli.main([str(folder), "--prompt", "x", "--device", "cpu"]) == 1
    assert f"error: cannot load {folder}, expected a converted folder or Hub id: " in capsys.readouterr().err


def test_weights_of_another_method_are_refused(base, text, tmp_path, capsys):
    other = tmp_path / "gptq"
    other.mkdir()
    config = json.loads((base / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert run(other, text, tmp_path)[0] == 1
    assert "quantised with 'gptq'" in capsys.readouterr().err


def test_a_losing_schedule_falls_back_to_uniform_and_says_so(base, text, tmp_path, capsys, monkeypatch):
    def worst(model, windows, layers, **kwargs):
        return CalibrationResult(dict.fromkeys(layers, (1, 1)), None, {}, {}, 1.0)

    monkeypatch.setattr(tq_ao.convert, "calibrate", worst)
    code, out = run(base, text, tmp_path, "--schedule", "auto")
    assert code == 0 and "falling back to uniform" in capsys.readouterr().err
    report = json.loads((out / "tq_ao_config.json").read_text())
    assert report["fell_back"] and report["average_bits"] == 3.0


def measured_at_most_bits(base, text, tmp_path, capsys, *flags):
    """What a run whose limits are out of reach says it measured: KL, and the rise of perplexity in percent."""
    code, out = run(base, text, tmp_path, *flags, "--bits", "4")
    error = capsys.readouterr().err
    assert code == 1 and not out.exists()
    assert "expected a target that a schedule of at most 4 bits on average can meet, got " in error
    assert f"what was measured is kept in {tmp_path / '.out.calibration'}: the same command goes on" in error
    assert f"with other limits and --output-dir {out}; to start afresh remove" in error
    assert (tmp_path / ".out.calibration").exists()
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
    said = error.split("measured there: ")[1]
    kl, ppl = re.search(r"KL ([\d.e-]+)", said), re.search(r"perplexity ([-+\d.e]+) %", said)
    return error, kl and float(kl[1]), ppl and float(ppl[1])


def test_the_fewest_bits_that_meet_a_target(base, text, tmp_path, capsys):
    error, kl, ppl = measured_at_most_bits(base, text, tmp_path, capsys, "--max-kl", "1e-9")
    assert "got KL 1e-09; measured there" in error and ppl is None
    reachable = 3 * kl
    for target, most in ((1e3, 1.0), (reachable, 3.99)):  # a bit less is about four times the KL
        to = tmp_path / str(most)
        assert run(base, text, tmp_path, "--max-kl", str(target), "--bits", "4", "--output-dir", str(to))[0] == 0
        report = json.loads((to / "tq_ao_config.json").read_text())
        assert 1 <= report["average_bits"] <= most
        assert report["max_kl"] == target and report["baseline_uniform"]["bits"] <= report["average_bits"]
        assert load(to / "recipe.yaml").max_kl == target
        missed = f"exceeds the {target:g} asked for" in capsys.readouterr().err
        assert missed == (report["kl"] > target)
    assert report["average_bits"] > 1


def test_the_fewest_bits_that_keep_perplexity(base, text, tmp_path, capsys, monkeypatch):
    """A model trained on the text would lose; the random one may gain, so its perplexity is made to follow its KL."""
    real = Evaluator.measure

    def measure(self, attention):
        metrics = real(self, attention)
        return replace(metrics, ppl_ratio=1 + metrics.kl)

    monkeypatch.setattr(Evaluator, "measure", measure)
    _, kl, ppl = measured_at_most_bits(base, text, tmp_path, capsys, "--max-ppl", "1e-9", "--max-kl", "1e3")
    assert ppl == pytest.approx(100 * kl, rel=1e-3)
    error, none, same = measured_at_most_bits(base, text, tmp_path, capsys, "--max-ppl", "1e-9")
    assert "got perplexity +1e-09 %; measured" in error and none is None and same == ppl
    loose, tight, bits = 1e4, 3 * ppl, {}
    for name, flags in {
        "loose": ["--max-ppl", f"{loose}"],
        "tight": ["--max-ppl", f"{tight}"],
        "as KL": ["--max-kl", f"{tight / 100}"],
        "both": ["--max-ppl", f"{tight}", "--max-kl", f"{loose}"],
        "both the other way": ["--max-ppl", f"{loose}", "--max-kl", f"{tight / 100}"],
    }.items():
        to = tmp_path / name
        assert run(base, text, tmp_path, *flags, "--bits", "4", "--output-dir", str(to))[0] == 0
        report = json.loads((to / "tq_ao_config.json").read_text())
        bits[name] = report["average_bits"]
        asked = dict(zip(flags[::2], map(float, flags[1::2]), strict=True))
        assert (report["max_kl"], report["max_ppl"]) == (asked.get("--max-kl"), asked.get("--max-ppl"))
        recipe = load(to / "recipe.yaml")
        assert (recipe.max_kl, recipe.max_ppl) == (report["max_kl"], report["max_ppl"])
        assert report["ppl_rise"] == pytest.approx(100 * (report["ppl_after"] / report["ppl_before"] - 1), abs=1e-3)
    assert bits["loose"] == 1 and len({bits[name] for name in bits if name != "loose"}) == 1 < bits["tight"] < 4


@pytest.mark.parametrize(
    ("flags", "missed"),
    [
        (["--max-ppl", "49"], ["perplexity +50 % exceeds the 49 asked for"]),
        (["--max-ppl", "51"], []),
        (["--max-kl", "0.1"], ["KL 0.125 exceeds the 0.1 asked for"]),
        (["--max-kl", "0.1", "--max-ppl", "51"], ["KL 0.125 exceeds the 0.1 asked for"]),
        (["--max-kl", "1", "--max-ppl", "49"], ["perplexity +50 % exceeds the 49 asked for"]),
    ],
)
def test_a_limit_missed_on_held_out_text_is_said(flags, missed, base, text, tmp_path, capsys, monkeypatch):
    real = tq_ao.convert.evaluate_caches

    def measure(*args, **kwargs):
        return {name: replace(m, kl=0.125, ppl_ratio=1.5) for name, m in real(*args, **kwargs).items()}

    def three(model, windows, layers, **kwargs):
        return CalibrationResult(dict.fromkeys(layers, (3, 3)), None, {}, {}, 3.0)

    monkeypatch.setattr(tq_ao.convert, "evaluate_caches", measure)
    monkeypatch.setattr(tq_ao.convert, "calibrate", three)
    assert run(base, text, tmp_path, *flags)[0] == 0
    said = capsys.readouterr()
    assert re.findall(r"on held-out text (.*?);", said.err) == missed and "(+50.00 +- " in said.out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["ppl_rise"] == pytest.approx(50) and report["ppl_rise_stderr"] > 0


def test_names_of_outputs():
    args = script.parse(["org/m", "--max-kl", "0.02"])
    assert script.default_output(script.settings(args), args.target) == Path("m-tq-kl0.02")
    args = script.parse(["org/m", "--max-ppl", "1.0"])
    assert script.default_output(script.settings(args), args.target) == Path("m-tq-ppl1")
    args = script.parse(["org/m", "--max-ppl", "0.5", "--max-kl", "0.02"])
    assert script.default_output(script.settings(args), args.target) == Path("m-tq-kl0.02-ppl0.5")
    args = script.parse(["org/m", "--memory", "30", "--max-kl", "0.02"])
    assert script.default_output(script.settings(args), args.target) == Path("m-tq-30mib-kl0.02")
    args = script.parse(["gemma-2b", "--bits", "2.5"])
    assert script.default_output(script.settings(args), args.target) == Path("gemma-2b-tq2.5")
    assert script.default_output(script.settings(args), "memory-first") == Path("gemma-2b-tq-memory-first")
    here = script.settings(script.parse(["."]))
    assert script.default_output(here, None) == Path(f"{Path.cwd().name}-tq3")


def test_the_commands_of_the_readme_run_one_after_the_other():
    commands = re.findall(r"^python scripts/(convert|generate)\.py (.*)$", (ROOT / "README.md").read_text(), re.M)
    outputs = []
    for kind, flags in commands:
        words = shlex.split(flags, comments=True)
        if kind == "generate":
            assert words[0] in outputs
            continue
        args = script.parse([str(ROOT / word) if word.endswith(".yaml") else word for word in words])
        output = str(args.output_dir or script.default_output(script.settings(args), args.target))
        assert output not in outputs, "which would not be replaced"
        outputs.append(output)
    assert len(outputs) > 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", "0.5"], "between 1 and 8"),
        (["--schedule", "uniform", "--bits", "2.3"], "use schedule auto"),
        (["--schedule", "uniform", "--max-kl", "0.1"], "expected schedule auto with max_kl"),
        (["--schedule", "uniform", "--max-ppl", "1"], "expected schedule auto with max_ppl"),
        (["--schedule", "uniform", "--repair", "4"], "expected schedule auto with repair, got 'uniform'"),
        (["--repair", "-1"], "expected repair to be a number of swaps, 0 or more, got -1"),
        (["--max-kl", "0"], "max_kl to be a number above 0, got 0.0"),
        (["--max-ppl", "0"], "max_ppl to be a number above 0, got 0.0"),
        (["--max-ppl", "-1"], "max_ppl to be a number above 0, got -1.0"),
        (["--max-ppl", "nan"], "max_ppl to be a number above 0, got nan"),
        (["--memory", "1", "--bits", "3"], "expected bits or memory, got 3.0 bits and 1.0 MiB; leave one out"),
        (["--schedule", "nowhere.yaml"], "nowhere.yaml"),
        (["--output-dir", "/proc/nope/out"], "/proc"),
        (["--calibration", "EMPTY"], "empty"),
        (["--calibration", "missing.txt"], "missing.txt"),
        (["--json", "nowhere/r.json"], "existing folder"),
        (["--json", "FOLDER"], "expected --json to be a file, got the folder"),
        (["--json", "OUT"], "expected --json and the output to be two places"),
        (
            ["--push-to-hub"],
            "expected an access token with --push-to-hub, got none; pass --token, set HF_TOKEN, or log in",
        ),
        (["--push-to-hub", "me/x", "--token", ""], "expected an access token with --push-to-hub, got none"),
        (["--push-to-hub", "a/b/c d", "--token", "hf_x"], "expected --push-to-hub with the name of a repository"),
        (["--push-to-hub", "--token", "hf_x", "--output-dir", "my model"], "a repository, 'org/name', got 'my model'"),
        (["--private"], "expected --push-to-hub with --private, got --private alone"),
        (
            ["--calibration-windows", "0"],
            "error: --calibration-windows: expected windows >= 1 and length >= 256, got 0",
        ),
        (["--verification-windows", "0"], "error: --verification-windows: expected windows >= 1"),
        (["--recall-windows", "-1"], "error: --recall-windows: expected recall to be a number of windows"),
        (
            ["--max-seq-length", "100"],
            "error: --max-seq-length: expected windows >= 1 and length >= 256, got 3 and 100",
        ),
        (["--window", "300"], "never leaves the exact window"),
        (["--calibration-windows", "2"], "expected at least 3 calibration windows with schedule auto, got 2"),
        (["--max-seq-length", "5000"], "expected windows of at most 4096 tokens, what"),
        (["--device", "nowhere"], "expected a device that this machine has, got 'nowhere'"),
        (["--device", "mps"], "expected a device of type cpu or cuda, got mps"),
        (["--device", "meta"], "expected a device that this machine has, got 'meta'"),
        (["--output-dir", "."], "cannot be replaced by a finished folder"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(flags, message, base, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "empty.txt").touch()
    places = {"EMPTY": "empty.txt", "FOLDER": "", "OUT": "out"}
    flags = [str(tmp_path / places[flag]) if flag in places else flag for flag in flags]
    before = sorted(tmp_path.iterdir())
    code, _ = run(base, text, tmp_path, *flags)
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and message in errors[0]
    assert "loading" not in said, "before anything is loaded"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--memory", "0"], "expected memory to be a number above 0, got 0.0"),
        (["--memory", "-3"], "expected memory to be a number above 0, got -3.0"),
        (["--memory", "inf"], "expected memory to be a number above 0, got inf"),
        (["--memory", "1", "--schedule", "uniform"], "expected schedule auto with memory, got 'uniform'"),
        (
            ["--memory", "0.1"],
            r"expected memory of at least 0\.\d{3} MiB, got 0.1: the least that a cache for 1024",
        ),
        (["--memory", "5"], r"expected memory below 0\.750 MiB, got 5: the exact cache for 1024 tokens fits"),
        (["--memory", "1", "--context", "100"], "a context that packing makes smaller, got 128 tokens"),
        (
            ["--memory", "0.4", "--max-kl", "1e-9"],
            "expected a target that a schedule of at most 0.4 MiB can meet, got KL 1e-09; measured",
        ),
    ],
)
def test_mistakes_about_memory(flags, message, base, text, tmp_path, capsys):
    out = tmp_path / "out"
    where = ["--calibration", str(text), "--output-dir", str(out), "--context", "1024"]
    assert script.main([str(base), *where, *FAST[:-2], *flags]) == 1 and not out.exists()
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), errors
    assert ("loading" in said) == ("--max-kl" in flags), "before anything is loaded"


def test_memory_takes_the_place_of_a_recipes_bits_and_bits_of_its_memory(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nbits: 3\n")
    found = script.settings(script.parse(["--recipe", str(path), "--memory", "30"]))
    assert (found.bits, found.memory) == (None, 30)
    path.write_text("model: m\nmemory: 30\n")
    assert (load(path).bits, load(path).memory) == (None, 30)
    found = script.settings(script.parse(["--recipe", str(path), "--bits", "2"]))
    assert (found.bits, found.memory) == (2, None)


def test_a_context_has_to_be_known_for_memory(base, monkeypatch):
    config = AutoConfig.from_pretrained(base)
    monkeypatch.setattr(loading, "longest_text", lambda config: float("inf"))
    with pytest.raises(ValueError, match="expected a context with memory, got none"):
        loading.memory_of(Recipe("m", memory=1.0), config)
    assert static_length(1) == static_length(128) == 128 and static_length(129) == 256


@pytest.mark.parametrize("flags", [["--max-ppl", "1%"], ["--max-kl", "low"], ["--max-ppl"], ["--maximum", "1"]])
def test_flags_that_do_not_parse_get_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["smollm2-135m", *flags])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert flags[-1] in err


def test_bad_models_get_one_line(tmp_path, capsys):
    DeepseekV3Config(num_hidden_layers=2, hidden_size=64).save_pretrained(tmp_path / "latent")
    before = sorted(tmp_path.iterdir())
    for name, message in (
        ("smollm2-134m", "smollm2-135m"),
        (str(tmp_path / "latent"), "latent attention"),
        ("gemma-2b", "HF_HUB_OFFLINE"),
        (str(tmp_path / "model.Q4.GGUF"), "expected a model in safetensors, got GGUF, which is not read"),
    ):
        assert script.main([name, "--output-dir", str(tmp_path / "out")]) == 1
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0], errors
    assert sorted(tmp_path.iterdir()) == before
    assert script.main([]) == 1 and "--recipe" in capsys.readouterr().err


def test_an_existing_output_is_not_overwritten(base, text, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    code, out = run(base, text, tmp_path, "--schedule", "uniform")
    assert code == 1 and "exists" in capsys.readouterr().err and (out / "precious").read_text() == "x"


def test_an_empty_folder_is_filled_a_link_to_one_too(base, text, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")
    code, out = run(base, text, tmp_path, "--schedule", "uniform")
    assert code == 0 and out.is_symlink() and (tmp_path / "there" / "config.json").exists()
    assert f'from_pretrained("{out.as_posix()}"' in (out / "README.md").read_text()


def test_a_mount_point_is_refused_before_anything_is_loaded(base, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Path, "is_mount", lambda self: True)
    assert run(base, text, tmp_path, "--schedule", "uniform")[0] == 1
    said = capsys.readouterr().err
    assert "cannot be replaced" in said and "loading" not in said


def test_more_than_four_bits_on_average(base, text, tmp_path):
    assert run(base, text, tmp_path, "--bits", "5.5")[0] == 0
    assert 5 <= json.loads((tmp_path / "r.json").read_text())["average_bits"] <= 5.5


def test_one_chunk_of_text_has_no_standard_error(base, text, tmp_path, capsys):
    assert run(base, text, tmp_path, "--schedule", "uniform", "--verification-windows", "1")[0] == 0
    report = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert report["kl"] > 0 and report["kl_stderr"] is None and report["ppl_rise_stderr"] is None
    assert "+-" not in capsys.readouterr().out


def test_attention_that_cannot_be_exchanged_gets_one_line(smollm2, text, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=64, n_head=2, n_layer=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    for schedule in ("auto", "uniform"):
        assert run(tmp_path / "bloom", text, tmp_path, "--schedule", schedule)[0] == 1
        (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert "bloom: expected a model whose attention can be exchanged" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "nowhere"], "expected a device that this machine has, got 'nowhere'"),
        (["--max-new-tokens", "0"], "expected --max-new-tokens to be 1 or more, got 0"),
        (["--prompt", ""], "expected a --prompt of at least one token, got none"),
    ],
)
def test_mistakes_in_generation_get_one_line(flags, message, base, text, tmp_path, capsys):
    code, out = run(base, text, tmp_path, "--schedule", "uniform")
    assert code == 0
    capsys.readouterr()
    assert generate_cli.main([str(out), "--prompt", "the sea", "--device", "cpu", *flags]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{0: [3.0, 2]}", "expected layer 0: [k_bits, v_bits], got [3.0, 2] ("),
        ("[[3, 3]]", "expected a mapping {layer: [k_bits, v_bits]}, got [[3, 3]]\n"),
        (
            json.dumps([{"layer": 0, "k_bits": k, "v_bits": 3} for k in (3, 4)]),
            "expected a row of every layer once, got [0, 0]",
        ),
        (
            "[{k_bits: 3, v_bits: 3}]",
            "expected a mapping {layer: [k_bits, v_bits]}, got [{'k_bits': 3, 'v_bits': 3}]\n",
        ),
        ("layers: 4", "expected a mapping {layer: [k_bits, v_bits]}, got 4\n"),
        ("schedule: auto", "expected a mapping {layer: [k_bits, v_bits]}, got 'auto'\n"),
        ("", "expected a mapping {layer: [k_bits, v_bits]}, got None\n"),
        ("{0: [3, 3]", "expected JSON or YAML, got neither ("),
        ("{0: [3, 3], 0: [4, 4]}", "expected every key once, got ['0'] again in the mapping of line 1; remove one\n"),
        (
            "{layers: {0: [3, 3]}, window: 64}",
            "expected 'layers' alone, which is all that is read, got ['window'] beside",
        ),
        (
            "{model: m, schedule: {0: [3, 3]}}",
            "expected 'schedule' alone, which is all that is read, got ['model'] beside",
        ),
        ("[{layer: 0, k_bits: 3, v_bits: 3, bits: 3}]", "expected layer 0: [k_bits, v_bits], got {"),
        (
            "{model_type: llama, quantization_config: {kv_cache_scheme: {layers: {}}}}",
            "expected a mapping {layer: [k_bits, v_bits]}, got the config.json of a model; copy what its",
        ),
    ],
)
def test_mistakes_in_schedule_files_get_one_line(given, says, base, text, tmp_path, capsys):
    path = tmp_path / "schedule.yaml"
    path.write_text(given)
    code, out = run(base, text, tmp_path, "--schedule", str(path))
    said = capsys.readouterr().err
    assert code == 1 and not out.exists() and said.count("\n") == 1
    assert said.startswith(f"error: {path}: {says}")


def test_a_schedule_as_rows(tmp_path):
    path = tmp_path / "report.json"
    row = {"layer": 1, "k_bits": 4, "v_bits": 2}
    for rows in ([row], {"schedule": [row]}, {"window": 128, "schedule": [{**row, "sensitivity": 0.1}]}):
        path.write_text(json.dumps(rows))
        assert script.schedule_file(str(path)) == {1: (4, 2)}


def test_a_schedule_that_measures_nan_falls_back(base, text, tmp_path, monkeypatch):
    real = tq_ao.convert.evaluate_caches

    def measure(*args, **kwargs):
        found = real(*args, **kwargs)
        return {**found, "chosen": replace(found["chosen"], kl=float("nan"))}

    monkeypatch.setattr(tq_ao.convert, "evaluate_caches", measure)
    assert run(base, text, tmp_path)[0] == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["fell_back"] and report["kl"] == report["baseline_uniform"]["kl"]


SMALL = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 1024}
OTHERS = {
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=96),
    "gpt2": GPT2Config(n_embd=64, n_head=2, n_layer=2),
    "opt": OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64),
    "phi": PhiConfig(**SMALL, intermediate_size=96),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_whose_configs_and_projections_have_other_names(kind, smollm2, text, tmp_path, capsys):
    """No num_key_value_heads, no o_proj."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    config = OTHERS[kind]
    config.update({"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    for schedule in ("uniform", "auto") if kind == "gpt_neox" else ("auto",):
        out = tmp_path / schedule
        code, _ = run(tmp_path / "small", text, tmp_path, "--schedule", schedule, "--output-dir", str(out))
        report = json.loads((tmp_path / "r.json").read_text())
        assert code == 0 and report["bytes_per_token"]["bfloat16"] == 2 * 2 * 2 * 64, "K and V, layers, bytes"
    variants = {value for _, value in report["variants"].values()}
    assert len(report["variants"]) == 2 and variants <= {*VALUE_CHOICES}
    capsys.readouterr()
    flags = ["--prompt", "the sea and the road " * 20, "--max-new-tokens", "4", "--device", "cpu"]
    assert generate_cli.main([str(out), *flags]) == 0
    assert "2 packed layers" in capsys.readouterr().out


def test_the_report_says_what_it_was_made_with(base, text, tmp_path):
    assert run(base, text, tmp_path, "--schedule", "uniform", "--dtype", "bfloat16", "--device", "cpu")[0] == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert {"tq_ao", "torch", "transformers", "python"} <= set(report["versions"])
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert report["commit"] == (git.stdout.strip() if git.returncode == 0 and (ROOT / ".git").exists() else None)
    assert report["dtype"] == "bfloat16" and re.fullmatch(r"CPU, \d+ threads", report["device"])


def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance()["commit"] is None


def test_the_card_says_how_it_was_made_and_what_to_load(base, text, tmp_path):
    where = ["--calibration", str(text), "--schedule", "uniform", *FAST]
    out = tmp_path / "by script"
    command = [sys.executable, str(ROOT / "scripts" / "convert.py"), str(base), *where, "--output-dir", str(out)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    card = (out / "README.md").read_text()
    assert f"```\npython scripts/convert.py {base} " in card and f'from_pretrained("{out}"' in card
    assert AutoConfig.from_pretrained(re.search(r'from_pretrained\("(.*?)"', card)[1]).model_type == "llama"
    out = tmp_path / "out"
    publish = ["--push-to-hub", "me/x", "--token", "hf_x"]
    assert script.main([str(base), *where, "--output-dir", str(out), *publish]) == 3, "no Hub here"
    card = (out / "README.md").read_text()
    assert f"```\ntq-ao-convert {base} " in card
    assert card.count('.from_pretrained("me/x"') == card.count(".from_pretrained(") == 2
    assert json.loads((out / "tq_ao_config.json").read_text())["repo_id"] == "me/x"


def test_an_interrupted_run_leaves_nothing_that_loads(base, text, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts" / "convert.py"), str(base), "--calibration", str(text)]
    command += ["--output-dir", str(out), *FAST]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    for line in process.stderr:
        if line.startswith("loading"):
            break
    time.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert not list(tmp_path.glob("**/config.json"))


@pytest.mark.parametrize("at", [0, 2])
def test_a_stopped_run_says_what_is_kept_and_goes_on(at, base, text, tmp_path, capsys, monkeypatch):
    """Ctrl-C in a calibration, after so many measurements."""
    put, seen = Journal.put, []

    def stopping(self, key, value):
        if len(seen) == at:
            raise KeyboardInterrupt
        seen.append(key)
        put(self, key, value)

    monkeypatch.setattr(Journal, "put", stopping)
    before = {*tmp_path.iterdir()}
    code, out = run(base, text, tmp_path)
    printed, said = capsys.readouterr()
    (stopped,) = (line for line in said.splitlines() if line.startswith("stopped: "))
    journal = tmp_path / ".out.calibration"
    assert code == 130 and not printed and "Traceback" not in said and said.endswith(f"{stopped}\n")
    assert {*tmp_path.iterdir()} - before == ({journal} if at else set())
    if not at:
        assert stopped == "stopped: nothing was written"
        return
    assert f"kept in {journal}: the same command goes on from there" in stopped and "remove that file" in stopped
    again = []
    monkeypatch.setattr(Journal, "put", lambda self, key, value: (again.append(key), put(self, key, value)))
    assert run(base, text, tmp_path)[0] == 0 and out.exists() and not journal.exists()
    assert again and not {*again} & {*seen}


def test_a_short_name_is_converted_before_it_generates(capsys):
    assert generate_cli.main(["SmolLM2-135M", "--prompt", "x"]) == 1
    said = capsys.readouterr().err
    assert "got the short name SmolLM2-135M; convert it first, with tq-ao-convert SmolLM2-135M, and give" in said


def test_a_run_that_is_stopped_while_it_publishes_has_written(base, text, tmp_path, capsys, monkeypatch):
    def stopping(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(script.hub, "push", stopping)
    publish = ["--push-to-hub", "me/x", "--private", "--token", "hf_x"]
    code, out = run(base, text, tmp_path, "--schedule", "uniform", *publish)
    assert code == 130 and (out / "config.json").exists() and not (tmp_path / ".out.calibration").exists()
    assert f"\nstopped: {out} is complete; to publish it: hf upload me/x {out} --private\n" in capsys.readouterr().err


def test_the_token_is_not_published():
    assert script.hide_token(["m", "--token", "hf_secret", "--private"]) == ["m", "--token", "...", "--private"]
    assert script.hide_token(["--token=hf_secret"]) == ["--token=..."]


@pytest.mark.parametrize("flags", [["--tok", "hf_secret"], ["--tok=hf_secret"]])
def test_flags_are_not_abbreviated(flags, capsys):
    """The command is published, and `hide_token` knows the whole name only."""
    with pytest.raises(SystemExit) as stopped:
        script.parse(["m", *flags])
    assert stopped.value.code == 2 and "unrecognized arguments: --tok" in capsys.readouterr().err
