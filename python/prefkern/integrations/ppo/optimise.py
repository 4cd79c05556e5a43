"""The updates of a step: epochs, mini-batches, their parts, the losses, the early stop."""

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefkern.integrations.ppo.config import PPOConfig
from prefkern.integrations.ppo.models import Scores
from prefkern.integrations.ppo.rollout import Rollout, Rows, deal, mini_batches
from prefkern.integrations.ppo.state import State
from prefkern.integrations.ppo.stats import Means
from prefkern.losses import ppo_loss, value_loss
from prefkern.losses.reduce import masked_mean


def optimise(state: State, rollout: Rollout) -> dict[str, float]:
    """All updates of one rollout; what they report, averaged over them."""
    args, means, updates, norms, stopped = state.args, Means(), 0, [], False
    state.model.train()
    state.accelerator.sync_gradients = True  # shared in a process: off where another's accumulation was interrupted
    for epoch in range(args.num_ppo_epochs):
        # the same on all processes and in a resumed run: it depends on the seed, the step and the epoch only
        random = np.random.default_rng((args.seed, state.global_step, epoch))
        for rows in mini_batches(rollout.lengths, min(args.parts(len(rollout)), len(rollout)), random):
            means.begin()
            _accumulate(state, rollout, rows, means)
            if args.target_kl is not None and means.last("policy/approxkl_avg", state.sum) > 1.5 * args.target_kl:
                state.optimizer.zero_grad()
                stopped = True
                break
            with state.phases("optimiser"):
                norms.append(_update(state))
            updates += 1
        if stopped:
            break
    stats = means.read(state.sum)
    if norms:
        stats["grad_norm"] = float(torch.stack(norms).mean())
    return {**stats, "policy/updates": float(updates), "policy/early_stop": float(stopped)}


def _accumulate(state: State, rollout: Rollout, rows: Rows, means: Means) -> None:
    """The gradient of one mini-batch, in parts, each divided by the mini-batch's own token counts."""
    cells = rollout.cells(rows)
    tokens, value_tokens = int(rollout.mask[cells].sum()), int(rollout.value_mask[cells].sum())
    ranks = state.accelerator.num_processes
    parts = state.args.gradient_accumulation_steps or 1
    if state.args.per_device_train_batch_size is not None:
        parts = -(-len(rows) // (state.args.per_device_train_batch_size * ranks))
    shares = deal(rollout.lengths, rows, parts, state.accelerator.process_index, ranks)
    for index, share in enumerate(shares):
        # a process without a row in this part still takes part in what all of them do together
        blank, share = not len(share), share if len(share) else rows[:1]
        last = index == len(shares) - 1
        with contextlib.nullcontext() if last else state.accelerator.no_sync(state.model):
            with state.phases("forward", int(rollout.lengths[share].sum())):
                loss = _loss(state, rollout, share, blank, (tokens, value_tokens), means)
            with state.phases("backward", int(rollout.lengths[share].sum())):
                state.accelerator.backward(loss * ranks)  # processes average their gradients


def _loss(state: State, rollout: Rollout, rows: Rows, blank: bool, counts: tuple[int, int], means: Means) -> Tensor:
    args = state.args
    batch = rollout.batch(rows, state.pad_token_id, state.device, blank=blank)
    cells = rollout.cells(rows)
    scores = state.model(
        batch,
        temperature=args.temperature,
        entropy=True,
        entropy_grad=args.entropy_coef > 0,
        max_memory=args.max_head_memory,
    )

    def of(field: Tensor) -> Tensor:
        return field[cells].to(state.device)

    mask, value_mask = of(rollout.mask), of(rollout.value_mask)
    if blank:
        mask, value_mask = torch.zeros_like(mask), torch.zeros_like(value_mask)
    loss, policy, value = losses(
        scores,
        old_logps=of(rollout.logps),
        old_values=of(rollout.values),
        advantages=of(rollout.advantages),
        returns=of(rollout.returns),
        ref_logps=of(rollout.ref_logps) if rollout.ref_logps is not None and args.kl_in == "loss" else None,
        mask=mask,
        value_mask=value_mask,
        counts=counts,
        kl_coef=state.controller.coef,
        args=args,
    )
    share, value_share = (0, 0) if blank else (int(rollout.mask[cells].sum()), int(rollout.value_mask[cells].sum()))
    means.add(policy, share / counts[0])
    means.add(value, value_share / counts[1])
    return loss


def losses(
    scores: Scores,
    *,
    old_logps: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    ref_logps: Tensor | None,
    mask: Tensor,
    value_mask: Tensor,
    counts: tuple[int, int],
    kl_coef: float,
    args: PPOConfig,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """``policy + vf_coef value - entropy_coef entropy`` over cells ``[n]``, sums divided by ``counts``, the policy's
    and the value function's tokens of the whole mini-batch; and the metrics of both."""
    assert scores.values is not None
    assert scores.entropy is not None
    policy = ppo_loss(
        scores.logps,
        old_logps,
        advantages,
        mask,
        cliprange=args.cliprange,
        cliprange_high=args.cliprange_high,
        delta=args.dual_clip,
        ref_logps=ref_logps,
        kl_coef=kl_coef if ref_logps is not None else 0.0,
        kl_estimator=args.kl_estimator,
        normalizer=counts[0],
    )
    value = value_loss(
        scores.values,
        old_values,
        returns,
        value_mask,
        cliprange_value=args.cliprange_value,
        normalizer=counts[1],
    )
    loss = policy.loss + args.vf_coef * value.loss
    if args.entropy_coef:
        loss = loss - args.entropy_coef * masked_mean(scores.entropy, mask, counts[0])
    entropy = {"policy/entropy_avg": masked_mean(scores.entropy.detach(), mask)}
    shown = {name: metric for name, metric in value.metrics.items() if name != "val/var_explained"}
    return loss, policy.metrics | entropy, shown


def _update(state: State) -> Tensor:
    """One optimiser step with the gradient's norm clipped; the norm before."""
    limit = state.args.max_grad_norm
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    norm: Any = state.accelerator.clip_grad_norm_(parameters, float("inf") if limit is None else limit)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if state.accelerator.scaler is None and not bool(norm.isfinite()):
        state.optimizer.zero_grad()
        raise FloatingPointError(
            f"prefkern.PPOTrainer.step: the gradient is not finite in step {state.global_step}: this update was not "
            "made; look at val/ratio and the rewards of the step before, lower the learning rate, or set max_grad_norm"
        )
    state.optimizer.step()
    state.optimizer.zero_grad()
    return torch.as_tensor(norm).detach()
