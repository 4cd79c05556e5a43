"""TRL's trainers that make full logits, on lazy ones, against their own runs from the same start."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_trl

from prefkern.integrations.transformers import lazy_logits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "orpo": (ORPOTrainer, ORPOConfig, {"beta": 0.3}),
    "cpo": (CPOTrainer, CPOConfig, {"beta": 0.3}),
    "simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}),
}


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 7,
    }


def run(kind: str, folder: Path, model: Any) -> list[dict[str, float]]:
    cls, config, options = TRAINERS[kind]
    made = cls(
        model=model,
        args=config(**settings(folder), **options),
        train_dataset=tiny_trl.dataset("dpo"),
        processing_class=tiny_trl.tokenizer(),
    )
    made.train()
    return [line for line in made.state.log_history if "loss" in line]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("head", ["plain", "softcap"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_trains_as_without_and_makes_no_logits(kind: str, head: str, tmp_path: Path) -> None:
    start = tiny_trl.model(head)
    expected = run(kind, tmp_path, copy.deepcopy(start))
    with lazy_logits(start) as lazy:
        got = run(kind, tmp_path, start)
    assert lazy.made_real == 0
    assert lazy.answered > 0
    timing = ("runtime", "per_second", "epoch")
    for line, other in zip(got, expected, strict=True):
        assert line.keys() == other.keys()
        for name in other:
            if not any(word in name for word in timing):
                assert line[name] == pytest.approx(other[name], abs=2e-5, rel=1e-4), name
