"""What a run holds: models, optimiser, processes, counters. The steps of the algorithm take it, not the trainer."""

import math
import os
from typing import Any

import numpy as np
import torch

from prefkern.integrations.ppo import episodes, models, stats, suitable, tokens
from prefkern.integrations.ppo.advantages import KLController
from prefkern.integrations.ppo.config import PPOConfig
from prefkern.integrations.ppo.rollout import Rollout
from prefkern.integrations.transformers import without_noise


class State:
    """Attributes of `PPOTrainer`.

    Attributes:
        args, tokenizer: as they were given.
        model: policy and value function in one module (`models.ActorCritic`), as accelerate wraps it; optimizer: its
            optimiser, rates: the learning rates of its groups before any schedule.
        reference: the frozen reference, or None; adapter_is_off_in_reference: the policy without its adapter is it.
        limits: what the policy can take; stop_token_ids, pad_token_id: what ends a response, what fills rows.
        accelerator, device, sharded: the processes, this one's device, whether FSDP2 shards the model.
        controller: the coefficient of the KL penalty.
        phases, sum: seconds of each phase; sums over processes.
        global_step, episode, total_steps: steps and episodes done, steps of the run (None: not known).
        history: the statistics of each step of `PPOTrainer.train`; last_rollout: what the last step computed.
    """

    last_rollout: Rollout

    def __init__(
        self,
        accelerate: Any,
        args: PPOConfig,
        model: Any,
        ref_model: Any,
        tokenizer: Any,
        value_model: Any,
        optimizer: torch.optim.Optimizer | None,
        accelerator: Any,
    ) -> None:
        self.args, self.tokenizer = args, tokenizer
        head = suitable.check_models(model, ref_model, value_model)
        vocabulary = len(head["weight"])
        self.reference = models.make_reference(model, ref_model, args)
        if self.reference is not None:
            suitable.check_policy(
                "ref_model", self.reference.policy
            )  # a copy is another object, of which nothing is known
        self.adapter_is_off_in_reference = self.reference is None and models.is_peft(model) and args.reference == "auto"
        self.stop_token_ids = tokens.stop_tokens(args, tokenizer, model, vocabulary)
        self.pad_token_id = tokens.padding(tokenizer)
        self.limits = episodes.Limits(
            vocabulary,
            getattr(models.text_config(model), "max_position_embeddings", None),
            self.stop_token_ids,
            self.pad_token_id,
            (~head["vocab_mask"]).nonzero().flatten().cpu().numpy() if "vocab_mask" in head else np.array([], np.int64),
        )

        self.accelerator = accelerator or make_accelerator(accelerate, args)
        args.check_processes(self.accelerator.num_processes)
        self.device = self.accelerator.device
        accelerate.utils.set_seed(args.seed + 100_003 * self.accelerator.process_index)
        if args.gradient_checkpointing:
            models.checkpoint_activations(model)
        both = models.ActorCritic(model, value_model)
        without_noise(both)  # old and new log-probabilities must differ by the update only
        optimizer = optimizer or make_optimizer(both, args)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.model, self.optimizer = self.accelerator.prepare(both, optimizer)
        self.sharded = models.prepare_sharded(self.model)
        if self.reference is not None:
            self.reference.to(self.device)
        self.controller = KLController(args)
        self.phases = stats.Phases(self.device)
        self.sum = stats.Reduce(self.accelerator)
        self.global_step = self.episode = 0
        self.total_steps = None if args.total_episodes is None else math.ceil(args.total_episodes / args.batch_size)
        self.history: list[dict[str, float]] = []


def make_optimizer(model: torch.nn.Module, args: PPOConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        fused=True,  # one pass over the parameters, without temporaries
    )


def make_accelerator(accelerate: Any, args: PPOConfig) -> Any:
    """An ``Accelerator`` of the package, in the precision of the options, else of accelerate's configuration.

    Accelerate keeps one precision for a process: without an explicit one this trainer would take over that of a TRL
    trainer before it (bf16 by TRL's default), and with another one accelerate asks for a new process. As transformers'
    trainers do, a state with another precision is begun anew; the process group stays.
    """
    state = accelerate.state.AcceleratorState
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if state._shared_state and state().mixed_precision != precision:
        state._reset_state()
    return accelerate.Accelerator(mixed_precision=precision, log_with=args.report_to, project_dir=args.output_dir)
