"""What is quantised and how: frozen, versioned, and the same object in Python, in config.json and in recipes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PureWindowsPath
from typing import Any

from tq_ao.codebook import BITS
from tq_ao.packing import LAYOUT_VERSION

FORMAT = "turboquant"
FORMAT_VERSION = 2
EXACT = 16
TRANSFORMS_FILE = "tq_ao_transforms.safetensors"


@dataclass(frozen=True)
class LayerScheme:
    """Code widths of one layer's keys and values: each 1, 2, 3, 4 or 8, or both 16 (kept exact).

    Raises:
        ValueError: another width, or only one side exact.
    """

    k_bits: int
    v_bits: int

    def __post_init__(self) -> None:
        for name, bits in (("k_bits", self.k_bits), ("v_bits", self.v_bits)):
            if type(bits) is not int or bits not in (*BITS, EXACT):
                raise ValueError(f"expected {name} in {(*BITS, EXACT)}, an int, got {bits!r}; choose one of those")
        if (self.k_bits == EXACT) != (self.v_bits == EXACT):
            raise ValueError(
                f"expected both or neither of k_bits, v_bits to be {EXACT}, got {self.k_bits} and {self.v_bits}; "
                "a layer is packed or exact as a whole (8 bits is the widest packed side)"
            )

    @property
    def average_bits(self) -> float:
        """Mean code bits per value."""
        return (self.k_bits + self.v_bits) / 2

    @property
    def exact(self) -> bool:
        """Whether the layer keeps an ordinary cache."""
        return self.k_bits == EXACT


def _index(key: object) -> int:
    """A layer by its number, which JSON has as text."""
    if not str(key).isdecimal() or str(int(str(key))) != str(key):
        raise ValueError(f"expected layer indices of kv_cache_scheme to be numbers such as '0', got {key!r}")
    return int(str(key))


def _scheme(index: object, given: object) -> LayerScheme:
    if not isinstance(index, int) or isinstance(index, bool):
        raise ValueError(f"expected layer indices to be integers, got {index!r}")
    if isinstance(given, LayerScheme):
        return given
    if not isinstance(given, Sequence) or len(given) != 2:
        raise ValueError(f"expected layer {index} to be a LayerScheme or (k_bits, v_bits), got {given!r}")
    return LayerScheme(*given)


def _is_file_name(name: object) -> bool:
    """Whether it stays in its folder: no part of a path, on any system."""
    return isinstance(name, str) and name not in ("", ".", "..") and PureWindowsPath(name).name == name


@dataclass(frozen=True)
class TurboQuantConfig:
    """KV-cache quantisation of a model.

    Attributes:
        bits: code width of every layer's K and V that `k_bits`, `v_bits` or `layers` do not name.
        k_bits, v_bits: code widths of K and of V for all layers.
        layers: layer index -> LayerScheme, or a pair (k_bits, v_bits) that becomes one; layers not named follow the
            uniform widths.
        window: newest tokens kept exact (up to 31 more while a tile fills).
        sinks: first tokens of each row kept exact.
        rotation: "hadamard" or "dense" random rotation per (layer, KV head); unused where `transforms` holds maps.
        seed: of the rotations.
        transforms: name of the safetensors file with calibrated maps beside the model, or None.
        num_layers, head_dim: of the model this was made for, checked when it is attached; None: any.

    Raises:
        ValueError: a field out of range.
    """

    bits: int = 3
    k_bits: int | None = None
    v_bits: int | None = None
    layers: Mapping[int, LayerScheme] = field(default_factory=dict)
    window: int = 128
    sinks: int = 4
    rotation: str = "hadamard"
    seed: int = 0
    transforms: str | None = None
    num_layers: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        LayerScheme(self._uniform("k_bits"), self._uniform("v_bits"))
        if not isinstance(self.layers, Mapping):
            raise ValueError(f"expected layers to map layer indices to LayerSchemes, got {self.layers!r}")
        object.__setattr__(self, "layers", {i: _scheme(i, given) for i, given in self.layers.items()})
        for name, value in (("window", self.window), ("sinks", self.sinks), ("seed", self.seed)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"expected {name} to be an integer >= 0, got {value!r}")
        if self.rotation not in ("hadamard", "dense"):
            raise ValueError(f"expected rotation 'hadamard' or 'dense', got {self.rotation!r}")
        if self.transforms is not None and not _is_file_name(self.transforms):
            raise ValueError(
                f"expected transforms None or the name of a file beside the weights, got {self.transforms!r}; the maps "
                f"of a converted model are in {TRANSFORMS_FILE!r}"
            )
        if self.layers and self.num_layers is not None and not all(0 <= i < self.num_layers for i in self.layers):
            raise ValueError(f"expected layer indices 0 to {self.num_layers - 1}, got {sorted(self.layers)}")

    def _uniform(self, side: str) -> int:
        value = getattr(self, side)
        return self.bits if value is None else value

    def layer(self, index: int) -> LayerScheme:
        """The scheme of a layer."""
        return self.layers.get(index) or LayerScheme(self._uniform("k_bits"), self._uniform("v_bits"))

    @classmethod
    def from_schedule(cls, schedule: Mapping[int, tuple[int, int]], **fields: Any) -> "TurboQuantConfig":
        """A config from layer index -> (k_bits, v_bits)."""
        return cls(layers={i: LayerScheme(*pair) for i, pair in schedule.items()}, **fields)

    def average_bits(self, layers: Sequence[int]) -> float:
        """Mean code bits per K or V value over the given quantised layers, scales not counted."""
        schemes = [self.layer(i) for i in layers]
        return sum(s.average_bits for s in schemes) / len(schemes) if schemes else float(EXACT)

    def resolve(self, layers: Sequence[int], num_layers: int, head_dim: int) -> "TurboQuantConfig":
        """The same config with every quantised layer spelled out and tied to a model's shape."""
        return replace(
            self,
            layers={i: self.layer(i) for i in layers},
            num_layers=num_layers,
            head_dim=head_dim,
            k_bits=None,
            v_bits=None,
        )

    def to_scheme(self) -> dict[str, Any]:
        """JSON form: the `kv_cache_scheme` of a checkpoint's config.json.

        Raises:
            ValueError: `k_bits` and `v_bits`, for which it has no place but in `layers`.
        """
        if self.k_bits is not None or self.v_bits is not None:
            raise ValueError(
                f"expected every layer spelled out, got k_bits {self.k_bits} and v_bits {self.v_bits}; call resolve()"
            )
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "layout_version": LAYOUT_VERSION,
            "codec": "mse",
            "num_bits": round(self.average_bits(sorted(self.layers)), 4) if self.layers else self.bits,
            "bits": self.bits,
            "layers": {str(i): {"k_bits": s.k_bits, "v_bits": s.v_bits} for i, s in sorted(self.layers.items())},
            "window": self.window,
            "sink_tokens": self.sinks,
            "rotation": {"kind": self.rotation, "seed": self.seed},
            "scale_dtype": "float16",
            "transforms": self.transforms,
            "num_layers": self.num_layers,
            "head_dim": self.head_dim,
        }

    @classmethod
    def from_scheme(cls, scheme: Mapping[str, Any]) -> "TurboQuantConfig":
        """Inverse of `to_scheme`.

        Raises:
            ValueError: no mapping, another format, a newer version or layout, an unknown codec or scale dtype, or a
                missing, malformed or unknown key.
        """
        known = set(cls().to_scheme())
        if not isinstance(scheme, Mapping):
            raise ValueError(
                f"expected kv_cache_scheme to be a mapping of {sorted(known)}, got {scheme!r}; convert the model again"
            )
        if scheme.get("format") != FORMAT:
            raise ValueError(
                f"expected kv_cache_scheme format {FORMAT!r}, got {scheme.get('format')!r}; "
                "this is not a tq_ao checkpoint"
            )
        for key, newest in (("version", FORMAT_VERSION), ("layout_version", LAYOUT_VERSION)):
            version = scheme.get(key)
            if type(version) is not int or not 1 <= version <= newest:
                raise ValueError(
                    f"expected kv_cache_scheme {key} 1..{newest}, got {version!r}; "
                    "upgrade tq_ao to read this checkpoint"
                )
        for key, only in (("codec", "mse"), ("scale_dtype", "float16")):
            if scheme.get(key, only) != only:
                raise ValueError(
                    f"expected kv_cache_scheme {key} {only!r}, got {scheme[key]!r}; "
                    "upgrade tq_ao or convert the model again"
                )
        if missing := known - set(scheme) - {"num_bits"}:
            raise ValueError(f"kv_cache_scheme lacks {sorted(missing)}; convert the model again")
        if unknown := set(scheme) - known:
            raise ValueError(f"kv_cache_scheme has unknown keys {sorted(unknown)}; upgrade tq_ao or remove them")
        try:
            layers = {_index(i): LayerScheme(**s) for i, s in scheme["layers"].items()}
            kind, seed = scheme["rotation"]["kind"], scheme["rotation"]["seed"]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                "expected kv_cache_scheme layers {index: {k_bits, v_bits}} and rotation {kind, seed}, "
                f"got {scheme['layers']!r} and {scheme['rotation']!r} ({error}); convert the model again"
            ) from error
        return cls(
            bits=scheme["bits"],
            layers=layers,
            window=scheme["window"],
            sinks=scheme["sink_tokens"],
            rotation=kind,
            seed=seed,
            transforms=scheme["transforms"],
            num_layers=scheme["num_layers"],
            head_dim=scheme["head_dim"],
        )
