"""What the torch renderer does to pixels: pure functions of tensors on any device.

Meanwhile a pixel is one int32: R, G and B from its lowest byte on. Shapes depend on arguments'
shapes alone, so nothing waits for the device; each output pixel is written once in a call, so the
result does not depend on any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAYER_COLUMNS = 14
STAMP_COLUMNS = 19
WEIGHT_BITS = 7  # of taps: two channels' sums side by side then stay below the sign of an int32
LEAST_SLOPE = 1e-9  # stands for 0; whole lines are then in or out
_ODD = 0x00FF00FF  # R and B of a packed pixel; shifted by 8, G
_HALF = 1 << (WEIGHT_BITS - 1)

Taps = list[tuple[Tensor, Tensor]]  # offset from a source's first pixel, weight; int32


def compose(table: Tensor, pixels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Put layers over grey, each pixel interpolated once, from the last layer that covers it.

    A layer covers the pixels whose centres lie in its rectangle or less than half a pixel outside;
    beyond its edge it is continued, so that no seam shows grey.

    Args:
        table: (F, 1 + K, LAYER_COLUMNS) float32; the first row of a frame is zero, for grey. A row
            maps output pixel indices to source ones (six numbers), limits those (low x, low y,
            high x, high y) and says how far beyond the limits the layer still covers (x, y); then,
            the bits of int32, where the source's pixels begin and how many a row of it has.
        pixels: (P, 3) uint8, see `bank`.
        x, y: (1, 1, S) and (1, S, 1) float32 pixel indices.

    Returns:
        (F, S, S) int32.
    """
    frames, rows, _ = table.shape
    which = _topmost(table[:, 1:], x, y)  # (F, S, S)
    which = which + rows * torch.arange(frames, dtype=torch.int32, device=x.device)[:, None, None]
    columns = table.view(frames * rows, LAYER_COLUMNS).t().contiguous()

    def of(number: int) -> Tensor:
        return columns[number].index_select(0, which.view(-1)).view_as(which)

    column = of(2).addcmul_(of(0), x).addcmul_(of(1), y).clamp_(of(6), of(8))
    row = of(5).addcmul_(of(3), x).addcmul_(of(4), y).clamp_(of(7), of(9))
    return _colours(pixels, _bits(of(12)), _taps(column, row, _bits(of(13))))


def _topmost(layers: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return which layer each pixel shows, from 1; 0 where there is none; (F, S, S) uint8.

    A layer covers one run of pixels in each line.
    """
    a, b, c, d, e, f, x0, y0, x1, y1, reach_x, reach_y = layers[..., :12, None].unbind(2)
    line = y.view(1, 1, -1)
    runs = (
        _run(a, b * line + c, x0 - reach_x, x1 + reach_x),
        _run(d, e * line + f, y0 - reach_y, y1 + reach_y),
    )  # each (F, K, S), twice
    first, last = torch.maximum(runs[0][0], runs[1][0]), torch.minimum(runs[0][1], runs[1][1])
    shape = (len(layers), y.shape[1], x.shape[2])
    top = torch.zeros(shape, dtype=torch.uint8, device=x.device)
    for layer in range(layers.shape[1]):
        covers = (x >= first[:, layer, :, None]) & (x <= last[:, layer, :, None])
        top.masked_fill_(covers, layer + 1)
    return top


def _run(slope: Tensor, start: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return from where to where low <= slope * x + start <= high."""
    slope = slope.masked_fill(slope.abs() < LEAST_SLOPE, LEAST_SLOPE)
    ends = (low - start) / slope, (high - start) / slope
    rises = slope > 0
    return torch.where(rises, *ends), torch.where(rises, *ends[::-1])


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
            how many pixels a row of them has, and which of their bytes counts.
        pixels: (P, 3) uint8, see `bank`.
        x, y: (1, 1, S) and (1, S, 1) float32 pixel indices.
        window: (h, w), the same for all; within the frame.
    """
    side = x.shape[2]
    numbers = table[:, :, None, None].unbind(1)  # each (n, 1, 1)
    a, b, c, d, e, f, x1, y1, *gains, strength, left, top = numbers[:14]
    which, colours, edges, step, channel = (_bits(number) for number in numbers[14:])
    over, down = x[..., : window[1]] + left, y[:, : window[0]] + top  # (n, 1, w), (n, h, 1)
    u, v = (b * down + c) + a * over, (e * down + f) + d * over  # (n, h, w)
    zero = torch.zeros_like(x1)
    taps = _taps(u.clamp(zero, x1), v.clamp(zero, y1), step)
    colour = _bytes(_colours(pixels, colours, taps)).float()  # (n, h, w, 4)
    colour *= torch.stack((*gains, zero), dim=-1)
    alpha = _one_byte(pixels, edges, taps, channel) * (strength / 255)
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
    """Interpolate all bytes, two at a time side by side in one int32."""
    odd = even = torch.full_like(taps[0][0], _HALF << 16 | _HALF)
    for offset, weight in taps:
        found = _packed(pixels, base + offset)
        odd = torch.addcmul(odd, found & _ODD, weight)
        even = torch.addcmul(even, found >> 8 & _ODD, weight)
    return (odd >> WEIGHT_BITS & _ODD) | (even >> WEIGHT_BITS & _ODD) << 8


def _one_byte(pixels: Tensor, base: Tensor, taps: Taps, channel: Tensor) -> Tensor:
    """Interpolate one of the three bytes; int32 in [0, 255]."""
    total = torch.full_like(taps[0][0], _HALF)
    for offset, weight in taps:
        found = _packed(pixels, base + offset)
        total = torch.addcmul(total, found >> 8 * channel & 255, weight)
    return total >> WEIGHT_BITS


def _packed(pixels: Tensor, places: Tensor) -> Tensor:
    """Return the pixels at some places, one int32 each."""
    found = pixels.index_select(0, places.view(-1))
    packed = torch.nn.functional.pad(found, (0, 1))
    return packed.view(torch.int32).view_as(places)


def _bytes(packed: Tensor) -> Tensor:
    """Return (...) int32 as a view (..., 4) uint8."""
    return packed[..., None].view(torch.uint8)


def _bits(number: Tensor) -> Tensor:
    """Return the int32 whose bits a float32 tensor carries."""
    return number.view(torch.int32)
