"""PPO on SmolLM2-135M-Instruct, on the CPU, offline: short answers that still say something.

    make ppo                          # or: python examples/ppo.py --steps 20 --output ppo-example

The reward is a program: an answer that ends by itself gets 1 at 12 words, less the further its length is from that; one
that is cut off gets none. Prints answers before and after, and writes a plot of reward, KL, clip fraction and length.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers

from prefkern.demo import data, model
from prefkern.integrations.ppo import PPOConfig, PPOTrainer

WORDS, TOKENS = 12, 40
ASKED = 3
PLOTTED = (
    ("objective/scores", "reward"),
    ("objective/kl", "KL to the reference, nats per answer"),
    ("policy/clipfrac_avg", "tokens whose ratio is clipped"),
    ("val/response_length", "tokens per answer"),
)


def brevity(prompts: list[Any], responses: list[str], response_ids: list[torch.Tensor]) -> list[float]:
    """1 for an answer of 12 words that ends by itself, lower the further it is away; 0 for one that is cut off."""
    rewards = []
    for text, ids in zip(responses, response_ids, strict=True):
        words = len(text.split())
        ended = len(ids) < TOKENS and words > 0
        rewards.append(max(0.0, 1.0 - abs(words - WORDS) / WORDS) if ended else 0.0)
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--model", help="a model of transformers, by folder or name (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--output", type=Path, default=Path("ppo-example"))
    given = parser.parse_args()

    model.check(given.model)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loaded = model.load(given.model)
    pairs = data.read(data.SHIPPED)
    random.Random(0).shuffle(pairs)
    questions = [[{"role": "user", "content": pair.prompt}] for pair in pairs]
    asked, trained = questions[:ASKED], questions[ASKED:]

    trainer = PPOTrainer(
        loaded.model,
        None,  # the reference: a frozen copy
        loaded.tokenizer,
        PPOConfig(
            learning_rate=1e-5,
            batch_size=16,
            num_mini_batches=2,
            num_ppo_epochs=2,
            total_episodes=16 * given.steps,
            response_length=TOKENS,
            temperature=1.0,
            kl_coef=0.01,
            output_dir=str(given.output),
        ),
    )
    before = trainer.evaluate(trained[:16], brevity)
    answers = [answer(trainer, question) for question in asked]
    history = trainer.train(trained, brevity)
    after = trainer.evaluate(trained[:16], brevity)

    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "history.json").write_text(json.dumps(history, indent=1))
    plot(history, given.output / "ppo.png")
    print(f"\nreward {before['eval/scores']:.2f} -> {after['eval/scores']:.2f}, ", end="")
    print(f"tokens per answer {before['eval/response_length']:.1f} -> {after['eval/response_length']:.1f}")
    for question, old in zip(asked, answers, strict=True):
        print(f"\n{question[0]['content']}\n  before: {old}\n  after:  {answer(trainer, question)}")
    print(f"\nplot: {given.output / 'ppo.png'}")


def answer(trainer: PPOTrainer, question: list[dict[str, str]]) -> str:
    """The greedy answer to one question."""
    template = trainer.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)
    (response,) = trainer.generate([template["input_ids"]], do_sample=False)
    text = " ".join(trainer.tokenizer.decode(response, skip_special_tokens=True).split())
    return text if len(response) < TOKENS else f"{text} ..."


def plot(history: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3), layout="constrained", dpi=120)
    for axes, (name, title) in zip(figure.subplots(1, len(PLOTTED)), PLOTTED, strict=True):
        axes.plot(range(1, len(history) + 1), [stats[name] for stats in history])
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
