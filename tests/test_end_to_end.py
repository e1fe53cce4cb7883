"""The whole line on a real model: convert, publish, load by name, generate from the packed cache."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

LOAD_BY_NAME = """
import sys
import tq_ao
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("tester/smollm2-tq3", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("tester/smollm2-tq3")
prompt = "The capital of France is Paris. The capital of Italy is Rome. " * 16 + "The capital of France is"
inputs = tokenizer(prompt, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
cache = out["cache" if "cache" in out else "past_key_values"]
packed = sum(layer.k_codes.any().item() for layer in cache.packed_layers())
print(type(cache).__name__, packed, model.turboquant.quantization.transforms)
print(tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1]:]))
"""


def test_convert_push_load_by_name_and_generate(hub, tmp_path, smollm2):
    out = tmp_path / "smollm2-tq3"
    flags = "--schedule auto --calibration-windows 3 --verification-windows 1 --max-seq-length 512".split()
    command = [sys.executable, str(ROOT / "scripts" / "convert.py"), "smollm2-135m", *flags, "--output-dir", str(out)]
    command += ["--push-to-hub", "tester/smollm2-tq3", "--token", hub.write_token]
    done = subprocess.run(command, env=hub.env() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "published: " in done.stdout and hub.write_token not in "".join(p.read_text() for p in out.glob("*.[jmy]*"))
    assert len(hub.repos["tester/smollm2-tq3"].commits) <= 2  # the repository's creation and ours
    card = hub.content("tester/smollm2-tq3", "README.md").decode()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card and "base_model_relation: quantized" in card
    assert "- turboquant" in card and "scripts/convert.py" in card
    report = json.loads((out / "tq_ao_config.json").read_text())
    assert len(report["schedule"]) == 30 and report["average_bits"] <= 3.0
    assert not report["fell_back"] and report["kl"] < report["baseline_uniform"]["kl"]

    env = hub.env() | {"PYTHONPATH": str(ROOT)}
    loaded = subprocess.run([sys.executable, "-c", LOAD_BY_NAME], env=env, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    first, text = loaded.stdout.split("\n", 1)
    assert first.split()[:2] == ["TurboQuantCache", "30"] and "Paris" in text

    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), str(out), "--max-new-tokens", "24"]
    command += ["--prompt", "One day a ship came in. " * 40]
    shown = subprocess.run(command, env=env, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "tokens/s" in shown.stdout and "packed at" in shown.stdout and "uint8" in shown.stdout


def test_a_token_that_may_not_write_keeps_the_output(hub, tmp_path, smollm2):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts" / "convert.py"), "smollm2-135m", "--output-dir", str(out)]
    command += "--schedule uniform --verification-windows 1 --max-seq-length 256 --push-to-hub tester/x --token".split()
    env = hub.env() | {"PYTHONPATH": str(ROOT)}
    refused = subprocess.run([*command, "hf_wrong"], env=env, capture_output=True, text=True)
    assert refused.returncode == 1 and not out.exists() and "that it refuses" in refused.stderr
    done = subprocess.run([*command, hub.read_token], env=env, capture_output=True, text=True)
    assert done.returncode == 3
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "may not write" in errors[0] and f"hf upload tester/x {out}" in errors[0]
    assert (out / "model.safetensors").exists() and "tester/x" not in hub.repos
