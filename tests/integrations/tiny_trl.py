"""Tiny models, a tokenizer and data for TRL's trainers, all made here: nothing is downloaded."""

import copy
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM as AutoModel
from transformers import (
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

WORDS = [f"w{i}" for i in range(57)]
SPECIAL = ["<pad>", "<eos>", "<unk>"]
_SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS) + len(SPECIAL),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
    "initializer_range": 0.2,  # logits of ordinary size: a wrong factor must show
}
_CONFIGS = {
    "plain": lambda: Qwen2Config(**_SHAPE),
    "tied": lambda: Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "softcap": lambda: Gemma2Config(**_SHAPE, head_dim=8, final_logit_softcapping=3.0),
    "multiplied": lambda: CohereConfig(**_SHAPE, logit_scale=0.25),
    "divided": lambda: GraniteConfig(**_SHAPE, logits_scaling=3.0),
}


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model(kind: str = "plain", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    made = AutoModel.from_config(_CONFIGS[kind](), attn_implementation="eager")
    assert made.dtype == torch.float32
    return made


def text(seed: int, length: int) -> str:
    rows = torch.randint(len(WORDS), (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[int(row)] for row in rows)


def dataset(kind: str, rows: int = 12) -> Dataset:
    prompts = [text(i, 3 + i % 4) for i in range(rows)]
    first = [" " + text(100 + i, 2 + i % 5) for i in range(rows)]
    second = [" " + text(200 + i, 2 + i % 3) for i in range(rows)]
    columns: dict[str, dict[str, list[Any]]] = {
        "dpo": {"prompt": prompts, "chosen": first, "rejected": second},
        "kto": {"prompt": prompts, "completion": first, "label": [i % 3 != 0 for i in range(rows)]},
        "sft": {"prompt": prompts, "completion": first},
        "grpo": {"prompt": prompts},
        "rloo": {"prompt": prompts},
    }
    return Dataset.from_dict(columns[kind])


def reward(completions: list[str], **_: object) -> list[float]:
    return [float(len(set(completion.split()))) + 0.01 * len(completion) for completion in completions]


_TRAINERS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, {"beta": 0.5}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, {"beta": 0.5}),
    "sft": (trl.SFTTrainer, trl.SFTConfig, {}),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, {"num_generations": 4, "max_completion_length": 6, "beta": 0.0}),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, {"num_generations": 4, "max_completion_length": 6, "beta": 0.0}),
}


def trainer(
    kind: str, folder: Path, start: PreTrainedModel, *, steps: int = 3, peft: object = None, **options: Any
) -> Any:
    """A trainer on a copy of ``start``, on the CPU, in float32, with a log line every step."""
    cls, config, defaults = _TRAINERS[kind]
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
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
        **defaults,
        **options,
    }
    arguments: dict[str, Any] = {"peft_config": peft} if peft is not None else {}
    if kind in ("dpo", "kto") and peft is None:
        arguments["ref_model"] = copy.deepcopy(start)
    if kind in ("grpo", "rloo"):
        arguments["reward_funcs"] = reward
    if "eval_strategy" in options:
        arguments["eval_dataset"] = dataset(kind, 6)
    return cls(
        model=copy.deepcopy(start),
        args=config(**settings),
        train_dataset=dataset(kind),
        processing_class=tokenizer(),
        **arguments,
    )


def run(kind: str, folder: Path, start: PreTrainedModel, **options: Any) -> list[dict[str, float]]:
    """Trains and returns what was logged at every step and evaluation."""
    made = trainer(kind, folder, start, **options)
    torch.manual_seed(11)  # generation
    made.train()
    return [line for line in made.state.log_history if "loss" in line or "eval_loss" in line]
