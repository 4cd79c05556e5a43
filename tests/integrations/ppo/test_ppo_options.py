"""Every option of PPO against what it is defined to be."""

import copy
from typing import Any

import numpy as np
import pytest
import tiny_ppo
import tiny_trl
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from prefkern.integrations.ppo import PPOConfig, PPOTrainer
from prefkern.integrations.ppo.advantages import KLController
from prefkern.integrations.ppo.models import Scores
from prefkern.integrations.ppo.optimise import losses

EXACT = {"rtol": 0, "atol": 1e-8}  # the trunk's norms and softmax run in float32, whatever the weights are


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def stepped(policy: Any = None, given: dict[str, Any] | None = None, **options: Any) -> Any:
    """A trainer in float64, after one step by plain gradient descent (Adam divides rounding by rounding)."""
    policy = tiny_ppo.model(0, torch.float64) if policy is None else policy
    if "value_model" not in options:
        options["optimizer"] = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    trainer = tiny_ppo.trainer(policy, **{"num_ppo_epochs": 2, "learning_rate": 0.1} | options)
    queries, responses, rewards = tiny_ppo.episodes()
    trainer.stats = trainer.step(**{"queries": queries, "responses": responses, "rewards": rewards} | (given or {}))
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 1},
        {"per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 9},  # more parts than episodes
        {"local_rollout_forward_batch_size": 2},
        {"gradient_checkpointing": True},
        {"max_head_memory": 0},
    ],
)
def test_how_a_mini_batch_is_cut_changes_nothing(options: dict[str, Any]) -> None:
    common = {"entropy_coef": 0.1, "kl_in": "loss", "kl_estimator": "k3"}
    whole, cut = stepped(**common), stepped(**common, **options)
    torch.testing.assert_close(weights(cut), weights(whole), **EXACT)
    for name, value in whole.stats.items():
        assert cut.stats[name] == pytest.approx(value, abs=1e-6), name


def test_mini_batches_by_size_and_by_number() -> None:
    by_size, by_number = stepped(mini_batch_size=2), stepped(num_mini_batches=3)
    assert by_size.stats["policy/updates"] == by_number.stats["policy/updates"] == 6
    tiny_ppo.assert_same(weights(by_size), weights(by_number))


def test_the_head_is_never_asked_for_logits_and_the_trunk_is_passed_once() -> None:
    policy = tiny_ppo.model(0, torch.float64)
    passes = {"policy": 0, "reference": 0}

    def refuse(*_: Any) -> None:
        raise AssertionError("logits were made")

    trainer = tiny_ppo.trainer(policy, num_ppo_epochs=2, num_mini_batches=2, entropy_coef=0.1)
    reference = trainer.reference.policy
    for name, each in (("policy", policy), ("reference", reference)):
        each.lm_head.register_forward_hook(refuse)
        each.model.register_forward_hook(lambda *_, name=name: passes.__setitem__(name, passes[name] + 1))
    trainer.step(*tiny_ppo.episodes())
    assert passes == {"policy": 1 + 4, "reference": 1}  # one to score, with the values; one for each mini-batch


@pytest.mark.parametrize("kind", ["plain", "tied", "softcap", "multiplied", "divided"])
def test_log_probabilities_are_the_models_own(kind: str) -> None:
    policy, reference = tiny_trl.model(kind), tiny_trl.model(kind, seed=1)
    queries, responses, rewards = tiny_ppo.episodes()
    expected = {}
    for name, each in (("logps", policy), ("ref_logps", reference)):
        rows = []
        for query, response in zip(queries, responses, strict=True):
            with torch.no_grad():
                logits = each(input_ids=torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1].double()
            rows.append((logits / 0.7).log_softmax(-1).gather(-1, response[:, None]).squeeze(-1))
        expected[name] = torch.cat(rows)
    trainer = tiny_ppo.trainer(policy, reference, num_ppo_epochs=1)
    trainer.step(queries, responses, rewards)
    for name, logps in expected.items():
        torch.testing.assert_close(getattr(trainer.last_rollout, name).double(), logps, rtol=0, atol=2e-5)


def test_the_reference_of_an_adapter_is_the_model_without_it() -> None:
    adapted = tiny_ppo.adapted()
    reference = tiny_ppo.model()  # the weights that the adapter was put on
    before = {name: value.clone() for name, value in adapted.named_parameters()}
    trainer = tiny_ppo.trainer(adapted, learning_rate=1e-2, num_ppo_epochs=2)
    assert trainer.reference is None
    trainer.step(*tiny_ppo.episodes())
    other = tiny_ppo.trainer(tiny_ppo.adapted(), reference, num_ppo_epochs=1)
    other.step(*tiny_ppo.episodes())
    first, second = trainer.last_rollout, other.last_rollout
    torch.testing.assert_close(first.ref_logps, second.ref_logps, rtol=0, atol=1e-6)
    assert (first.logps - first.ref_logps).abs().max() > 1e-3
    changed = {name for name, value in adapted.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_given_reference_log_probabilities() -> None:
    first = stepped()
    rollout = first.last_rollout
    given = [rollout.ref_logps[a:b] for a, b in zip(rollout.offsets, rollout.offsets[1:], strict=False)]
    second = stepped(given={"ref_logps": given}, reference="given")
    torch.testing.assert_close(weights(second), weights(first), **EXACT)


def test_no_reference_without_a_penalty() -> None:
    made = PPOTrainer(tiny_ppo.model(), None, None, PPOConfig(kl_coef=0.0, disable_tqdm=True))
    assert made.reference is None
    stats = made.step(*tiny_ppo.episodes())
    assert "objective/kl" not in stats
    assert stats["objective/rlhf_reward"] == stats["objective/scores"]


def test_rewards_of_tokens() -> None:
    _, responses, scores = tiny_ppo.episodes()
    per_token = [torch.zeros(len(response), dtype=torch.float64) for response in responses]
    for row, score in zip(per_token, scores, strict=True):
        row[-1] = score
    first, second = stepped(), stepped(given={"rewards": per_token})
    torch.testing.assert_close(weights(second), weights(first), **EXACT)
    assert second.stats["objective/scores"] == pytest.approx(first.stats["objective/scores"])
    per_token[0][1] = 2.0
    third = stepped(given={"rewards": per_token}).last_rollout.rewards - second.last_rollout.rewards
    assert third.nonzero().flatten().tolist() == [1]
    assert third[1] == pytest.approx(2.0)


def test_what_a_tool_wrote_is_not_scored_and_passed_over() -> None:
    masks = [[1, 1, 0, 0, 1], [1, 1], [0, 1, 1, 0, 0, 1, 1], [1] * 7, [1]]
    trainer = stepped(given={"response_masks": masks}, whiten_advantages=False, gamma=0.9, lam=0.8, num_ppo_epochs=1)
    rollout = trainer.last_rollout
    scored = torch.tensor([bool(flag) for mask in masks for flag in mask])
    assert torch.equal(rollout.mask, scored)
    assert not rollout.rewards[~scored].any()
    assert not rollout.advantages[~scored].any()
    for index, (start, stop) in enumerate(zip(rollout.offsets, rollout.offsets[1:], strict=False)):
        cells = np.arange(start, stop)[scored[start:stop].numpy()]
        following, value_after = 0.0, 0.0
        for position, cell in enumerate(reversed(cells)):
            reward = -trainer.args.kl_coef * float(rollout.logps[cell] - rollout.ref_logps[cell])
            if position == 0:
                reward += rollout.episodes[index].score
            delta = reward + 0.9 * value_after - float(rollout.values[cell])
            following = delta + 0.9 * 0.8 * following
            value_after = float(rollout.values[cell])
            assert float(rollout.advantages[cell]) == pytest.approx(following, abs=1e-10)


def test_the_loss_does_not_see_what_a_tool_wrote() -> None:
    """Whatever its tokens' log-probabilities are: only what comes after them may depend on them."""
    masks = [[1, 1, 1, 0, 0], [1, 1], [1] * 7, [1] * 7, [1]]
    _, responses, _ = tiny_ppo.episodes()
    changed = [response.clone() for response in responses]
    changed[0][3:] = torch.tensor([2, 3])
    assert not torch.equal(changed[0], responses[0])
    first = stepped(given={"response_masks": masks})
    second = stepped(given={"response_masks": masks, "responses": changed})
    torch.testing.assert_close(weights(second), weights(first), **EXACT)


def test_a_separate_value_model() -> None:
    shape = tiny_ppo.model().config.to_dict() | {"num_labels": 1, "hidden_size": 24}
    torch.manual_seed(5)
    value_model = Qwen2ForSequenceClassification(Qwen2Config(**shape)).double()
    before = copy.deepcopy(value_model)
    trainer = stepped(value_model=value_model, learning_rate=1e-2)
    queries, responses, _ = tiny_ppo.episodes()
    expected = []
    for query, response in zip(queries, responses, strict=True):
        with torch.no_grad():
            hidden = before.model(input_ids=torch.cat([query, response])[None]).last_hidden_state[0]
            expected.append(before.score(hidden[len(query) - 1 : -1]).squeeze(-1))
    torch.testing.assert_close(trainer.last_rollout.values, torch.cat(expected), rtol=0, atol=1e-10)
    assert not torch.equal(before.score.weight, value_model.score.weight)
    assert not torch.equal(before.model.layers[0].mlp.up_proj.weight, value_model.model.layers[0].mlp.up_proj.weight)


def test_the_loss_is_its_formula() -> None:
    n, made = 40, torch.Generator().manual_seed(0)

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(n, generator=made, dtype=torch.float64)

    old, advantages, returns, old_values = -normal().abs(), normal(), normal(), normal()
    scores = Scores(old + normal(0.5), normal().abs(), old_values + normal(0.5))
    ref, mask = old + normal(0.3), torch.rand(n, generator=made) > 0.3
    args = PPOConfig(
        cliprange=0.1,
        cliprange_high=0.3,
        dual_clip=1.5,
        kl_in="loss",
        kl_estimator="k3",
        entropy_coef=0.2,
        vf_coef=0.4,
        cliprange_value=0.2,
    )
    loss, *_ = losses(
        scores,
        old_logps=old,
        old_values=old_values,
        advantages=advantages,
        returns=returns,
        ref_logps=ref,
        mask=mask,
        value_mask=mask,
        counts=(50, 60),
        kl_coef=0.7,
        args=args,
    )
    ratio = (scores.logps - old).exp()
    policy = torch.minimum(ratio.clamp(max=1.5) * advantages, ratio.clamp(0.9, 1.3) * advantages)
    x = ref - scores.logps
    kl = x.exp() - x - 1
    clipped = old_values + (scores.values - old_values).clamp(-0.2, 0.2)
    value = torch.maximum((scores.values - returns) ** 2, (clipped - returns) ** 2) / 2
    per_token = (-policy + 0.7 * kl - 0.2 * scores.entropy)[mask].sum() / 50
    assert float(loss) == pytest.approx(float(per_token + 0.4 * value[mask].sum() / 60), abs=1e-12)


def test_updates_stop_before_the_policy_moves_too_far() -> None:
    one, stopped = stepped(num_ppo_epochs=1), stepped(num_ppo_epochs=4, target_kl=1e-9)
    assert (stopped.stats["policy/updates"], stopped.stats["policy/early_stop"]) == (1, 1)
    tiny_ppo.assert_same(weights(stopped), weights(one))
    assert stepped(num_ppo_epochs=4, target_kl=1e9).stats["policy/updates"] == 4


def test_the_adaptive_controller() -> None:
    controller = KLController(PPOConfig(kl_coef=0.1, kl_controller="adaptive", kl_target=2.0, kl_horizon=100))
    controller.update(2.2, 10)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.1 * 10 / 100))
    controller.update(50.0, 10)
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02)
    fixed = KLController(PPOConfig(kl_coef=0.1))
    fixed.update(50.0, 10)
    assert fixed.coef == 0.1


def test_learning_rates() -> None:
    args = PPOConfig(lr_scheduler_type="linear", warmup_steps=2)
    assert [round(args.schedule(step, 6), 3) for step in range(6)] == [0.333, 0.667, 1.0, 0.75, 0.5, 0.25]
    assert PPOConfig(lr_scheduler_type="cosine").schedule(5, 10) == pytest.approx(0.5)
    assert PPOConfig().schedule(5, 10) == PPOConfig(lr_scheduler_type="linear").schedule(5, None) == 1.0
    policy = tiny_ppo.model()
    groups = [{"params": [policy.lm_head.weight], "lr": 0.4}, {"params": list(policy.model.parameters()), "lr": 0.2}]
    trainer = tiny_ppo.trainer(policy, optimizer=torch.optim.SGD(groups), warmup_steps=1)
    trainer.step(*tiny_ppo.episodes())
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.2, 0.1]


def test_a_classic_loop() -> None:
    """As textbooks write it, with strings."""
    tokenizer = tiny_trl.tokenizer()
    policy = tiny_trl.model()
    start = policy.lm_head.weight.detach().clone()
    trainer = PPOTrainer(policy, tiny_trl.model(seed=1), tokenizer, PPOConfig(learning_rate=1e-3, response_length=4))
    prompts = ["w1 w2 w3", "w4 w5"]
    for _ in range(2):
        responses = trainer.generate(prompts, max_new_tokens=3, top_k=5)
        assert all(1 <= len(response) <= 3 for response in responses)
        texts = [tokenizer.decode(response) for response in responses]
        rewards = [torch.tensor(float(len(text))) for text in texts]
        stats = trainer.step(prompts, responses, rewards)
    assert stats["episode"] == 4
    assert stats["objective/scores"] == pytest.approx(sum(map(len, texts)) / 2)
    assert not torch.equal(policy.lm_head.weight, start)


def test_strings_are_encoded() -> None:
    tokenizer = tiny_trl.tokenizer()
    queries, responses = ["w1 w2 w3", "w4"], ["w5 w6", "w7 w8 w9"]
    trainers = []
    for given in ((queries, responses), ([tokenizer(q)["input_ids"] for q in queries], [[8, 9], [10, 11, 12]])):
        trainers.append(tiny_ppo.trainer(tiny_trl.model(), tiny_trl.model(seed=1), tokenizer))
        trainers[-1].step(*given, [1.0, -1.0])
    tiny_ppo.assert_same(weights(trainers[0]), weights(trainers[1]))
