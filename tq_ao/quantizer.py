"""`quant_method: "turboquant"` for transformers: the weights stay as they are, the KV cache becomes packed.

Loaded while transformers itself may still be importing (see `_import_hook`), so it takes only transformers'
quantizer bases; everything else is imported when a model is loaded.
"""

from pathlib import Path
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.utils import logging
from transformers.utils import quantization_config as of_transformers

from tq_ao.config import FORMAT, FORMAT_VERSION, TurboQuantConfig

logger = logging.get_logger(__name__)


class TurboQuantQuantizationConfig(of_transformers.QuantizationConfigMixin):
    """The `quantization_config` of a converted checkpoint.

    Args:
        kv_cache_scheme: JSON form of a TurboQuantConfig.
        version: format version.

    Raises:
        ValueError: a version or scheme this tq_ao cannot read.
    """

    def __init__(
        self, kv_cache_scheme: dict[str, Any] | None = None, version: int = FORMAT_VERSION, **kwargs: Any
    ) -> None:
        self.quant_method = FORMAT
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"expected turboquant version 1..{FORMAT_VERSION}, got {version!r}; "
                "upgrade tq_ao to read this checkpoint"
            )
        if kv_cache_scheme is None:
            raise ValueError("quantization_config lacks kv_cache_scheme; convert the model again")
        TurboQuantConfig.from_scheme(kv_cache_scheme)
        self.version = version
        self.kv_cache_scheme = dict(kv_cache_scheme)

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": FORMAT, "version": self.version, "kv_cache_scheme": self.kv_cache_scheme}


class TurboQuantHfQuantizer(HfQuantizer):
    """Attaches the packed cache after the weights are loaded; touches no weight."""

    requires_calibration = False
    _folder: Path | None = None

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        self._folder = _folder_of(checkpoint_files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model.is_quantized = False  # its weights are not: transformers would refuse float(), half() and training
        return _attach(model, self.quantization_config.kv_cache_scheme, self._folder)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class TorchAoConfig(of_transformers.TorchAoConfig):
    """torchao's weight quantisation with our `kv_cache_scheme` beside it in the same dict.

    transformers compares the names of classes: a caller's `quantization_config=TorchAoConfig(...)` must meet its own.
    """

    def __init__(self, *args: Any, kv_cache_scheme: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if kv_cache_scheme is not None:
            TurboQuantConfig.from_scheme(kv_cache_scheme)
            self.kv_cache_scheme = kv_cache_scheme


class TorchAoHfQuantizerWithKV(TorchAoHfQuantizer):
    """torchao's quantizer; attaches the packed cache when the checkpoint carries a `kv_cache_scheme`."""

    _folder: Path | None = None

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        self._folder = _folder_of(checkpoint_files)
        return super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs) or model
        scheme = getattr(self.quantization_config, "kv_cache_scheme", None)
        return model if scheme is None else _attach(model, scheme, self._folder)


def _attach(model: Any, scheme: dict[str, Any], folder: Path | None) -> Any:
    """`hf.attach_checkpoint` for a schedule that is complete; says which packed layers the transforms file lacks.

    Raises:
        ValueError: a schedule made for a model of this shape that leaves out a layer to pack; or see there.
    """
    from tq_ao import hf
    from tq_ao.cache import quantizable_layers

    quantization = TurboQuantConfig.from_scheme(scheme)
    whole = quantization.layers and quantization.num_layers is not None
    if whole and (missing := [i for i in quantizable_layers(model.config) if i not in quantization.layers]):
        raise ValueError(
            f"expected kv_cache_scheme to name every full-attention layer, got none for {missing}; add them to its "
            "layers, with 16 and 16 bits to keep one exact"
        )
    model = hf.attach_checkpoint(model, scheme, folder)
    maps, packed = model.turboquant.maps.calibrated, model.turboquant.quantization.layers
    if maps and (bare := [i for i, scheme in packed.items() if not scheme.exact and i not in maps]):
        logger.warning(
            "%s has no maps for the packed layers %s, which get random rotations: convert the model again if it is not "
            "meant to be so",
            quantization.transforms,
            bare,
        )
    return model


def _folder_of(checkpoint_files: Any) -> Path | None:
    """The folder weights are loaded from, where the transforms file belongs too."""
    return Path(checkpoint_files[0]).parent if checkpoint_files else None


if FORMAT not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(FORMAT)(TurboQuantQuantizationConfig)
    register_quantizer(FORMAT)(TurboQuantHfQuantizer)
    AUTO_QUANTIZATION_CONFIG_MAPPING["torchao"] = TorchAoConfig
    AUTO_QUANTIZER_MAPPING["torchao"] = TorchAoHfQuantizerWithKV
