"""The examples of docstrings print what they say."""

import doctest

import pytest

from prefkern.data.advantages import gae, groups, moments, returns, rewards
from prefkern.data.batches import filtering, padding_free, rollouts, sampling

MODULES = [gae, groups, moments, padding_free, returns, rewards, rollouts, sampling, filtering]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples(module):
    found = doctest.testmod(module)
    assert found.attempted >= 1
    assert found.failed == 0
