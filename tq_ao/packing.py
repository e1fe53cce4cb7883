"""Tile layout v2: where every code of a packed K or V tile lives.  Kernels and torch agree on this file.

A tile is 32 consecutive tokens of one KV head; D = head_dim is a multiple of 32.  A tile of `bits`-bit codes
is 32 * D * bits / 8 bytes, seen as little-endian 32-bit words [D/32 groups of 32 codes] x [bits words]:

    word address = ((w * 32) + lane) * (D / 32) + group        w = 0 .. bits-1, lane = 0 .. 31

so one lane of a warp reads its words of plane w as D/8 contiguous bytes (16 at D = 128).

Which 32 * (D/32) codes belong to a lane, and in which order, is the tensor-core fragment order, with
lane = 4 * g + t (g = 0..7, t = 0..3), flattened to D codes and cut into groups of 32 (digits, highest first):

    key    (i1 2)(i0 2)(jj 2)(byte 4)        token = 16*i1 + 8*i0 + g          dim = 32*group + 16*jj + 4*t + byte
           four bytes = one B register of mma.m16n8k32 (k = dim, n = token)
    value  (m1 2)(m0 2)(j0 2)(b1 2)(b0 2)    token = 16*j0 + 8*b1 + 2*t + b0   dim = 32*group + 16*m1 + 8*m0 + g
           two b0 = one fp16x2 A register of mma.m16n8k16 (row = dim, k = token)

A group is cut into four words s of eight nibbles n, and these are put together into its `bits` words:

                        s              n                       pos = bit of a code in its byte (key) or half (value)
    key                 2*jj + i0      2*byte + i1             4*i1 + ..
    value, 3-4 bits     2*j0 + b1      4*b0 + 2*m0 + m1        8*m0 + 4*m1 + ..
    value, 1-2 bits     2*j0 + m0      4*b0 + 2*b1 + m1        8*b1 + 4*m1 + ..

    4 bits   word s     [ n7 ][ n6 ] ... [ n1 ][ n0 ]                     one code to a nibble
    3 bits   word s<3   [c7|x7][c6|x6] ... [c1|x1][c0|x0]                 bits 3-1 = code of s, bit 0 = x:
             word 0, 1, 2 carry bit 2, 1, 0 of the eight codes of s = 3   (left shifts by 3, 2, 1 put them together)
    2 bits   word w     [ 2w+1 | 2w ] in every nibble                     codes of s = 2w low, of s = 2w + 1 high
    1 bit    word 0     [ 3|2|1|0 ] in every nibble                       bit s
    8 bits   word w = digits 4..2, one code to a byte, in fragment order

So one AND with a mask such as 0x0E0E0E0E turns a word of keys into four int8 numbers that belong to one token tile i
and have one common factor, a power of two; and one AND such as 0x000E000E (of the word, or of the word shifted) turns
a word of values into two fp16 numbers, subnormal ones, which belong to one dimension block m and have one common
factor.  No look-up, no conversion, no exchange between lanes.  Where a key's field touches bit 7 the number is
negative, so those codes are stored with their highest bit inverted (`KEY_FLIP`): two's complement instead of offset
binary.
"""

import torch

from tq_ao.codebook import BITS, ROLES, Role

LAYOUT_VERSION = 2
TILE = 32
# What a group's words of keys are xor-ed with: the highest bit of the codes whose field ends at bit 7 of a byte.
KEY_FLIP: dict[int, tuple[int, ...]] = {
    1: (0,),
    2: (0x80808080, 0x80808080),
    3: (0x90909090, 0x80808080, 0x80808080),
    4: (0x80808080,) * 4,
}


def tile_bytes(bits: int, head_dim: int) -> int:
    """Bytes of one packed tile of 32 tokens.

    Raises:
        ValueError: head_dim is not a positive multiple of 32, or bits is no int of `BITS` (3.0 and True are none).
    """
    if head_dim <= 0 or head_dim % 32:
        raise ValueError(
            f"expected head_dim to be a positive multiple of 32, got {head_dim}; layout v2 has no other shapes"
        )
    if not isinstance(bits, int | torch.SymInt) or isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"expected bits in {BITS}, an int, got {bits!r}; choose one of those")
    return TILE * head_dim * bits // 8


def to_fragments(tiles: torch.Tensor, role: Role) -> torch.Tensor:
    """Tiles in token order [..., 32 tokens, D] -> fragment order [..., 32 lanes, D]."""
    _check_role(role)
    lead, head_dim = tiles.shape[:-2], tiles.shape[-1]
    x = tiles.reshape(-1, TILE, head_dim)
    if role == "key":  # (i g) (group jj t byte) -> (g t) (group i jj byte)
        x = x.view(-1, 4, 8, head_dim // 32, 2, 4, 4).permute(0, 2, 5, 3, 1, 4, 6)
    else:  # (j0 b1 t b0) (group m g) -> (g t) (group m j0 b1 b0)
        x = x.view(-1, 2, 2, 4, 2, head_dim // 8, 8).permute(0, 6, 3, 5, 1, 2, 4)
    return x.reshape(*lead, 32, head_dim)


def from_fragments(fragments: torch.Tensor, role: Role) -> torch.Tensor:
    """Inverse of `to_fragments`."""
    _check_role(role)
    lead, head_dim = fragments.shape[:-2], fragments.shape[-1]
    if role == "key":
        x = fragments.reshape(-1, 8, 4, head_dim // 32, 4, 2, 4).permute(0, 4, 1, 3, 5, 2, 6)
    else:
        x = fragments.reshape(-1, 8, 4, head_dim // 8, 2, 2, 2).permute(0, 4, 5, 2, 6, 3, 1)
    return x.reshape(*lead, TILE, head_dim)


def _check_role(role: Role) -> None:
    if role not in ROLES:
        raise ValueError(f"expected role in {ROLES}, got {role!r}; keys and values are laid out differently")


def _flip(bits: int, device: torch.device) -> torch.Tensor:
    """KEY_FLIP as int32 [bits]."""
    signed = [x - (1 << 32) if x >> 31 else x for x in KEY_FLIP[bits]]
    return torch.tensor(signed, dtype=torch.int32, device=device)


def pack(codes: torch.Tensor, bits: int, role: Role) -> torch.Tensor:
    """Pack codes.

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
    if not codes.numel():  # its strides are whatever they are: `contiguous` does nothing, the view below is refused
        _check_role(role)
        return codes.new_empty(*lead, tokens // TILE, nbytes, dtype=torch.uint8)
    tiles = codes.reshape(*lead, tokens // TILE, TILE, head_dim).to(torch.int32)
    q = to_fragments(tiles, role).unflatten(-1, (-1, 32))  # [..., T, lane, group, 32]
    if bits == 8:
        byte = 8 * torch.arange(4, device=codes.device, dtype=torch.int32)
        words = (q.unflatten(-1, (8, 4)) << byte).sum(-1, dtype=torch.int32)
    else:
        if role == "key":  # i1 i0 jj byte -> (jj i0) (byte i1)
            n = q.unflatten(-1, (2, 2, 2, 4)).movedim((-2, -3, -1, -4), (-4, -3, -2, -1))
        elif bits >= 3:  # m1 m0 j0 b1 b0 -> (j0 b1) (b0 m0 m1)
            n = q.unflatten(-1, (2, 2, 2, 2, 2)).movedim((-3, -2, -1, -4, -5), (-5, -4, -3, -2, -1))
        else:  # m1 m0 j0 b1 b0 -> (j0 m0) (b0 b1 m1)
            n = q.unflatten(-1, (2, 2, 2, 2, 2)).movedim((-3, -4, -1, -2, -5), (-5, -4, -3, -2, -1))
        n = n.reshape(*q.shape[:-1], 4, 8)
        s = (n << (4 * torch.arange(8, device=codes.device, dtype=torch.int32))).sum(-1, dtype=torch.int32)
        plane = torch.arange(4, device=codes.device, dtype=torch.int32)
        if bits == 4:
            words = s
        elif bits == 3:
            words = (s[..., :3] << 1) | ((s[..., 3:] >> (2 - plane[:3])) & 0x11111111)
        else:
            per = 4 // bits  # words s in one word
            words = (s.unflatten(-1, (bits, per)) << (bits * plane[:per])).sum(-1, dtype=torch.int32)
        if role == "key":
            words = words ^ _flip(bits, codes.device)
    planes = words.movedim(-1, -3).contiguous()  # [..., T, w, lane, group]
    return planes.view(torch.uint8).reshape(*lead, tokens // TILE, nbytes)


def nibble_bytes(packed: torch.Tensor, bits: int, head_dim: int, role: Role) -> torch.Tensor:
    """Undo the bit packing of 1-4 bits: uint8 [..., T, bytes] -> uint8 [..., T, 32 lanes, D/32 groups, 4 s, 4 bytes].

    Byte n of a word s holds its codes 2n (low nibble) and 2n + 1 (high nibble), which differ in i1 or m1.
    """
    w = packed.contiguous().view(torch.int32).unflatten(-1, (bits, 32, head_dim // 32))
    if role == "key":
        w = w ^ _flip(bits, packed.device)[:, None, None]
    planes = w.unbind(-3)  # [..., T, lane, group]
    if bits == 4:
        s = list(planes)
    elif bits == 3:
        spare = ((planes[0] & 0x11111111) << 2) | ((planes[1] & 0x11111111) << 1) | (planes[2] & 0x11111111)
        s = [(x >> 1) & 0x77777777 for x in planes] + [spare]
    elif bits == 2:
        s = [(x >> k) & 0x33333333 for x in planes for k in (0, 2)]
    else:
        s = [(planes[0] >> k) & 0x11111111 for k in range(4)]
    return torch.stack(s, -1).view(torch.uint8).unflatten(-1, (4, 4))


def unpack(packed: torch.Tensor, bits: int, head_dim: int, role: Role) -> torch.Tensor:
    """Inverse of `pack`: uint8 [..., T, tile_bytes] -> uint8 codes [..., T*32, D]."""
    nbytes = tile_bytes(bits, head_dim)
    _check_role(role)
    if packed.shape[-1] != nbytes:
        raise ValueError(
            f"expected {nbytes} bytes per tile for {bits} bits and head_dim {head_dim}, got {packed.shape[-1]}; "
            "bits and head_dim are those the tile was packed with"
        )
    *lead, tiles, _ = packed.shape
    if not packed.numel():  # as in `pack`
        return packed.new_empty(*lead, tiles * TILE, head_dim)
    groups = head_dim // 32
    if bits == 8:
        words = packed.contiguous().view(torch.int32).unflatten(-1, (bits, 32, groups))
        fragments = words.movedim(-3, -1).contiguous().view(torch.uint8).flatten(-2)
        return from_fragments(fragments, role).flatten(-3, -2)
    x = nibble_bytes(packed, bits, head_dim, role).reshape(-1, 8, 4, groups, 2, 2, 2, 2)
    if role == "key":  # g t group jj i0 byte -> i1 (i0 g) (group jj t byte)
        codes = packed.new_empty(x.shape[0], 2, 16, head_dim)
        low, high = codes[:, 0], codes[:, 1]
        x = x.flatten(-2).permute(0, 5, 1, 3, 4, 2, 6)
    else:  # g t group .. -> (j0 b1 t b0) group m1 (m0 g)
        codes = packed.new_empty(x.shape[0], TILE, groups, 2, 16)
        low, high = codes[..., 0, :], codes[..., 1, :]
        # j0 b1 b0 m0 at 3 and 4 bits, j0 m0 b0 b1 at 1 and 2
        x = x.permute(0, 4, 5, 2, 6, 3, 7, 1) if bits >= 3 else x.permute(0, 4, 7, 2, 6, 3, 5, 1)
    x = x.reshape(low.shape)
    torch.bitwise_and(x, 15, out=low)
    torch.bitwise_right_shift(x, 4, out=high)
    return codes.view(*lead, tiles * TILE, head_dim)
