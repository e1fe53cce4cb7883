"""The file of a checkpoint's calibrated maps: where it is found, how it is written and read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from tq_ao.rotation import LayerMaps


def find_transforms(config: PreTrainedConfig, name: str, folder: Path | None) -> str | Path:
    """Path of a checkpoint's transforms file, fetched from the Hub if need be into the cache the weights are in.

    Raises:
        OSError: it is not there, or cannot be fetched.
    """
    where: dict[str, Any] = {"revision": getattr(config, "_commit_hash", None)}
    if folder is not None:
        if (folder / name).is_file():
            return folder / name
        if Path(config._name_or_path).is_dir():
            raise OSError(
                f"{name} is missing in {folder}: copy it there from the converted model, or remove quantization_config "
                "from config.json"
            )
        parts = folder.parts
        if "snapshots" in parts:  # <cache_dir>/models--org--name/snapshots/<commit>/<subfolder>
            at = len(parts) - 1 - parts[::-1].index("snapshots")
            where.update(cache_dir=Path(*parts[: at - 1]), subfolder="/".join(parts[at + 2 :]))
    try:
        return cached_file(config._name_or_path, name, **where)
    except OSError as error:
        raise OSError(
            f"{config._name_or_path}: cannot get {name}, which its KV-cache schedule needs; it is fetched with the "
            "stored login, not with a token passed to from_pretrained: for a private model run `hf auth login` or set "
            "HF_TOKEN "
            f"({' '.join(str(error).split())})"
        ) from error


def save_transforms(path: str | Path, calibrated: Mapping[int, LayerMaps]) -> None:
    """Write calibrated maps: one float32 tensor `layers.<i>.<name>` per map, shift or feedback (names of LayerMaps)."""
    tensors = {  # copies: plain keys and values share a map, which safetensors refuses
        f"layers.{i}.{name}": t.to("cpu", copy=True).contiguous()
        for i, maps in calibrated.items()
        for name, t in maps.tensors().items()
    }
    Path(path).write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file's is for its owner's eyes only


def load_transforms(path: str | Path) -> dict[int, LayerMaps]:
    """Inverse of `save_transforms`.

    Raises:
        ValueError: a file that is not safetensors, or a layer with a map missing, unknown, of another shape or with
            numbers that are not finite.
    """
    by_layer: dict[int, dict[str, torch.Tensor]] = {}
    try:
        for key, tensor in load_file(str(path)).items():
            _, index, name = key.split(".")
            if not tensor.isfinite().all():
                raise ValueError(f"expected finite numbers in {key}, got {tensor[~tensor.isfinite()][0].item()}")
            by_layer.setdefault(int(index), {})[name] = tensor
        return {i: LayerMaps(**named) for i, named in sorted(by_layer.items())}
    except (TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: not a transforms file of this version ({error}); convert the model again") from error
