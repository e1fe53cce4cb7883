"""Calibration: which maps and how many bits each layer's K and V get.

    from tq_ao.calibration.calibrate import calibrate

    layers = {i: rotation_maps("hadamard", kv_heads, head_dim, seed_of(i)) for i in quantised_layers}
    result = calibrate(model, calibration_windows, layers, bits=3.0, window=128, sinks=4,
                       # or, instead of bits, memory=footprint.memory_budget(...) and widths=(1, 2, 3, 4, 8)
                       maps="auto",                     # or "plain": TurboQuant's rotations, schedule only
                       repair_evaluations=0, journal=path, seed=0, progress=True, report=print)
    result.schedule   {layer: (k_bits, v_bits)}         result.maps  {layer: LayerMaps} or None (plain)
    result.table      {(layer, "key"|"value", bits): KL}

Steps, each a function of its own: `trace` (measure/capture.py) runs a window and returns q, k, v, output and gradient
of every layer; `collect` gathers statistics; `choose_variants` picks maps; `sensitivity` scores layers; `knapsack`
allocates; `repair` improves by measured swaps; `measure.evaluator.Evaluator` measures.  That the result beats a uniform
schedule on other text is for the caller to see: `tq_ao.convert` measures it.
"""
