"""One rollout and three updates against the formulas of TRL 1.12's PPOTrainer, in float64, with full logits.

The package itself, run once on a tiny model in float32 with a value model, gave the same: KL and losses within 1e-7,
weights after three updates of AdamW within 1.2e-7.
"""

import copy
from itertools import pairwise
from typing import NamedTuple

import pytest
import tiny_ppo
import torch
from torch import Tensor

INVALID_LOGPROB = 1.0


class Trl(NamedTuple):
    """What TRL's train() computes before its updates, padded [B, R]."""

    logprobs: Tensor
    values: Tensor
    kl: Tensor
    non_score_reward: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    padding_mask: Tensor
    padding_mask_p1: Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    variance = variance * mask.sum() / (mask.sum() - 1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


def forward(policy, value_head, queries, responses, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and values [B, R], the first value of a row at its last prompt token."""
    R = max(len(response) for response in responses)
    logps, values = [], []
    for query, response in zip(queries, responses, strict=True):
        row = torch.cat([query, response, torch.full((R - len(response),), tiny_ppo.PAD)])
        output = policy(input_ids=row[None], attention_mask=torch.ones(1, len(row)), output_hidden_states=True)
        start = len(query) - 1
        logits = output.logits[0, start:-1] / temperature  # TRL adds 1e-7; ours is given the sum
        logps.append(torch.log_softmax(logits, -1).gather(-1, row[start + 1 :, None]).squeeze(-1))
        values.append(value_head(output.hidden_states[-1][0, start:-1]).squeeze(-1))
    return torch.stack(logps), torch.stack(values)


def trl_rollout(policy, value_head, reference, queries, responses, scores, args) -> Trl:
    """The lines of TRL 1.12's train() from "Response Processing 3" to its updates."""
    with torch.no_grad():
        logprobs, values = forward(policy, value_head, queries, responses, args.temperature)
        ref_logprobs, _ = forward(reference, value_head, queries, responses, args.temperature)
        sequence_lengths = torch.tensor([len(response) for response in responses]) - 1
        response_idxs = torch.arange(logprobs.shape[1]).repeat(len(responses), 1)
        padding_mask = response_idxs > sequence_lengths.unsqueeze(1)
        logprobs = torch.masked_fill(logprobs, padding_mask, INVALID_LOGPROB)
        ref_logprobs = torch.masked_fill(ref_logprobs, padding_mask, INVALID_LOGPROB)
        sequence_lengths_p1 = sequence_lengths + 1
        padding_mask_p1 = response_idxs > sequence_lengths_p1.unsqueeze(1)
        values = torch.masked_fill(values, padding_mask_p1, 0)

        logr = ref_logprobs - logprobs
        kl = -logr if args.kl_estimator == "k1" else (logr.exp() - 1) - logr
        non_score_reward = -args.kl_coef * kl
        rewards = non_score_reward.clone()
        actual_end = torch.where(sequence_lengths_p1 < rewards.size(1), sequence_lengths_p1, sequence_lengths)
        rewards[torch.arange(rewards.size(0)), actual_end] += torch.tensor(scores, dtype=rewards.dtype)
        if args.whiten_rewards:
            rewards = masked_whiten(rewards, ~padding_mask_p1, shift_mean=False)
            rewards = torch.masked_fill(rewards, padding_mask_p1, 0)

        lastgaelam, advantages_reversed, gen_length = 0, [], rewards.shape[1]
        for t in reversed(range(gen_length)):
            nextvalues = values[:, t + 1] if t < gen_length - 1 else 0.0
            delta = rewards[:, t] + args.gamma * nextvalues - values[:, t]
            lastgaelam = delta + args.gamma * args.lam * lastgaelam
            advantages_reversed.append(lastgaelam)
        advantages = torch.stack(advantages_reversed[::-1], axis=1)
        returns = advantages + values
        advantages = masked_whiten(advantages, ~padding_mask)
        advantages = torch.masked_fill(advantages, padding_mask, 0)

        return Trl(logprobs, values, kl, non_score_reward, rewards, advantages, returns, padding_mask, padding_mask_p1)


def trl_losses(policy, value_head, queries, responses, rollout: Trl, args) -> tuple[Tensor, Tensor]:
    """The lines of TRL 1.12's innermost loop: policy loss and value loss of one mini-batch."""
    new_logprobs, vpred = forward(policy, value_head, queries, responses, args.temperature)
    new_logprobs = torch.masked_fill(new_logprobs, rollout.padding_mask, INVALID_LOGPROB)
    vpred = torch.masked_fill(vpred, rollout.padding_mask_p1, 0)
    vpredclipped = torch.clamp(vpred, rollout.values - args.cliprange_value, rollout.values + args.cliprange_value)
    vf_loss_max = torch.max(torch.square(vpred - rollout.returns), torch.square(vpredclipped - rollout.returns))
    vf_loss = 0.5 * masked_mean(vf_loss_max, ~rollout.padding_mask_p1)
    ratio = torch.exp(new_logprobs - rollout.logprobs)
    pg_losses = -rollout.advantages * ratio
    pg_losses2 = -rollout.advantages * torch.clamp(ratio, 1.0 - args.cliprange, 1.0 + args.cliprange)
    return masked_mean(torch.max(pg_losses, pg_losses2), ~rollout.padding_mask), vf_loss


def padded(trainer, packed: Tensor) -> Tensor:
    rollout = trainer.last_rollout
    rows = [packed[a:b] for a, b in zip(rollout.offsets, rollout.offsets[1:], strict=False)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


RATE = 0.5


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
def test_rollout_losses_and_updated_weights_are_those_of_trl(kl_estimator: str, whiten_rewards: bool) -> None:
    policy = tiny_ppo.model(0, torch.float64)
    trainer = tiny_ppo.trainer(
        policy,
        kl_estimator=kl_estimator,
        whiten_rewards=whiten_rewards,
        score_at="after_last",
        num_ppo_epochs=3,
        gamma=0.9,
        lam=0.8,
        kl_coef=0.3,
        cliprange_value=0.02,
        max_grad_norm=None,
        learning_rate=RATE,
        temperature=0.7 + 1e-7,
        optimizer=torch.optim.SGD(policy.parameters(), lr=RATE),
    )
    queries, responses, scores = tiny_ppo.episodes()
    twin = copy.deepcopy(trainer.model)
    stats = trainer.step(queries, responses, scores)
    ours = trainer.last_rollout

    theirs = trl_rollout(
        twin.policy, twin.value_head, trainer.reference.policy, queries, responses, scores, trainer.args
    )
    sgd = torch.optim.SGD(twin.policy.parameters(), lr=RATE)
    updates = []
    for _ in range(3):
        losses = trl_losses(twin.policy, twin.value_head, queries, responses, theirs, trainer.args)
        sgd.zero_grad()
        (losses[0] + trainer.args.vf_coef * losses[1]).backward()
        sgd.step()
        updates.append([float(part.detach()) for part in losses])

    def cells(packed: Tensor) -> Tensor:
        rows = [packed[a:b] for a, b in pairwise(ours.offsets)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(cells(ours.kl), theirs.kl, **close)
    torch.testing.assert_close(cells(ours.rewards), theirs.rewards, **close)
    torch.testing.assert_close(cells(ours.advantages), theirs.advantages, **close)
    returns = theirs.returns.masked_fill(theirs.padding_mask_p1, 0)
    torch.testing.assert_close(cells(ours.returns), returns, **close)
    mean = torch.tensor(updates).mean(0)
    assert stats["loss/policy_avg"] == pytest.approx(float(mean[0]), abs=1e-5)
    assert stats["loss/value_avg"] == pytest.approx(float(mean[1]), abs=1e-5)
    assert stats["policy/clipfrac_avg"] > 0.02  # the clips have work
    assert stats["val/clipfrac_avg"] > 0
    assert stats["objective/kl"] == pytest.approx(float(theirs.kl.sum(1).mean()), abs=1e-5)
    assert stats["objective/non_score_reward"] == pytest.approx(float(theirs.non_score_reward.sum(1).mean()), abs=1e-5)
    for parameter, expected in zip(trainer.model.policy.parameters(), twin.policy.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), expected.detach(), **close)
