"""The plain buffers of one packed layer, written with the op and wrapped afterwards: a cache in miniature."""

import torch

from tq_ao import ops
from tq_ao.packing import TILE, tile_bytes
from tq_ao.rotation import LayerMaps, rotation_maps
from tq_ao.tensor import TurboQuantTensor


class PackedLayer(torch.nn.Module):
    """Buffers for `max_len` tokens per row; `append` writes, `wrap` makes tensors of what is there."""

    def __init__(
        self,
        batch: int = 2,
        heads: int = 2,
        dim: int = 64,
        max_len: int = 256,
        k_bits: int = 3,
        v_bits: int = 4,
        window: int = 32,
        sinks: int = 4,
        start: tuple[int, ...] | None = None,
        maps: LayerMaps | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.window, self.max_len, self.dtype = window, max_len, dtype
        self.maps = maps or rotation_maps("hadamard", heads, dim, 0)
        tiles = -(-max_len // TILE)
        for side, bits in (("k", k_bits), ("v", v_bits)):
            codes = torch.zeros(batch, heads, tiles, tile_bytes(bits, dim), dtype=torch.uint8)
            self.register_buffer(f"{side}_codes", codes)
            self.register_buffer(f"{side}_scales", torch.zeros(batch, heads, tiles, TILE, dtype=torch.float16))
            self.register_buffer(f"{side}_sinks", torch.zeros(batch, heads, sinks, dim, dtype=dtype))
            self.register_buffer(f"{side}_recent", torch.zeros(batch, heads, window + 2 * TILE, dim, dtype=dtype))
        self.register_buffer("length", torch.tensor(0))
        self.register_buffer("start", torch.tensor(start or (0,) * batch))
        for buffer in self.buffers():
            torch._dynamo.mark_static_address(buffer)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write new tokens [B, H, q, D] and count them."""
        maps = self.maps
        ops.append_(
            self.k_codes, self.k_scales, self.v_codes, self.v_scales,
            self.k_sinks, self.v_sinks, self.k_recent, self.v_recent,
            k, v, self.length, self.start, maps.key, maps.key_shift, maps.value, maps.value_shift, self.window,
        )  # fmt: skip
        self.length.add_(k.shape[2])

    def wrap(
        self, new_k: torch.Tensor | None = None, new_v: torch.Tensor | None = None
    ) -> tuple[TurboQuantTensor, TurboQuantTensor]:
        """Key and value tensors over the buffers, zero-copy."""
        maps, n = self.maps, self.max_len
        key = TurboQuantTensor(
            self.k_codes, self.k_scales, maps.key, maps.query, maps.key_shift, "key", n, self.window, self.dtype,
            self.k_sinks, self.k_recent, new_k, self.length, self.start,
        )  # fmt: skip
        value = TurboQuantTensor(
            self.v_codes, self.v_scales, maps.value, maps.output, maps.value_shift, "value", n, self.window, self.dtype,
            self.v_sinks, self.v_recent, new_v, self.length, self.start,
        )  # fmt: skip
        return key, value
