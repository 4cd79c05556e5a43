"""Every causal architecture of the installed transformers: its head is right or refused, and no noise is left."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("architectures")


@pytest.mark.slow
def test_no_architecture_is_wrong(script: ModuleType) -> None:
    """Within 1e-5 of the model's own log-probabilities, a ratio of exactly 1 in train mode under without_noise, and
    padding on the left and packed rows equal or refused."""
    rows = list(script.sweep(script.kinds()))
    assert [row for row in rows if row.verdict == "wrong"] == []
    assert {row.kind for row in rows if row.verdict == "refused"} <= {"cpmant", "prophetnet", "xlm", "xlnet"}
    assert sum(row.verdict == "right" for row in rows) >= 0.9 * len(rows)


def test_the_sweep_tells_right_from_wrong(script: ModuleType) -> None:
    rows = {row.kind: row for row in script.sweep(["gemma2", "xlnet"])}
    assert rows["gemma2"].verdict == "right"
    assert rows["gemma2"].plain > 1e-3  # without the cap it is not
    assert rows["gemma2"].noise > 1e-3
    assert rows["xlnet"].verdict == "refused"
