"""The examples run as they are, in a short form, and show what they say."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")  # what TRL, transformers and datasets warn about in each other


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models run on one thread: a second one only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dpo_with_trl_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        result = load("dpo_trl").main(["--rows", "8", "--steps", "3", "--batch", "2"])
    finally:
        datasets.enable_progress_bars()
    out, err = capsys.readouterr()
    assert len(result.before.losses) == len(result.after.losses) == 3
    assert result.before.losses[0] == pytest.approx(0.693147, abs=1e-5)  # policy and reference are the same yet
    assert result.before.losses[-1] < result.before.losses[0] - 1e-3
    assert result.loss_difference < 1e-4  # of the head's rounding, grown over two updates
    assert result.after.data_milliseconds < result.before.data_milliseconds / 2
    assert 200 < result.tokens < 900
    assert "preference (conversations): 8 rows of prompt, chosen, rejected" in err
    assert f"data time of a step{result.before.data_milliseconds:>22.2f} ms" in out


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[{path.name}]({path.name})" in listed for path in EXAMPLES.glob("*.py"))
