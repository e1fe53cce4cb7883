"""The kernels of other packages get the same keys and values as SDPA, in the layouts that they document."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bf16_kernels


class PagedDecode:
    """What FlashInfer's BatchDecodeWithPagedKVCacheWrapper documents, on whole tensors."""

    def __init__(self, workspace, layout, use_tensor_cores):
        assert layout == "HND"

    def plan(self, indptr, indices, last_page_len, heads, kv_heads, head_dim, page_size, q_data_type, kv_data_type):
        tables = (indptr, indices, last_page_len)
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in tables)  # it takes their data pointers
        self.indptr, self.indices, self.last = (t.tolist() for t in tables)
        self.shape = (kv_heads, page_size, head_dim)
        assert q_data_type == kv_data_type == torch.bfloat16

    def run(self, q, pages):
        assert pages.shape[2:] == self.shape and pages.is_contiguous()
        out = []
        for b, (first, end) in enumerate(zip(self.indptr, self.indptr[1:], strict=False)):
            kv = pages[self.indices[first:end]].permute(1, 2, 0, 3, 4).flatten(2, 3)
            k, v = kv[:, :, : kv.shape[2] - self.shape[1] + self.last[b]]
            out.append(F.scaled_dot_product_attention(q[b, :, None], k, v, enable_gqa=True)[:, 0])
        return torch.stack(out)


class PagedPrefill(PagedDecode):
    """Its BatchPrefillWithPagedKVCacheWrapper, of equally many queries to a row."""

    def __init__(self, workspace, layout, backend):
        assert layout == "HND" and backend == "fa2"

    def plan(self, q_indptr, *others, causal, **dtypes):
        super().plan(*others, **dtypes)
        assert q_indptr.dtype == torch.int32 and causal
        self.rows = q_indptr.tolist()

    def run(self, q, pages):
        assert pages.is_contiguous() and len(q) == self.rows[-1]
        out = []
        for b, (first, end) in enumerate(zip(self.indptr, self.indptr[1:], strict=False)):
            k, v = pages[self.indices[first:end]].permute(1, 2, 0, 3, 4).flatten(2, 3)
            one = q[self.rows[b] : self.rows[b + 1]].transpose(0, 1)
            out.append(F.scaled_dot_product_attention(one, k, v, seen(one[None], k[None]), enable_gqa=True))
        return torch.cat(out, 1).transpose(0, 1)


def flash_attn_with_kvcache(q, k, v, cache_seqlens, causal):
    assert cache_seqlens.tolist() == [k.shape[1]] * q.shape[0] and causal
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, seen(q, k), enable_gqa=True).transpose(1, 2)


def seen(q, k):
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])


@pytest.fixture
def packages(monkeypatch):
    found = {
        "flashinfer": SimpleNamespace(
            BatchDecodeWithPagedKVCacheWrapper=PagedDecode, BatchPrefillWithPagedKVCacheWrapper=PagedPrefill
        ),
        "fa3_fwd_interface": SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache),
    }
    for name, package in found.items():
        monkeypatch.setitem(sys.modules, name, package)
    return found


def inputs(rng, q_len=1):
    q = torch.randn(3, 8, q_len, 32, generator=rng).bfloat16()
    return q, [torch.randn(2, 3, 2, 192, 32, generator=rng).bfloat16() for _ in range(2)]


def test_every_kernel_computes_the_same_attention(packages, rng):
    q, caches = inputs(rng)
    found = bf16_kernels.calls(q, caches)
    for i, (k, v) in enumerate(caches):
        want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), enable_gqa=True).flatten()
        for name in ("flashinfer bf16", "flash-attention 3 bf16"):
            got = found[name][i]().float().flatten()
            assert ((got - want).norm() / want.norm()).item() < 0.01, name


def test_several_queries_are_causal(packages, rng):
    q, caches = inputs(rng, 5)
    found = bf16_kernels.calls(q, caches)
    k, v = caches[0].float()
    want = F.scaled_dot_product_attention(q.float(), k, v, seen(q, k), enable_gqa=True)
    for name in ("flashinfer bf16", "flash-attention 3 bf16"):
        got = found[name][0]().float()
        assert got.shape == want.shape and ((got - want).norm() / want.norm()).item() < 0.01, name


def test_a_package_that_is_missing_or_refuses_is_left_out_by_name(packages, rng, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise RuntimeError("no kernel for head_dim 32\nand a trace")

    packages["flashinfer"].BatchDecodeWithPagedKVCacheWrapper = refuse
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", None)
    found = bf16_kernels.calls(*inputs(rng))
    assert all(name.startswith("sdpa") for name in found) and len(found) == 3
    said = capsys.readouterr().err
    assert "flashinfer bf16 does not run: no kernel for head_dim 32\n" in said
    assert "flash-attention 3 bf16 is not installed" in said
