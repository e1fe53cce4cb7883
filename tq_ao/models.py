"""Names of models: local folders, aliases, Hub ids, and the models that come inside PyPI wheels."""

import difflib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tq_ao.embedded import EMBEDDED, materialize
from tq_ao.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# Short name -> (Hub id, license as the Hub writes it).
ALIASES = {
    "gemma-2b": ("google/gemma-2b", "gemma"),
    "gemma-2b-it": ("google/gemma-2b-it", "gemma"),
    "gemma-7b": ("google/gemma-7b", "gemma"),
    "gemma-2-2b": ("google/gemma-2-2b", "gemma"),
    "gemma-2-2b-it": ("google/gemma-2-2b-it", "gemma"),
    "gemma-2-9b-it": ("google/gemma-2-9b-it", "gemma"),
    "gemma-3-270m-it": ("google/gemma-3-270m-it", "gemma"),
    "gemma-3-1b": ("google/gemma-3-1b-pt", "gemma"),
    "gemma-3-1b-it": ("google/gemma-3-1b-it", "gemma"),
    "tinyllama-1.1b": ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "apache-2.0"),
    "tinyllama-1.1b-chat": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "apache-2.0"),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", "llama3"),
    "llama-3-8b-instruct": ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", "llama3.1"),
    "llama-3.1-8b-instruct": ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1"),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", "llama3.2"),
    "llama-3.2-1b-instruct": ("meta-llama/Llama-3.2-1B-Instruct", "llama3.2"),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", "llama3.2"),
    "llama-3.2-3b-instruct": ("meta-llama/Llama-3.2-3B-Instruct", "llama3.2"),
    "llama-3.3-70b-instruct": ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3"),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", "apache-2.0"),
    "qwen2.5-0.5b-instruct": ("Qwen/Qwen2.5-0.5B-Instruct", "apache-2.0"),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B", "apache-2.0"),
    "qwen2.5-1.5b-instruct": ("Qwen/Qwen2.5-1.5B-Instruct", "apache-2.0"),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", "apache-2.0"),
    "qwen2.5-7b-instruct": ("Qwen/Qwen2.5-7B-Instruct", "apache-2.0"),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", "apache-2.0"),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", "apache-2.0"),
    "qwen3-4b": ("Qwen/Qwen3-4B", "apache-2.0"),
    "qwen3-8b": ("Qwen/Qwen3-8B", "apache-2.0"),
    "mistral-7b": ("mistralai/Mistral-7B-v0.3", "apache-2.0"),
    "mistral-7b-instruct": ("mistralai/Mistral-7B-Instruct-v0.3", "apache-2.0"),
    "mistral-nemo-12b-instruct": ("mistralai/Mistral-Nemo-Instruct-2407", "apache-2.0"),
    "phi-3.5-mini": ("microsoft/Phi-3.5-mini-instruct", "mit"),
    "phi-4": ("microsoft/phi-4", "mit"),
    "phi-4-mini": ("microsoft/Phi-4-mini-instruct", "mit"),
    "smollm2-135m-base": ("HuggingFaceTB/SmolLM2-135M", "apache-2.0"),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", "apache-2.0"),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "apache-2.0"),
}


@dataclass(frozen=True)
class ResolvedModel:
    """What a name stands for.

    path_or_id: for `from_pretrained`: a local folder or a Hub id.
    name: short, for messages and for the name of an output folder.
    base_model: Hub id for the model card; None for a local folder that does not say.
    license: license as the Hub writes it; None if the model does not say.
    is_local: path_or_id is a folder on this machine.
    """

    path_or_id: str
    name: str
    base_model: str | None
    license: str | None
    is_local: bool


def resolve(name: str, token: str | None = None, cache_dir: str | Path | None = None) -> ResolvedModel:
    """Find a model: a local folder first, then an embedded model, then an alias or Hub id.

    Args:
        name: path of a folder with a config.json, a key of `EMBEDDED` or `ALIASES` in any case, or "org/name".
        token: Hub access token, for gated and private models; None uses the one of `hf auth login`, if any.
        cache_dir: where converted embedded models are kept; None is $TQ_AO_CACHE or ~/.cache/tq_ao.

    Embedded models are converted on first use (a minute at most); of Hub models only config.json and README.md are
    fetched, which shows that the model exists and that the token opens it.

    Raises:
        ModelError: nothing of that name, a folder without a model, a gated or private model the token does not
            open, no network, or an embedded model whose wheel is not installed.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return _local(folder)
    key = name.lower()
    if key in EMBEDDED:
        model = EMBEDDED[key]
        return ResolvedModel(str(materialize(model, cache_dir)), model.name, model.base_model, model.license, True)
    if key in ALIASES:
        hub_id, license = ALIASES[key]
        _fetch(hub_id, "config.json", token)
        return ResolvedModel(hub_id, key, hub_id, license, False)
    if folder.exists():
        raise ModelError(f"{name!r} has no config.json: expected the folder of a transformers model (safetensors)")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        _fetch(name, "config.json", token)
        return ResolvedModel(name, name.split("/")[1].lower(), name, _card(name, token).get("license"), False)
    if "/" in name or "\\" in name or name.startswith((".", "~")):
        raise ModelError(f"{name!r} does not exist: give a model folder, a Hub id 'org/name', or a short name")
    raise ModelError(f"unknown model {name!r}{_near(name)}: give a short name, a local folder, or a Hub id 'org/name'")


def auto_class(config: "PreTrainedConfig") -> Any:
    """transformers' auto class of models that generate text: of language models, or of those that see images too.

    Raises:
        ModelError: a model that does neither.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or ()
    ):
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise ModelError(
        f"{config.model_type}: expected a model that generates text (AutoModelForCausalLM or "
        "AutoModelForImageTextToText), got another kind; a KV cache is of no use there"
    )


def _near(name: str) -> str:
    known = {**dict.fromkeys(EMBEDDED), **dict.fromkeys(ALIASES)}
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5) or list(EMBEDDED)
    return f" (near: {', '.join(close)})"


def _local(folder: Path) -> ResolvedModel:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} is not readable JSON ({error}): is it a model folder?") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{folder / 'config.json'} names no model_type: expected the folder of a transformers model")
    metadata = _metadata(folder / "README.md")
    base = metadata.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    base = base if isinstance(base, str) else None
    return ResolvedModel(str(folder), folder.resolve().name, base, metadata.get("license"), True)


def _metadata(readme: Path | None) -> dict[str, Any]:
    """Front matter of a model card; empty where there is none."""
    from huggingface_hub.repocard import metadata_load

    if readme is None or not readme.is_file():
        return {}
    try:
        return metadata_load(readme) or {}
    except (yaml.YAMLError, ValueError, UnicodeDecodeError) as error:  # it tells licence and origin only
        logger.warning(
            "%s: its front matter is left out, as it cannot be read: %s", readme, " ".join(str(error).split())
        )
        return {}


def _card(hub_id: str, token: str | None) -> dict[str, Any]:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _metadata(_fetch(hub_id, "README.md", token))
    except ModelError as error:
        if isinstance(error.__cause__, EntryNotFoundError):  # a model without a card, or offline without it
            return {}
        raise


def _fetch(hub_id: str, filename: str, token: str | None) -> Path:
    """Download one file of a Hub model, with every failure as a ModelError that says what to do."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(hub_id, filename, token=token))
    except GatedRepoError as error:
        message = f"{hub_id} is gated: accept its terms on its Hub page, then pass an access token with --token"
        if token:
            message = f"{hub_id} is gated and this --token does not open it: accept its terms on its Hub page"
        raise ModelError(message) from error
    except RepositoryNotFoundError as error:
        what = "this --token does not open it" if token else "it is private (then pass --token)"
        raise ModelError(f"{hub_id} is not on the Hub, or {what}: check the spelling{_near_id(hub_id)}") from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise ModelError(
            f"{why} and {hub_id} is not in the local cache: go online, give a local folder, or use one of the "
            f"embedded models {', '.join(EMBEDDED)}"
        ) from error
    except EntryNotFoundError as error:
        raise ModelError(f"{hub_id} has no {filename}: expected a transformers model (not GGUF-only)") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        todo = "check --token" if status in (401, 403) else "try again later"
        raise ModelError(f"the Hub refused {hub_id} with status {status}: {todo}") from error
    except HFValidationError as error:
        raise ModelError(f"{hub_id!r} is not a Hub id: expected 'org/name'") from error


def _near_id(hub_id: str) -> str:
    ids = [hub for hub, _ in ALIASES.values()]
    close = difflib.get_close_matches(hub_id, ids, n=2, cutoff=0.6)
    return f" (near: {', '.join(close)})" if close else ""
