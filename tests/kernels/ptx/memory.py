"""Memory: the bytes of the tensors of a launch and of each program's shared array, their bounds.

Global memory is the memory of the CPU tensors themselves.
"""

import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ptx.faults import OutOfBounds
from ptx.races import Shadow
from ptx.registers import Array

ALIGN = 16  # the widest access


class Extent(NamedTuple):
    """The bytes ``[low, high)`` of a tensor; with gaps between rows, ``width`` bytes every ``pitch``."""

    low: int
    high: int
    itemsize: int
    pitch: int
    width: int
    name: str


def extent(tensor: Any, name: str) -> Extent:
    """Returns the bytes of a tensor (any object with torch's ``data_ptr``, ``shape``, ``stride``, ``element_size``)."""
    shape, stride, size = tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size()
    low = tensor.data_ptr()
    if 0 in shape:
        return Extent(low, low, size, 0, 0, name)
    last = sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    gaps = len(shape) == 2 and shape[0] > 1 and stride[1] == 1 and stride[0] > shape[1]
    pitch, width = (stride[0] * size, shape[1] * size) if gaps else (0, 0)
    return Extent(low, low + (last + 1) * size, size, pitch, width, name)


class Storage:
    """Bytes that are loaded and stored by the vector, at offsets that are multiples of its width."""

    def __init__(self, data: Array) -> None:
        self.words = {size: data.view(f"u{size}") for size in (1, 2, 4, 8)}

    def load(self, offset: Array, size: int, count: int) -> Array:
        """Returns ``count`` words of ``size`` bytes for each offset: [lanes, count]."""
        return self.words[size].reshape(-1, count)[offset // (size * count)]

    def store(self, offset: Array, size: int, values: Array) -> None:
        self.words[size].reshape(-1, values.shape[1])[offset // (size * values.shape[1])] = values


class Region(Storage):
    """Tensors whose bytes touch. ``offset = address - base``; the base is aligned for the widest access."""

    def __init__(self, extents: list[Extent]) -> None:
        self.extents = extents
        self.low, self.high = min(e.low for e in extents), max(e.high for e in extents)
        self.base = self.low - self.low % ALIGN
        self.size = (self.high - self.base + ALIGN - 1) // ALIGN * ALIGN
        super().__init__(np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self.base)))
        self.name = " and ".join(dict.fromkeys(e.name for e in extents))
        granule = min(e.itemsize for e in extents)
        if any((e.low - self.base) % granule for e in extents):
            granule = 1
        self.shadow = Shadow(self.name, self.size // granule, granule)
        self.whole = any(not e.pitch for e in extents if (e.low, e.high) == (self.low, self.high))

    def outside(self, address: Array, total: int) -> Array:
        """Which accesses inside the region's ends are outside every tensor: in the gaps between rows."""
        if self.whole:
            return np.zeros(address.shape, bool)
        bad = np.ones(address.shape, bool)
        for e in self.extents:
            at = address - np.uint64(e.low)  # below the tensor it wraps and is far beyond
            inside = at + np.uint64(total) <= np.uint64(e.high - e.low)
            if e.pitch:
                inside &= at % np.uint64(e.pitch) + np.uint64(total) <= np.uint64(e.width)
            bad &= ~inside
        return bad


class GlobalMemory:
    """The tensors of a launch."""

    def __init__(self, extents: list[Extent]) -> None:
        groups: list[list[Extent]] = []
        for e in sorted({e for e in extents if e.high > e.low}):
            if groups and e.low < max(other.high for other in groups[-1]):
                groups[-1].append(e)
            else:
                groups.append([e])
        self.regions = [Region(group) for group in groups]
        self.lows = np.array([region.low for region in self.regions], np.uint64)
        self.highs = np.array([region.high for region in self.regions], np.uint64)
        self._last = 0

    def locate(self, address: Array, total: int, where: str) -> Iterator[tuple[Region, Array | None, Array]]:
        """Yields the regions that accesses of ``total`` bytes lie in, which of them (None: all), and their offsets."""
        least, most = int(address.min()), int(address.max()) + total
        if self.regions and not self.regions[self._last].low <= least <= most <= self.regions[self._last].high:
            self._last = max(int(np.searchsorted(self.lows, np.uint64(least), side="right")) - 1, 0)
        region = self.regions[self._last] if self.regions else None
        if region is not None and region.low <= least and most <= region.high:
            self._inside(region, address, total, where)
            yield region, None, (address - np.uint64(region.base)).astype(np.int64)
            return
        which = np.searchsorted(self.lows, address, side="right") - 1
        bad = which < 0
        if self.regions:
            at = np.maximum(which, 0)
            bad |= (address >= self.highs[at]) | (self.highs[at] - address < np.uint64(total))
        if bad.any():
            self._fail(address, bad, total, where)
        for number in np.unique(which):
            mask = which == number
            region = self.regions[number]
            self._inside(region, address[mask], total, where)
            yield region, mask, (address[mask] - np.uint64(region.base)).astype(np.int64)

    def _inside(self, region: Region, address: Array, total: int, where: str) -> None:
        bad = region.outside(address, total)
        if bad.any():
            self._fail(address, bad, total, where)

    def _fail(self, address: Array, bad: Array, total: int, where: str) -> None:
        first = int(address[bad][0])
        known = [e for region in self.regions for e in region.extents]
        near = min(known, key=lambda e: max(e.low - first, first + total - e.high), default=None)
        place = "the launch has no tensor" if near is None else f"byte {first - near.low} of {near.name}"
        raise OutOfBounds(
            f"out of bounds: {int(bad.sum())} accesses of {total} bytes outside every tensor in {where}: the first at "
            f"{first:#x}, {place}"
        )


class SharedMemory(Storage):
    """The shared arrays of all programs of a batch, one after the other; bytes of nobody separate them."""

    def __init__(self, programs: int, size: int, granule: int) -> None:
        self.size = size
        self.pitch = (size // ALIGN + 1) * ALIGN
        super().__init__(np.full(programs * self.pitch, 0xDE, np.uint8))
        self.shadow = Shadow("shared memory", programs * self.pitch // granule, granule)
        self.in_flight: Array | None = None  # granules that an asynchronous copy is going to write
