"""Other ways to store a cache, for the same table as ours: the published levels, KIVI, transformers' own."""

from dataclasses import dataclass

from tq_ao.calibration.allocation import uniform
from tq_ao.evaluation.kivi import kivi
from tq_ao.evaluation.kivi import stored_bits as kivi_bits
from tq_ao.evaluation.lloyd import lloyd
from tq_ao.evaluation.setup import Setup
from tq_ao.evaluation.transformers_cache import BITS, KINDS, transformers_quantized, unavailable
from tq_ao.evaluation.transformers_cache import stored_bits as transformers_bits
from tq_ao.measure.capture import Handler


@dataclass(frozen=True)
class Baseline:
    """A row to be measured.

    Attributes:
        method: its name.
        bits: of a code.
        stored_bits: per value, scales and offsets included.
        sinks: first tokens it keeps exact.
        attention: reads old keys and values as this method stores them.
    """

    method: str
    bits: int
    stored_bits: float
    sinks: int
    attention: Handler


def baselines(setup: Setup, window: int, sinks: int) -> tuple[list[Baseline], dict[str, str]]:
    """Every baseline that can run here, and why the others cannot: method -> reason."""
    found, left_out, layers = [], {}, set(setup.plain)
    for bits in (2, 3, 4):
        stored = setup.shape.average(uniform(setup.shape, bits), stored=True)
        published = lloyd(setup.plain, bits, window=window, sinks=sinks)
        found.append(Baseline("TurboQuant (Lloyd-Max levels)", bits, stored, sinks, published))
        rounded = kivi(layers, bits, window=window, sinks=sinks)
        found.append(Baseline("KIVI-style, groups of 32", bits, kivi_bits(bits), sinks, rounded))
    for method, kind in KINDS.items():
        if reason := unavailable(setup.model.config, kind, window):
            left_out[method] = reason
            continue
        for bits in BITS:
            attention = transformers_quantized(setup.model.config, layers, kind, bits, window=window)
            found.append(Baseline(method, bits, transformers_bits(bits), 0, attention))
    return found, left_out
