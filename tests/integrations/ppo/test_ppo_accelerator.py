"""Accelerate keeps its precision and its accumulation for a whole process: no earlier trainer decides how PPO runs."""

from collections.abc import Iterator

import pytest
import tiny_ppo
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def _new_state() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def _weights() -> dict[str, torch.Tensor]:
    trainer = tiny_ppo.trainer()
    trainer.step(*tiny_ppo.episodes())
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_mixed_precision_is_accelerates() -> None:
    expected = tiny_ppo.trainer().step(*tiny_ppo.episodes())
    trainer = tiny_ppo.trainer(mixed_precision="bf16")  # another precision than the trainer before
    stats = trainer.step(*tiny_ppo.episodes())
    assert trainer.accelerator.mixed_precision == "bf16"
    assert trainer.last_rollout.logps.dtype == torch.float32
    assert 0 < abs(stats["objective/kl"] - expected["objective/kl"]) < 0.1


def test_an_earlier_trainers_precision_does_not_stay() -> None:
    expected = _weights()
    assert AcceleratorState().mixed_precision == "no"
    AcceleratorState._reset_state(True)
    Accelerator(cpu=True, mixed_precision="bf16")  # as a TRL trainer makes it
    tiny_ppo.assert_same(_weights(), expected)
    assert AcceleratorState().mixed_precision == "no"


def test_accelerates_configuration_decides_where_the_options_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert tiny_ppo.trainer().accelerator.mixed_precision == "bf16"
    assert tiny_ppo.trainer(mixed_precision="no").accelerator.mixed_precision == "no"


def test_an_accelerator_given_is_left_as_it_is() -> None:
    given = Accelerator(cpu=True, mixed_precision="bf16")
    trainer = tiny_ppo.trainer(accelerator=given)
    assert trainer.accelerator is given
    assert given.mixed_precision == "bf16"


def test_an_interrupted_accumulation_of_another_trainer_does_not_swallow_updates() -> None:
    expected = _weights()
    GradientState().sync_gradients = False  # where a trainer was stopped between two of its parts
    tiny_ppo.assert_same(_weights(), expected)
