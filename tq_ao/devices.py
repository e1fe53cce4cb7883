"""Devices: which can hold a packed cache, and which of those this machine has."""

import torch

SUPPORTED = ("cpu", "cuda")


def check(device: torch.device) -> None:
    """Raise ValueError unless there are kernels for a device; "meta", where bytes are counted, has shapes only."""
    if device.type not in (*SUPPORTED, "meta"):
        raise ValueError(
            f"expected a device of type {' or '.join(SUPPORTED)}, got {device}: packed K and V have no kernels for it; "
            "move the model there"
        )


def named(name: str | None) -> str:
    """A device by name, as --device has it; None: the GPU if there is one.

    Raises:
        ValueError: no such device on this machine, or one without kernels.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        check(torch.device(name))
        torch.empty(1, device=name).item()  # "meta" has none
    except (RuntimeError, AssertionError) as error:  # the latter from a torch built without CUDA
        reason = str(error).split("\n")[0]
        raise ValueError(f"expected a device that this machine has, got {name!r} ({reason})") from error
    return name
