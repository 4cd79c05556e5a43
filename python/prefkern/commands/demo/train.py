"""One DPO run with TRL's trainer, with TRL's own head or with prefkern's, and what came of it."""

import contextlib
import copy
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefkern.check import require
from prefkern.commands.demo.data import Split, columns
from prefkern.commands.demo.measure import HeadClock
from prefkern.commands.demo.model import Loaded, answer
from prefkern.integrations.trl.patching import patch

BATCH = 2
BETA, LEARNING_RATE = 0.1, 1e-5
TIE = 1e-3
"""Margins below this are ties: before training the policy is the reference, and rounding must not decide."""


class Score(NamedTuple):
    """On the held-out pairs: the DPO loss, the mean margin between the implicit rewards of the chosen and of the
    rejected answer, and how often the chosen one is ahead (a tie counts half)."""

    loss: float
    margin: float
    accuracy: float


class Step(NamedTuple):
    loss: float
    margin: float
    seconds: float
    head_seconds: float


class Run(NamedTuple):
    steps: list[Step]
    before: Score
    after: Score
    head_peak: int  # bytes
    prefkern_calls: int
    answers: list[str]


def work(split: Split, steps: int, questions: int) -> int:
    """Units of a run: a batch passes the head once in scoring, before and after; twice in a step, in the policy and in
    the reference. Every answer is one more."""
    return 2 * math.ceil(len(split.held_out) / BATCH) + 2 * steps + questions


def train(
    loaded: Loaded,
    split: Split,
    *,
    steps: int,
    with_prefkern: bool,
    questions: Sequence[str] = (),
    on_progress: Callable[[], None],
) -> Run:
    """Trains a copy of the model, then asks it the questions. ``on_progress`` is called `work` times."""
    install = ("prefkern demo", "pip install 'prefkern[demo]'")
    utils = require("trl.trainer.utils", *install)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="prefkern-demo-"))
        served = stack.enter_context(patch()) if with_prefkern else None
        head = stack.enter_context(HeadClock(utils, on_progress))
        trainer = _trainer(loaded, split, steps, folder)
        clock = _clock(head)
        trainer.add_callback(clock)
        reference = _margins(trainer, None)  # the policy is still the reference: all margins are 0
        trainer.train()
        after = _margins(trainer, reference)
        answers = []
        for question in questions:
            answers.append(answer(loaded, trainer.model, question))
            on_progress()
        calls = 0 if served is None else served.calls
        logs = [line for line in trainer.state.log_history if "loss" in line]
        return Run(
            [Step(log["loss"], log["rewards/margins"], *times) for log, times in zip(logs, clock.times, strict=True)],
            _score(torch.zeros_like(after)),
            _score(after),
            head.peak_bytes(),
            calls,
            answers,
        )


def _trainer(loaded: Loaded, split: Split, steps: int, folder: str) -> Any:
    trl = require("trl", "prefkern demo", "pip install 'prefkern[demo]'")
    datasets = require("datasets", "prefkern demo", "pip install 'prefkern[demo]'")
    transformers = require("transformers", "prefkern demo", "pip install 'prefkern[demo]'")
    chat = bool(loaded.tokenizer.chat_template)
    torch.manual_seed(0)
    trainer = trl.DPOTrainer(
        model=copy.deepcopy(loaded.model),
        ref_model=copy.deepcopy(loaded.model),
        args=trl.DPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            beta=BETA,
            max_length=512,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=datasets.Dataset.from_dict(columns(split.train, chat=chat)),
        eval_dataset=datasets.Dataset.from_dict(columns(split.held_out, chat=chat)),
        processing_class=copy.deepcopy(loaded.tokenizer),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _clock(head: HeadClock) -> Any:
    """A callback of transformers that keeps, for every step, its seconds and those of its head."""
    transformers = require("transformers", "prefkern demo", "pip install 'prefkern[demo]'")

    class Clock(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._begin = time.perf_counter(), head.seconds

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append((time.perf_counter() - self._begin[0], head.seconds - self._begin[1]))

    return Clock()


def _margins(trainer: Any, reference: Tensor | None) -> Tensor:
    """log p(chosen) - log p(rejected) of every held-out pair, less that of the reference."""
    differences = []
    model = trainer.model.eval()
    for batch in trainer.get_eval_dataloader():
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with torch.no_grad():
            output = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
            )
        chosen, rejected = output.log_probs.sum(-1).chunk(2)
        differences.append(chosen - rejected)
    difference = torch.cat(differences)
    return difference if reference is None else difference - reference


def _score(ratios: Tensor) -> Score:
    margin = BETA * ratios
    ahead = torch.where(margin.abs() < TIE, 0.5, (margin > 0).float())
    loss = torch.nn.functional.softplus(-margin)
    return Score(float(loss.mean()), float(margin.mean()), float(ahead.mean()))
