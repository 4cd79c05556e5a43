"""GAE beside a copy of its inputs into its outputs, and beside the loops of TRL and verl."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prefkern.commands.benchmark.data.cases.advantage_peers import trl_gae, verl_gae
from prefkern.commands.benchmark.data.cases.case import FLOOR, OURS, DataCase, Goal, Prepared, Step
from prefkern.data import gae

GAMMA, LAM = 0.99, 0.95
SHAPES = ((64, 1024), (256, 2048), (1024, 4096), (4096, 128))
QUICK_SHAPE = (8, 64)
TRL, VERL = "TRL 1.12's loop", "verl's loop and whitening"
Array = npt.NDArray[np.float64]


class Batch(NamedTuple):
    rewards: Tensor
    values: Tensor
    mask: Tensor
    out: tuple[Tensor, Tensor]


def batch(shape: tuple[int, int]) -> Batch:
    """Rows of a prompt, scored text with a tool's output inside, and padding; masked memory is garbage."""
    random = np.random.default_rng(0)
    rows, width = shape
    start, end = random.integers(0, width // 4, (rows, 1)), random.integers(width // 2, width + 1, (rows, 1))
    tool = random.integers(width // 4, width // 2, (rows, 1))
    t = np.arange(width)
    mask = (t >= start) & (t < end) & ((t < tool) | (t >= tool + width // 16))
    rewards, values = (torch.from_numpy(random.normal(size=shape).astype(np.float32)) for _ in range(2))
    return Batch(rewards, values, torch.from_numpy(mask), (torch.zeros(shape), torch.zeros(shape)))


def recursion(rewards: Array, values: Array, mask: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    """The definition in float64, masked positions skipped."""
    advantages, returns = np.zeros_like(rewards), np.zeros_like(rewards)
    following, last = np.zeros(len(rewards)), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        scored = mask[:, t]
        stepped = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * last
        last, following = np.where(scored, stepped, last), np.where(scored, values[:, t], following)
        advantages[:, t], returns[:, t] = np.where(scored, last, 0), np.where(scored, last + values[:, t], 0)
    return advantages, returns


def copies(given: Batch) -> dict[str, Step]:
    """The least that must move: both inputs once in, both outputs once out."""
    (a, b), (into_a, into_b) = (tensor.numpy() for tensor in given[:2]), (tensor.numpy() for tensor in given.out)

    def memcpy() -> None:
        np.copyto(into_a, a)
        np.copyto(into_b, b)

    def threaded() -> None:
        given.out[0].copy_(given.rewards)
        given.out[1].copy_(given.values)

    return {"copy, 1 thread": memcpy, f"copy, {torch.get_num_threads()} threads": threaded}


def last_level_cache() -> int:
    """In bytes; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


def _goal(shape: tuple[int, int]) -> Goal:
    beyond = 4 * 4 * shape[0] * shape[1] > last_level_cache()
    return Goal(FLOOR, 1.3) if beyond else Goal(FLOOR, 2.0, 10e-6)


def _wrong(name: str, got: Tensor, want: Array, allowed: Array) -> str | None:
    over = float((np.abs(got.numpy() - want) / allowed).max(initial=0))
    return None if over <= 1 else f"{name} differ from float64 by {over:.3g} times what rounding explains"


class Truth(NamedTuple):
    """In float64, with what rounding may change: what `prefkern.data.gae` says of float32."""

    advantages: Array
    returns: Array
    allowed: Array
    allowed_in_returns: Array

    @classmethod
    def of(cls, given: Batch, mask: npt.NDArray[np.bool_]) -> "Truth":
        rewards, values = given.rewards.double().numpy(), given.values.double().numpy()
        advantages, returns = recursion(rewards, values, mask)
        terms, _ = recursion(np.abs(rewards) + 2 * np.abs(values), np.abs(values), mask)
        allowed = 2.0**-20 * terms + 2.0**-40
        return cls(advantages, returns, allowed, allowed + 2.0**-24 * np.abs(returns))

    def whitened(self, mask: npt.NDArray[np.bool_]) -> "Truth":
        """An error of the size ``allowed`` moves the mean and the deviation by at most its root mean square."""
        numbers = self.advantages[mask]
        std = np.sqrt(numbers.var(ddof=1) + 1e-8)
        white = np.where(mask, (self.advantages - numbers.mean()) / std, 0)
        moved = np.sqrt(np.mean(self.allowed[mask] ** 2))
        allowed = (self.allowed + (1 + np.abs(white)) * moved) / std + 2.0**-24 * np.abs(white)
        return self._replace(advantages=white, allowed=allowed)

    def wrong(self, got: tuple[Tensor, Tensor]) -> str | None:
        first = _wrong("advantages", got[0], self.advantages, self.allowed)
        return first or _wrong("returns", got[1], self.returns, self.allowed_in_returns)


def plain(shape: tuple[int, int]) -> Prepared:
    given = batch(shape)
    call = partial(gae, given.rewards, given.values, gamma=GAMMA, lam=LAM)

    def check() -> str | None:
        return Truth.of(given, np.ones(shape, bool)).wrong(call(out=given.out))

    floor = copies(given)
    steps: dict[str, Step] = {
        OURS: partial(call, out=given.out),
        "prefkern, fresh outputs": call,
        "prefkern, exact": partial(call, out=given.out, exact=True),
        **floor,
        TRL: partial(trl_gae, given.rewards, given.values, GAMMA, LAM),
    }
    return Prepared(steps, check, tuple(floor), (_goal(shape), Goal(TRL, 1 / 100)))


def masked(shape: tuple[int, int]) -> Prepared:
    given = batch(shape)
    scored = given.mask.numpy()
    call = partial(gae, given.rewards, given.values, gamma=GAMMA, lam=LAM, mask=given.mask, whiten=True)

    def check() -> str | None:
        return Truth.of(given, scored).whitened(scored).wrong(call(out=given.out))

    floor = copies(given)
    peer = partial(verl_gae, given.rewards, given.values, given.mask.float(), GAMMA, LAM)
    steps: dict[str, Step] = {OURS: partial(call, out=given.out), **floor, VERL: peer}
    return Prepared(steps, check, tuple(floor), (Goal(FLOOR, 2.5), Goal(VERL, 1 / 100)))


def _cases(shape: tuple[int, int], *, quick: bool = False) -> list[DataCase]:
    size = f"[{shape[0]}, {shape[1]}] float32"
    return [
        DataCase("GAE", size, partial(plain, shape), quick),
        DataCase("masked GAE and whitening", size, partial(masked, shape), quick),
    ]


CASES = [case for shape in SHAPES for case in _cases(shape)] + _cases(QUICK_SHAPE, quick=True)
