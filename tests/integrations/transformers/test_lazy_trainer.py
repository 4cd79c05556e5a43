"""transformers.Trainer on lazy logits, against its own run from the same start."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_heads import V, adapted, tiny
from torch import Tensor, nn
from torch.utils.data import Dataset

from prefkern.integrations.transformers import lazy_logits


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of different numbers of scored tokens, one without any."""

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(1)
        self.ids = torch.randint(2, V - 8, (32, 12), generator=made)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        labels = self.ids[row].clone()
        labels[: row % 12 + 1] = -100
        return {"input_ids": self.ids[row], "labels": labels}


class Kept(transformers.Trainer):
    """Keeps the gradients of every optimizer step, as they are before clipping."""

    gradients: list[list[Tensor]]

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        optimizer = super().create_optimizer(*args, **options)
        self.gradients = []
        optimizer.register_step_pre_hook(
            lambda *_: self.gradients.append(
                [each.grad.clone() for each in self.model.parameters() if each.grad is not None]
            )
        )
        return optimizer


def train(model: Any, folder: Path, **options: Any) -> tuple[list[float], list[list[Tensor]], Any]:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_grad_norm": 0.0,
        "seed": 3,
    }
    rows = Rows()
    trainer = Kept(model, transformers.TrainingArguments(**settings | options), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], trainer.gradients, trainer


_NAMES = vars(transformers.TrainingArguments)["__dataclass_fields__"]
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {CHECKPOINTING: True},
    "all of it": {"gradient_accumulation_steps": 2, CHECKPOINTING: True, "label_smoothing_factor": 0.1},
}
MODELS = {
    "llama": lambda: tiny(),
    "tied qwen3": lambda: tiny("qwen3", tie_word_embeddings=True),
    "capped gemma2": lambda: tiny("gemma2", head_dim=8, final_logit_softcapping=3.0),
    "experts": lambda: tiny("mixtral", num_local_experts=4, output_router_logits=True),
    "peft": lambda: adapted(tiny(), target_modules=["q_proj", "lm_head"]),
}


def _compare(kind: str, folder: Path, **options: Any) -> tuple[Any, Any, list[list[Tensor]], list[list[Tensor]]]:
    expected, gradients, _ = train(MODELS[kind](), folder, **options)
    model = MODELS[kind]()
    with lazy_logits(model) as lazy:
        got, found, _ = train(model, folder, **options)
    assert lazy.made_real == 0
    assert lazy.answered > 0
    return expected, got, gradients, found


@pytest.mark.parametrize(
    ("kind", "case"), [*(("llama", case) for case in CASES), *((kind, "plain") for kind in MODELS if kind != "llama")]
)
def test_sft_trains_as_without_and_makes_no_logits(kind: str, case: str, tmp_path: Path) -> None:
    expected, got, gradients, found = _compare(kind, tmp_path, **CASES[case])
    assert got == pytest.approx(expected, abs=1e-5)
    for step, others in zip(found, gradients, strict=True):
        for one, other in zip(step, others, strict=True):
            assert float((one - other).norm()) <= 1e-4 * float(other.norm()) + 1e-7


def test_under_bfloat16_autocast_it_is_not_further_from_float32_than_without(tmp_path: Path) -> None:
    exact, exact_gradients, _ = train(tiny(), tmp_path, max_steps=1)
    expected, got, gradients, found = _compare("llama", tmp_path, max_steps=1, bf16=True)
    assert abs(got[0] - exact[0]) <= abs(expected[0] - exact[0]) + 2e-4
    for one, other, truth in zip(found[0], gradients[0], exact_gradients[0], strict=True):
        assert (one - truth).norm() <= 1.3 * (other - truth).norm() + 1e-3 * truth.norm()


def test_evaluation_and_accuracy_are_those_of_real_logits(tmp_path: Path) -> None:
    def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
        return logits.argmax(-1)

    def measure(found: Any) -> dict[str, float]:
        scored = found.label_ids[:, 1:] != -100
        return {"accuracy": float((found.predictions[:, :-1] == found.label_ids[:, 1:])[scored].mean())}

    results = []
    for lazily in (False, True):
        model = tiny()
        arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
        trainer = transformers.Trainer(
            model, arguments, eval_dataset=Rows(), preprocess_logits_for_metrics=accuracy, compute_metrics=measure
        )
        if lazily:
            with lazy_logits(model) as lazy:
                results.append(trainer.evaluate())
            assert lazy.made_real == 0
        else:
            results.append(trainer.evaluate())
    own, ours = results
    assert ours["eval_loss"] == pytest.approx(own["eval_loss"], abs=1e-5)
    assert ours["eval_accuracy"] == own["eval_accuracy"]
    assert isinstance(model.lm_head, nn.Linear)
