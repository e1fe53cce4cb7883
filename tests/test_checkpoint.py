"""Tensors in safetensors files: found under the names of a model, and overwritten without touching another byte."""

import json
import stat

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from tq_ao import TurboQuantConfig, checkpoint, hf, quantize_kv_, quantizer
from tq_ao.checkpoint import find_stored, other_weights, overwrite, read_stored, was_folded, weight_files, write
from tq_ao.config import TRANSFORMS_FILE
from tq_ao.errors import ModelError
from tq_ao.model_card import SIDECAR
from tq_ao.rotation import rotation_maps
from tq_ao.transforms_file import find_transforms, load_transforms, save_transforms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_tensor_is_overwritten_and_nothing_else(dtype, rng, tmp_path):
    tensors = {name: torch.randn(5, 7, generator=rng).to(dtype) for name in "abc"} | {"d": torch.arange(3)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "made": "by hand"})
    before, new = path.read_bytes(), torch.randn(7, 5, generator=rng).to(dtype).mT  # not contiguous
    overwrite(path, {"b": new})
    after = path.read_bytes()
    held = load_file(path)
    assert torch.equal(held["b"], new) and all(torch.equal(held[name], tensors[name]) for name in "acd")
    differ = [i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y]
    assert max(differ) - min(differ) < new.nbytes
    overwrite(path, {"b": tensors["b"]})
    assert path.read_bytes() == before
    for wrong in ({"b": new.mT}, {"b": new.to(torch.int32)}, {"e": new}):
        with pytest.raises(ValueError, match="expected [be] as"):
            overwrite(path, wrong)
    assert path.read_bytes() == before


def test_parameters_are_found_in_shards_and_under_the_names_of_the_base_model(tmp_path):
    model = tiny.model("qwen2")
    names = [name for name, _ in model.named_parameters() if "self_attn" in name]
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    AutoModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "base")
    assert len(weight_files(tmp_path / "one")) == 1 < len(weight_files(tmp_path / "shards"))
    parameters = dict(model.named_parameters())
    for kind in ("one", "shards", "base"):
        where = find_stored(tmp_path / kind, names, model.base_model_prefix)
        assert where.keys() == set(names)
        assert all(torch.equal(read_stored(*where[name]), parameters[name]) for name in names), kind
    assert not next(key for _, key in where.values()).startswith("model.")


def test_what_is_not_there_is_said(tmp_path):
    model = tiny.model()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="expected weights in safetensors, model.safetensors missing"):
        find_stored(tmp_path, ["x"], "model")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    with pytest.raises(ModelError, match="expected x in its safetensors"):
        find_stored(tmp_path, ["x"], "model")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = next(iter(index["weight_map"].values()))
    (tmp_path / shard).unlink()
    with pytest.raises(ModelError, match=f"{shard} missing"):
        weight_files(tmp_path)
    save_file({"x": torch.zeros(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="expected x in its safetensors, stored as .*found none"):
        find_stored(tmp_path, ["x"], "model")


def test_a_folder_says_whether_values_were_folded(tmp_path):
    assert not was_folded(tmp_path)
    for written, wanted in (({"kl": 1}, False), ({"fold_kl": 0.0}, True), ({"folded_base": True}, True), ([], False)):
        (tmp_path / SIDECAR).write_text(json.dumps(written))
        assert was_folded(tmp_path) is wanted
    (tmp_path / SIDECAR).write_text("no JSON")
    assert not was_folded(tmp_path)


def test_maps_that_keys_and_values_share_are_stored_twice(tmp_path):
    maps = rotation_maps("hadamard", 2, 32, 0)
    assert maps.key is maps.value and maps.key_shift is maps.value_shift
    save_transforms(tmp_path / "x", {0: maps})
    (again,) = load_transforms(tmp_path / "x").values()
    assert again.tensors().keys() == maps.tensors().keys()
    assert all(torch.equal(t, maps.tensors()[name]) for name, t in again.tensors().items())


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_maps_that_are_not_finite_are_refused(number, tmp_path):
    save_transforms(tmp_path / "x", {4: rotation_maps("hadamard", 2, 32, 0)})
    tensors = load_file(tmp_path / "x")
    tensors["layers.4.query"][1, 2, 3] = number
    save_file(tensors, tmp_path / "x")
    with pytest.raises(ValueError, match=rf"expected finite numbers in layers.4.query, got {number}\); convert the"):
        load_transforms(tmp_path / "x")


def test_a_transforms_file_that_was_not_copied(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    with pytest.raises(OSError, match=f"{TRANSFORMS_FILE} is missing in {tmp_path}: copy it there") as error:
        find_transforms(config, TRANSFORMS_FILE, tmp_path)
    assert "login" not in str(error.value)
    save_transforms(tmp_path / TRANSFORMS_FILE, {0: rotation_maps("hadamard", 2, 32, 0)})
    assert find_transforms(config, TRANSFORMS_FILE, tmp_path) == tmp_path / TRANSFORMS_FILE
    assert other_weights(tmp_path) == [], "they are no weights"


def test_a_damaged_header_is_said(tmp_path):
    for content in (b"\x00" * 4, b"\xff" * 40, b"\x10" + b"\x00" * 20):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match="model.safetensors: a damaged safetensors file .* download it again"):
            find_stored(tmp_path, ["x"], "model")


def test_a_transforms_file_without_a_packed_layer_is_warned_of(tmp_path, monkeypatch):
    maps = {i: rotation_maps("dense", 2, 32, i) for i in range(2)}
    said = []
    monkeypatch.setattr(quantizer.logger, "warning", lambda message, *args: said.append(message % args))
    for schedule, wanted in (({2: (16, 16)}, 0), ({2: (3, 3)}, 1)):
        hf.attach(tiny.model(), TurboQuantConfig(layers=schedule), maps).save_pretrained(tmp_path)
        AutoModelForCausalLM.from_pretrained(tmp_path)
        assert len(said) == wanted, "layers that are kept exact have no maps"
    assert f"{TRANSFORMS_FILE} has no maps for the packed layers [2], which get random rotations" in said[0]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_schedule_names_every_layer_that_is_packed(kind, tmp_path):
    """Sliding layers, of which Gemma-3 has two here, are in no schedule."""
    model = quantize_kv_(tiny.model(kind), TurboQuantConfig(bits=2))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    layers = config["quantization_config"]["kv_cache_scheme"]["layers"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [str(i) for i in again.turboquant.quantization.layers] == list(layers)
    del layers["1"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"to name every full-attention layer, got none for \[1\]; add them"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.fixture
def base(tmp_path):
    """A folder to convert, with a file that is nobody else's business."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", ".env"):
        (folder / name).write_text("{}")
    return folder


def write_beside(base):
    output = base.with_name("out")
    write(output, base, TurboQuantConfig(), maps=None, recipe="", report={}, changed={})
    return output


def test_hidden_files_are_not_copied(base):
    names = {path.name for path in write_beside(base).iterdir()}
    assert "tokenizer.json" in names and not any(name.startswith(".") for name in names)


def test_a_converted_folder_is_open_to_every_reader(base):
    assert stat.S_IMODE(write_beside(base).stat().st_mode) == 0o755


def test_a_write_that_fails_leaves_nothing_behind(base, monkeypatch):
    def full(report):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "model_card", full)
    with pytest.raises(OSError, match="no space left"):
        write_beside(base)
    assert list(base.parent.iterdir()) == [base]
