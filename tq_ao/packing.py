"""Tile layout v1: where every code of a packed K or V tile lives.  Kernels and torch agree on this file.

A tile is 32 consecutive tokens of one KV head; D = head_dim is a multiple of 32.  A tile of `bits`-bit codes
is 32 * D * bits / 8 bytes, seen as little-endian 32-bit words [D/32 groups of 32 codes] x [bits words]:

    word address = ((w * 32) + lane) * (D / 32) + group        w = 0 .. bits-1, lane = 0 .. 31

so one lane of a warp reads its words of plane w as D/8 contiguous bytes (16 at D = 128).

Which 32 * (D/32) codes belong to a lane, and in which order, is the tensor-core fragment order, with
lane = 4 * g + t (g = 0..7, t = 0..3), flattened to D codes and cut into groups of 32:

    key    (i 4)(j D/16)(byte 4)        token = 8*i + g            dim = 16*j + 4*t + byte
           four bytes = one B register of mma.m16n8k32 (k = dim, n = token)
    value  (m D/8)(j0 2)(b1 2)(b0 2)    token = 16*j0 + 8*b1 + 2*t + b0    dim = 8*m + g
           four bytes -> two fp16x2 A registers of mma.m16n8k16 (row = dim, k = token)

Inside a group, code q (0..31) sits in the words like this (bit 31 left, bit 0 right, one nibble per column):

    4 bits   word w   [ 8w+7 ][ 8w+6 ] ... [ 8w+1 ][ 8w ]            nibble n = code 8w + n
    3 bits   word w   [x|8w+7][x|8w+6] ... [x|8w+1][x|8w]            low three bits = code 8w + n;
                      x in nibble n of word w = bit w of code 24+n    the top bits of three words make 8 more codes
    2 bits   word w   [16w+15|16w+7] ... [16w+8|16w]                 low pair = code 16w+n, high pair = code 16w+8+n
    1 bit    word 0   [31|23|15|7] ... [24|16|8|0]                   bit s of nibble n = code 8s + n
    8 bits   word w   [ 4w+3 ][ 4w+2 ][ 4w+1 ][ 4w ]                 one byte per code

After at most a shift and a mask each nibble is a PRMT selector: one PRMT turns four codes into the four
grid bytes of an MMA operand register.  The only permutation left is the one absorbed here.
"""

import torch

from tq_ao.codebook import BITS, ROLES, Role

LAYOUT_VERSION = 1
TILE = 32


def tile_bytes(bits: int, head_dim: int) -> int:
    """Bytes of one packed tile of 32 tokens.

    Raises:
        ValueError: head_dim is not a positive multiple of 32, or bits is unsupported.
    """
    if head_dim <= 0 or head_dim % 32:
        raise ValueError(
            f"expected head_dim to be a positive multiple of 32, got {head_dim}; layout v1 has no other shapes"
        )
    if bits not in BITS:
        raise ValueError(f"expected bits in {BITS}, got {bits!r}; choose one of those widths")
    return TILE * head_dim * bits // 8


def to_fragments(tiles: torch.Tensor, role: Role) -> torch.Tensor:
    """Tiles in token order [..., 32 tokens, D] -> fragment order [..., 32 lanes, D]."""
    if role not in ROLES:
        raise ValueError(f"expected role in {ROLES}, got {role!r}; keys and values are laid out differently")
    lead, head_dim = tiles.shape[:-2], tiles.shape[-1]
    x = tiles.reshape(-1, TILE, head_dim)
    if role == "key":  # (i g) (j t byte) -> (g t) (i j byte)
        x = x.view(-1, 4, 8, head_dim // 16, 4, 4).permute(0, 2, 4, 1, 3, 5)
    else:  # (j0 b1 t b0) (m g) -> (g t) (m j0 b1 b0)
        x = x.view(-1, 2, 2, 4, 2, head_dim // 8, 8).permute(0, 6, 3, 5, 1, 2, 4)
    return x.reshape(*lead, 32, head_dim)


def from_fragments(fragments: torch.Tensor, role: Role) -> torch.Tensor:
    """Inverse of `to_fragments`."""
    if role not in ROLES:
        raise ValueError(f"expected role in {ROLES}, got {role!r}; keys and values are laid out differently")
    lead, head_dim = fragments.shape[:-2], fragments.shape[-1]
    if role == "key":
        x = fragments.reshape(-1, 8, 4, 4, head_dim // 16, 4).permute(0, 3, 1, 4, 2, 5)
    else:
        x = fragments.reshape(-1, 8, 4, head_dim // 8, 2, 2, 2).permute(0, 4, 5, 2, 6, 3, 1)
    return x.reshape(*lead, TILE, head_dim)


def pack(codes: torch.Tensor, bits: int, role: Role) -> torch.Tensor:
    """Pack codes into layout v1.

    Args:
        codes: integer [..., T*32, D], values 0 .. 2**bits - 1.
        bits: code width.
        role: "key" or "value".

    Returns:
        uint8 [..., T, tile_bytes(bits, D)].
    """
    *lead, tokens, head_dim = codes.shape
    nbytes = tile_bytes(bits, head_dim)
    if tokens % TILE:
        raise ValueError(f"expected a multiple of {TILE} tokens, got {tokens}; pad the last tile")
    tiles = codes.reshape(*lead, tokens // TILE, TILE, head_dim).to(torch.int32)
    q = to_fragments(tiles, role).unflatten(-1, (-1, 32))  # [..., T, lane, group, 32]
    nibble = 4 * torch.arange(8, device=codes.device, dtype=torch.int32)
    if bits == 8:
        byte = 8 * torch.arange(4, device=codes.device, dtype=torch.int32)
        words = (q.unflatten(-1, (8, 4)) << byte).sum(-1, dtype=torch.int32)
    elif bits == 3:
        low, spare = q[..., :24].unflatten(-1, (3, 8)), q[..., 24:]
        plane = torch.arange(3, device=codes.device, dtype=torch.int32)
        top = ((spare.unsqueeze(-2) >> plane[:, None]) & 1) << 3
        words = ((low | top) << nibble).sum(-1, dtype=torch.int32)
    else:
        per = 4 // bits  # codes sharing a nibble
        shift = bits * torch.arange(per, device=codes.device, dtype=torch.int32)[:, None]
        words = (q.unflatten(-1, (bits, per, 8)) << (shift + nibble)).sum((-1, -2), dtype=torch.int32)
    planes = words.movedim(-1, -3).contiguous()  # [..., T, w, lane, group]
    return planes.view(torch.uint8).reshape(*lead, tokens // TILE, nbytes)


def selector_bytes(packed: torch.Tensor, bits: int, head_dim: int) -> torch.Tensor:
    """Undo the bit packing of 1-4 bits: uint8 [..., T, bytes] -> uint8 [..., T, 32 lanes, D / 2].

    Byte i of a lane holds its codes 2i (low nibble) and 2i + 1 (high nibble): what a kernel has in registers
    after its shifts and masks.
    """
    words = packed.contiguous().view(torch.int32).unflatten(-1, (bits, 32, head_dim // 32))
    w = words.unbind(-3)  # planes [..., T, lane, group]
    if bits == 4:
        nibbles = list(w)
    elif bits == 3:
        top = ((w[0] >> 3) & 0x11111111) | ((w[1] >> 2) & 0x22222222) | ((w[2] >> 1) & 0x44444444)
        nibbles = [x & 0x77777777 for x in w] + [top]
    elif bits == 2:
        nibbles = [(x >> s) & 0x33333333 for x in w for s in (0, 2)]
    else:
        nibbles = [(w[0] >> s) & 0x11111111 for s in range(4)]
    return torch.stack(nibbles, -1).view(torch.uint8).flatten(-2)  # [..., T, lane, group, 4 words] -> bytes


def unpack_fragments(packed: torch.Tensor, bits: int, head_dim: int) -> torch.Tensor:
    """Codes in fragment order: uint8 [..., T, bytes] -> uint8 [..., T, 32 lanes, D]."""
    nbytes = tile_bytes(bits, head_dim)
    if packed.shape[-1] != nbytes:
        raise ValueError(
            f"expected {nbytes} bytes per tile for {bits} bits and head_dim {head_dim}, got {packed.shape[-1]}; "
            "bits and head_dim are those the tile was packed with"
        )
    if bits == 8:
        words = packed.contiguous().view(torch.int32).unflatten(-1, (bits, 32, head_dim // 32))
        return words.movedim(-3, -1).contiguous().view(torch.uint8).flatten(-2)
    pairs = selector_bytes(packed, bits, head_dim)
    return torch.stack([pairs & 0xF, pairs >> 4], -1).flatten(-2)


def unpack(packed: torch.Tensor, bits: int, head_dim: int, role: Role) -> torch.Tensor:
    """Inverse of `pack`: uint8 [..., T, tile_bytes] -> uint8 codes [..., T*32, D]."""
    return from_fragments(unpack_fragments(packed, bits, head_dim), role).flatten(-3, -2)
