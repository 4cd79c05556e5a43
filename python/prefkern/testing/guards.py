"""Guard bands and poison: what shows a read or a write out of bounds, and an output element that nobody wrote."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def _poison(dtype: torch.dtype) -> float | int | bool:
    """NaN, True, or the largest integer: a value that no result should have."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def guarded(tensor: Tensor, *, pad: int = 4096, row_gap: int = 0) -> tuple[Tensor, Callable[[], None]]:
    """A copy of ``tensor`` inside a buffer of NaN (integers: the largest value), and a check of that buffer.

    A read out of bounds poisons the result that used it; a write out of bounds makes the check fail. ``pad`` elements
    stand before and after, ``row_gap`` after each row of a matrix (its row stride then exceeds its width).
    """
    sizes = list(tensor.shape)
    strides = [1] * len(sizes)
    for i in range(len(sizes) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(sizes[i + 1], 1) + (row_gap if i == len(sizes) - 2 else 0)
    extent = strides[0] * max(sizes[0], 1) if sizes else 1
    buffer = torch.full((extent + 2 * pad,), _poison(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
    view = buffer.as_strided(sizes, strides, pad)
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside.as_strided(sizes, strides, pad).fill_(False)
    before = buffer.view(torch.uint8).view(len(buffer), -1).clone()
    view.copy_(tensor)

    def check() -> None:
        changed = (buffer.view(torch.uint8).view(len(buffer), -1) != before).any(-1) & outside
        if bool(changed.any()):
            raise AssertionError(
                f"{int(changed.sum())} elements outside a tensor of shape {tuple(sizes)} and strides {tuple(strides)} "
                f"were written, the first at offset {int(changed.nonzero()[0]) - pad}"
            )

    return view, check


class Guards:
    """Guard bands around several tensors: ``g = Guards(); x = g(x); run(x); g.check()``. None passes through."""

    def __init__(self) -> None:
        self._checks: list[Callable[[], None]] = []

    def __call__(self, tensor: Any, *, row_gap: int = 0) -> Any:
        if tensor is None:
            return None
        view, check = guarded(tensor, row_gap=row_gap)
        self._checks.append(check)
        return view

    def check(self) -> None:
        for check in self._checks:
            check()


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A new tensor of NaN (integers: the largest value; bool: True)."""
    return torch.full(shape, _poison(dtype), dtype=dtype, device=device)


@contextlib.contextmanager
def poison_empty() -> Iterator[None]:
    """``torch.empty``, ``empty_like``, ``empty_strided`` and ``Tensor.new_empty`` return poison, not old memory."""
    places: list[tuple[Any, str]] = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
    places.append((Tensor, "new_empty"))
    originals = [getattr(owner, name) for owner, name in places]

    def poisoning(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def create(*args: Any, **kwargs: Any) -> Tensor:
            out = original(*args, **kwargs)
            if out.device.type == "meta":
                return out
            return out.detach().fill_(_poison(out.dtype)).requires_grad_(out.requires_grad)

        return create

    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, poisoning(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
