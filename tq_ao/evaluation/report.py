"""Tables of docs/quality.md, written from the result files and from nothing else."""

import json
import re
from pathlib import Path
from typing import Any

_SLOT = re.compile(r"(<!-- table: (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.S)


def table(result: dict[str, Any]) -> str:
    """Markdown of one result file: its setting, then its rows."""
    rows = result["rows"]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    commit = (result["commit"] or "unknown")[:10]
    head = f"{result['model']}; {result['text']}; {result['device']}; {versions}; commit {commit}.\n"
    if "task" in rows[0]:
        columns = ["task", "tokens", "packed", "cache", "code bits", "bytes per token", "right", "lost, gained"]
        columns += ["log p", "change"]
        rows = sorted(rows, key=lambda r: (r["task"], r["tokens"]))
        return head + _markdown(columns, [_found(r) for r in rows])
    if "method" in rows[0]:
        rows = sorted(rows, key=lambda r: (r["method"], r["code_bits"]))
        body = [
            [r["method"], f"{r['code_bits']:g}", f"{r['stored_bits']:.3g}", *_quality(r), f"{100 * r['top1']:.1f} %"]
            for r in rows
        ]
        reasons = "".join(f"\nNot measured: {method} ({why}).\n" for method, why in result.get("left_out", {}).items())
        return head + _markdown(["method", "code bits", "stored bits", "KL", "perplexity", "top-1"], body) + reasons
    if "experiment" in rows[0]:
        body = [[r["experiment"], r["name"], f"{r['bits']:g}", *_quality(r)] for r in rows]
        return head + _markdown(["experiment", "what", "bits", "KL", "perplexity"], body)
    body = [[r["metric"], *(f"{r[k]:+.2f}" for k in ("key", "value", "both"))] for r in rows]
    return head + _markdown(["metric", "K layers", "V layers", "K and V together"], body)


def _quality(row: dict[str, Any]) -> list[str]:
    return [f"{row['kl']:.5f} ± {row['kl_stderr']:.5f}", f"{100 * (row['ppl_ratio'] - 1):+.2f} %"]


def _found(row: dict[str, Any]) -> list[str]:
    values = [f"{row[k]:.2f} ± {row[k + '_stderr']:.2f}" for k in ("log_probability", "change")]
    return [
        row["task"], str(row["tokens"]), str(row["packed_tokens"]), row["method"], f"{row['code_bits']:g}",
        f"{row['bytes_per_token']:.0f}", f"{row['right']} of {row['questions']}",
        f"{row['lost']}, {row['gained']}", *values,
    ]  # fmt: skip


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines)


def fill(document: str, results: Path) -> str:
    """The document with every `<!-- table: NAME --> ... <!-- end -->` filled from results/NAME.json.

    A slot whose file does not exist says which command makes it.
    """

    def one(match: re.Match[str]) -> str:
        path = results / f"{match['name']}.json"
        if path.exists():
            return match[1] + table(json.loads(path.read_text(encoding="utf-8"))) + match[3]
        command, _, model = match["name"].partition("_")
        return f"{match[1]}Not measured yet: `python scripts/evaluate.py {command} --model {model}`.\n{match[3]}"

    return _SLOT.sub(one, document)
