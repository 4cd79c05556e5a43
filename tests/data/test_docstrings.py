"""The examples of docstrings print what they say."""

import doctest

import pytest

from prefkern.data import (
    advantages,
    groups,
    moments,
    padding_free,
    returns,
    rewards,
    rollouts,
    sampling,
    sparsity,
)

MODULES = [advantages, groups, moments, padding_free, returns, rewards, rollouts, sampling, sparsity]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples(module):
    found = doctest.testmod(module)
    assert found.attempted >= 1
    assert found.failed == 0
