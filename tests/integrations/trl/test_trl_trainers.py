"""TRL's trainers with its own head and with ours: the same losses, gradients and metrics, step by step."""

from pathlib import Path
from typing import Any

import pytest
import tiny_trl as tiny
from peft import LoraConfig

from prefkern.integrations.trl.patching import patch

# what TRL, transformers and datasets warn about in each other is theirs
pytestmark = pytest.mark.filterwarnings("ignore")

HEADS_PER_STEP = {"dpo": 2, "kto": 4, "sft": 1, "grpo": 1, "rloo": 2}


def both(kind: str, folder: Path, model: str = "plain", **options: Any) -> tuple[list[Any], list[Any], int]:
    start = tiny.model(model)
    theirs = tiny.run(kind, folder, start, **options)
    with patch() as replaced:
        ours = tiny.run(kind, folder, start, **options)
    return theirs, ours, replaced.calls


def same(theirs: list[dict[str, float]], ours: list[dict[str, float]], tolerance: float = 1e-4) -> None:
    """Every number logged at every step, except the clock's; gradient norms relative to their size."""
    assert len(theirs) == len(ours) > 0
    for their, our in zip(theirs, ours, strict=True):
        assert their.keys() == our.keys()
        for name, want in their.items():
            if "time" not in name and "per_second" not in name:
                scale = max(1.0, abs(want)) if name == "grad_norm" else 1.0
                assert our[name] == pytest.approx(want, abs=tolerance * scale), name


@pytest.mark.parametrize("kind", HEADS_PER_STEP)
def test_losses_agree_over_steps(kind: str, tmp_path: Path) -> None:
    theirs, ours, calls = both(kind, tmp_path, steps=4)
    same(theirs, ours)
    assert calls == 4 * HEADS_PER_STEP[kind]
    assert len({line["grad_norm"] for line in ours}) == 4  # the model moved


@pytest.mark.parametrize("model", ["tied", "softcap", "multiplied", "divided"])
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_every_kind_of_head(kind: str, model: str, tmp_path: Path) -> None:
    same(*both(kind, tmp_path, model)[:2])


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_gradient_checkpointing_and_accumulation(kind: str, tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}
    theirs, ours, calls = both(kind, tmp_path, "tied", steps=2, **options)
    same(theirs, ours)
    assert calls == 2 * 3 * HEADS_PER_STEP[kind]


def test_accumulation_equals_one_batch(tmp_path: Path) -> None:
    start = tiny.model()
    with patch():
        whole = tiny.run("sft", tmp_path, start, steps=2, per_device_train_batch_size=4)
        parts = tiny.run("sft", tmp_path, start, steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for one, other in zip(whole, parts, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_evaluation_between_steps(kind: str, tmp_path: Path) -> None:
    theirs, ours, calls = both(kind, tmp_path, steps=2, eval_strategy="steps", eval_steps=1)
    same(theirs, ours)
    assert sum("eval_loss" in line for line in ours) == 2
    assert calls > 2 * HEADS_PER_STEP[kind]


@pytest.mark.parametrize("model", ["plain", "softcap"])
def test_entropy_bonus(model: str, tmp_path: Path) -> None:
    theirs, ours, _ = both("grpo", tmp_path, model, entropy_coef=0.3)
    same(theirs, ours)
    without = both("grpo", tmp_path, model)[1]
    assert abs(ours[0]["grad_norm"] - without[0]["grad_norm"]) > 1e-3


def test_grpo_with_several_updates_of_one_rollout(tmp_path: Path) -> None:
    """The ratio leaves 1, the entropy chooses tokens, and samples are scored by a call of their own."""
    theirs, ours, calls = both("grpo", tmp_path, steps=4, num_iterations=2, top_entropy_quantile=0.5)
    same(theirs, ours)
    assert calls > 4


@pytest.mark.parametrize("kind", ["dpo", "kto", "sft", "grpo"])
def test_lora_on_the_backbone(kind: str, tmp_path: Path) -> None:
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    import torch

    histories = []
    for replaced in (False, True):
        torch.manual_seed(3)  # the adapter's start
        if replaced:
            with patch() as ours:
                histories.append(tiny.run(kind, tmp_path, tiny.model(), peft=peft))
                assert ours.calls >= 3
        else:
            histories.append(tiny.run(kind, tmp_path, tiny.model(), peft=peft))
    same(*histories)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_bf16_autocast_with_float32_weights(kind: str, tmp_path: Path) -> None:
    """TRL's logits are rounded to bf16 here, ours are not: the float32 run is the judge, for the first step."""
    exact = tiny.run(kind, tmp_path, tiny.model())[0]
    theirs, ours, calls = both(kind, tmp_path, bf16=True)
    assert calls == 3 * HEADS_PER_STEP[kind]
    for name in ("loss", "entropy"):
        limit = 2 * abs(theirs[0][name] - exact[name]) + 2e-2  # the backbone's own rounding is in both
        assert abs(ours[0][name] - exact[name]) <= limit, name
    for their, our in zip(theirs, ours, strict=True):
        assert our["grad_norm"] == pytest.approx(their["grad_norm"], rel=0.05)
