"""Publishing, end to end against a server on loopback; clients run in processes of their own (see hub_server)."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM

from tq_ao.errors import HubError
from tq_ao.hub import push
from tq_ao.model_card import SIDECAR, model_card

PUSH = """
import sys, time
time.sleep = lambda seconds: None  # retries do not wait
from tq_ao.hub import push
from tq_ao.errors import HubError
folder, repo_id, *token = sys.argv[1:]
try:
    print(push(folder, repo_id, token=token[0] if token else None, message="the message"))
except HubError as error:
    sys.exit(f"error: {error}")
"""

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.arange(8)[None]).logits, sys.argv[2])
"""


@pytest.fixture
def folder(tmp_path):
    """A tiny model with random weights, a model card and a file in a sub-folder."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    path = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(path)
    (path / "README.md").write_text(model_card({"base_model": "org/base", "license": "apache-2.0"}))
    (path / "extra").mkdir()
    (path / "extra" / "recipe.yaml").write_text("bits: 3\n")
    return path


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def as_before(files: dict[str, str], before: dict[str, str]) -> bool:
    """All but the card, which is published with the repository's name."""
    return files.keys() == before.keys() and all(files[name] == before[name] for name in before if name != "README.md")


def test_push_is_one_commit_that_loads_by_name(hub, folder, tmp_path):
    before = digest(folder)
    pushed = hub.run(PUSH, str(folder), "tester/tiny-tq3", hub.write_token)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip() == f"{hub.endpoint}/tester/tiny-tq3"
    repo = hub.repos["tester/tiny-tq3"]
    assert [commit.title for commit in repo.commits] == ["the message"]
    assert not repo.private
    assert as_before(repo.head.files, before)
    assert digest(folder) == before

    loaded = hub.run(LOAD, "tester/tiny-tq3", str(tmp_path / "logits.pt"))
    assert loaded.returncode == 0, loaded.stderr
    expected = LlamaForCausalLM.from_pretrained(folder)(torch.arange(8)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


def test_name_without_namespace_and_logged_in_token(hub, folder):
    pushed = hub.run(PUSH, str(folder), "tiny-tq3", token=hub.write_token)
    assert pushed.returncode == 0, pushed.stderr
    assert list(hub.repos) == ["tester/tiny-tq3"]


@pytest.mark.parametrize("repo_id", ["tiny-tq3", "tester/tiny-tq3"])
def test_the_published_card_loads_the_published_model(hub, folder, repo_id):
    """Whatever the folder says, which stays as it is; in one commit; with all that others wrote into the card."""
    said = {"name": "base", "repo_id": '/some where/"out"'}
    note = 'Compare AutoModelForCausalLM.from_pretrained("org/base").\n'
    (folder / "README.md").write_text(model_card({"name": "base", "repo_id": "out/model"}) + note)
    (folder / SIDECAR).write_text(json.dumps(said, indent=2))
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "state").write_text("of downloads")
    before = digest(folder)
    pushed = hub.run(PUSH, str(folder), repo_id, hub.write_token)
    assert pushed.returncode == 0, pushed.stderr
    (commit,) = hub.repos["tester/tiny-tq3"].commits
    assert set(commit.files) == {name for name in before if not name.startswith(".cache")}
    card = hub.content("tester/tiny-tq3", "README.md").decode()
    named = re.findall(r'= (\w+)\.from_pretrained\("(.*?)"', card)
    assert named == [(kind, "tester/tiny-tq3") for kind in ("AutoModelForCausalLM", "AutoTokenizer")]
    assert card == model_card({"name": "base", "repo_id": "tester/tiny-tq3"}) + note
    assert json.loads(hub.content("tester/tiny-tq3", SIDECAR)) == {**said, "repo_id": "tester/tiny-tq3"}
    assert digest(folder) == before


def test_second_push_adds_a_commit(hub, folder):
    for text in ("bits: 3\n", "bits: 2\n"):
        (folder / "extra" / "recipe.yaml").write_text(text)
        assert hub.run(PUSH, str(folder), "tester/tiny-tq3", hub.write_token).returncode == 0
        assert hub.content("tester/tiny-tq3", "extra/recipe.yaml") == text.encode()
    assert len(hub.repos["tester/tiny-tq3"].commits) == 2


@pytest.mark.parametrize(
    ("repo_id", "token", "says"),
    [
        ("tester/tiny", "hf_revoked", "the Hub refused the access token (pass a valid one with --token"),
        ("tester/tiny", "hf_read", "this access token may not write to tester/tiny"),
        ("somebody/tiny", "hf_write", "this access token may not write to somebody/tiny"),
        ("tester/tiny", None, "there is no access token (pass --token"),
        ("a/b/c", "hf_write", "'a/b/c' is not a repository name"),
    ],
)
def test_refusals_say_what_to_do(hub, folder, repo_id, token, says):
    before = digest(folder)
    pushed = hub.run(PUSH, str(folder), repo_id, *([token] if token else []))
    assert_not_published(pushed, folder, before, says)
    assert not hub.repos


def test_upload_broken_off_half_way_leaves_no_commit(hub, folder):
    before = digest(folder)
    hub.break_uploads_after = (folder / "model.safetensors").stat().st_size // 2
    pushed = hub.run(PUSH, str(folder), "tester/tiny-tq3", hub.write_token)
    assert_not_published(pushed, folder, before, "the connection to the Hub failed (")
    assert hub.repos["tester/tiny-tq3"].commits == []
    assert any(line.startswith("PUT /lfs/") and line.endswith("broken off") for line in hub.log)

    hub.break_uploads_after = None
    assert hub.run(PUSH, str(folder), "tester/tiny-tq3", hub.write_token).returncode == 0
    assert as_before(hub.repos["tester/tiny-tq3"].head.files, before)


def test_no_network(hub, folder):
    before = digest(folder)
    hub.close()
    pushed = hub.run(PUSH, str(folder), "tester/tiny-tq3", hub.write_token)
    assert_not_published(pushed, folder, before, "the connection to the Hub failed (ConnectionRefusedError: ")


def test_offline_mode(folder):
    """conftest sets HF_HUB_OFFLINE for this process."""
    with pytest.raises(HubError, match=r"not published: HF_HUB_OFFLINE is set \(unset it to publish\)"):
        push(folder, "tester/tiny", token="hf_write")


def test_how_to_publish_what_was_not(folder):
    spaced = folder.rename(folder.parent / "my model")
    for private, wanted in ((False, f"hf upload me/x '{spaced}'"), (True, f"hf upload me/x '{spaced}' --private")):
        with pytest.raises(HubError) as error:
            push(spaced, "me/x", private=private, token="hf_write")
        assert str(error.value).endswith(f"is complete; to retry: {wanted}")


def test_a_token_is_checked_before_the_work(hub):
    program = """
import sys
from tq_ao.hub import check_token
for token in sys.argv[1:]:
    try:
        print(check_token(token))
    except ValueError as error:
        print(error)
"""
    good, bad, none = hub.run(program, hub.write_token, "hf_revoked", "").stdout.splitlines()
    assert good == "None" and "that the Hub accepts with --push-to-hub, got one that it refuses" in bad
    assert "expected an access token with --push-to-hub, got none" in none
    hub.close()
    assert hub.run(program, "hf_revoked").stdout == "None\n", "no network: it may be there when the work is done"


def test_folder_without_a_model(tmp_path):
    with pytest.raises(HubError, match=r"without config\.json: convert first"):
        push(tmp_path, "tester/tiny")


def assert_not_published(pushed, folder, before, says):
    assert pushed.returncode == 1
    message = pushed.stderr.strip().splitlines()[-1]
    assert message.startswith(f"error: not published: {says}"), pushed.stderr
    assert f"{folder} is complete; to retry: hf upload" in message
    assert "Traceback" not in pushed.stderr
    assert digest(folder) == before


REPORT = {
    "name": "smollm2-135m-tq3",
    "repo_id": "tester/smollm2-135m-tq3",
    "command": "python scripts/convert.py smollm2-135m --schedule auto",
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "license": "apache-2.0",
    "schedule": [
        {"layer": 0, "k_bits": 4, "v_bits": 3, "sensitivity": 0.00123},
        {"layer": 1, "k_bits": 2, "v_bits": 3, "sensitivity": None},
    ],
    "average_bits": 3.0,
    "stored_bits": 3.25,
    "kl": 0.0079,
    "ppl_before": 20.5,
    "ppl_after": 20.6,
    "baseline_uniform": {"bits": 3, "stored_bits": 3.25, "kl": 0.0112, "ppl": 20.7},
    "text": "enwiki, 12 windows of 2048 tokens",
    "window": 128,
    "sinks": 4,
    "cache": {"tokens": 8192, "bytes": {"codes": 18 * 2**20, "exact": 2**22, "maps": 2**20 + 2**19}},
    "versions": {"tq_ao": "0.1.0"},
    "sample": {"prompt": "The sea", "text": " is wide\nand blue."},
}


def test_model_card_front_matter_is_what_the_hub_reads():
    data = ModelCard(model_card(REPORT)).data
    assert data.base_model == REPORT["base_model"]
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["turboquant", "kv-cache", "tq_ao", "torchao"]
    results = {(result.metric_type, result.metric_name): result.metric_value for result in data.eval_results}
    assert sorted(results.values()) == [0.0079, 20.5, 20.6]
    assert {result.dataset_type for result in data.eval_results} == {"enwiki"}
    own = ModelCard(model_card({**REPORT, "text": "/home/me/notes.txt, 3 windows"})).data
    assert {result.dataset_type for result in own.eval_results} == {"text"}


def test_model_card_body_has_the_command_the_measurements_and_the_schedule():
    card = model_card(REPORT)
    for line in (
        "```\npython scripts/convert.py smollm2-135m --schedule auto\n```",
        "| cache | exact | this model | uniform 3 |",
        "| bits per value, stored | 16 | 3.25 | 3.25 |",
        "| perplexity | 20.5 | 20.6 | 20.7 |",
        "| next-token KL (nats) | 0 | 0.0079 | 0.0112 |",
        "| 0 | 4 | 3 | 0.00123 |",
        "| 1 | 2 | 3 |  |",
        "Measured on enwiki, 12 windows of 2048 tokens, the last 128 tokens exact, the first 4 tokens exact.",
        "The cache of a text of 8192 tokens takes 23.50 MiB, maps and exact tokens included.",
        'AutoModelForCausalLM.from_pretrained("tester/smollm2-135m-tq3"',
        "> The sea is wide\n> and blue.",
    ):
        assert line in card


def test_model_card_says_what_became_of_the_weights():
    card = model_card(REPORT)
    assert "The weights are unchanged" in card and "folded" not in card and "loads as the original model, with" in card
    for more, kl in (
        ({"fold_kl": 1.2345e-5}, "(next-token KL 1.2e-05 nats)"),
        ({"folded_base": True}, "weights. Without"),
    ):
        card = model_card({**REPORT, **more})
        assert "The weights are unchanged" not in card and "folded into the weights of `v_proj` and `o_proj`" in card
        assert kl in card and "Without `tq_ao` it loads as that equivalent of the original model, with one" in card
    assert model_card({**REPORT, "folded_base": False}) == model_card(REPORT)


@pytest.mark.parametrize("missing", sorted(REPORT))
def test_model_card_renders_what_is_there(missing):
    report = {key: value for key, value in REPORT.items() if key != missing}
    card = model_card(report)
    assert "None" not in card
    ModelCard(card)  # parses
    assert ModelCard(model_card({})).data.library_name == "transformers"
    assert "## Measured" not in model_card({})
