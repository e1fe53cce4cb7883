"""One packed layer of the KV cache: the buffers, what is written to them, and what attention reads.

A packed layer owns plain buffers (tiles, sinks, recent ring, length) that one mutating op writes; what
`update` returns is a `TurboQuantTensor` wrapped around them after the write.  That order matters: under
torch.compile a wrapper made before a write to its inner tensors would read the old data, silently.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from tq_ao import devices, ops, reference
from tq_ao.codebook import ROLES
from tq_ao.config import LayerScheme
from tq_ao.packing import TILE, tile_bytes
from tq_ao.rotation import MapSource, one_by_one
from tq_ao.tensor import TurboQuantTensor

# The ring keeps this many tokens beyond the window: one tile filling, and one tile of room so that taking back
# up to 32 tokens (a rejected speculation) never needs a token whose exact copy is gone.
RING_SLACK = 2 * TILE
_BUFFERS = ("k_codes", "k_scales", "v_codes", "v_scales", "k_sinks", "v_sinks", "k_recent", "v_recent")


def _ordinary() -> AbstractContextManager:
    """Where buffers are made: one made under inference mode could not be written to after it."""
    compiling = torch.compiler.is_compiling()  # to a graph, which has no such mode
    return nullcontext() if compiling or not torch.is_inference_mode_enabled() else torch.inference_mode(False)


class TurboQuantLayer(CacheLayerMixin):
    """One layer's packed K and V: exact sinks, packed tiles, exact recent ring (geometry: tq_ao.reference).

    Args:
        index: layer index, selects the layer's maps.
        scheme: code widths.
        maps: source of the layer's maps.
        window, sinks: see TurboQuantConfig.
        max_cache_len: tokens to allocate for (static, compiles), or None to grow.
    """

    is_sliding = False
    is_croppable = True
    length: torch.Tensor  # int64 0-d, tokens seen, padding included
    start: torch.Tensor  # int64 [B], position of each row's first real token
    key_operands: torch.Tensor | None  # what kernels read of the maps; None on the CPU, where nothing reads them
    value_operands: torch.Tensor | None

    def __init__(
        self,
        index: int,
        scheme: LayerScheme,
        maps: MapSource,
        window: int,
        sinks: int,
        max_cache_len: int | None = None,
    ) -> None:
        super().__init__()
        self.index, self.scheme, self.maps = index, scheme, maps
        self.window, self.sinks, self.max_cache_len = window, sinks, max_cache_len
        self.is_compileable = max_cache_len is not None
        self.guards_length = False  # one layer of a static cache looks on the device whether it is full
        self.is_empty = True
        self.seen = 0  # host copy of the length; a growing layer's only
        self.behind = 0  # at least how far the ring has been written beyond the length (crop)
        self._first_start: torch.Tensor | None = None  # a start told before the buffers exist

    def __repr__(self) -> str:
        kind = "growing" if self.max_cache_len is None else f"max_cache_len={self.max_cache_len}"
        bits = f"k_bits={self.scheme.k_bits}, v_bits={self.scheme.v_bits}"
        return f"TurboQuantLayer({bits}, window={self.window}, sinks={self.sinks}, {kind})"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        if value_states.shape[-1] != dim:
            raise ValueError(
                f"layer {self.index}: expected K and V of one head_dim, got {dim} and {value_states.shape[-1]}"
            )
        devices.check(key_states.device)
        self.dtype, self.device, self.batch_size, self.head_dim = key_states.dtype, key_states.device, batch, dim
        with _ordinary():
            self._allocate(batch, heads, dim)
        self._mark_static(*self.buffers(), self.length, self.start, self.key_operands, self.value_operands)
        self.is_initialized = True

    def _mark_static(self, *tensors: torch.Tensor | None) -> None:
        """Compiled graphs may take the addresses of these for granted."""
        if self.is_compileable and not torch.compiler.is_compiling():
            for tensor in tensors:
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)

    def _allocate(self, batch: int, heads: int, dim: int) -> None:
        """Maps, and buffers of an empty cache."""
        self.layer_maps = maps = self.maps(self.index, heads, dim, self.device)
        self.key_operands = self.value_operands = None
        if self.device.type != "cpu":  # on "meta" too, where bytes are counted
            self.key_operands = ops.prepare(maps.key, maps.key_shift, "key", feedback=maps.key_feedback)
            self.value_operands = ops.prepare(maps.value, maps.value_shift, "value", feedback=maps.value_feedback)
        tiles = self._static_tiles()
        ring = self.window + RING_SLACK
        for side, bits in (("k", self.scheme.k_bits), ("v", self.scheme.v_bits)):
            codes = torch.zeros(batch, heads, tiles, tile_bytes(bits, dim), dtype=torch.uint8, device=self.device)
            setattr(self, f"{side}_codes", codes)
            setattr(
                self, f"{side}_scales", torch.zeros(batch, heads, tiles, TILE, dtype=torch.float16, device=self.device)
            )
            setattr(
                self, f"{side}_sinks", torch.zeros(batch, heads, self.sinks, dim, dtype=self.dtype, device=self.device)
            )
            setattr(self, f"{side}_recent", torch.zeros(batch, heads, ring, dim, dtype=self.dtype, device=self.device))
        self.length = torch.zeros((), dtype=torch.int64, device=self.device)
        self.written = torch.zeros_like(self.length)  # length the ring was written up to before the last crop
        self.start = torch.zeros(batch, dtype=torch.int64, device=self.device)
        if self._first_start is not None:
            self.start.copy_(self._first_start)
            self._first_start = None

    def buffers(self) -> list[torch.Tensor]:
        """Codes, scales, sinks and rings of K and V: everything that grows with the batch or the length."""
        return [getattr(self, name) for name in _BUFFERS]

    def set_start(self, start: torch.Tensor) -> None:
        """Position of each row's first real token, int64 [B]; before the keys of that chunk arrive."""
        if self.is_initialized:
            self._check_batch(start.shape[0])
            self.start.copy_(start)
        else:
            self._first_start = start.clone()

    def _check_batch(self, rows: int) -> None:
        if rows != self.batch_size:
            raise ValueError(
                f"expected batch size {self.batch_size}, got {rows}; reset() keeps the batch size, make a new cache"
            )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [B, H, q, D]; returns what attention reads.

        An empty cache hands back the exact tensors (prefill attends exact K and V).  Later calls return
        TurboQuantTensors; for q > 1 they see the cache as it was plus the new tokens, exact, until the next update.

        Raises:
            ValueError: another batch size, or more tokens than a static cache was made for.  How many it holds only an
                eager CPU knows without waiting for a device: compiled, a CPU raises RuntimeError, and a GPU fails an
                assertion that the next synchronisation reports.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        q = key_states.shape[2]
        self._check_batch(key_states.shape[0])
        if self.max_cache_len is None:
            self._grow(self.seen + q)
            self.seen += q
        else:
            self._check_room(q, self.max_cache_len)
        snapshot = None
        if q > 1 and not self.is_empty:
            # Up to a tile of new tokens goes to slots of the ring whose tokens were packed before them.
            rings = [x if q <= TILE else x.clone() for x in (self.k_recent, self.v_recent)]
            snapshot = (*rings, self.length.clone())
        maps = self.layer_maps
        ops.append_(
            *self.buffers(), key_states, value_states, self.length, self.start,
            maps.key, maps.key_shift, maps.value, maps.value_shift, self.window,
            key_feedback=maps.key_feedback, value_feedback=maps.value_feedback,
            key_operands=self.key_operands, value_operands=self.value_operands,
        )  # fmt: skip
        self.length.add_(q)
        if self.is_empty:
            self.is_empty = False
            return key_states, value_states
        if snapshot is None:
            return self.tensors()
        k_recent, v_recent, length = snapshot
        k, v = self._wrap("k", k_recent, key_states, length), self._wrap("v", v_recent, value_states, length)
        return k, v

    def _check_room(self, q: int, room: int) -> None:
        known = self.length.device.type == "cpu" and not torch.compiler.is_compiling()
        held = int(self.length) if known else 0
        if held + q > room:
            raise ValueError(f"expected at most max_cache_len={room} tokens, got {q} after {held}; make a longer cache")
        if self.guards_length and not known:
            # Without the number: of a second length a compiler makes a symbol, which no string can hold.
            full = "expected at most max_cache_len tokens, got more; make a longer cache"
            torch._assert_async(self.length <= room - q, full)

    def tensors(self) -> tuple[TurboQuantTensor, TurboQuantTensor]:
        """The cache's K and V as they stand, zero-copy."""
        return self._wrap("k", self.k_recent, None, self.length), self._wrap("v", self.v_recent, None, self.length)

    def _wrap(
        self, side: str, recent: torch.Tensor, new: torch.Tensor | None, length: torch.Tensor
    ) -> TurboQuantTensor:
        maps, key = self.layer_maps, side == "k"
        return TurboQuantTensor(
            getattr(self, f"{side}_codes"),
            getattr(self, f"{side}_scales"),
            maps.key if key else maps.value,
            maps.query if key else maps.output,
            maps.key_shift if key else maps.value_shift,
            "key" if key else "value",
            self.seen if self.max_cache_len is None else self.max_cache_len,
            self.window,
            self.dtype,
            getattr(self, f"{side}_sinks"),
            recent,
            new,
            length,
            self.start,
        )

    def _grow(self, tokens: int) -> None:
        """Room for the tiles of `tokens` tokens, half as much again at a time."""
        have = self.k_codes.shape[2]
        need = reference.packed_tokens(tokens, self.sinks, self.window, self.k_recent.shape[2]) // TILE
        if need > have:
            self._allocate_tiles(max(need, have + have // 2, 8))

    def make_room(self, max_cache_len: int) -> None:
        """Let a static layer hold as many tokens, what it holds included.  Its tiles get new addresses."""
        self.max_cache_len = max_cache_len
        if self.is_initialized:
            self._allocate_tiles(self._static_tiles())
            self._mark_static(*self.buffers()[:4])

    def _static_tiles(self) -> int:
        return 0 if self.max_cache_len is None else max(0, self.max_cache_len - self.sinks - self.window) // TILE

    def _allocate_tiles(self, tiles: int) -> None:
        """Buffers for `tiles` tiles, with the ones there are."""
        for name in _BUFFERS[:4]:
            old = getattr(self, name)
            with _ordinary():
                new = old.new_zeros(*old.shape[:2], tiles, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_seq_length(self) -> int | torch.Tensor:
        if not self.is_initialized:
            return 0
        return self.seen if self.max_cache_len is None else self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.seen + query_length if self.max_cache_len is None else self.max_cache_len), 0

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self) -> None:
        """Empty the layer, keeping its buffers (and their addresses)."""
        self.is_empty, self.seen, self.behind, self._first_start = True, 0, 0, None
        if self.is_initialized:
            for tensor in (self.length, self.start, self.written):
                tensor.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens (0 or negative, as transformers passes it).

        Up to 32 tokens cost nothing.  Beyond that, in one call or in several, tokens that fall back into the
        window but exist only as codes return to the ring as their reconstruction; packing them again yields the
        same codes, but for a few in a thousand with error feedback.

        Raises:
            ValueError: a positive number, or more tokens than the layer holds (a static layer, whose length is on
                the device, is emptied instead by crops that cost nothing).
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"expected crop(-n) to remove n tokens, got {tokens_to_remove}; "
                "positive crops are gone from transformers"
            )
        removed = -tokens_to_remove
        if not self.is_initialized or not removed:
            return
        if self.max_cache_len is None:
            self._check_holds(self.seen, removed)
            self.seen -= removed
        torch.maximum(self.written, self.length, out=self.written)
        self.behind += removed
        if self.behind > RING_SLACK - TILE:  # perhaps not, if tokens have come in between: look at the device
            length = int(self.length)
            self._check_holds(length, removed)
            self.behind = int(self.written) - (length - removed)
            if self.behind > RING_SLACK - TILE:
                self._restore_ring(length - removed, int(self.written))
            if length == removed:
                self.reset()
                return
        self.length.sub_(removed).clamp_(min=0)
        if self.max_cache_len is not None:
            self.start.mul_(self.length > 0)  # an empty cache knows of no padding
        elif not self.seen:
            self.reset()
            return
        # A restored ring is as good as one written up to here: its oldest token is the first that is not packed.
        torch.minimum(self.written, self.length + RING_SLACK, out=self.written)

    def _check_holds(self, length: int, removed: int) -> None:
        if removed > length:
            raise ValueError(f"expected to remove at most {length} tokens, got {removed}; reset() empties a cache")

    def _restore_ring(self, length: int, written: int) -> None:
        """Put what a cache of `length` tokens keeps in its ring back there, from the tiles where need be.

        Codes go back through the inverse of the map they came by, not through the read-out map: calibrated read-outs
        carry a gain, and a token that is packed again must not get it twice.
        """
        ring, maps = self.k_recent.shape[2], self.layer_maps
        sides = (
            (self.k_codes, self.k_scales, self.k_recent, one_by_one(torch.linalg.inv, maps.key), maps.key_shift),
            (self.v_codes, self.v_scales, self.v_recent, one_by_one(torch.linalg.inv, maps.value), maps.value_shift),
        )
        for row, first in enumerate(self.start.tolist()):
            lost_from = reference.packed_tokens(max(0, length - first), self.sinks, self.window, ring)
            lost_to = min(written - first - self.sinks - ring, length - first - self.sinks)
            if lost_to <= lost_from:
                continue
            tiles = slice(lost_from // TILE, -(-lost_to // TILE))
            slots = torch.arange(lost_from, lost_to, device=self.device) % ring
            for role, (codes, scales, recent, back, shift) in zip(ROLES, sides, strict=True):
                y = reference.decode(codes[row, :, tiles], scales[row, :, tiles], self.head_dim, role)
                x = y[:, : lost_to - lost_from] @ back + shift[:, None]
                recent[row, :, slots] = x.to(recent.dtype)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes old row beam_idx[i], in place: compiled graphs hold the addresses."""
        if self.is_initialized:
            for tensor in (*self.buffers(), self.start):
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given rows; the batch size becomes len(indices)."""
        if self.is_initialized:
            with _ordinary():
                for name in (*_BUFFERS, "start"):
                    setattr(self, name, getattr(self, name).index_select(0, indices.to(self.device)))
            self._mark_static(*self.buffers(), self.start)
            self.batch_size = self.start.shape[0]

    def offload(self) -> None:
        raise NotImplementedError("a packed cache is not offloaded; use the default cache_implementation")

    def prefetch(self) -> None:
        raise NotImplementedError("a packed cache is not offloaded; use the default cache_implementation")

    def nbytes(self) -> dict[str, int]:
        """Bytes held, counted from the tensors: {"packed": codes and scales, "exact": sinks and ring}."""
        if not self.is_initialized:
            return {"packed": 0, "exact": 0}
        sizes = [t.numel() * t.element_size() for t in self.buffers()]
        return {"packed": sum(sizes[:4]), "exact": sum(sizes[4:])}
