"""Every causal architecture of the installed transformers: its head is right or refused, and no noise is left."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architectures", ROOT / "bench" / "architectures.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_no_architecture_is_wrong() -> None:
    """Within 1e-5 of the model's own log-probabilities, a ratio of exactly 1 in train mode under without_noise, and
    padding on the left and packed rows equal or refused."""
    script = _script()
    rows = list(script.sweep(script.kinds()))
    assert [row for row in rows if row.verdict == "wrong"] == []
    assert {row.kind for row in rows if row.verdict == "refused"} <= {"cpmant", "prophetnet", "xlm", "xlnet"}
    assert sum(row.verdict == "right" for row in rows) >= 0.9 * len(rows)


def test_the_sweep_tells_right_from_wrong() -> None:
    script = _script()
    rows = {row.kind: row for row in script.sweep(["gemma2", "xlnet"])}
    assert rows["gemma2"].verdict == "right"
    assert rows["gemma2"].plain > 1e-3  # without the cap it is not
    assert rows["gemma2"].noise > 1e-3
    assert rows["xlnet"].verdict == "refused"
