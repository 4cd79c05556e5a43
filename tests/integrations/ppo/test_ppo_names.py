"""Names of other trainers are answered with the name here; options are fixed once they are made."""

import copy
import dataclasses
import inspect
import pickle
import re
from typing import Any

import pytest
import tiny_ppo
import tiny_trl
from transformers import GenerationConfig

from prefkern.integrations.ppo import PPOConfig, PPOTrainer, names


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ppo_epochs": 4}, "there is no ppo_epochs: use num_ppo_epochs"),
        ({"init_kl_coef": 0.2}, "there is no init_kl_coef: use kl_coef"),
        ({"lr": 1e-5}, "there is no lr: use learning_rate"),
        ({"adap_kl_ctrl": True}, "there is no adap_kl_ctrl: use kl_controller='adaptive' for True, 'fixed' for False"),
        ({"bf16": True}, "there is no bf16: use mixed_precision='bf16'"),
        ({"kl_coeff": 0.1}, "there is no kl_coeff: did you mean kl_coef?"),
        ({"wibble": 1}, "there is no wibble"),
        (
            {"steps": 5, "target": 6.0, "seed": 1},
            "there is no steps: use total_episodes, which counts episodes; there is no target: use kl_target",
        ),
    ],
)
def test_options_of_other_trainers(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TypeError) as refused:
        PPOConfig(**options)
    assert str(refused.value) == f"prefkern.PPOConfig: {sentence}"


def test_options_without_a_name() -> None:
    with pytest.raises(TypeError, match="arguments without a name do not exist; all others have one: got 2"):
        PPOConfig("gpt2", 1e-5)  # type: ignore[misc]


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("table", "known", "further"),
    [
        (names.OPTIONS, parameters(PPOConfig), set()),
        (names.TRAINER, parameters(PPOTrainer), parameters(PPOConfig)),
        (names.STEP, parameters(PPOTrainer.step), set()),
        (names.GENERATE, parameters(PPOTrainer.generate), parameters(PPOConfig) | set(vars(GenerationConfig()))),
        (names.ATTRIBUTES, set(), set(vars(tiny_ppo.trainer())) | set(vars(PPOTrainer))),
    ],
)
def test_every_answer_names_what_there_is(table: dict[str, str], known: set[str], further: set[str]) -> None:
    assert not known & table.keys()
    for name, answer in table.items():
        used = re.match(r"use (\w+)", answer)
        assert used is None or used[1] in known | further, (name, answer)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"config": PPOConfig()}, "there is no config: use args"),
        ({"processing_class": None}, "there is no processing_class: use tokenizer"),
        ({"reward_model": None}, "there is no reward_model: pass a reward function to PPOTrainer.train"),
        ({"tokeniser": None}, "there is no tokeniser: did you mean tokenizer?"),
    ],
)
def test_arguments_of_other_trainers(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TypeError) as refused:
        PPOTrainer(model=tiny_ppo.model(), **arguments)
    assert str(refused.value) == f"prefkern.PPOTrainer: {sentence}"


def test_the_order_of_other_trainers() -> None:
    model, reference, tokenizer, args = tiny_ppo.model(), tiny_ppo.model(1), tiny_trl.tokenizer(), PPOConfig()
    for order in ((args, model, reference, tokenizer), (model, reference, args), (model, args)):
        with pytest.raises(TypeError, match=r"the order is PPOTrainer\(model, ref_model, tokenizer, args\)"):
            PPOTrainer(*order)
    with pytest.raises(TypeError, match=rf"args must be a PPOConfig, got {type(tokenizer).__name__}$"):
        PPOTrainer(model, reference, None, tokenizer)
    with pytest.raises(TypeError, match=r"without a name are model, ref_model, tokenizer, args; .* got 7"):
        PPOTrainer(args, tokenizer, model, reference, None, None, None)


def test_other_names_of_methods_and_attributes() -> None:
    trainer = tiny_ppo.trainer()
    queries, responses, rewards = tiny_ppo.episodes()
    with pytest.raises(TypeError, match=r"^prefkern.PPOTrainer.step: there is no scores: use rewards$"):
        trainer.step(queries, responses, scores=rewards)
    with pytest.raises(AttributeError, match=r"there is no log_stats: PPOTrainer.step returns the statistics"):
        trainer.log_stats({}, {}, rewards)
    trainer.accelerator.init_trackers("ppo")  # as the sentence says
    trainer.accelerator.log({"objective/kl": 0.0}, trainer.global_step)
    with pytest.raises(AttributeError, match=r"^prefkern.PPOTrainer: there is no wibble$"):
        trainer.wibble  # noqa: B018
    assert not hasattr(trainer, "last_rollout")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_token": 3}, "there is no max_new_token: did you mean max_new_tokens?"),
        ({"length_sampler": len}, "there is no length_sampler: use max_new_tokens"),
        (
            {"num_return_sequences": 2},
            "there is no num_return_sequences: give each query as often",
        ),
        ({"return_dict_in_generate": True}, "responses alone are returned"),
    ],
)
def test_options_of_generation_that_would_be_left_alone(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TypeError) as refused:
        tiny_ppo.trainer().generate([[3, 4]], **options)
    assert str(refused.value).startswith("prefkern.PPOTrainer.generate: ")
    assert sentence in str(refused.value)


def test_options_are_fixed_and_others_are_made_of_them() -> None:
    args = PPOConfig(kl_coef=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"kl_coef is fixed .*\.replace\(options, kl_coef="):
        args.kl_coef = -3.0  # type: ignore[misc]
    with pytest.raises(TypeError, match="there is no kl_coeff: did you mean kl_coef"):
        args.kl_coeff = 1.0  # type: ignore[attr-defined]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del args.kl_coef
    assert args.kl_coef == 0.1
    other = dataclasses.replace(args, kl_coef=0.2, cliprange=0.3)
    assert (other.kl_coef, other.cliprange, args.kl_coef) == (0.2, 0.3, 0.1)
    with pytest.raises(ValueError, match="kl_coef must be a finite number"):
        dataclasses.replace(args, kl_coef=-3.0)
    for same in (pickle.loads(pickle.dumps(args)), copy.deepcopy(args), copy.copy(args)):
        assert same == args
    assert list(inspect.signature(PPOConfig).parameters) == [field.name for field in dataclasses.fields(PPOConfig)]


def test_pairs_of_options_that_say_the_same_thing_may_agree() -> None:
    assert PPOConfig(batch_size=64, mini_batch_size=16, num_mini_batches=4).parts(64) == 4
    with pytest.raises(ValueError, match="batch_size=64 in mini-batches of 16 makes 4, got num_mini_batches=2"):
        PPOConfig(batch_size=64, mini_batch_size=16, num_mini_batches=2)
    both: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    agree = tiny_ppo.trainer(batch_size=16, num_mini_batches=2, **both)
    one = tiny_ppo.trainer(batch_size=16, num_mini_batches=2, per_device_train_batch_size=2)
    tiny_ppo.assert_same(*(each.step(*tiny_ppo.episodes()) for each in (agree, one)))
    with pytest.raises(
        ValueError, match="a mini-batch of 16 episodes on 1 process in parts of 2 makes 8, got 4"
    ) as refused:
        tiny_ppo.trainer(batch_size=16, **both)
    assert str(refused.value).startswith("prefkern.PPOConfig: ")
    PPOConfig(batch_size=16, **both).check_processes(2)


def test_no_tracker_by_any_name(tmp_path: Any) -> None:
    for none in (None, "none", ["none"], (), []):
        assert PPOConfig(report_to=none).report_to is None
    assert PPOConfig(report_to="tensorboard").report_to == "tensorboard"
    assert PPOConfig(report_to=["tensorboard", "wandb"]).report_to == ("tensorboard", "wandb")
    with pytest.raises(TypeError, match="report_to must be names of trackers, or 'none', got int"):
        PPOConfig(report_to=3)  # type: ignore[arg-type]
    made = tiny_ppo.trainer(
        report_to="none", batch_size=2, total_episodes=2, response_length=2, output_dir=str(tmp_path)
    )
    (stats,) = made.train([[3, 4], [5, 6]], lambda prompts, responses: [1.0, 0.0])
    assert stats["objective/scores"] == 0.5
    assert list(tmp_path.iterdir()) == []
