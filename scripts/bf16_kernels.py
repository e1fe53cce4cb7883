"""The bf16 attention kernels that the benchmarks compare with, as far as they are installed."""

import importlib
import sys
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

Call = Callable[[], torch.Tensor]
PAGE = 64  # tokens to a page of FlashInfer's cache


def calls(q: torch.Tensor, caches: list[torch.Tensor]) -> dict[str, list[Call]]:
    """Calls of every installed kernel, one for each cache; whether it accepts the shape shows when it is called.

    Args:
        q: bf16 [B, Hq, q_len, D]; several queries see the cache causally, the last one all of it.
        caches: bf16 [2, B, H, N, D] each, keys and values; kernels that want another layout get a copy in it.
    """
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    backends["efficient"] = SDPBackend.EFFICIENT_ATTENTION
    found: dict[str, list[Call]] = {}
    for name, backend in backends.items():
        found[f"sdpa {name} bf16"] = [partial(_sdpa, backend, q, *kv) for kv in caches]
    others = {"flash-attention 3 bf16": ("fa3_fwd_interface", _flash_attention_3)}
    others["flashinfer bf16"] = ("flashinfer", _flashinfer)
    for name, (package, make) in others.items():
        try:
            found[name] = [make(importlib.import_module(package), q, kv) for kv in caches]
        except ImportError as missing:
            print(f"  {name} is not installed ({missing}): not measured", file=sys.stderr)
        except RuntimeError as refused:  # of FlashInfer, which compiles for the shape when it plans
            print(f"  {name} does not run: {str(refused).splitlines()[0][:90]}", file=sys.stderr)
    return found


def _sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says at length why each other backend is not used
        mask = causal_lower_right(q.shape[2], k.shape[2]) if q.shape[2] > 1 else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _flash_attention_3(package, q: torch.Tensor, kv: torch.Tensor) -> Call:  # type: ignore[no-untyped-def]
    lengths = torch.full((q.shape[0],), kv.shape[3], device=q.device, dtype=torch.int32)
    k, v = kv.transpose(2, 3).contiguous()  # [B, N, H, D]
    query = q.transpose(1, 2).contiguous()
    return lambda: package.flash_attn_with_kvcache(query, k, v, cache_seqlens=lengths, causal=True).transpose(1, 2)


def _flashinfer(package, q: torch.Tensor, kv: torch.Tensor) -> Call:  # type: ignore[no-untyped-def]
    """Its batch decode over pages in order, on tensor cores; of several queries its prefill, by the same kernel."""
    _, batch, heads, tokens, dim = kv.shape
    pages = kv.unflatten(3, (-1, PAGE)).permute(1, 3, 0, 2, 4, 5).flatten(0, 1).contiguous()  # [pages, 2, H, PAGE, D]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)

    def starts(each: int) -> torch.Tensor:
        return torch.arange(0, batch * each + 1, each, dtype=torch.int32, device=q.device)

    index = torch.arange(len(pages), dtype=torch.int32, device=q.device)
    last = torch.full((batch,), PAGE, dtype=torch.int32, device=q.device)
    tables = (starts(tokens // PAGE), index, last)
    of_heads, dtypes = (q.shape[1], heads, dim, PAGE), {"q_data_type": q.dtype, "kv_data_type": kv.dtype}
    if q.shape[2] == 1:
        wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(*tables, *of_heads, **dtypes)
        return partial(wrapper.run, q[:, :, 0].contiguous(), pages)
    # Its "fa3" does not split rows.
    wrapper = package.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend="fa2")
    wrapper.plan(starts(q.shape[2]), *tables, *of_heads, causal=True, **dtypes)
    rows = q.transpose(1, 2).flatten(0, 1)
    return lambda: wrapper.run(rows, pages).unflatten(0, (batch, -1)).transpose(1, 2)
