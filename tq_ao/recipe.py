"""Recipes: the settings of a conversion as a YAML file.

A file may hold several targets of one model: settings they share, and under `targets` what each one changes.
"""

import difflib
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from tq_ao.calibration.target import LOSSES
from tq_ao.codebook import BITS
from tq_ao.config import EXACT, LayerScheme, TurboQuantConfig
from tq_ao.packing import TILE

# Uniform schedules, ascending: K takes the larger half.
SHIPPED = Path(__file__).with_name("recipes")
UNIFORM = tuple(LayerScheme(k, v) for k in BITS for v in BITS if 0 <= k - v <= 1)


@dataclass(frozen=True)
class Text:
    """Windows of text: `source` is "enwiki" or a file, `windows` of them, `length` tokens each.

    `recall` windows besides are made from the text (see `tq_ao.recall`); only calibration has them.
    """

    source: str = "enwiki"
    windows: int = 6
    length: int = 2048
    recall: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.source, str):
            raise ValueError(f"expected source to be enwiki or the path of a text file, got {self.source!r}")
        if not (_is_count(self.windows, 1) and _is_count(self.length, 256)):
            raise ValueError(
                f"expected windows >= 1 and length >= 256, got {self.windows!r} and {self.length!r}; "
                "shorter ones tell too little"
            )
        if not _is_count(self.recall, 0):
            raise ValueError(f"expected recall to be a number of windows, 0 or more, got {self.recall!r}")


@dataclass(frozen=True)
class Recipe:
    """One conversion.

    Attributes:
        model: alias, local folder or Hub id.
        schedule: "auto" (measured), "uniform", or layer index -> [k_bits, v_bits].
        bits: average code bits per value; for "uniform" a multiple of 0.5 (K gets the odd half: 2.5 is K 3, V 2).
            With `max_kl` or `max_ppl`, the most it may take.  None: 3, or as many as `memory` has room for.
            Beside a mapping of layers: what layers that it does not name get (see `whole`).
        memory: instead of `bits`, MiB that the cache of a text of `context` tokens may take, counted as it is stored
            (`tq_ao.footprint`); layers may then be 8 bits wide or stay exact; "auto" schedules only.
        max_kl, max_ppl: take the fewest bits (the least memory) whose KL (nats) and rise of perplexity (percent),
            measured on the calibration text, are at most this; "auto" schedules only.
        repair: swaps of bits between layers to measure, as the costs of single layers do not add up; 0 takes the sum's
            word; "auto" schedules only.
        maps: "auto" calibrates maps and picks a variant per layer, "plain" keeps random rotations; read by "auto"
            schedules only.
        fold_values: fold the value maps of packed layers into v_proj and o_proj (`tq_ao.fold`): the weights of these
            are rewritten, and any KV cache holds the mapped values.
        window, sinks, rotation, seed: see TurboQuantConfig.
        context: tokens of the longest text that calibrated maps are to serve; None: what the model can read.  With a
            short one they are a little better on short texts, and fail beyond it.  Read as `maps` is.
        calibration: text the schedule is chosen on.  verification: text it is measured on, other articles.

    Raises:
        ValueError: a field out of range.
    """

    model: str
    schedule: str | Mapping[int, tuple[int, int]] = "auto"
    bits: float | None = None
    memory: float | None = None
    max_kl: float | None = None
    max_ppl: float | None = None
    repair: int = 0
    maps: str = "auto"
    fold_values: bool = False
    window: int = 128
    sinks: int = 4
    rotation: str = "hadamard"
    seed: int = 0
    context: int | None = None
    calibration: Text = field(default_factory=lambda: Text(recall=3))
    verification: Text = field(default_factory=lambda: Text(windows=3))

    def __post_init__(self) -> None:
        if not isinstance(self.model, str):
            raise ValueError(f"expected model to be an alias, a folder or a Hub id, got {self.model!r}")
        if not isinstance(self.schedule, Mapping) and self.schedule not in ("auto", "uniform"):
            raise ValueError(f"expected schedule auto, uniform, a file or a mapping of layers, got {self.schedule!r}")
        if self.maps not in ("auto", "plain"):
            raise ValueError(f"expected maps auto or plain, got {self.maps!r}")
        if not isinstance(self.fold_values, bool):
            raise ValueError(f"expected fold_values true or false, got {self.fold_values!r}")
        if self.memory is None and self.bits is None:
            object.__setattr__(self, "bits", 3.0)
        if self.memory is not None and self.bits is not None:
            raise ValueError(
                f"expected bits or memory, got {self.bits} bits and {self.memory} MiB; leave one out (null in a recipe)"
            )
        most = EXACT if isinstance(self.schedule, Mapping) else BITS[-1]  # an average may count layers kept exact
        if self.bits is not None and not (_is_positive(self.bits) and 1 <= self.bits <= most):
            raise ValueError(
                f"expected bits between 1 and {most}, got {self.bits!r}; widths are {BITS} and a schedule averages them"
            )
        for name, text in (("calibration", self.calibration), ("verification", self.verification)):
            if not isinstance(text, Text):
                raise ValueError(f"expected {name} to be a mapping of {[f.name for f in fields(Text)]}, got {text!r}")
        if self.verification.recall:
            raise ValueError(
                f"expected no recall windows in verification, got {self.verification.recall}; it is ordinary text"
            )
        if self.context is not None and not _is_count(self.context, 1):
            raise ValueError(f"expected context to be a number of tokens, or none, got {self.context!r}")
        if not _is_count(self.repair, 0):
            raise ValueError(f"expected repair to be a number of swaps, 0 or more, got {self.repair!r}")
        if self.repair and self.schedule != "auto":
            raise ValueError(
                f"expected schedule auto with repair, got {self.schedule!r}; other schedules leave nothing to swap"
            )
        for name, limit in {**self.limits, "memory": self.memory}.items():
            if limit is None:
                continue
            if not _is_positive(limit):
                raise ValueError(f"expected {name} to be a number above 0, got {limit!r}")
            if self.schedule != "auto":
                raise ValueError(
                    f"expected schedule auto with {name}, got {self.schedule!r}; "
                    "other schedules leave nothing to choose"
                )
        if self.schedule == "uniform":
            self.uniform()
        self.config({})
        self._check_windows()

    def _check_windows(self) -> None:
        """Text that leaves the exact window, and enough of it to choose on."""
        exact = self.window + self.sinks + TILE
        used = [("verification", self.verification)]
        if self.schedule == "auto":
            used.append(("calibration", self.calibration))
        for name, text in used:
            if text.length <= exact:
                raise ValueError(
                    f"expected {name} windows of more than {exact} tokens (window, sinks and a tile), got "
                    f"{text.length}; shorter text never leaves the exact window"
                )
        if self.schedule == "auto" and self.calibration.windows < 3:
            raise ValueError(
                f"expected at least 3 calibration windows with schedule auto, got {self.calibration.windows}; two "
                "thirds give statistics, the rest sensitivities"
            )

    @property
    def limits(self) -> dict[str, float]:
        """The limits of quality that are set, by name: the schedule takes the fewest bits within all of them."""
        return {name: limit for name in LOSSES if (limit := getattr(self, name)) is not None}

    def uniform(self) -> LayerScheme:
        """The uniform widths of `bits`: K takes the larger half.

        Raises:
            ValueError: no pair of widths averages to `bits`.
        """
        for scheme in UNIFORM:
            if scheme.average_bits == self.bits:
                return scheme
        raise ValueError(
            f"expected uniform bits 1, 1.5, 2, 2.5, 3, 3.5, 4 or 8, got {self.bits}; "
            "use schedule auto for other averages"
        )

    def uniform_below(self, average_bits: float | None = None) -> LayerScheme:
        """The widest uniform schedule of at most `average_bits` (default: `bits`): what a schedule has to beat."""
        most = self.bits if average_bits is None else average_bits
        return [scheme for scheme in UNIFORM if most is None or scheme.average_bits <= most][-1]

    def whole(self, layers: Sequence[int]) -> "Recipe":
        """A mapping of some layers as one of all `layers`, with the average of them all as `bits`.

        Layers that it does not name get the widest uniform widths of at most `bits`.  Other schedules: as it is.

        Raises:
            ValueError: `bits` that leave such layers exact, or a schedule that packs none.
        """
        if isinstance(self.schedule, str):
            return self
        unnamed = [i for i in layers if i not in self.schedule]
        if unnamed and self.bits is not None and self.bits > BITS[-1]:
            raise ValueError(
                f"expected bits between 1 and {BITS[-1]} for layers {unnamed}, which the schedule does not name, got "
                f"{self.bits!r}; name them as [{EXACT}, {EXACT}] to keep them exact"
            )
        base = self.uniform_below()
        schedule = {i: self.schedule.get(i, (base.k_bits, base.v_bits)) for i in layers}
        if all(pair == (EXACT, EXACT) for pair in schedule.values()):
            raise ValueError(f"expected a schedule that packs a layer, got {EXACT} bits for all; name fewer for some")
        return replace(self, schedule=schedule, bits=self.config(schedule).average_bits(layers))

    def config(self, schedule: Mapping[int, tuple[int, int]]) -> TurboQuantConfig:
        """The TurboQuantConfig of a schedule under this recipe's window, sinks and rotations."""
        return TurboQuantConfig.from_schedule(
            schedule, window=self.window, sinks=self.sinks, rotation=self.rotation, seed=self.seed
        )

    def to_yaml(self) -> str:
        """YAML that `load` reads back to an equal recipe."""
        data = asdict(self)
        if not isinstance(self.schedule, str):
            data["schedule"] = {int(i): list(pair) for i, pair in self.schedule.items()}
        return yaml.safe_dump(data, sort_keys=False)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def find(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a recipe that comes with the package.

    Raises:
        ValueError: neither; names that are near.
    """
    path = Path(name)
    if path.is_dir() or not path.exists():  # a model's folder may have the name of its recipe
        shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
        if str(name) in shipped:
            return shipped[str(name)]
        near = difflib.get_close_matches(path.name.removesuffix(".yaml").lower(), shipped, n=3, cutoff=0.5)
        raise ValueError(
            f"expected the path of a recipe or the name of one that comes with tq_ao, got {str(name)!r} "
            f"(near: {', '.join(near or shipped)})"
        )
    return path


def load(path: str | Path, target: str | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file with one recipe, or with several targets.
        target: the target wanted; None takes the one the file names under `target`.

    Raises:
        ValueError: not YAML, an unknown or missing key, a field out of range, or a target the file does not have; the
            message names the file.
    """
    with _naming(path):
        data = _read(path)
        if "targets" not in data:
            if target is not None:
                raise ValueError(f"expected no target, got {target!r}: this recipe has only one setting")
            return from_mapping(data)
        recipes = _targets(data)
        name = data.get("target") if target is None else target
        if name is None:
            raise ValueError(f"expected a target, one of {', '.join(recipes)}")
        return _pick(recipes, str(name))


def load_targets(path: str | Path) -> dict[str, Recipe]:
    """Every target of a recipe file by name, in its order; none in a file with a single setting.

    Raises:
        ValueError: as `load`.
    """
    with _naming(path):
        data = _read(path)
        return _targets(data) if "targets" in data else {}


class _Loader(yaml.SafeLoader):
    """Of two settings with one name YAML would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, str(key.value)) for key, _ in node.value]
        if again := [name for n, (_, name) in enumerate(keys) if keys[n] in keys[:n]]:
            line = node.start_mark.line + 1
            raise ValueError(f"expected every key once, got {again} again in the mapping of line {line}; remove one")
        return node


def read_yaml(path: str | Path) -> Any:
    """Data from a YAML or JSON file in which mappings have every key once."""
    return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Every mistake in the file as a ValueError of one line that begins with its path."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot read the recipe ({error.strerror}); give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a recipe in YAML, got a file that is no UTF-8 text") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _read(path: str | Path) -> dict[str, Any]:
    data = read_yaml(path)
    if not isinstance(data, dict) or "model" not in data:
        raise ValueError(f"expected a mapping with a key 'model', got {reprlib.repr(data)}")
    return data


def _targets(data: Mapping[str, Any]) -> dict[str, Recipe]:
    """All targets of a file, so that a mistake in one shows whichever is asked for."""
    shared = {key: value for key, value in data.items() if key not in ("target", "targets")}
    if not isinstance(data["targets"], Mapping) or not data["targets"]:
        raise ValueError(f"expected targets to be a mapping of names, got {data['targets']!r}")
    recipes = {}
    for name, changes in data["targets"].items():
        try:
            recipes[str(name)] = from_mapping(_over(shared, changes))
        except (ValueError, TypeError) as error:
            raise ValueError(f"target {name}: {error}") from error
    if "target" in data:
        _pick(recipes, str(data["target"]))
    return recipes


def _over(shared: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    if not isinstance(changes, Mapping):
        raise ValueError(f"expected a mapping of settings, got {changes!r}")
    texts = {
        name: {**_settings(name, shared.get(name, {})), **_settings(name, changes[name])}
        for name in ("calibration", "verification")
        if name in changes
    }
    return {**shared, **changes, **texts}


def _settings(name: str, given: Any) -> Mapping[str, Any]:
    """The settings of a Text, all of them known."""
    known = [f.name for f in fields(Text)]
    if not isinstance(given, Mapping):
        raise ValueError(f"expected {name} to be a mapping of {known}, got {given!r}")
    if unknown := set(given) - set(known):
        raise ValueError(f"unknown keys {sorted(unknown, key=str)} in {name}; expected some of {known}")
    return given


def _pick(recipes: Mapping[str, Recipe], name: str) -> Recipe:
    if name not in recipes:
        raise ValueError(f"unknown target {name!r}; expected one of {', '.join(recipes)}")
    return recipes[name]


def from_mapping(data: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data; unknown keys are errors."""
    known = {f.name for f in fields(Recipe)}
    if unknown := set(data) - known:
        raise ValueError(f"unknown keys {sorted(unknown, key=str)}; expected some of {sorted(known)}")
    values, defaults = dict(data), Recipe(model="")
    for name in ("calibration", "verification"):
        if name in values:
            given = _settings(name, values[name])
            try:
                values[name] = replace(getattr(defaults, name), **given)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    if isinstance(values.get("schedule"), Mapping):
        values["schedule"] = read_schedule(values["schedule"])
    return Recipe(**values)


def read_schedule(data: Mapping[Any, Any]) -> dict[int, tuple[int, int]]:
    """Layer index -> (k_bits, v_bits) from {"0": [4, 3], ...} or {"0": {"k_bits": 4, "v_bits": 3}, ...}.

    Raises:
        ValueError: an entry of another form, a layer named twice, or widths that LayerScheme refuses.
    """
    schedule: dict[int, tuple[int, int]] = {}
    for layer, pair in data.items():
        if not (str(layer).isdecimal() and isinstance(layer, int | str)) or int(layer) in schedule:
            raise ValueError(f"expected every layer once, by its number, got {layer!r} among {[*data]}")
        try:
            scheme = LayerScheme(**pair) if isinstance(pair, Mapping) else LayerScheme(*pair)
            schedule[int(layer)] = (scheme.k_bits, scheme.v_bits)
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected layer {layer}: [k_bits, v_bits], got {pair!r} ({error})") from error
    return schedule
