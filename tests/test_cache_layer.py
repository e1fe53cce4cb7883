"""One packed layer by itself: the tokens it holds after crops, a reset or new rows."""

import layer_state
import pytest
import torch

from tq_ao.cache_layer import TurboQuantLayer
from tq_ao.config import LayerScheme
from tq_ao.rotation import LayerMaps, MapSource

WINDOW, SINKS = 32, 3
either_kind = pytest.mark.parametrize("max_len", [None, 512], ids=["growing", "static"])


def make_layer(max_len: int | None = None, maps: LayerMaps | None = None) -> TurboQuantLayer:
    calibrated = {} if maps is None else {0: maps}
    return TurboQuantLayer(0, LayerScheme(8, 8), MapSource("hadamard", 0, calibrated), WINDOW, SINKS, max_len)


def keys_and_values(rng: torch.Generator, count: int, rows: int = 1) -> torch.Tensor:
    """[2, rows, heads, count, D]."""
    return torch.randn(2, rows, 2, count, 32, generator=rng)


def assert_holds(layer: TurboQuantLayer, kv: torch.Tensor) -> None:
    """These tokens and no others, but for padding; 8 bits are within 2 % of a vector (5 % of a stretched one)."""
    assert int(layer.get_seq_length()) == kv.shape[3]
    for packed, want in zip(layer.tensors(), kv, strict=True):
        error = (packed.dequantize()[:, :, : kv.shape[3]] - want).norm(dim=-1) / want.norm(dim=-1)
        for row, first in enumerate(layer.start.tolist()):
            assert (error[row, :, first:] < 0.05).all()


@either_kind
@pytest.mark.parametrize("removed", [34, 40, 64, 150])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_deep_crop_keeps_the_tokens_before_it(calibrated, removed, max_len, rng):
    """In a padded row, too, and where maps have shifts; which slots of the ring are lost depends on the length."""
    maps = layer_state.maps(2, 32, rng) if calibrated else None
    for length in (196, 223, 245):
        kv = keys_and_values(rng, length, rows=2)
        layer = make_layer(max_len, maps)
        layer.set_start(torch.tensor([0, 45]))
        layer.update(*kv)
        layer.crop(-removed)
        assert_holds(layer, kv[:, :, :, :-removed])


@either_kind
def test_tokens_written_after_a_deep_crop_survive_another_crop(max_len, rng):
    kv, more = keys_and_values(rng, 260), keys_and_values(rng, 20)
    layer = make_layer(max_len)
    layer.update(*kv)
    layer.crop(-150)
    layer.update(*more)
    layer.crop(-5)
    assert_holds(layer, torch.cat([kv[:, :, :, :110], more[:, :, :, :15]], 3))


@either_kind
def test_crops_after_a_reset_bring_back_nothing_of_the_text_before(max_len, rng):
    layer, kv = make_layer(max_len), keys_and_values(rng, 60)
    layer.update(*keys_and_values(rng, 260))
    layer.crop(-1)
    layer.reset()
    layer.update(*kv)
    for _ in range(2):
        layer.crop(-20)
    assert_holds(layer, kv[:, :, :, :20])


def test_a_static_layer_is_emptied_by_a_shallow_crop_of_more_than_it_holds(rng):
    layer = make_layer(64)
    layer.update(*keys_and_values(rng, 10))
    layer.crop(-11)
    assert int(layer.get_seq_length()) == 0


def test_a_static_layer_refuses_a_deep_crop_of_more_than_it_holds(rng):
    layer, kv = make_layer(64), keys_and_values(rng, 10)
    layer.update(*kv)
    with pytest.raises(ValueError, match="at most 10 tokens, got 70"):
        layer.crop(-70)
    assert_holds(layer, kv)


@either_kind
@pytest.mark.parametrize("filled", [False, True])
def test_a_reset_forgets_padding(filled, max_len, rng):
    layer, kv = make_layer(max_len), keys_and_values(rng, 20, rows=2)
    layer.set_start(torch.tensor([0, 7]))
    if filled:
        layer.update(*keys_and_values(rng, 20, rows=2))
    layer.reset()
    layer.update(*kv)
    assert layer.start.tolist() == [0, 0]
    assert_holds(layer, kv)


@either_kind
def test_reordered_rows_keep_their_padding(max_len, rng):
    layer, kv = make_layer(max_len), keys_and_values(rng, 100, rows=2)
    layer.set_start(torch.tensor([0, 7]))
    layer.update(*kv)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert layer.start.tolist() == [7, 0]
    assert_holds(layer, kv[:, [1, 0]])
