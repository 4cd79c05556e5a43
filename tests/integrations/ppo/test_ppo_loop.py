"""Generation, training on prompts, evaluation, checkpoints."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_ppo
import tiny_trl
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prefkern.integrations.ppo import checkpoint, prompts

PROMPTS = [[2 + i % 5, 3, 4 + i % 3][: 1 + i % 3] for i in range(10)]


def reward(prompts: list[Any], responses: list[Tensor]) -> list[float]:
    return [float((response == 5).float().mean()) + float(torch.rand(())) for response in responses]


def trainer(folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "batch_size": 4,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "total_episodes": 24,
        "response_length": 5,
        "kl_controller": "adaptive",
        "kl_horizon": 50,
        "lr_scheduler_type": "linear",
        "output_dir": str(folder),
    }
    policy = options.pop("policy", None)
    return tiny_ppo.trainer(policy, **settings | options)


def test_responses_end_with_the_stop_token_and_are_those_of_the_model(tmp_path: Path) -> None:
    made = trainer(tmp_path, response_length=6, local_rollout_forward_batch_size=3)
    policy = made.model.policy
    together = made.generate(PROMPTS, do_sample=False)
    assert len(together) == len(PROMPTS)
    for prompt, response in zip(PROMPTS, together, strict=True):
        assert 1 <= len(response) <= 6
        assert not (response[:-1] == tiny_ppo.EOS).any()
        row = torch.cat([torch.tensor(prompt), response])
        with torch.no_grad():
            best = policy(input_ids=row[None]).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert torch.equal(best, response)
    whole = made.generate(PROMPTS[:2], do_sample=False, return_prompt=True)
    assert whole[1].tolist() == PROMPTS[1] + together[1].tolist()


def test_samples_follow_the_temperature_and_not_the_models_defaults() -> None:
    count = 4096
    policy = tiny_ppo.model()
    policy.generation_config.update(top_k=2, repetition_penalty=3.0, do_sample=True)
    made = tiny_ppo.trainer(policy, response_length=1, temperature=2.0, local_rollout_forward_batch_size=count)
    query = torch.tensor([3, 4])
    with torch.no_grad():
        expected = (policy(input_ids=query[None]).logits[0, -1] / 2.0).softmax(-1)
    sampled = torch.cat(made.generate([query] * count)).bincount(minlength=tiny_ppo.VOCABULARY) / count
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((sampled - expected).abs() < 5 * deviation + 1 / count).all()
    assert policy.generation_config.top_k == 2


def test_without_a_stop_token_nothing_stops() -> None:
    policy = tiny_ppo.model()
    assert policy.generation_config.eos_token_id == tiny_ppo.EOS
    made = tiny_ppo.trainer(policy, response_length=6, stop_token_id=None, temperature=5.0)
    responses = torch.stack(made.generate([[3, 4]] * 200))
    assert responses.shape == (200, 6)
    assert (responses[:, :-1] == tiny_ppo.EOS).any()


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", save_steps=2)
    whole.train(PROMPTS, reward)
    assert whole.global_step == 6
    assert [path.name for path in checkpoint._all(tmp_path / "whole")] == ["checkpoint-4", "checkpoint-6"]

    resumed = trainer(tmp_path / "other", policy=tiny_ppo.model(7))  # its weights come from the checkpoint
    torch.manual_seed(99)
    history = resumed.train(PROMPTS, reward, resume_from=tmp_path / "whole" / "checkpoint-4")
    tiny_ppo.assert_same(history, whole.history)
    tiny_ppo.assert_same(tiny_ppo.state(resumed), tiny_ppo.state(whole))

    # the newest by itself, and a folder without any
    again = trainer(tmp_path / "whole")
    assert again.train(PROMPTS, reward, resume_from=True) == whole.history
    fresh = trainer(tmp_path / "nothing", total_episodes=4)
    assert len(fresh.train(PROMPTS, reward, resume_from=True)) == 1


def test_a_resumed_run_with_tied_embeddings_and_an_adapter(tmp_path: Path) -> None:
    for name, policy in (("tied", lambda: tiny_ppo.model(tie_word_embeddings=True)), ("lora", tiny_ppo.adapted)):
        whole = trainer(tmp_path / name, policy=policy(), save_steps=1, total_episodes=8)
        whole.train(PROMPTS, reward)
        resumed = trainer(tmp_path / "other", policy=policy(), total_episodes=8)
        resumed.train(PROMPTS, reward, resume_from=tmp_path / name / "checkpoint-1")
        tiny_ppo.assert_same(tiny_ppo.state(resumed), tiny_ppo.state(whole))


def test_an_interrupted_save_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path)
    first = made.save_checkpoint(tmp_path / "checkpoint-0")
    kept = {path.name: path.read_bytes() for path in first.iterdir()}

    def dies(folder: str, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(made.accelerator, "save_state", dies)
    for target in (first, tmp_path / "checkpoint-1"):
        with pytest.raises(KeyboardInterrupt):
            made.save_checkpoint(target)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == kept
    assert not (tmp_path / "checkpoint-1").exists()
    assert checkpoint.newest(str(tmp_path)) == first
    monkeypatch.undo()
    made.save_checkpoint(tmp_path / "checkpoint-1")  # what was left behind is in nobody's way
    made.load_checkpoint(tmp_path / "checkpoint-1")


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = trainer(tmp_path).save_checkpoint()
    with pytest.raises(ValueError, match="batch_size: 4 there, 8 here"):
        trainer(tmp_path, batch_size=8).load_checkpoint(folder)
    with pytest.raises(ValueError, match=r"got a folder without ppo\.json"):
        trainer(tmp_path).load_checkpoint(tmp_path)
    assert json.loads((folder / "ppo.json").read_text())["global_step"] == 0


def test_save_pretrained(tmp_path: Path) -> None:
    tokenizer = tiny_trl.tokenizer()
    made = tiny_ppo.trainer(tiny_trl.model("tied"), tiny_trl.model("tied", 1), tokenizer)
    made.step(["w1 w2"] * 2, ["w3", "w4 w5"], [1.0, 0.0])
    for _ in range(2):  # over what is there
        made.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tiny_ppo.assert_same(dict(loaded.state_dict()), dict(made.model.policy.state_dict()))
    assert (
        PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")("w3")["input_ids"] == tokenizer("w3")["input_ids"]
    )
    value = load_file(tmp_path / "model" / "value_model.safetensors")
    assert torch.equal(value["value_head.weight"], made.model.value_head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_save_pretrained_of_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made = tiny_ppo.trainer(tiny_ppo.adapted())
    made.step(*tiny_ppo.episodes())
    made.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded = peft.PeftModel.from_pretrained(tiny_ppo.model(), tmp_path)
    ours = dict(made.model.policy.state_dict())
    tiny_ppo.assert_same({name: ours[name] for name in loaded.state_dict()}, dict(loaded.state_dict()))


def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    before = tiny_ppo.state(made)

    def length(prompts: list[Any], responses: list[Tensor]) -> list[float]:
        return [float(len(response)) for response in responses]

    sampled, greedy = made.evaluate(PROMPTS, length), made.evaluate(PROMPTS, length, do_sample=False)
    assert made.evaluate(PROMPTS, length) == sampled
    assert (
        greedy["eval/scores"]
        == greedy["eval/response_length"]
        == pytest.approx(sum(len(response) for response in made.generate(PROMPTS, do_sample=False)) / len(PROMPTS))
    )
    tiny_ppo.assert_same(tiny_ppo.state(made), before)


def test_prompts_come_in_permutations_of_the_dataset() -> None:
    source = prompts.Prompts(PROMPTS, None)
    rows = [row for step in range(5) for row in source.order(step, 4, seed=3)]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]
    assert source.order(7, 4, seed=3) == source.order(7, 4, seed=3)


def test_a_reward_function_gets_what_it_names(tmp_path: Path) -> None:
    tokenizer = tiny_trl.tokenizer()
    rows = [{"query": "w1 w2", "answer": "w3", "level": i} for i in range(3)]
    seen: dict[str, Any] = {}

    def score(prompts: list[str], responses: list[str], level: list[int], response_ids: list[Tensor]) -> list[float]:
        seen.update(prompts=prompts, responses=responses, level=level, response_ids=response_ids)
        return [float(value) for value in level]

    made = tiny_ppo.trainer(
        tiny_trl.model(),
        tiny_trl.model(seed=1),
        tokenizer,
        batch_size=3,
        total_episodes=3,
        response_length=2,
        missing_eos_penalty=10.0,
        output_dir=str(tmp_path),
    )
    (stats,) = made.train(rows, score)
    assert seen["prompts"] == ["w1 w2"] * 3
    assert sorted(seen["level"]) == [0, 1, 2]
    assert seen["responses"] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in seen["response_ids"]]
    unfinished = sum(not (ids == tokenizer.eos_token_id).any() for ids in seen["response_ids"])
    assert stats["objective/scores"] == pytest.approx(1.0 - 10.0 * unfinished / 3)
    with pytest.raises(ValueError, match="reward_fn must return one reward per response, got 1 for 3"):
        made.evaluate(rows, lambda prompts, responses: [1.0])
    with pytest.raises(ValueError, match=r"dataset\[1\] must have at least one token, got none"):
        made.evaluate(["w1", ""], score)
    conversation = [{"role": "user", "content": "w1 w2"}]
    with pytest.raises(ValueError, match=r"queries\[0\] is a list of messages, which needs a tokenizer with a chat"):
        made.generate([conversation])
    tokenizer.chat_template = "{% for each in messages %}{{ each['content'] }} {% endfor %}w9"
    seen.clear()
    made.evaluate([{"prompt": conversation, "level": 0}], score, do_sample=False)
    expected = made.generate([tokenizer("w1 w2 w9")["input_ids"]], do_sample=False)
    tiny_ppo.assert_same(seen["response_ids"], expected)
    assert seen["prompts"] == [conversation]
    with pytest.raises(ValueError, match=r"dataset\[0\] must have one of prompt, query, input_ids, got text"):
        made.evaluate([{"text": "w1"}], score)
