"""What other systems balance work with, written from its description."""

import heapq
from typing import Any


def verl_balance(lengths: list[int], k: int) -> list[list[int]]:
    """The largest differencing method as verl runs it: every state keeps k parts with the items of each in a list."""
    heap: list[Any] = []

    def push(parts: list[tuple[int, int, list[int]]]) -> None:
        parts.sort(key=lambda part: (part[0], part[1], part[2]), reverse=True)
        total, count, items = parts[0]
        heapq.heappush(heap, (parts[-1][0] - total, -total, -count, -items[0], parts))

    for length, item in sorted((length, item) for item, length in enumerate(lengths)):
        push([(length, 1, [item]), *((0, 0, list[int]()) for _ in range(k - 1))])
    while len(heap) > 1:
        first, second = heapq.heappop(heap)[-1], heapq.heappop(heap)[-1]
        pairs = zip(first, reversed(second), strict=True)
        push([(a[0] + b[0], a[1] + b[1], [*a[2], *b[2]]) for a, b in pairs])
    return [sorted(part[2]) for part in heap[0][-1]]
