"""Every kernel case runs three times: in the interpreter, compiled on the PTX machine (``-m ptx``, a process of its
own), and (``-m gpu``) on a CUDA device when there is one."""

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from ptx import session
from ptx.session import ptx, pytest_collection_modifyitems, pytest_terminal_summary  # noqa: F401

DEVICES = [pytest.param("ptx", marks=pytest.mark.ptx)] if session.requested() else ["interpreter"]


@pytest.fixture(params=[*DEVICES, pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels run. In the interpreter their tiles are small, so that few elements make several of them."""
    if request.param == "ptx":
        request.getfixturevalue("ptx")
        return torch.device("cpu")
    if request.param != "interpreter":
        return torch.device(request.param)
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled where there is a CUDA device")
    import interpreter

    from prefkern.kernels.triton import divergence, logprobs, scale
    from prefkern.kernels.triton.launch import Tile

    interpreter.install()
    tiles = {2: Tile(16, 8, 1, 1), 4: Tile(32, 4, 1, 1)}
    for name in ("FORWARD", "SOFTCAP_FORWARD", "BACKWARD"):
        monkeypatch.setattr(logprobs, name, tiles)
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(divergence, name, tiles)
    monkeypatch.setattr(scale, "SCALE", tiles)
    return torch.device("cpu")


@pytest.fixture
def columns(device: torch.device) -> int:
    """A vocabulary of at least two tiles and a ragged tail, odd, so that rows are not aligned."""
    return 301 if device.type == "cpu" and not session.requested() else 8493


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, ...]]]:
    """Puts spies, which launch nothing, in the place of a module's kernels; returns the grids asked of any of them."""
    grids: list[tuple[int, ...]] = []

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *args, **kwargs: None

    def spy(module: ModuleType, *names: str) -> list[tuple[int, ...]]:
        for name in names:
            monkeypatch.setattr(module, name, Spy())
        return grids

    return spy
