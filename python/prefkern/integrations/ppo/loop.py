"""Training and evaluation on a dataset of prompts with a reward function."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefkern.check import require
from prefkern.integrations.ppo import checkpoint, episodes, prompts
from prefkern.integrations.ppo.state import State

Generate = Callable[..., list[Tensor]]
Step = Callable[..., dict[str, float]]
_SHOWN = {"score": "objective/scores", "kl": "objective/kl", "clip": "policy/clipfrac_avg"}


def train(
    state: State,
    generate: Generate,
    step: Step,
    dataset: Any,
    reward_fn: Callable[..., Any],
    resume_from: str | os.PathLike[str] | bool | None,
) -> list[dict[str, float]]:
    """``generate(queries)`` gives responses, ``step(queries, responses, rewards)`` learns from them."""
    args, accelerator = state.args, state.accelerator
    source = prompts.Prompts(dataset, state.tokenizer)
    state.total_steps = math.ceil((args.total_episodes or len(source)) / args.batch_size)
    folder = checkpoint.newest(args.output_dir) if resume_from is True else resume_from
    if folder:
        checkpoint.load(state, Path(folder))
    if args.report_to:
        accelerator.init_trackers("ppo", config=checkpoint.plain(args.to_dict()))
    silent = args.disable_tqdm or not accelerator.is_main_process
    tqdm = require("tqdm", "PPOTrainer.train", "pip install 'prefkern[ppo]'").tqdm
    with tqdm(total=state.total_steps, initial=state.global_step, desc="ppo", disable=silent) as bar:
        while state.global_step < state.total_steps:
            order = source.order(state.global_step, args.batch_size, args.seed)
            queries, columns = source.take(order[accelerator.process_index :: accelerator.num_processes])
            responses = generate(queries)
            with state.phases("reward"):
                scores = _rewards(state, reward_fn, columns, responses)
            found = step(queries, responses, scores)
            state.history.append(found)
            bar.update()
            bar.set_postfix({name: f"{found[key]:.3g}" for name, key in _SHOWN.items() if key in found})
            if args.report_to and state.global_step % args.logging_steps == 0:
                accelerator.log(found, step=state.global_step)
            if args.save_steps and state.global_step % args.save_steps == 0:
                checkpoint.save(state)
    if not silent:
        print(state.phases.table())
    if args.report_to:
        accelerator.end_training()
    return state.history


def evaluate(
    state: State, generate: Generate, dataset: Any, reward_fn: Callable[..., Any], options: dict[str, Any]
) -> dict[str, float]:
    """Scores of ``generate(queries, **options)`` for all prompts."""
    source = prompts.Prompts(dataset, state.tokenizer)
    queries, columns = source.take(list(range(len(source))))
    devices = [] if state.device.type == "cpu" else [state.device]
    with torch.random.fork_rng(devices):
        torch.manual_seed(state.args.seed)
        responses = generate(queries, **options)
    scores = torch.tensor(
        [float(torch.as_tensor(score).sum()) for score in _rewards(state, reward_fn, columns, responses)]
    )
    return {
        "eval/scores": float(scores.mean()),
        "eval/scores_std": float(scores.std()) if len(scores) > 1 else 0.0,
        "eval/response_length": sum(len(response) for response in responses) / len(responses),
    }


def _rewards(
    state: State, reward_fn: Callable[..., Any], columns: list[dict[str, Any]], responses: list[Tensor]
) -> list[Any]:
    scores = prompts.rewards(reward_fn, state.tokenizer, columns, responses)
    penalty, stops = state.args.missing_eos_penalty, torch.tensor(state.stop_token_ids, dtype=torch.int64)
    if penalty is not None:
        for index, response in enumerate(responses):
            if not torch.isin(response, stops).any():
                score = np.array(episodes.numbers(f"rewards[{index}]", scores[index]))
                score.reshape(-1)[-1] -= penalty  # once, where there is a reward for each token
                scores[index] = score
    return scores
