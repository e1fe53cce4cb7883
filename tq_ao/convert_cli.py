"""Convert a model: choose bits (and maps) for its KV cache, measure them, write a checkpoint that carries them.

tq-ao-convert gemma-2b --schedule auto
tq-ao-convert smollm2-135m --schedule uniform --bits 4 --output-dir out
tq-ao-convert --recipe gemma-2b --target memory-first --push-to-hub me/gemma-2b-tq

A run that is stopped (Ctrl-C) or misses its limits keeps what it measured beside the output, in .NAME.calibration; the
next run with that output goes on from there.
"""

import argparse
import json
import os
import reprlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
import yaml

import tq_ao.quiet  # noqa: F401 - before anything imports torchao
from tq_ao import hub, loading, recipe
from tq_ao.calibration.target import LOSSES
from tq_ao.convert import convert
from tq_ao.errors import HubError, TurboQuantError, one_line

PROGRAM = "tq-ao-convert"


class Parser(argparse.ArgumentParser):
    """Mistakes in flags look like all others: one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse(argv: Sequence[str] | None = None, program: str = PROGRAM) -> argparse.Namespace:
    """The flags, each by its whole name: `hide_token` has to know them again."""
    p = Parser(
        prog=program, description=(__doc__ or "").replace(PROGRAM, program), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("model", nargs="?", help="alias (gemma-2b, smollm2-135m, ...), local folder or Hub id")
    p.add_argument(
        "--recipe", metavar="FILE", help="YAML file with these settings, or the name of one that comes with tq_ao "
        "(gemma-2b, ...); flags override it",
    )  # fmt: skip
    p.add_argument("--target", help="which target of the recipe, such as 2bit or memory-first; default: what it says")
    p.add_argument(
        "--schedule", help="auto (measured), uniform, or a JSON/YAML file {layer: [k_bits, v_bits]} (layers that it "
        "does not name get uniform widths of at most --bits); default auto",
    )  # fmt: skip
    p.add_argument(
        "--bits", type=float, help="average code bits per value (with --max-kl or --max-ppl the most); default 3"
    )
    p.add_argument(
        "--memory", type=float, metavar="MIB",
        help="instead of --bits: MiB for the cache of a text of --context tokens, with all that it stores",
    )  # fmt: skip
    p.add_argument("--max-kl", type=float, help="take the fewest bits whose measured KL (nats) stays under this")
    p.add_argument(
        "--max-ppl", type=float, metavar="PERCENT",
        help="take the fewest bits whose measured perplexity rises by at most this; with --max-kl both hold",
    )  # fmt: skip
    p.add_argument(
        "--repair", type=int, metavar="N", help="measure N swaps of bits between layers, keep what helps; default 0"
    )
    p.add_argument(
        "--maps", choices=("auto", "plain"), help="calibrated maps, or TurboQuant's random rotations; default auto"
    )
    p.add_argument(
        "--fold-values", action=argparse.BooleanOptionalAction,
        help="fold the value maps into v_proj and o_proj, whose weights are rewritten: other KV caches then hold "
        "rotated values too; default no",
    )  # fmt: skip
    p.add_argument("--window", type=int, help="newest tokens kept exact; default 128")
    p.add_argument("--sinks", type=int, help="first tokens kept exact; default 4")
    p.add_argument("--calibration", help="calibration and verification text: enwiki or a text file; default enwiki")
    p.add_argument("--calibration-windows", type=int, help="windows of text to choose on, 3 or more; default 6")
    p.add_argument("--recall-windows", type=int, help="windows of recall text to choose on besides; default 3")
    p.add_argument("--verification-windows", type=int, help="windows of held-out text to measure on; default 3")
    p.add_argument("--max-seq-length", type=int, help="tokens per window; default 2048")
    p.add_argument(
        "--context", type=int,
        help="tokens of the longest text: maps serve it, --memory holds it; default what the model can read",
    )  # fmt: skip
    p.add_argument("--seed", type=int, help="of rotations, text split and sampling; default 0")
    p.add_argument("--output-dir", type=Path, help="folder to create; default <model>-tq<bits>, or -tq-<target>")
    p.add_argument(
        "--push-to-hub", nargs="?", const="", metavar="ID", help="publish too; default ID is the output folder's name"
    )
    p.add_argument("--private", action="store_true", help="make the Hub repository private; with --push-to-hub")
    p.add_argument(
        "--token", default=os.environ.get("HF_TOKEN"), help="Hub token; default HF_TOKEN or the stored login"
    )
    p.add_argument("--device", help="device to calibrate on; default cuda if there is one, else cpu")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="default bfloat16 on cuda, float32 on cpu; with torchao weights the dtype they were made for",
    )  # fmt: skip
    p.add_argument("--json", type=Path, metavar="FILE", help="write the report there too; - for standard output")
    return p.parse_args(argv)


def settings(args: argparse.Namespace) -> recipe.Recipe:
    """The recipe file, if any, with the flags over it."""
    if args.recipe is None and args.model is None:
        raise ValueError("expected a model or --recipe; for example: smollm2-135m --schedule auto")
    if args.target is not None and args.recipe is None:
        raise ValueError("expected --recipe with --target; targets are settings in a recipe, see recipes/README.md")
    base = recipe.load(recipe.find(args.recipe), args.target) if args.recipe else recipe.Recipe(model=args.model)
    names = ("model", "bits", "memory", *LOSSES, "repair", "maps", "fold_values", "window", "sinks", "context", "seed")
    changes = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.memory is not None:  # a budget takes the place of the recipe's
        changes.setdefault("bits", None)
    elif args.bits is not None:
        changes["memory"] = None
    if args.schedule is not None:
        changes["schedule"] = args.schedule if args.schedule in ("auto", "uniform") else schedule_file(args.schedule)
    for name, count in (("calibration", args.calibration_windows), ("verification", args.verification_windows)):
        text = {"source": args.calibration, "windows": count, "length": args.max_seq_length}
        flags = {"windows": f"--{name}-windows", "length": "--max-seq-length", "recall": "--recall-windows"}
        if name == "calibration":
            text["recall"] = args.recall_windows
        for key, value in text.items():
            try:
                changes[name] = replace(changes.get(name, getattr(base, name)), **{} if value is None else {key: value})
            except ValueError as error:
                raise ValueError(f"{flags[key]}: {error}") from error
    return replace(base, **changes)


def default_output(chosen: recipe.Recipe, target: str | None) -> Path:
    """<model>-tq3, or <model>-tq-memory-first for a target asked for by name; a schedule of layers has them all."""
    parts = [] if chosen.memory is None else [f"-{chosen.memory:g}mib"]
    parts += [f"-{name.removeprefix('max_')}{limit:g}" for name, limit in chosen.limits.items()]
    bits = "" if chosen.bits is None else f"{chosen.bits:{'g' if isinstance(chosen.schedule, str) else '.3g'}}"
    label = "".join(parts) or bits
    return Path(f"{Path(chosen.model).resolve().name}-tq{label if target is None else f'-{target}'}")


def schedule_file(path: str) -> dict[int, tuple[int, int]]:
    """A schedule from a file: {layer: [k_bits, v_bits]}, alone or under a key "layers", or the rows of a report."""
    try:
        data = recipe.read_yaml(path)
    except OSError as error:
        raise ValueError(f"expected --schedule auto, uniform or a file, got {path!r} ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON or YAML, got neither ({' '.join(str(error).split())})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if isinstance(data, Mapping) and "model_type" in data:
        raise ValueError(
            f"{path}: expected a mapping {{layer: [k_bits, v_bits]}}, got the config.json of a model; copy what its "
            "kv_cache_scheme has under layers into a file of its own"
        )
    if isinstance(data, Mapping) and (key := next((key for key in ("layers", "schedule") if key in data), None)):
        others = sorted(set(data) - {key}, key=str)
        if others and not isinstance(data[key], list):  # a report is about another conversion
            raise ValueError(
                f"{path}: expected {key!r} alone, which is all that is read, got {others} beside it; remove them, and "
                "give what is to hold as flags or as a --recipe"
            )
        data = data[key]
    if isinstance(data, list) and all(isinstance(row, Mapping) and type(row.get("layer")) is int for row in data):
        about = ("layer", "sensitivity")
        rows = {row["layer"]: {key: value for key, value in row.items() if key not in about} for row in data}
        if len(rows) < len(data):
            raise ValueError(f"{path}: expected a row of every layer once, got {[row['layer'] for row in data]}")
        data = rows
    if not isinstance(data, Mapping) or not data:
        raise ValueError(f"{path}: expected a mapping {{layer: [k_bits, v_bits]}}, got {reprlib.repr(data)}")
    try:
        return recipe.read_schedule(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def show(report: dict) -> None:
    """The final table."""
    print(f"\n{'layer':>5}  {'K bits':>6}  {'V bits':>6}  sensitivity (nats)")
    for row in report["schedule"]:
        score = "" if row["sensitivity"] is None else f"{row['sensitivity']:.6f}"
        print(f"{row['layer']:>5}  {row['k_bits']:>6}  {row['v_bits']:>6}  {score}")
    size = report["bytes_per_token"]
    print(
        f"\naverage {report['average_bits']:.3f} code bits, {report['stored_bits']:.3f} stored bits per value; "
        f"packed tokens take {size['packed']:.0f} bytes against {size['bfloat16']:.0f} in bfloat16 "
        f"({size['bfloat16'] / size['packed']:.2f}x smaller)"
    )
    if cache := report.get("cache"):
        parts = {name: size / 2**20 for name, size in cache["bytes"].items()}
        print(
            f"the cache of a text of {cache['tokens']} tokens takes {sum(parts.values()):.2f} MiB of "
            f"{report['memory']:g}, counted from its tensors: {parts['codes']:.2f} codes and scales, "
            f"{parts['exact']:.2f} exact tokens, {parts['maps']:.2f} maps"
        )
    print(
        f"measured through the packed cache on {report['text']} (window {report['window']}, sinks {report['sinks']}):"
    )
    print(
        f"  this schedule: KL {report['kl']:.5f}{_spread(report['kl_stderr'], 5)}, "
        f"perplexity {report['ppl_before']:.3f} -> {report['ppl_after']:.3f} "
        f"({report['ppl_rise']:+.2f}{_spread(report['ppl_rise_stderr'], 2)} %)"
    )
    if base := report.get("baseline_uniform"):
        fewer = report["average_bits"] - base["bits"]
        widest = f" ({fewer:.3g} bits fewer: the widest that takes no more)" if fewer > 1e-6 else ""
        print(
            f"  uniform {base['bits']:g}{widest}, random rotations: "
            f"KL {base['kl']:.5f}{_spread(base['kl_stderr'], 5)}, perplexity {base['ppl']:.3f}"
        )
    if report.get("fold_kl") is not None:
        print(
            f"value maps are folded into v_proj and o_proj: with an exact cache KL {report['fold_kl']:z.7f} to the "
            "original, which all figures compare with"
        )
    print(f"sample: ...{report['sample']['prompt'][-60:]!r} -> {report['sample']['text']!r}\n")


def _spread(error: float | None, digits: int) -> str:
    return "" if error is None else f" +- {error:.{digits}f}"


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Convert as the flags say.

    Args:
        argv: the flags; None takes those of this process.
        program: how it was started, for the help and the command that is recorded.

    Returns:
        Exit status: 0, 1 for a mistake (said in one line), 3 if only publishing failed, 130 if it was stopped.
    """
    args = parse(argv, program)
    command = f"{program} {shlex.join(hide_token(list(sys.argv[1:] if argv is None else argv)))}"
    written = "nothing was written"
    try:
        if args.private and args.push_to_hub is None:
            raise ValueError("expected --push-to-hub with --private, got --private alone; nothing would be published")
        chosen = settings(args)
        to_stdout = args.json is not None and str(args.json) == "-"
        if args.json is not None and not to_stdout:
            check_json(args.json)
        if args.push_to_hub is not None:
            hub.check_token(args.token)
        if args.output_dir is None:  # its name has the average of all layers
            chosen = loading.whole(chosen, token=args.token)
        output = args.output_dir or default_output(chosen, args.target)
        if args.json is not None and not to_stdout and args.json.resolve() == output.resolve():
            raise ValueError(f"expected --json and the output to be two places, got {output} for both; name a file")
        published = args.push_to_hub if args.push_to_hub is None else args.push_to_hub or output.name
        if published is not None:
            check_repository(published)
        report = convert(
            chosen, output, token=args.token, device=args.device, repo_id=published,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            command=command, progress=sys.stderr.isatty(), say=lambda message: print(message, file=sys.stderr),
        )  # fmt: skip
        written = f"{output} is complete"
        if published is not None:
            written += f"; to publish it: {hub.upload_command(output, published, args.private)}"
        with redirect_stdout(sys.stderr if to_stdout else sys.stdout):  # `--json -`: nothing but JSON in a pipe
            show(report)
        if args.json is not None:
            text = json.dumps(report, indent=2) + "\n"
            if to_stdout:
                print(text, end="")
            else:
                args.json.write_text(text, encoding="utf-8")
        if published is not None:
            url = hub.push(output, published, private=args.private, token=args.token)
            print("published:", url, file=sys.stderr if to_stdout else sys.stdout)
    except HubError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except (TurboQuantError, ValueError, OSError, RuntimeError) as error:
        print("error:", "; ".join([one_line(error), *notes(error)]), file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        if sys.stderr.isatty():  # a bar or ^C stands there
            print(file=sys.stderr)
        print("stopped:", "; ".join(notes(stop)) or written, file=sys.stderr)
        return 130
    return 0


def check_json(path: Path) -> None:
    """Raise ValueError unless a report can be written there."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"expected --json in an existing folder, got {path}; create {path.parent} first")
    if path.is_dir():
        raise ValueError(f"expected --json to be a file, got the folder {path}; name one in it: {path / 'report.json'}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError(f"expected --json where this user may write, got {path}; name another file")


def check_repository(name: str) -> None:
    """Raise ValueError unless a repository can have that name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"expected --push-to-hub with the name of a repository, 'org/name', got {name!r} (the output folder's if "
            "none is given)"
        ) from error


def notes(error: BaseException) -> list[str]:
    """What `convert` says about what it leaves behind."""
    return [" ".join(note.split()) for note in getattr(error, "__notes__", [])]


def hide_token(argv: list[str]) -> list[str]:
    """The command line without the secret: it is published with the model."""
    out: list[str] = []
    for word in argv:
        if word.startswith("--token="):
            word = "--token=..."
        elif out and out[-1] == "--token":
            word = "..."
        out.append(word)
    return out
