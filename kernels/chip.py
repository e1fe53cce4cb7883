"""What launches depend on: facts about the device."""

from functools import lru_cache

import torch


def is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many there are; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache
def shared_kib(device: torch.device) -> int:
    """Shared memory of a multiprocessor in KiB; what an sm_80 has for the interpreter."""
    if device.type != "cuda":
        return 164
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor // 1024


@lru_cache
def launches_early(device: torch.device) -> bool:
    """Whether a launch can begin while the one before it ends: programmatic dependent launch."""
    return is_nvidia(device) and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def is_hopper(device: torch.device) -> bool:
    return is_nvidia(device) and torch.cuda.get_device_capability(device)[0] == 9  # AMD's gfx9 has 9, too
