"""tq_ao: packed TurboQuant KV caches for transformers models.

Importing this package registers the "turboquant" quantization method with transformers (once transformers
loads its quantizers) and nothing else: no triton, no torchao, no CUDA until they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tq_ao._import_hook import after_import

if TYPE_CHECKING:
    from tq_ao.cache import TurboQuantCache
    from tq_ao.config import LayerScheme, TurboQuantConfig
    from tq_ao.hf import quantize_kv_
    from tq_ao.quantize import TurboQuantKVCacheConfig
    from tq_ao.rotation import LayerMaps
    from tq_ao.tensor import TurboQuantTensor

__version__ = "0.1.0"
__all__ = [
    "LayerMaps",
    "LayerScheme",
    "TurboQuantCache",
    "TurboQuantConfig",
    "TurboQuantKVCacheConfig",
    "TurboQuantTensor",
    "quantize_kv_",
]

_HOME = {
    "LayerMaps": "rotation",
    "LayerScheme": "config",
    "TurboQuantCache": "cache",
    "TurboQuantConfig": "config",
    "TurboQuantKVCacheConfig": "quantize",
    "TurboQuantTensor": "tensor",
    "quantize_kv_": "hf",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tq_ao' has no attribute {name!r}; public names are {__all__}")
    return getattr(import_module(f"tq_ao.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


after_import("transformers.quantizers.auto", "tq_ao.quantizer")
