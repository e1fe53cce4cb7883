"""The table of recipes/README.md: every recipe and its targets, and what result files say about them."""

import json
import re
from pathlib import Path

from tq_ao.calibration.target import LOSSES
from tq_ao.embedded import EMBEDDED
from tq_ao.models import ALIASES
from tq_ao.recipe import load, load_targets

_SLOT = re.compile(r"(<!-- recipes -->\n).*?(<!-- end -->)", re.S)
NOT_MEASURED = "–"


def fill(document: str, recipes: Path, results: Path) -> str:
    """The document with the table between `<!-- recipes -->` and `<!-- end -->` made anew.

    Args:
        recipes: folder of recipes.
        results: folder of reports as convert.py's --json writes them: convert_<recipe>.json for the target taken by
            default, convert_<recipe>_<target>.json for any.
    """
    return _SLOT.sub(lambda match: match[1] + table(recipes, results) + match[2], document)


def table(recipes: Path, results: Path) -> str:
    """Markdown: a row per recipe, a column per target."""
    files = sorted(recipes.glob("*.yaml"))
    names = list(dict.fromkeys(target for file in files for target in load_targets(file)))
    lines = [["recipe", "model", *names], ["---"] * (2 + len(names))]
    for file in files:
        targets = load_targets(file)
        cells = [_measured(file, name, results) if name in targets else "" for name in names]
        lines.append([f"`{file.name}`", _hub_id(load(file).model), *cells])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def result_file(recipe: Path, target: str, results: Path) -> Path | None:
    """The report about a target, if there is one.

    Raises:
        ValueError: a report about other settings than the recipe now has.
    """
    wanted = load(recipe, target)
    named = [f"convert_{recipe.stem}_{target}.json"]
    if wanted == load(recipe):
        named.append(f"convert_{recipe.stem}.json")
    for path in (results / name for name in named):
        if path.exists():
            report = json.loads(path.read_text(encoding="utf-8"))
            limits = {name: report[name] for name in LOSSES if report.get(name) is not None}
            have = (report["window"], report["sinks"], report.get("memory"), limits)
            same = have == (wanted.window, wanted.sinks, wanted.memory, wanted.limits)
            if isinstance(wanted.schedule, str):
                same = same and (wanted.bits is None or report["average_bits"] <= wanted.bits + 1e-6)
            else:  # `bits` are for layers that it does not name
                pairs = {row["layer"]: (row["k_bits"], row["v_bits"]) for row in report["schedule"]}
                same = same and wanted.schedule.items() <= pairs.items()
            if not same:
                raise ValueError(f"{path} was measured with other settings than {target} of {recipe}; measure it again")
            return path
    return None


def _measured(recipe: Path, target: str, results: Path) -> str:
    path = result_file(recipe, target, results)
    if path is None:
        return NOT_MEASURED
    report = json.loads(path.read_text(encoding="utf-8"))
    base = report.get("baseline_uniform")
    uniform = f"; uniform {base['bits']:g}: {base['kl']:.5f}" if base else ""
    return f"{report['kl']:.5f} at {report['average_bits']:.3g} bits{uniform}"


def _hub_id(model: str) -> str:
    return EMBEDDED[model].base_model if model in EMBEDDED else ALIASES[model][0]
