"""TurboQuantConfig and recipes: validation, and round trips through JSON and YAML."""

import json

import pytest

from tq_ao.config import LayerScheme, TurboQuantConfig
from tq_ao.quantizer import TurboQuantQuantizationConfig
from tq_ao.recipe import Recipe, Text, from_mapping, load


def test_scheme_round_trip_through_json():
    config = TurboQuantConfig(
        bits=2, layers={0: LayerScheme(4, 3), 7: LayerScheme(16, 16)}, window=64, sinks=2, rotation="dense", seed=5,
        transforms="maps.safetensors", num_layers=9, head_dim=96,
    )  # fmt: skip
    again = TurboQuantConfig.from_scheme(json.loads(json.dumps(config.to_scheme())))
    assert again == config and again.to_scheme() == config.to_scheme()


def test_widths_of_keys_and_values_are_spelled_out_before_they_are_written():
    config = TurboQuantConfig(k_bits=4, v_bits=2)
    for given in (config, TurboQuantConfig(v_bits=2)):
        with pytest.raises(ValueError, match=r"every layer spelled out, got k_bits .* call resolve\(\)"):
            given.to_scheme()
    again = TurboQuantConfig.from_scheme(config.resolve([0], 1, 64).to_scheme())
    assert again.layer(0) == LayerScheme(4, 2)


def test_resolve_spells_every_layer_out():
    config = TurboQuantConfig(k_bits=4, v_bits=2, layers={1: LayerScheme(3, 3)}).resolve([0, 1, 5], 6, 64)
    assert config.layers == {0: LayerScheme(4, 2), 1: LayerScheme(3, 3), 5: LayerScheme(4, 2)}
    assert TurboQuantConfig.from_scheme(config.to_scheme()) == config
    assert config.average_bits([0, 1, 5]) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format 'turboquant'"),
        ({"version": 3}, "version 1..2, got 3; upgrade"),
        ({"layout_version": 9}, "layout_version 1..2, got 9; upgrade"),
        ({"codec": "qjl"}, "codec 'mse', got 'qjl'"),
        ({"scale_dtype": "bfloat16"}, "scale_dtype 'float16', got 'bfloat16'"),
        ({"extra": 1}, r"unknown keys \['extra'\]"),
        ({"layers": {"0": {"k_bits": 5, "v_bits": 3}}}, "k_bits in"),
        ({"layers": {"0": {"k_bits": 3, "v_bits": 3, "bits": 4}}}, "unexpected keyword argument 'bits'"),
        *(
            ({"layers": {name: {"k_bits": 3, "v_bits": 3}}}, f"numbers such as '0', got '{name}'")
            for name in ("x", "-1", "1.0", "01", "")
        ),
        *(({"version": version}, f"version 1..2, got {version}") for version in (True, 0)),
        *(
            ({"transforms": name}, "transforms None or the name of a file")
            for name in ("../x", "a/x", r"a\x", "..", "", 5)
        ),
    ],
)
def test_schemes_that_cannot_be_read_say_why(change, message):
    with pytest.raises(ValueError, match=message):
        TurboQuantConfig.from_scheme({**TurboQuantConfig().to_scheme(), **change})


@pytest.mark.parametrize("scheme", [[1], "x", 3])
def test_a_scheme_is_a_mapping(scheme):
    for read in (TurboQuantConfig.from_scheme, TurboQuantQuantizationConfig):
        with pytest.raises(ValueError, match="expected kv_cache_scheme to be a mapping of .*, got"):
            read(scheme)
    with pytest.raises(ValueError, match="turboquant version 1..2, got True"):
        TurboQuantQuantizationConfig(TurboQuantConfig().to_scheme(), version=True)


def test_a_missing_key_is_named():
    scheme = TurboQuantConfig().to_scheme()
    del scheme["window"]
    with pytest.raises(ValueError, match=r"lacks \['window'\]"):
        TurboQuantConfig.from_scheme(scheme)


@pytest.mark.parametrize(
    "fields", [{"bits": 5}, {"k_bits": 16, "v_bits": 3}, {"window": -1}, {"sinks": 1.5}, {"rotation": "none"}]
)
def test_bad_fields(fields):
    with pytest.raises(ValueError, match="expected"):
        TurboQuantConfig(**fields)


def test_recipe_round_trip(tmp_path):
    recipe = Recipe("gemma-2b", schedule={3: (4, 2)}, bits=2.5, window=64, calibration=Text("a.txt", 4, 512))
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert load(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: x\nbitz: 3", "unknown keys"),
        ("bits: 3", "key 'model'"),
        ("[1]", "a mapping"),
        ("model: x\nbits: 0.5", "between 1 and 8"),
        ("model: x\nbits: '3'", "between 1 and 8, got '3'"),
        ("model: 5", "expected model to be an alias, a folder or a Hub id, got 5"),
        ("model: x\nschedule: [[4, 3], [3, 3]]", "expected schedule auto, uniform, a file or a mapping of layers"),
        ("model: x\nschedule: null", "expected schedule auto, .*, got None"),
        ("model: x\nwindow: true", "expected window to be an integer >= 0, got True"),
        ("model: x\ncalibration: {length: 10}", "length >= 256"),
        ("model: x\ncalibration: null", "expected calibration to be a mapping of .*, got None"),
        ("model: x\ncalibration: {windows: six}", "expected windows >= 1 and length >= 256, got 'six' and 2048"),
        ("model: x\ncalibration: {windows: 2}", "expected at least 3 calibration windows with schedule auto, got 2"),
        ("model: x\ncalibration: {source: 3}", "expected source to be enwiki or the path of a text file, got 3"),
        ("model: x\nwindow: 256\ncalibration: {length: 256}", "expected calibration windows of more than 292 tokens"),
        ("model: x\nwindow: 2048", "expected verification windows of more than 2084 tokens"),
        ("model: x\nschedule: {0: [5, 3]}", "k_bits in"),
        ("model: x\nschedule: {0: [3, 2.0]}", "v_bits in .*, an int, got 2.0"),
        ("a: [", "r.yaml"),
    ],
)
def test_bad_recipes_name_the_file(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "r.yaml")
    assert "r.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [3.0, True, "3"])
def test_widths_are_ints(bits):
    with pytest.raises(ValueError, match=f"an int, got {bits!r}"):
        TurboQuantConfig(bits=bits)


def test_layers_as_pairs():
    assert TurboQuantConfig(layers={0: (4, 3)}).layer(0) == LayerScheme(4, 3)
    for layers in ({0: 3}, {0: (4, 3, 2)}, {"0": (4, 3)}, {True: (4, 3)}, {0: "43"}, None, [(4, 3)]):
        with pytest.raises(ValueError, match="expected"):
            TurboQuantConfig(layers=layers)


@pytest.mark.parametrize("layer", [-1, 2])
def test_layers_that_the_model_does_not_have(layer):
    with pytest.raises(ValueError, match=rf"layer indices 0 to 1, got \[{layer}\]"):
        TurboQuantConfig(layers={layer: (3, 3)}, num_layers=2)


def test_uniform_widths():
    assert Recipe("x", bits=2.5).uniform() == LayerScheme(3, 2)
    assert Recipe("x", bits=4).uniform() == LayerScheme(4, 4)
    assert Recipe("x", bits=2.25).uniform_below() == LayerScheme(2, 2)
    assert Recipe("x", bits=6.0).uniform_below() == LayerScheme(4, 4)
    with pytest.raises(ValueError, match="use schedule auto"):
        Recipe("x", schedule="uniform", bits=2.25)
    assert from_mapping({"model": "x", "verification": {"windows": 1}}).verification == Text("enwiki", 1, 2048)


def test_recall_windows_belong_to_calibration(tmp_path):
    assert from_mapping({"model": "x", "calibration": {"windows": 4}}).calibration == Text(windows=4, recall=3)
    recipe = Recipe("x", calibration=Text(recall=7))
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert load(tmp_path / "r.yaml") == recipe and recipe.verification.recall == 0
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(ValueError, match=f"expected recall to be a number of windows, 0 or more, got {wrong!r}"):
            from_mapping({"model": "x", "calibration": {"recall": wrong}})
    with pytest.raises(ValueError, match="expected no recall windows in verification, got 2"):
        from_mapping({"model": "x", "verification": {"recall": 2}})
