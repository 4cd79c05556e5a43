"""Training and evaluation on a dataset of prompts with a reward function."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefkern.check import require
from prefkern.integrations.ppo import checkpoint, prompts

if TYPE_CHECKING:
    from prefkern.integrations.ppo.trainer import PPOTrainer

_SHOWN = {"score": "objective/scores", "kl": "objective/kl", "clip": "policy/clipfrac_avg"}


def train(
    trainer: "PPOTrainer",
    dataset: Any,
    reward_fn: Callable[..., Any],
    resume_from: str | os.PathLike[str] | bool | None,
) -> list[dict[str, float]]:
    args, accelerator = trainer.args, trainer.accelerator
    source = prompts.Prompts(dataset, trainer.tokenizer)
    trainer.total_steps = math.ceil((args.total_episodes or len(source)) / args.batch_size)
    folder = checkpoint.newest(args.output_dir) if resume_from is True else resume_from
    if folder:
        checkpoint.load(trainer, Path(folder))
    if args.report_to:
        accelerator.init_trackers("ppo", config=checkpoint.plain(args.to_dict()))
    silent = args.disable_tqdm or not accelerator.is_main_process
    tqdm = require("tqdm", "PPOTrainer.train", "pip install 'prefkern[ppo]'").tqdm
    with tqdm(total=trainer.total_steps, initial=trainer.global_step, desc="ppo", disable=silent) as bar:
        while trainer.global_step < trainer.total_steps:
            found = _step(trainer, source, reward_fn)
            bar.update()
            bar.set_postfix({name: f"{found[key]:.3g}" for name, key in _SHOWN.items() if key in found})
            if args.report_to and trainer.global_step % args.logging_steps == 0:
                accelerator.log(found, step=trainer.global_step)
            if args.save_steps and trainer.global_step % args.save_steps == 0:
                checkpoint.save(trainer)
    if not silent:
        print(trainer.phases.table())
    if args.report_to:
        accelerator.end_training()
    return trainer.history


def _step(trainer: "PPOTrainer", source: prompts.Prompts, reward_fn: Callable[..., Any]) -> dict[str, float]:
    args, accelerator = trainer.args, trainer.accelerator
    order = source.order(trainer.global_step, args.batch_size, args.seed)
    queries, columns = source.take(order[accelerator.process_index :: accelerator.num_processes])
    responses = trainer.generate(queries)
    with trainer.phases("reward"):
        scores = _rewards(trainer, reward_fn, columns, responses)
    found = trainer.step(queries, responses, scores)
    trainer.history.append(found)
    return found


def _rewards(
    trainer: "PPOTrainer", reward_fn: Callable[..., Any], columns: list[dict[str, Any]], responses: list[Tensor]
) -> list[Any]:
    scores = prompts.rewards(reward_fn, trainer.tokenizer, columns, responses)
    penalty, stop = trainer.args.missing_eos_penalty, trainer.stop_token_id
    if penalty is not None:
        for index, response in enumerate(responses):
            if stop is None or not (response == stop).any():
                scores[index] = scores[index] - penalty
    return scores


def evaluate(
    trainer: "PPOTrainer", dataset: Any, reward_fn: Callable[..., Any], options: dict[str, Any]
) -> dict[str, float]:
    source = prompts.Prompts(dataset, trainer.tokenizer)
    queries, columns = source.take(list(range(len(source))))
    devices = [] if trainer.device.type == "cpu" else [trainer.device]
    with torch.random.fork_rng(devices):
        torch.manual_seed(trainer.args.seed)
        responses = trainer.generate(queries, **options)
    scores = torch.tensor(
        [float(torch.as_tensor(score).sum()) for score in _rewards(trainer, reward_fn, columns, responses)]
    )
    return {
        "eval/scores": float(scores.mean()),
        "eval/scores_std": float(scores.std()) if len(scores) > 1 else 0.0,
        "eval/response_length": sum(len(response) for response in responses) / len(responses),
    }
