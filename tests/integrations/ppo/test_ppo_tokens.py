"""Strings become one row of token ids, and a response ends at any of several tokens."""

from typing import Any

import pytest
import tiny_ppo
import tiny_trl
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from prefkern.integrations.ppo import PPOConfig, tokens

BOS, EOS = 2, 1  # <unk> stands in for a beginning token


def adding(single: str, pair: str = "$A $B") -> PreTrainedTokenizerFast:
    """A tokenizer that puts special tokens around every text."""
    made = tiny_trl.tokenizer()
    special = [("<unk>", BOS), ("<eos>", EOS)]
    made._tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return made


def ids(text: str) -> list[int]:
    return list(tiny_trl.tokenizer()(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("single", "text", "expected"),
    [
        ("$A", "w1 w2", ids("w1 w2")),
        ("$A <eos>", "w1 w2", ids("w1 w2")),
        ("<unk> $A <eos>", "w1 w2", [BOS, *ids("w1 w2")]),
        ("<unk> $A <eos>", "<unk> w1 w2 <eos>", [BOS, *ids("w1 w2")]),  # rendered already
        ("<unk> $A", "<unk> w1 w2", [BOS, *ids("w1 w2")]),
        ("$A", "w1 <eos> w2 <eos>", [*ids("w1"), EOS, *ids("w2")]),  # an end within it is the text's own
        ("$A <eos>", "w1 <eos>", ids("w1")),
        ("<unk> $A <eos>", "", [BOS]),
    ],
)
def test_a_query_begins_once_and_does_not_end(single: str, text: str, expected: list[int]) -> None:
    (row,) = tokens.rows_of("PPOTrainer.step", "queries", [text], adding(single))
    assert row.tolist() == expected


def test_a_response_is_encoded_as_it_is() -> None:
    (row,) = tokens.rows_of("PPOTrainer.step", "responses", ["w1 w2 <eos>"], adding("<unk> $A <eos>"))
    assert row.tolist() == [*ids("w1 w2"), EOS]


def test_token_ids_are_taken_as_they_are() -> None:
    given = [BOS, BOS, 5, EOS]
    (row,) = tokens.rows_of("PPOTrainer.step", "queries", [given], adding("<unk> $A <eos>"))
    assert row.tolist() == given


def test_a_step_on_strings_has_no_end_behind_a_query() -> None:
    policies = tiny_trl.model(), tiny_trl.model(seed=1)
    made = tiny_ppo.trainer(*policies, adding("<unk> $A <eos>"), num_ppo_epochs=1)
    made.step(["w1 w2", "w3"], ["w4", "w5 <eos>"], [1.0, 0.0])
    assert [each.query.tolist() for each in made.last_rollout.episodes] == [[BOS, *ids("w1 w2")], [BOS, *ids("w3")]]
    assert [each.response.tolist() for each in made.last_rollout.episodes] == [ids("w4"), [*ids("w5"), EOS]]


def test_what_cannot_be_encoded_is_named_by_row() -> None:
    tokenizer = tiny_trl.tokenizer()
    made = tiny_ppo.trainer(tiny_trl.model(), tiny_trl.model(seed=1), tokenizer)
    for name, given in (("queries", ["w1", "\ud83d"]), ("responses", ["w2", "w3 \ud83d"])):
        rows = {"queries": ["w1", "w2"], "responses": ["w3", "w4"], "rewards": [0.0, 1.0]} | {name: given}
        with pytest.raises(ValueError, match=rf"step: {name}\[1\] cannot be encoded by the tokenizer \(\w+Error"):
            made.step(**rows)
    with pytest.raises(ValueError, match=r"PPOTrainer.generate: queries\[0\] cannot be encoded"):
        made.generate(["\ud83d"])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"queries\[0\] cannot be encoded .*roles must alternate"):
        made.generate([[{"role": "user", "content": "w1"}]])
    with pytest.raises(TypeError, match=r"queries\[0\] is a dict: a conversation is a list of messages"):
        made.generate([{"role": "user", "content": "w1"}])


def _ends(made: Any, stops: set[int], **options: Any) -> None:
    """Every response ends at the first of the ends, and at each of them some do."""
    responses = made.generate([[3, 4]] * 200, **options)
    last = {int(response[-1]) for response in responses if len(response) < made.args.response_length}
    assert last == stops
    assert all(not stops & set(response[:-1].tolist()) for response in responses)


def several(**options: Any) -> Any:
    return tiny_ppo.trainer(**{"response_length": 12, "temperature": 5.0, "stop_token_id": None} | options)


def test_a_response_ends_at_any_of_several_tokens() -> None:
    made = several()
    for given in ([1, 7], (1, 7), torch.tensor([1, 7])):
        _ends(made, {1, 7}, eos_token_id=given)
    _ends(made, {5}, eos_token_id=5)
    _ends(several(stop_token_id=[1, 7]), {1, 7})
    _ends(several(stop_token_id=[1, 7]), {5}, eos_token_id=5)
    for wrong, shown in (([1, 24], "24"), (-1, "-1"), ([1.5], "1.5"), (True, "True"), (["<eos>"], "'<eos>'")):
        with pytest.raises(ValueError, match=rf"generate: eos_token_id must hold ids in \[0, 24\), .* got {shown}"):
            made.generate([[3]], eos_token_id=wrong)


def test_the_models_own_ends_count_beside_the_tokenizers() -> None:
    tokenizer = tiny_trl.tokenizer()
    policy = tiny_trl.model()
    policy.generation_config.eos_token_id = [7, 9]
    made = several(policy=policy, ref_model=tiny_trl.model(seed=1), tokenizer=tokenizer)
    assert made.stop_token_ids == (tokenizer.eos_token_id, 7, 9)
    _ends(made, {1, 7, 9})
    assert policy.generation_config.eos_token_id == [7, 9]
    assert several(policy=policy, ref_model=tiny_trl.model(seed=1), stop_token="eos").stop_token_ids == (7, 9)
    policy.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="stop_token='eos' needs a tokenizer or a model with an end token"):
        several(policy=policy, ref_model=tiny_trl.model(seed=1), stop_token="eos")


def test_the_penalty_and_the_count_know_all_ends(tmp_path: Any) -> None:
    made = several(
        stop_token_id=(1, 7),
        response_length=3,
        missing_eos_penalty=10.0,
        batch_size=32,
        total_episodes=32,
        output_dir=str(tmp_path),
    )

    def none(prompts: list[Any], responses: list[torch.Tensor]) -> list[float]:
        return [0.0] * len(prompts)

    (found,) = made.train([[3, 4]], none)
    ended = [int(each.response[-1]) in (1, 7) for each in made.last_rollout.episodes]
    assert 0 < sum(ended) < 32
    assert found["val/num_eos_tokens"] == sum(ended)
    assert found["objective/scores"] == pytest.approx(-10.0 * (32 - sum(ended)) / 32)

    def per_token(prompts: list[Any], responses: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.ones(len(response)) for response in responses]

    made.total_steps = None
    evaluated = made.evaluate([[3, 4]] * 8, per_token)  # the penalty once, not at each token
    lengths = made.evaluate([[3, 4]] * 8, none)
    assert evaluated["eval/scores"] - lengths["eval/scores"] == pytest.approx(evaluated["eval/response_length"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "stop_token_id must be an id or several, got none"),
        ([1, -1], r"stop_token_id\[1\] must be an integer of at least 0, got -1"),
        (True, "stop_token_id must be an integer of at least 0, got True"),
        ("eos", "stop_token_id must be an integer of at least 0, got 'eos'"),
    ],
)
def test_ends_that_are_none(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(stop_token_id=given)
    with pytest.raises(ValueError, match=r"stop_token_id must hold ids in \[0, 24\), the model's vocabulary, got 24"):
        tiny_ppo.trainer(stop_token_id=[1, 24])
