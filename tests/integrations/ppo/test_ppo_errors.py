"""What PPO refuses: the sentence, and that nothing has changed."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_ppo
import tiny_trl
import torch

from prefkern.integrations.ppo import PPOConfig, PPOTrainer

NAN = float("nan")


def _given(**changes: Any) -> dict[str, Any]:
    queries, responses, rewards = tiny_ppo.episodes()
    return {"queries": queries, "responses": responses, "rewards": rewards} | changes


def _row(name: str, index: int, value: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        given = _given()
        given[name][index] = value
        return given

    return make


REFUSED = {
    "one reward short": (
        lambda: _given(rewards=[1.0] * 4),
        "one response and one reward for every query, got 5 queries, 5 responses, 4 rewards",
    ),
    "responses short": (lambda: _given(responses=tiny_ppo.episodes()[1][:3]), "got 5 queries, 3 responses, 5 rewards"),
    "none": (lambda: _given(queries=[], responses=[], rewards=[]), "queries must hold at least one query, got none"),
    "empty response": (
        _row("responses", 2, torch.tensor([], dtype=torch.int64)),
        r"responses\[2\] must have at least one token, got none: there is nothing to learn from",
    ),
    "empty query": (_row("queries", 1, []), r"queries\[1\] must have at least one token, got none"),
    "NaN": (_row("rewards", 3, NAN), r"rewards\[3\] must be finite, got nan"),
    "inf in a tensor": (_row("rewards", 0, torch.tensor(float("inf"))), r"rewards\[0\] must be finite"),
    "NaN per token": (_row("rewards", 1, [0.0, NAN]), r"rewards\[1\] must be finite"),
    "rewards per token": (
        _row("rewards", 0, [0.0, 1.0]),
        r"rewards\[0\] must be one number, or one for each of 5 tokens, got 2",
    ),
    "reward of text": (_row("rewards", 0, "good"), r"rewards\[0\] must be a number or numbers, got str"),
    "too long": (
        _row("queries", 0, torch.full((28,), 3)),
        r"queries\[0\] and responses\[0\] together must have at most the model's 32 positions, got 28 \+ 5 = 33 tokens",
    ),
    "unknown token": (
        _row("responses", 0, [3, 24]),
        r"responses\[0\] must hold ids in \[0, 24\), the model's vocabulary, got 24",
    ),
    "negative token": (_row("queries", 4, [-1]), r"queries\[4\] must hold ids in \[0, 24\)"),
    "floating ids": (_row("queries", 0, torch.ones(3)), r"queries\[0\] must hold token ids \(int64\), got float32"),
    "two dimensions": (
        _row("queries", 0, torch.ones(1, 3, dtype=torch.int64)),
        r"queries\[0\] must have one dimension",
    ),
    "text without tokenizer": (_row("queries", 0, "hello"), r"queries\[0\] is a string, which needs a tokenizer"),
    "not a list": (lambda: _given(queries=3), "queries must be a list with one tensor of token ids each, got int"),
    "a number of rewards": (
        lambda: _given(rewards=1.0),
        "rewards must be a list with one entry per response",
    ),
    "mask length": (
        lambda: _given(response_masks=[[1] * 4, [1] * 2, [1] * 7, [1] * 7, [1]]),
        r"response_masks\[0\] must hold 0 or 1 for each of 5 tokens",
    ),
    "mask empty": (
        lambda: _given(response_masks=[[1] * 5, [0] * 2, [1] * 7, [1] * 7, [1]]),
        r"response_masks\[1\] must mark at least one token that the policy wrote, got none",
    ),
    "responses that contain their queries": (
        lambda: _given(responses=[torch.cat(pair) for pair in zip(*tiny_ppo.episodes()[:2], strict=True)]),
        "responses must not contain their queries, but each of the 5 begins with its own, as "
        r"generate\(return_prompt=True\) gives it: pass response\[len\(query\):\]",
    ),
    "padding behind the end": (
        _row("responses", 2, [3, 1, 0, 0]),
        r"responses\[2\] must end with its end token 1, got 2 tokens of padding behind it: pass the first 2 tokens",
    ),
    "ends behind the end": (
        _row("responses", 2, [3, 1, 1, 1]),
        r"responses\[2\] must end with its end token 1, got 2 tokens of padding behind it",
    ),
    "too large a number": (
        _row("rewards", 3, 10**400),
        r"rewards\[3\] must be finite in float64, got a larger integer",
    ),
    "ref_logps length": (
        lambda: _given(ref_logps=[[-1.0]] * 5),
        r"ref_logps\[0\] must be one number for each of 5 tokens, got shape \(1,\)",
    ),
}


@pytest.fixture(scope="module")
def trainer() -> PPOTrainer:
    made = tiny_ppo.trainer(num_ppo_epochs=1)
    made.step(*tiny_ppo.episodes())  # the optimiser has a state
    return made


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_step_changes_nothing(trainer: PPOTrainer, case: str) -> None:
    make, message = REFUSED[case]
    given, before = make(), tiny_ppo.state(trainer)
    with pytest.raises((TypeError, ValueError), match=message) as refused:
        trainer.step(**given)
    assert str(refused.value).startswith("prefkern.PPOTrainer.step: ")
    tiny_ppo.assert_same(tiny_ppo.state(trainer), before)


def test_responses_that_repeat_their_queries_on_purpose() -> None:
    queries, responses, rewards = tiny_ppo.episodes()
    whole = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
    trainer = tiny_ppo.trainer(num_ppo_epochs=1)
    trainer.step(queries, whole, rewards, [torch.ones(len(response)) for response in whole])
    trainer.step(queries, [*whole[:-1], responses[-1]], rewards)  # one of them does not
    trainer.step([[3], [4, 5]], [[3, 2], [4, 5, 6]], [0.0, 1.0])  # by chance, as far as three tokens tell
    trainer.step([[3, 4]], [[5, 1, 6, 1]], [0.0])  # an end within a response is its own


def test_a_reference_that_was_to_be_given() -> None:
    trainer = tiny_ppo.trainer(reference="given")
    with pytest.raises(ValueError, match="ref_logps must be given, as reference='given' and kl_coef is not 0"):
        trainer.step(*tiny_ppo.episodes())


def test_a_reference_of_another_vocabulary() -> None:
    with pytest.raises(ValueError, match="one vocabulary, got 24 and 25 rows in their output layers"):
        tiny_ppo.trainer(ref_model=tiny_ppo.model(vocab_size=25))


def test_a_reference_that_is_the_policy() -> None:
    policy = tiny_ppo.model()
    with pytest.raises(ValueError, match="ref_model must be another object than model"):
        tiny_ppo.trainer(policy, policy)


def test_models_that_are_none() -> None:
    with pytest.raises(TypeError, match="model must be a causal language model of transformers"):
        PPOTrainer(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="args must be a PPOConfig, got dict"):
        PPOTrainer(tiny_ppo.model(), args={})
    with pytest.raises(TypeError, match="value_model must be a model of transformers"):
        PPOTrainer(tiny_ppo.model(), value_model=torch.nn.Linear(2, 1))


def test_an_adapter_on_the_head_is_refused() -> None:
    adapted = tiny_ppo.adapted(target_modules=["lm_head", "q_proj"])
    with pytest.raises(ValueError, match="plain linear output layer"):
        PPOTrainer(adapted)


def test_a_tokenizer_without_a_pad_token_says_what_it_uses() -> None:
    tokenizer = tiny_trl.tokenizer()
    tokenizer.pad_token = None
    with pytest.warns(UserWarning, match="no pad token: rows are filled with id 1 \\('<eos>'\\), which is masked out"):
        PPOTrainer(tiny_ppo.model(vocab_size=60), None, tokenizer, PPOConfig(kl_coef=0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be a finite number"),
        ({"temperature": 0.0}, "temperature must be a finite number"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"num_ppo_epochs": True}, "num_ppo_epochs must be an integer of at least 1, got True"),
        ({"mini_batch_size": 4, "num_mini_batches": 2}, "mini_batch_size and num_mini_batches say the same thing"),
        ({"kl_in": "loss"}, "needs kl_estimator='k2' or 'k3'"),
        ({"kl_in": "both"}, "kl_in must be one of 'reward', 'loss', got 'both'"),
        ({"dual_clip": 1.0}, "dual_clip must be a finite number in"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        PPOConfig(**options)
    assert str(refused.value).startswith("prefkern.PPOConfig: ")


def test_a_query_that_leaves_no_room() -> None:
    trainer = tiny_ppo.trainer(response_length=30)
    with pytest.raises(ValueError, match="must fit the model's 32 positions, got 33: shorten the queries"):
        trainer.generate([[3, 4, 5]])
