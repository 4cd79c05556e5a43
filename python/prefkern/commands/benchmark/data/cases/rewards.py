"""Advantages within groups and discounted returns, beside the loops of TRL and verl."""

from functools import partial

import numpy as np
import torch

from prefkern.commands.benchmark.data.cases.case import OURS, DataCase, Goal, Prepared, Step
from prefkern.commands.benchmark.data.cases.reward_peers import trl_groups, verl_groups, verl_returns
from prefkern.data import discounted_returns, group_advantages

GAMMA, SIZE = 0.99, 8
TRL, VERL, COPY = "TRL", "verl's loop", "copy"
CONSECUTIVE = "prefkern, consecutive groups"


def groups_case(rows: int) -> Prepared:
    random = np.random.default_rng(0)
    rewards = torch.from_numpy(random.normal(size=rows).astype(np.float32))
    ids = random.permutation(np.arange(rows) // SIZE)
    listed = ids.tolist()

    def check() -> str | None:
        wide = rewards.double()
        pairs = (
            (group_advantages(rewards, ids), verl_groups(wide, listed)),
            (group_advantages(rewards, SIZE), trl_groups(wide, SIZE)),
        )
        # summed in float64 and rounded once
        same = all(torch.allclose(got.double(), want, rtol=2.0**-23, atol=1e-12) for got, want in pairs)
        return None if same else "the advantages are not those of TRL and verl"

    steps: dict[str, Step] = {
        OURS: partial(group_advantages, rewards, ids),
        CONSECUTIVE: partial(group_advantages, rewards, SIZE),
        TRL: partial(trl_groups, rewards, SIZE),
        VERL: partial(verl_groups, rewards, listed),
    }
    return Prepared(steps, check, (), (Goal(VERL, 1 / 100),))


def returns_case(shape: tuple[int, int]) -> Prepared:
    rewards = torch.from_numpy(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    into, given = np.zeros(shape, np.float32), rewards.numpy()

    def check() -> str | None:
        got, want = discounted_returns(rewards, gamma=GAMMA).double(), verl_returns(rewards.double(), GAMMA)
        terms = verl_returns(rewards.double().abs(), GAMMA)  # of the sum: rounded once, to float32
        return None if bool(((got - want).abs() <= 2.0**-23 * terms).all()) else "the returns are not those of float64"

    steps: dict[str, Step] = {
        OURS: partial(discounted_returns, rewards, gamma=GAMMA),
        COPY: partial(np.copyto, into, given),
        VERL: partial(verl_returns, rewards, GAMMA),
    }
    return Prepared(steps, check, (COPY,))


CASES = [
    DataCase("group advantages", "8192 rewards, groups of 8", partial(groups_case, 8192)),
    DataCase("discounted returns", "[256, 2048] float32", partial(returns_case, (256, 2048))),
    DataCase("group advantages", "64 rewards, groups of 8", partial(groups_case, 64), quick=True),
    DataCase("discounted returns", "[8, 64] float32", partial(returns_case, (8, 64)), quick=True),
]
