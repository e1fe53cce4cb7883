"""Tensors in safetensors files: found under the names of a model, and overwritten without touching another byte."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tq_ao.checkpoint import find_stored, overwrite, read_stored, was_folded, weight_files
from tq_ao.errors import ModelError
from tq_ao.model_card import SIDECAR


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
