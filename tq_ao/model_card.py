"""The README.md of a converted model, for people and for the Hub's index."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

TAGS = ["turboquant", "kv-cache", "tq_ao", "torchao"]
CARD, SIDECAR = "README.md", "tq_ao_config.json"  # the card, and the report it is made of
_WHERE = {  # what says where the model is: `_load`'s example, and the report's repo_id
    CARD: re.compile(rb'^((?:model|tokenizer) = Auto\w+\.from_pretrained\(")[^"\n]*', re.M),
    SIDECAR: re.compile(rb'^(  "repo_id": ")(?:[^"\\\n]|\\.)*', re.M),
}


def model_card(report: Mapping[str, Any]) -> str:
    """README.md of a converted model: YAML front matter the Hub reads, then what was done and what was measured.

    Args:
        report: any of these; what is missing is left out.
            name, repo_id: of the converted model; repo_id is what the loading example names.
            command: the exact command that made it.
            base_model, license: Hub id and license of the original.
            schedule: rows {"layer", "k_bits", "v_bits", "sensitivity"}; sensitivity may be missing or None.
            average_bits, stored_bits: bits per cached value, codes alone and with scales.
            kl, ppl_before, ppl_after: next-token KL (nats) and perplexity, packed against exact cache.
            baseline_uniform: {"bits", "kl", "ppl"} of the uniform schedule on the same text.
            text, window, sinks: what it was measured on; exact recent tokens; exact first tokens.
            fold_kl: KL of the model with folded value maps to the original, both with an exact cache.
            folded_base: whether the values of the model it was made from had been folded before.
            cache: {"tokens", "bytes": {part: bytes}} of the cache of one text, counted from its tensors.
            versions: {"tq_ao": ..., "torch": ...}.
            sample: {"prompt", "text"}, a generation from the packed cache.

    Returns:
        Markdown text.
    """
    front = yaml.safe_dump(_front_matter(report), sort_keys=False, allow_unicode=True)
    sections = [_intro(report), _load(report), _measured(report), _schedule(report), _sample(report), _made(report)]
    return f"---\n{front}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def published(folder: Path, repo_id: str) -> dict[str, bytes]:
    """The card and the report of a converted folder, if they are there, as its repository on the Hub is to have them.

    Returns:
        File name -> content with `repo_id` as where the model is; all else as it is.
    """
    found = {name: folder / name for name in _WHERE if (folder / name).is_file()}
    return {name: _WHERE[name].sub(rb"\g<1>" + repo_id.encode(), path.read_bytes()) for name, path in found.items()}


def _front_matter(report: Mapping[str, Any]) -> dict[str, Any]:
    sees = report.get("loads_with") == "AutoModelForImageTextToText"
    task = "image-text-to-text" if sees else "text-generation"
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    if report.get("license"):
        front["license"] = report["license"]
    if report.get("base_model"):
        front["base_model"] = report["base_model"]
        front["base_model_relation"] = "quantized"
    front["tags"] = list(TAGS)
    metrics = [
        {"type": kind, "value": float(report[key]), "name": name}
        for key, kind, name in (
            ("ppl_after", "perplexity", "perplexity, packed KV cache"),
            ("ppl_before", "perplexity", "perplexity, exact KV cache"),
            ("kl", "kl_divergence", "next-token KL to the exact KV cache (nats)"),
        )
        if report.get(key) is not None
    ]
    if metrics:
        text = str(report.get("text") or "text not recorded")
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"type": _dataset(text), "name": text},
            "metrics": metrics,
        }
        front["model-index"] = [{"name": _name(report), "results": [result]}]
    return front


def _dataset(text: str) -> str:
    """Identifier for the index: the source's name, or "text" where that is no word."""
    source = text.split(",")[0].strip()
    return source if re.fullmatch(r"[\w.-]+", source) else "text"


def _name(report: Mapping[str, Any]) -> str:
    return str(report.get("name") or report.get("repo_id") or "model")


def _intro(report: Mapping[str, Any]) -> str:
    base = report.get("base_model")
    of = f"[{base}](https://huggingface.co/{base})" if base else "The original model"
    bits = report.get("average_bits")
    width = f"at {bits:.3g} bits per value" if bits is not None else "at a few bits per value"
    return (
        f"# {_name(report)}\n\n{of} with a KV cache kept as packed TurboQuant codes {width}. {_weights(report)} "
        "model, with one warning."
    )


def _weights(report: Mapping[str, Any]) -> str:
    """What was done to them, up to the last two words of `_intro`."""
    if report.get("fold_kl") is None and not report.get("folded_base"):
        return (
            "The weights are unchanged: what this repository adds is the schedule of the cache. Without `tq_ao` it "
            "loads as the original"
        )
    kl = "" if report.get("fold_kl") is None else f" (next-token KL {report['fold_kl']:.2g} nats)"
    return (
        "The maps of its values are folded into the weights of `v_proj` and `o_proj`, all other weights are unchanged: "
        "any KV cache holds mapped values, and the model computes what it did up to the rounding of those "
        f"weights{kl}. Without `tq_ao` it loads as that equivalent of the original"
    )


def _load(report: Mapping[str, Any]) -> str:
    where, kind = report.get("repo_id") or _name(report), report.get("loads_with", "AutoModelForCausalLM")
    return (
        "## Use\n\n```python\nimport tq_ao  # registers the cache with transformers\n"
        f"from transformers import {kind}, AutoTokenizer\n\n"
        f'model = {kind}.from_pretrained("{where}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")\n'
        'inputs = tokenizer("The sea", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))\n```"
    )


def _measured(report: Mapping[str, Any]) -> str:
    baseline = report.get("baseline_uniform") or {}
    columns: list[tuple[str, ...]] = [
        ("cache", "exact", "this model", f"uniform {baseline.get('bits', '')}".strip()),
        ("bits per value, codes", "16", _number(report.get("average_bits")), _number(baseline.get("bits"))),
        ("bits per value, stored", "16", _number(report.get("stored_bits")), _number(baseline.get("stored_bits"))),
        ("perplexity", *(_number(x) for x in (report.get("ppl_before"), report.get("ppl_after"), baseline.get("ppl")))),
        ("next-token KL (nats)", "0", _number(report.get("kl")), _number(baseline.get("kl"))),
    ]
    rows = [row if baseline else row[:3] for row in columns]
    rows = [rows[0], *(row for row in rows[1:] if any(cell for cell in row[2:]))]
    if len(rows) == 1:
        return ""
    settings = [f"on {report['text']}"] if report.get("text") else []
    settings += [f"the last {report['window']} tokens exact"] if report.get("window") is not None else []
    settings += [f"the first {report['sinks']} tokens exact"] if report.get("sinks") is not None else []
    how = f"Measured {', '.join(settings)}.\n\n" if settings else ""
    return "## Measured\n\n" + how + _table(rows) + _cache_size(report)


def _cache_size(report: Mapping[str, Any]) -> str:
    cache = report.get("cache")
    if not cache:
        return ""
    size = sum(cache["bytes"].values()) / 2**20
    return f"\n\nThe cache of a text of {cache['tokens']} tokens takes {size:.2f} MiB, maps and exact tokens included."


def _schedule(report: Mapping[str, Any]) -> str:
    schedule: Sequence[Mapping[str, Any]] = report.get("schedule") or []
    if not schedule:
        return ""
    rows: list[tuple[str, ...]] = [("layer", "K bits", "V bits", "sensitivity")]
    rows += [tuple(_number(row.get(key)) for key in ("layer", "k_bits", "v_bits", "sensitivity")) for row in schedule]
    if not any(row[3] for row in rows[1:]):
        rows = [row[:3] for row in rows]
    return "## Schedule\n\n" + _table(rows)


def _sample(report: Mapping[str, Any]) -> str:
    sample = report.get("sample") or {}
    if not sample:
        return ""
    text = f"{sample.get('prompt', '')}{sample.get('text', '')}".strip()
    quoted = "\n".join(f"> {line}".rstrip() for line in text.splitlines())
    return f"## Sample from the packed cache\n\n{quoted}"


def _made(report: Mapping[str, Any]) -> str:
    parts = [f"```\n{report['command']}\n```"] if report.get("command") else []
    versions = report.get("versions") or {}
    if versions:
        parts.append("with " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return "## Made by\n\n" + "\n\n".join(parts) if parts else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
