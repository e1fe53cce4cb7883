"""The files of a checkpoint: where the tensors of a model are stored, and the folder of a converted one."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from tq_ao.config import TRANSFORMS_FILE, TurboQuantConfig
from tq_ao.errors import ModelError
from tq_ao.model_card import CARD, SIDECAR, model_card
from tq_ao.quantizer import TurboQuantQuantizationConfig
from tq_ao.rotation import LayerMaps
from tq_ao.transforms_file import save_transforms

# The names of safetensors' dtypes: https://github.com/huggingface/safetensors#format
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".bin.index.json")


def check_output(output: Path) -> None:
    """Raise OSError or ValueError unless `output`, a resolved path, can be created, or replaced where it is empty."""
    if output.is_mount() or output == Path.cwd():
        raise ValueError(f"{output} cannot be replaced by a finished folder; give an --output-dir inside it")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists; give another --output-dir or remove it")
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"cannot write to {parent}; give another --output-dir")
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except FileNotFoundError as error:  # of file systems that hold no files, such as /proc
        raise PermissionError(f"cannot write to {parent}; give another --output-dir") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that from_pretrained reads.

    Raises:
        ModelError: none, or a shard that its index names is missing.
    """
    files = [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not files[0].is_file() and index.is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(shards))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(f"{folder}: expected weights in safetensors, {', '.join(missing)} missing")
    return files


def other_weights(folder: Path) -> list[Path]:
    """Weights in files that from_pretrained does not read (PyTorch's, say): they would not go with folded values.

    Raises:
        ModelError: see `weight_files`.
    """
    known = [*weight_files(folder), folder / TRANSFORMS_FILE]
    return [file for file in sorted(folder.iterdir()) if file.name.endswith(_WEIGHTS) and file not in known]


def find_stored(folder: Path, names: Iterable[str], prefix: str) -> dict[str, tuple[Path, str]]:
    """Where the parameters of a model are stored.

    Args:
        folder: of the checkpoint.
        names: of parameters.
        prefix: the model's `base_model_prefix`, with or without which the checkpoint may name them.

    Returns:
        Parameter -> (file, key in it).

    Raises:
        ModelError: no safetensors, or a parameter that they do not hold under its name as a matrix or vector of floats.
    """
    where, found = {}, {}
    for file in weight_files(folder):
        for key, entry in _header(file)[1].items():
            if entry.get("dtype") in _DTYPES:
                where[key] = file
    for name in names:
        keys = [key for key in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if key in where]
        if not keys:
            raise ModelError(f"{folder}: expected {name} in its safetensors, stored as {sorted(_DTYPES)}, found none")
        found[name] = (where[keys[0]], keys[0])
    return found


def read_stored(file: Path, key: str) -> torch.Tensor:
    """One tensor, as it is stored."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(key)


def was_folded(folder: Path) -> bool:
    """Whether a folder is a converted model whose weights hold folded value maps (see `tq_ao.fold`)."""
    try:
        report = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and (report.get("fold_kl") is not None or report.get("folded_base") is True)


def overwrite(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Overwrite tensors of a safetensors file in place: every byte but theirs stays, metadata included.

    Raises:
        ValueError: a tensor that the file does not hold, or holds in another shape or dtype.
    """
    start, header = _header(file)
    with file.open("r+b") as opened:
        for key, tensor in tensors.items():
            entry = header.get(key, {})
            have = (_DTYPES.get(entry.get("dtype")), entry.get("shape"))
            if have != (tensor.dtype, list(tensor.shape)):
                raise ValueError(f"{file}: expected {key} as {have}, got {tensor.dtype} {list(tensor.shape)}")
            opened.seek(start + entry["data_offsets"][0])
            opened.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begin, and its header: key -> dtype, shape and data_offsets.

    Raises:
        ModelError: another or a damaged file.
    """
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        try:
            return 8 + size, json.loads(opened.read(min(size, file.stat().st_size)))
        except ValueError as error:
            raise ModelError(f"{file}: a damaged safetensors file ({error}); copy or download it again") from error


def write(
    output: Path,
    base: Path,
    quantization: TurboQuantConfig,
    *,
    maps: Mapping[int, LayerMaps] | None,
    recipe: str,
    report: Mapping[str, Any],
    changed: Mapping[tuple[Path, str], torch.Tensor],
) -> None:
    """Write a converted checkpoint beside `output`, then rename it into place.

    Args:
        output: folder to create.
        base: folder of the model it was made from, whose files are copied.
        quantization: the resolved schedule.
        maps: of its transforms file, or None.
        recipe: YAML.  report: everything measured.
        changed: (file, key) in `base` -> the tensor to store there instead.  With any, `other_weights` are left out.
    """
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        ours_to_write = (CARD, "config.json", "recipe.yaml", SIDECAR, TRANSFORMS_FILE)
        stale = other_weights(base) if changed else []
        for file in sorted(base.iterdir()):
            if file.is_file() and file.name not in ours_to_write and file.name[0] != "." and file not in stale:
                shutil.copyfile(file, part / file.name)
        for file in {file for file, _ in changed}:
            overwrite(part / file.name, {key: tensor for (of, key), tensor in changed.items() if of == file})
        if (base / CHAT_TEMPLATE_DIR).is_dir():  # other folders hold other things: training state, exports
            shutil.copytree(base / CHAT_TEMPLATE_DIR, part / CHAT_TEMPLATE_DIR)
        if maps is not None:
            save_transforms(part / TRANSFORMS_FILE, maps)
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        ours = TurboQuantQuantizationConfig(quantization.to_scheme()).to_dict()
        existing = config.get("quantization_config") or {}
        if existing.get("quant_method") == "torchao":
            ours = {**existing, "kv_cache_scheme": ours["kv_cache_scheme"]}
        config["quantization_config"] = ours
        _dump(part / SIDECAR, report)
        (part / "recipe.yaml").write_text(recipe, encoding="utf-8")
        (part / CARD).write_text(model_card(report), encoding="utf-8")
        _dump(part / "config.json", config)  # last: until now nothing here loads, whatever interrupts
        part.chmod(0o755)
        if output.exists():
            output.rmdir()
        os.replace(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _dump(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
