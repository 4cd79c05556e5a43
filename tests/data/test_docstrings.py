"""The examples of docstrings print what they say."""

import doctest

import pytest

from prefkern.data import advantages, groups, moments, returns, rewards, rollouts

MODULES = [advantages, groups, moments, returns, rewards, rollouts]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples(module):
    found = doctest.testmod(module)
    assert found.attempted >= 1
    assert found.failed == 0
