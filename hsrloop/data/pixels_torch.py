"""What the torch renderer does to pixels: pure functions of tensors on any device.

Pixels are packed, see `bank`. Shapes depend on arguments' shapes alone, so nothing waits for the
device; each output pixel is written once in a call, so the result does not depend on any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAYER_COLUMNS = 14
STAMP_COLUMNS = 19
WEIGHT_BITS = 7  # of taps: two channels' sums side by side then stay below the sign of an int32
_ODD = 0x00FF00FF  # R and B of a packed pixel; shifted by 8, G and the fourth byte
_HALF = 1 << (WEIGHT_BITS - 1)

Taps = list[tuple[Tensor, Tensor]]  # offset from a source's first pixel, weight; int32


def compose(table: Tensor, pixels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Put layers over grey, each pixel interpolated once, from the last layer that covers it.

    A layer covers the pixels whose centres lie in its rectangle or less than half a pixel outside;
    beyond its edge it is continued, so that no seam shows grey.

    Args:
        table: (F, K, LAYER_COLUMNS) float32. A row maps output pixel indices to source ones (six
            numbers), limits those (low x, low y, high x, high y) and says how far beyond the limits
            the layer still covers (x, y); then, the bits of int32, where the source's pixels begin
            and how many a row of it has.
        pixels: (P,) int32.
        x, y: (1, 1, S) and (1, S, 1) float32 pixel indices.

    Returns:
        (F, S, S) int32.
    """
    frames, slots, _ = table.shape
    side = x.shape[2]
    column, row = x.new_zeros((frames, side, side)), x.new_zeros((frames, side, side))
    base = torch.zeros((frames, side, side), dtype=torch.int32, device=x.device)  # the grey pixel
    step = torch.zeros_like(base)
    for slot in range(slots):
        numbers = table[:, slot, :, None, None].unbind(1)  # each (F, 1, 1)
        a, b, c, d, e, f, x0, y0, x1, y1, reach_x, reach_y, first, width = numbers
        u, v = (b * y + c) + a * x, (e * y + f) + d * x  # (F, S, S)
        inside_x, inside_y = u.clamp(x0, x1), v.clamp(y0, y1)
        covers = (u.sub_(inside_x).abs_() <= reach_x) & (v.sub_(inside_y).abs_() <= reach_y)
        column, row = torch.where(covers, inside_x, column), torch.where(covers, inside_y, row)
        base = torch.where(covers, _bits(first), base)
        step = torch.where(covers, _bits(width), step)
    return _colours(pixels, base, _taps(column, row, step))


def stamp(
    frames: Tensor, table: Tensor, pixels: Tensor, x: Tensor, y: Tensor, window: tuple[int, int]
) -> None:
    """Blend one cut-out, or its shadow, over each of some frames, in place.

    Args:
        frames: (F, S, S) int32, contiguous.
        table: (n, STAMP_COLUMNS) float32, one row for a frame. A row maps output pixel indices to
            source ones (six numbers), limits those (high x, high y; low is 0), multiplies colours
            (R, G, B; 0 for a shadow) and the edge (1 or an opacity), names the top left pixel of
            its window (x, y); then, the bits of int32, which frame, where colours and edges begin,
            how many pixels a row of them has, and which bits of the edges count.
        pixels: (P,) int32.
        x, y: (1, 1, S) and (1, S, 1) float32 pixel indices.
        window: (h, w), the same for all; within the frame.
    """
    side = x.shape[2]
    numbers = table[:, :, None, None].unbind(1)  # each (n, 1, 1)
    a, b, c, d, e, f, x1, y1, *gains, strength, left, top = numbers[:14]
    which, colours, edges, step, shift = (_bits(number) for number in numbers[14:])
    over, down = x[..., : window[1]] + left, y[:, : window[0]] + top  # (n, 1, w), (n, h, 1)
    u, v = (b * down + c) + a * over, (e * down + f) + d * over  # (n, h, w)
    zero = torch.zeros_like(x1)
    taps = _taps(u.clamp(zero, x1), v.clamp(zero, y1), step)
    colour = _bytes(_colours(pixels, colours, taps)).float()  # (n, h, w, 4)
    colour *= torch.stack((*gains, zero), dim=-1)
    alpha = _one_byte(pixels, edges, taps, shift) * (strength / 255)
    place = (which.long() * side**2 + (down * side + over).long()).view(-1)
    below = frames.view(-1).index_select(0, place).view_as(u)
    mixed = torch.lerp(
        _bytes(below).float(), colour.clamp_(max=255).round_(), alpha[..., None]
    ).round_()
    frames.view(-1).index_copy_(0, place, mixed.to(torch.uint8).view(torch.int32).view(-1))


def blend(frame: Tensor, partner: Tensor, weight: float) -> None:
    """Replace `frame`, (S, S) int32, by weight times itself and the rest of its partner."""
    mixed = torch.lerp(_bytes(partner).float(), _bytes(frame).float(), weight)
    _bytes(frame).copy_(mixed.round_())


def unpack(frames: Tensor, out: Tensor) -> None:
    """Write (n, S, S) int32 as (n, S, S, 3) uint8 RGB."""
    out.copy_(_bytes(frames)[..., :3])


def _taps(column: Tensor, row: Tensor, step: Tensor) -> Taps:
    """Return the four taps of a bilinear interpolation; their weights sum to one.

    Args:
        column, row: float32 pixel indices of one shape, not negative.
        step: int32, pixels in a row of the source; broadcast.
    """
    x, y = column.floor(), row.floor()
    one = 1 << WEIGHT_BITS
    wx, wy = ((column - x) * one).round_().int(), ((row - y) * one).round_().int()
    at = y.int() * step + x.int()
    both = (wx * wy + one // 2) >> WEIGHT_BITS
    return [(at, one - wx - wy + both), (at + 1, wx - both), (at + step, wy - both),
            (at + step + 1, both)]  # fmt: skip


def _colours(pixels: Tensor, base: Tensor, taps: Taps) -> Tensor:
    """Interpolate all four bytes, two at a time side by side in one int32."""
    odd = even = torch.full_like(taps[0][0], _HALF << 16 | _HALF)
    for offset, weight in taps:
        found = pixels.index_select(0, (base + offset).view(-1)).view_as(offset)
        odd = torch.addcmul(odd, found & _ODD, weight)
        even = torch.addcmul(even, found >> 8 & _ODD, weight)
    return (odd >> WEIGHT_BITS & _ODD) | (even >> WEIGHT_BITS & _ODD) << 8


def _one_byte(pixels: Tensor, base: Tensor, taps: Taps, shift: Tensor) -> Tensor:
    """Interpolate the byte that begins at bit `shift`; int32 in [0, 255]."""
    total = torch.full_like(taps[0][0], _HALF)
    for offset, weight in taps:
        found = pixels.index_select(0, (base + offset).view(-1)).view_as(offset)
        total = torch.addcmul(total, found >> shift & 255, weight)
    return total >> WEIGHT_BITS


def _bytes(packed: Tensor) -> Tensor:
    """Return (...) int32 as a view (..., 4) uint8."""
    return packed[..., None].view(torch.uint8)


def _bits(number: Tensor) -> Tensor:
    """Return the int32 whose bits a float32 tensor carries."""
    return number.view(torch.int32)
