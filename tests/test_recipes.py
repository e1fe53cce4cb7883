"""Every target of every recipe fits its model's real config, and runs on a small random model of that architecture."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from architectures import ARCHITECTURES, PACKED, config, small
from transformers import AutoModelForCausalLM, AutoTokenizer

from tq_ao import TurboQuantCache, hf, recipe_table
from tq_ao import convert_cli as script
from tq_ao.cache import GENERATE_CACHE, head_dim, quantizable_layers
from tq_ao.calibration.allocation import Shape, knapsack
from tq_ao.calibration.target import LOSSES, meet
from tq_ao.embedded import EMBEDDED
from tq_ao.evaluation.decode_kl import prove_packed
from tq_ao.models import ALIASES
from tq_ao.recipe import Recipe, find, load, load_targets, read_schedule

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TARGETS = ["2bit", "2.5bit", "3bit", "4bit", "quality-first", "memory-first"]
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def test_the_set_is_there():
    assert {path.stem for path in RECIPES} == set(ARCHITECTURES) == set(PACKED)


@every_recipe
def test_it_says_everything_and_how_to_run_it(path):
    data = yaml.safe_load(path.read_text())
    assert data["model"] == path.stem and (path.stem in ALIASES or path.stem in EMBEDDED)
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = f"# python scripts/convert.py --recipe recipes/{path.name} --target {data['target']}"
    assert comments[-1] == command and len(comments) > 1, "what is special about this model, then the command"
    args = script.parse(command.split("convert.py ")[1].split())
    args.recipe = path
    assert script.settings(args) == load(path)
    for changes in data["targets"].values():
        unsaid = {field.name for field in fields(Recipe)} - set(data) - set(changes)
        assert unsaid <= {*LOSSES, "memory", "repair", "fold_values"}, "no hidden defaults"


@every_recipe
def test_every_target_fits_the_model(path):
    whole = config(path.stem)
    hf.check_supported(whole)
    layers, dim = quantizable_layers(whole), head_dim(whole)
    assert layers == PACKED[path.stem] and dim % 32 == 0
    shape = Shape.same(layers, whole.num_key_value_heads, dim)
    # K of early layers is what costs most: a schedule that really mixes widths.
    costs = {(i, s, b): 4.0**-b * (2 if s == "key" else 1) / (1 + i) for i in layers for s in ("key", "value")
             for b in (1, 2, 3, 4)}  # fmt: skip
    targets = load_targets(path)
    assert list(targets) == TARGETS
    for name, target in targets.items():
        schedule = knapsack(costs, shape, target.bits)
        assert shape.average(schedule) == pytest.approx(target.bits), f"{name}: reachable with {len(layers)} layers"
        if name.endswith("bit"):
            assert name == f"{target.bits:g}bit" and not target.limits
        resolved = target.config(schedule).resolve(layers, whole.num_hidden_layers, dim)
        cache = TurboQuantCache(whole, resolved)
        assert [i for i, layer in enumerate(cache.layers) if layer in cache.packed_layers()] == layers
        below = target.uniform_below()
        assert target.bits - 0.5 < (below.k_bits + below.v_bits) / 2 <= target.bits
        for text in (target.calibration, target.verification):
            assert target.window + target.sinks + 32 < text.length <= whole.max_position_embeddings
        assert target.calibration.windows >= 3, "two thirds for statistics, the rest for sensitivities"
    quality, memory = targets["quality-first"], targets["memory-first"]
    assert quality.bits == max(target.bits for target in targets.values())
    assert quality.window > targets["4bit"].window > memory.window
    tried = meet(memory.limits, lambda bits: knapsack(costs, shape, bits), lambda s: {"max_kl": 0.0}, high=memory.bits)
    assert tried.budget == 1.0, "all budgets down to the smallest schedule can be tried"


@pytest.mark.parametrize(("name", "folder"), [("smollm2-135m", "smollm2"), ("gemma-3-270m", "gemma3")])
def test_the_configs_above_are_the_real_ones(name, folder, request):
    """Those that are on this machine."""
    folder = request.getfixturevalue(folder)
    real = json.loads((folder / "config.json").read_text())
    ours = config(name).to_dict()
    for key in (*ARCHITECTURES[name], "head_dim", "layer_types"):
        assert real.get(key) == ours.get(key), key


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of four articles of random words."""
    pick = torch.randint(97, 997, (4, 600), generator=torch.Generator().manual_seed(1)).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n\n".join(f"= Part {i} =\n\n" + " ".join(map(str, row)) for i, row in enumerate(pick)))
    return path


@pytest.fixture
def run(tokenizer, text, tmp_path):
    """Convert a small random model as a recipe says; the folder with the result."""

    def convert(path, *flags):
        base, out = tmp_path / "base", tmp_path / "out"
        AutoModelForCausalLM.from_config(small(path.stem, vocab_size=len(tokenizer))).save_pretrained(base)
        tokenizer.save_pretrained(base)
        where = ["--calibration", str(text), "--output-dir", str(out), "--verification-windows", "1"]
        assert script.main([str(base), "--recipe", str(path), *where, "--max-seq-length", "320", *flags]) == 0
        return out

    return convert


@every_recipe
def test_a_small_model_of_the_architecture_converts_and_generates(path, run):
    out = run(path, *"--target 2.5bit --schedule uniform --calibration-windows 1".split())
    effective = load(out / "recipe.yaml")
    assert (effective.bits, effective.window, effective.schedule) == (2.5, 128, "uniform")
    assert "targets" not in yaml.safe_load((out / "recipe.yaml").read_text())
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(5, 305)[None]
    cache = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )[GENERATE_CACHE]
    assert isinstance(cache, TurboQuantCache)
    assert prove_packed(cache) == pytest.approx(2.5 + 16 / head_dim(model.config))
    schemes = {(layer.scheme.k_bits, layer.scheme.v_bits) for layer in cache.packed_layers()}
    assert schemes == {(3, 2)} and len(cache.packed_layers()) == len(quantizable_layers(model.config)) >= 1


@pytest.mark.parametrize("model_type", sorted({fields["model_type"] for fields in ARCHITECTURES.values()}))
def test_every_kind_of_model_is_calibrated(model_type, run):
    path = next(path for path in RECIPES if ARCHITECTURES[path.stem]["model_type"] == model_type)
    out = run(path, *"--target memory-first --calibration-windows 3".split())
    assert load(out / "recipe.yaml") == replace(load(out / "recipe.yaml"), bits=4.0, max_kl=0.01, window=64)
    report = json.loads((out / "tq_ao_config.json").read_text())
    assert len(report["sensitivity"]) == 8 * len(report["schedule"]), "K and V, four widths"
    assert report["kl"] <= report["max_kl"] == 0.01 and report["average_bits"] < 4


TEXT = r"\['source', 'windows', 'length', 'recall'\]"
GOOD = {"model": "m", "bits": 3, "target": "a", "targets": {"a": {}, "b": {"bits": 2, "calibration": {"length": 512}}}}


def test_targets_change_what_they_name_and_nothing_else(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "calibration": {"windows": 4}}))
    a, b = load_targets(path).values()
    assert load(path) == a == load(path, "a") and load(path, "b") == b
    assert (a.bits, a.calibration.windows, a.calibration.length) == (3, 4, 2048)
    assert (b.bits, b.calibration.windows, b.calibration.length) == (2, 4, 512)
    assert replace(b, bits=3, calibration=a.calibration) == a
    path.write_text(b.to_yaml())
    assert load(path) == b and load_targets(path) == {}
    within = replace(b, bits=None, memory=24.5)
    path.write_text(within.to_yaml())
    assert load(path) == within and yaml.safe_load(path.read_text())["bits"] is None
    path.write_text(replace(b, fold_values=True).to_yaml())
    assert load(path) == replace(b, fold_values=True) != b
    limited = replace(b, max_kl=0.01, max_ppl=1.0)
    path.write_text(limited.to_yaml())
    assert load(path) == limited and limited.limits == {"max_kl": 0.01, "max_ppl": 1.0} and not b.limits


@pytest.mark.parametrize(
    ("change", "target", "says"),
    [
        ({}, "c", "unknown target 'c'; expected one of a, b"),
        ({"target": "c"}, "a", "unknown target 'c'; expected one of a, b"),
        ({"target": None}, None, "expected a target, one of a, b"),
        ({"targets": {}}, None, "expected targets to be a mapping of names"),
        ({"targets": {"a": {}, "b": {"bitts": 2}}}, "a", r"target b: unknown keys \['bitts'\]"),
        ({"targets": {"a": {}, "b": 2}}, "a", "target b: expected a mapping of settings, got 2"),
        ({"targets": {"a": {"bits": 9}}}, None, "target a: expected bits between 1 and 8"),
        *(
            ({"targets": {"a": {name: limit, **more}}}, None, f"target a: expected {says}")
            for name in ("max_kl", "max_ppl")
            for limit, more, says in (
                (0.1, {"schedule": "uniform"}, f"schedule auto with {name}, got 'uniform'"),
                (0, {}, f"{name} to be a number above 0, got 0"),
                (-0.5, {}, f"{name} to be a number above 0, got -0.5"),
                ("1 %", {}, f"{name} to be a number above 0, got '1 %'"),
                (True, {}, f"{name} to be a number above 0, got True"),
                (float("nan"), {}, f"{name} to be a number above 0, got nan"),
                (float("inf"), {}, f"{name} to be a number above 0, got inf"),
            )
        ),
        *(
            ({"targets": {"a": {"bits": None, "memory": mib, **more}}}, None, f"target a: expected {says}")
            for mib, more, says in (
                (24, {"bits": 3}, r"bits or memory, got 3 bits and 24 MiB; leave one out \(null in a recipe\)"),
                (24, {"schedule": "uniform"}, "schedule auto with memory, got 'uniform'"),
                (24, {"schedule": {0: [4, 4]}}, "schedule auto with memory, got {0"),
                (0, {}, "memory to be a number above 0, got 0"),
                ("24 MiB", {}, "memory to be a number above 0, got '24 MiB'"),
                (float("inf"), {}, "memory to be a number above 0, got inf"),
            )
        ),
        *(
            (
                {"targets": {"a": {"fold_values": value}}},
                None,
                f"target a: expected fold_values true or false, got {value!r}",
            )
            for value in ("yes please", 1, 0.0)
        ),
        *(
            (
                {"targets": {"a": {name: {"lenght": 512, 5: 6}}}},
                None,
                rf"target a: unknown keys \[5, 'lenght'\] in {name}; expected some of {TEXT}",
            )
            for name in ("calibration", "verification")
        ),
        (
            {"targets": {"a": {"calibration": 5}}},
            None,
            f"target a: expected calibration to be a mapping of {TEXT}, got 5",
        ),
        ({"verification": [5]}, "a", rf"target a: expected verification to be a mapping of {TEXT}, got \[5\]"),
        ({"verification": 5}, "b", f"target a: expected verification to be a mapping of {TEXT}, got 5"),
        ({"calibration": 5}, "b", f"target a: expected calibration to be a mapping of {TEXT}, got 5"),
        (
            {"targets": {"a": {"verification": {"windows": 0}}}},
            None,
            "target a: verification: expected windows >= 1 and",
        ),
    ],
)
def test_mistakes_in_targets(change, target, says, tmp_path):
    path = tmp_path / "r.yaml"
    data = {**GOOD, **change}
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}))
    with pytest.raises(ValueError, match=f"r.yaml: {says}"):
        load(path, target)


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ([3.0, 2], r"got \[3.0, 2\] \(expected k_bits"),
        ([3, 5], r"got \[3, 5\] \(expected v_bits"),
        ([3], r"got \[3\] \(.* missing .* 'v_bits'"),
        (3, r"got 3 \(.* must be an iterable"),
        ({"k_bits": 3}, "got {'k_bits': 3} .* missing .* 'v_bits'"),
        ({"k_bits": 3, "v_bits": 3, "bits": 3}, "got {.*} .* unexpected keyword argument 'bits'"),
    ],
)
def test_mistakes_in_schedules(pair, says, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "schedule": {0: [4, 4], 1: pair}}))
    with pytest.raises(ValueError, match=rf"r.yaml: expected layer 1: \[k_bits, v_bits\], {says}"):
        load(path)
    for layers in ({"x": [3, 3]}, {1.5: [3, 3]}, {True: [3, 3]}, {1: [3, 3], "1": [4, 4]}, {-1: [3, 3]}):
        with pytest.raises(ValueError, match="expected every layer once, by its number, got"):
            read_schedule(layers)
    with pytest.raises(ValueError, match="expected a schedule that packs a layer, got 16 bits for all"):
        Recipe("m", schedule={0: (16, 16), 1: (16, 16)}).whole([0, 1])


def test_mistakes_in_a_recipe_without_targets(tmp_path):
    path = tmp_path / "r.yaml"
    for more, says in (
        ({"calibration": {"winds": 3}}, rf"unknown keys \['winds'\] in calibration; expected some of {TEXT}"),
        ({"calibration": None}, f"expected calibration to be a mapping of {TEXT}, got None"),
        ({"winds": 3, 4: 5}, r"unknown keys \[4, 'winds'\]; expected some of \['bits', "),
    ):
        path.write_text(yaml.safe_dump({"model": "m", **more}))
        with pytest.raises(ValueError, match=f"r.yaml: {says}"):
            load(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"model: m\nbits: 3\nbits: 2\n", r"expected every key once, got \['bits'\] again in the mapping of line 1"),
        (b"model: m\ncalibration:\n  windows: 4\n  windows: 6", r"got \['windows'\] again in the mapping of line 3"),
        (b'{"model": "m", "schedule": {"0": [3, 3], "0": [4, 4]}}', r"expected every key once, got \['0'\] again"),
        (b"\xff\xfe\x00", "expected a recipe in YAML, got a file that is no UTF-8 text"),
        (b"model: m\nbits: 3\x00", "unacceptable character"),
    ],
)
def test_files_that_do_not_say_one_thing(content, says, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: .*{says}"):
        load(path)
    path.write_text("shared: &s {bits: 3}\nmodel: m\n<<: *s\nbits: 2\n")  # YAML's way to change what is shared
    with pytest.raises(ValueError, match=r"unknown keys \['shared'\]"):
        load(path)


def test_a_recipe_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert [find(path.stem).resolve() for path in RECIPES] == RECIPES
    found = script.settings(script.parse(["--recipe", "gemma-2b", "--target", "memory-first"]))
    assert found == load(ROOT / "recipes" / "gemma-2b.yaml", "memory-first")
    (tmp_path / "gemma-2b").mkdir()  # a model
    assert script.settings(script.parse(["--recipe", "gemma-2b"])) == load(ROOT / "recipes" / "gemma-2b.yaml")
    (tmp_path / "gemma-3-1b").write_text("model: mine\n")
    assert script.settings(script.parse(["--recipe", "gemma-3-1b"])).model == "mine", "a path wins"
    for name in ("gemma-2c", "recipes/Gemma-2B.yaml"):
        assert script.main(["--recipe", name]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and f"got '{name}' (near: gemma-2b" in said
    assert script.main(["--recipe", "zzz"]) == 1 and ", ".join(path.stem for path in RECIPES) in capsys.readouterr().err


def test_a_target_needs_a_recipe_that_has_it(tmp_path, capsys):
    path = tmp_path / "plain.yaml"
    path.write_text("model: smollm2-135m\nbits: 3\n")
    for argv, says in (
        (["smollm2-135m", "--target", "3bit"], "expected --recipe with --target"),
        (["--recipe", str(path), "--target", "3bit"], "this recipe has only one setting"),
        (["--recipe", str(RECIPES[0]), "--target", "5bit"], f"expected one of {', '.join(TARGETS)}"),
    ):
        assert script.main(argv) == 1
        assert says in capsys.readouterr().err
    assert (
        script.main(["--recipe", str(path), "--output-dir", str(RECIPES[0].parent)]) == 1
    )  # as before there were targets
    assert f"{RECIPES[0].parent} exists" in capsys.readouterr().err


def test_the_table_says_what_the_results_say():
    readme = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    filled = recipe_table.fill(readme, ROOT / "recipes", ROOT / "benchmarks" / "results")
    assert readme == filled, "run python scripts/evaluate.py report"
    rows = [line for line in readme.splitlines() if line.startswith("| `") and ".yaml" in line]
    assert len(rows) == len(RECIPES)


def test_a_result_of_other_settings_is_not_shown(tmp_path):
    recipe, results = next(path for path in RECIPES if path.stem == "smollm2-135m"), tmp_path
    report = {"window": 128, "sinks": 4, "average_bits": 3.0, "kl": 0.001, "max_kl": None}
    (results / "convert_smollm2-135m.json").write_text(json.dumps(report))
    row = next(line for line in recipe_table.table(recipe.parent, results).splitlines() if recipe.name in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][2:] == ["–", "–", "0.00100 at 3 bits", "–", "–", "–"]
    for change in ({"window": 64}, {"average_bits": 3.5}, {"max_kl": 0.01}, {"max_ppl": 1.0}, {"memory": 30.0}):
        (results / "convert_smollm2-135m.json").write_text(json.dumps({**report, **change}))
        with pytest.raises(ValueError, match=r"convert_smollm2-135m\.json was measured with other settings than 3bit"):
            recipe_table.table(recipe.parent, results)


def test_a_result_of_a_schedule_of_layers(tmp_path):
    """`bits` are for layers that it does not name."""
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "target": "a", "targets": {"a": {"schedule": {0: [4, 4]}}}}))
    row = {"layer": 0, "k_bits": 4, "v_bits": 4}
    report = {"window": 128, "sinks": 4, "average_bits": 3.5, "kl": 0.001, "schedule": [row, {**row, "layer": 1}]}
    result = tmp_path / "convert_m.json"
    result.write_text(json.dumps(report))
    assert recipe_table.result_file(path, "a", tmp_path) == result
    result.write_text(json.dumps({**report, "schedule": [{**row, "v_bits": 3}]}))
    with pytest.raises(ValueError, match="was measured with other settings than a"):
        recipe_table.result_file(path, "a", tmp_path)
