"""Quality experiments: `pareto` (bits against KL), `ablation`, `sensitivity` (which metric ranks layers), `retrieval`
(facts found in long text that is packed), `report` and `plot` of what they wrote."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import tq_ao.quiet  # noqa: F401 - before anything imports torchao
from tq_ao.errors import TurboQuantError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "quality.md"
PLOT = ROOT / "docs" / "pareto.svg"
RECIPES = ROOT / "recipes"


def parser() -> argparse.ArgumentParser:
    """Command line."""
    top = argparse.ArgumentParser(description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    for name, text in (
        ("pareto", "stored bits against KL and perplexity: schedules, baselines, KIVI-style rounding"),
        ("ablation", "map variants, gains and fitted decoders, one at a time"),
        ("sensitivity", "rank correlation of each sensitivity metric with measured per-layer KL"),
    ):
        p = commands.add_parser(name, help=text, description=text)
        p.add_argument("--model", required=True, help="folder, alias, embedded model or Hub id")
        p.add_argument("--text", default="enwiki", help="'enwiki' or a UTF-8 text file")
        p.add_argument("--length", type=int, default=2048, help="tokens per window")
        p.add_argument("--calibration-windows", type=int, default=6)
        p.add_argument("--windows", type=int, default=4, help="held-out windows")
        p.add_argument("--window", type=int, default=128, help="recent tokens kept exact")
        p.add_argument("--sinks", type=int, default=4)
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--all-layers", action="store_true", help="quantise sliding-window layers too")
        p.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/<command>_<model>.json")
        p.add_argument("--quiet", action="store_true", help="no progress bars")
    for name, budgets in (("pareto", [1.75, 2.0, 2.25, 2.5, 3.0, 3.5]), ("ablation", [2.25, 3.0])):
        p = commands.choices[name]
        p.add_argument("--budgets", type=float, nargs="+", default=budgets, help="average code bits")
    commands.choices["pareto"].add_argument(
        "--recall-windows", type=int, default=3, help="of recall text to calibrate on besides, as convert.py does"
    )
    commands.choices["pareto"].add_argument(
        "--context", type=int, default=0, help="tokens the maps are to serve, see convert.py; default those of a window"
    )
    commands.choices["pareto"].add_argument("--repair", type=int, default=0, help="measured swaps per budget")
    commands.choices["sensitivity"].add_argument("--bits", type=int, nargs="+", default=[2, 3])
    p = commands.add_parser("retrieval", help="facts found in long text that is read from packed storage")
    p.add_argument("--model", required=True, help="converted folder or Hub id; others are asked without a schedule")
    p.add_argument("--text", default="enwiki", help="'enwiki' or a UTF-8 text file to hide the facts in")
    p.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens of the prompts")
    p.add_argument("--prompts", type=int, nargs="+", default=[16, 12, 8, 6], help="passkey prompts of each length")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/retrieval_<model>.json")
    for p in commands.choices.values():
        p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in")
    commands.add_parser("report", help="rewrite the tables of docs/quality.md and recipes/README.md")
    commands.add_parser("plot", help="redraw docs/pareto.svg")
    return top


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The experiment's result."""
    from tq_ao.evaluation.ablation import ablation
    from tq_ao.evaluation.pareto import Options, pareto
    from tq_ao.evaluation.rank_metrics import rank_metrics
    from tq_ao.evaluation.setup import prepare

    def say(line: str) -> None:
        print(line, flush=True)

    dtype = getattr(torch, args.dtype)

    if args.command == "retrieval":
        from tq_ao.evaluation.retrieval_run import measure

        # 3 make 2 key-value prompts, and a single one has no standard error.
        if len(args.lengths) != len(args.prompts) or min(args.prompts) < 3:
            raise TurboQuantError(f"expected --prompts of at least 3 for each of {args.lengths}, got {args.prompts}")
        return measure(args.model, args.lengths, args.prompts, text=args.text, seed=args.seed, dtype=dtype, report=say)
    setup = prepare(
        args.model, length=args.length, calibration=args.calibration_windows, evaluation=args.windows,
        recall=getattr(args, "recall_windows", 0), text=args.text, seed=args.seed, all_layers=args.all_layers,
        dtype=dtype,
    )  # fmt: skip
    progress = not args.quiet
    if args.command == "pareto":
        options = Options(
            budgets=args.budgets, window=args.window, sinks=args.sinks, repair_evaluations=args.repair,
            context=args.context, seed=args.seed,
        )  # fmt: skip
        return pareto(setup, options, progress=progress, report=say)
    if args.command == "ablation":
        return ablation(setup, args.budgets, args.window, args.sinks, args.seed, progress, say)
    return rank_metrics(setup, args.bits, args.window, args.sinks, args.seed, progress, say)


def main(argv: list[str] | None = None) -> int:
    """Run one experiment and write its JSON."""
    args = parser().parse_args(argv)
    if args.command == "report":
        from tq_ao import recipe_table
        from tq_ao.evaluation.report import fill

        DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
        readme = RECIPES / "README.md"
        readme.write_text(recipe_table.fill(readme.read_text(encoding="utf-8"), RECIPES, RESULTS), encoding="utf-8")
        return 0
    try:
        if args.command == "plot":
            from tq_ao.evaluation import plot

            plot.draw(plot.results(RESULTS), PLOT)
            return 0
        result = run(args)
    except TurboQuantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    suffix = "_all_layers" if getattr(args, "all_layers", False) else ""
    output = args.output or RESULTS / f"{args.command}_{result['model']}{suffix}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
