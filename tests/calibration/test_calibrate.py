"""What a journal of measurements belongs to."""

import copy

import layer_state
import tiny
import torch

from tq_ao.calibration.calibrate import _fingerprint


def test_a_journal_is_of_one_model_text_and_setting(rng):
    model, windows = tiny.model(), torch.randint(2, 97, (3, 64), generator=rng)
    maps = {i: layer_state.maps(2, 32, rng) for i in range(2)}
    tuned = copy.deepcopy(model)
    tuned.model.layers[1].mlp.up_proj.weight.data.mul_(2)
    swapped = {0: maps[1], 1: maps[0]}
    mark = _fingerprint(model, maps, windows, "auto", 3)
    assert _fingerprint(copy.deepcopy(model), dict(maps), windows.clone(), "auto", 3) == mark
    for other in (
        (tuned, maps, windows, "auto", 3),
        (model, swapped, windows, "auto", 3),
        (model, maps, windows.flip(1), "auto", 3),
        (model, maps, windows[:2], "auto", 3),
        (model, maps, windows, "auto", 4),
    ):
        assert _fingerprint(*other) != mark
