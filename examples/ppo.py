"""PPO on SmolLM2-135M-Instruct, on the CPU, offline: short answers to the point.

    make ppo                          # or: python examples/ppo.py --steps 20 --output ppo-example

An answer ends with its first full stop. The reward is a program: 1 for a sentence of 10 words, less the further its
length is from that, and 0 for one that is cut off or names nothing of the question. Prints answers before and after
training, and writes a plot of reward, KL, clip fraction and length.
"""

import argparse
import datetime
import json
import random
import re
from pathlib import Path
from typing import Any

import transformers

from prefkern.commands.benchmark.machine import processor
from prefkern.commands.demo import data, model
from prefkern.integrations.ppo import PPOConfig, PPOTrainer

WORDS, TOKENS = 10, 32
EPISODES, ASKED = 12, 3
COMMON = {"should", "could", "would", "which", "where", "there", "their", "about", "before", "while"}
PLOTTED = (
    ("objective/scores", "reward"),
    ("objective/kl", "KL to the reference, nats per answer"),
    ("policy/clipfrac_avg", "share of ratios that are clipped"),
    ("val/response_length", "tokens per answer"),
)


def brevity(prompts: list[Any], responses: list[str]) -> list[float]:
    """1 for a whole sentence of 10 words, 0 for one of 20 or more, of none, without an end, or beside the question."""
    questions = [prompt[-1]["content"] for prompt in prompts]
    return [
        max(0.0, 1.0 - abs(len(text.split()) - WORDS) / WORDS) if text.endswith(".") and named(question, text) else 0.0
        for question, text in zip(questions, responses, strict=True)
    ]


def named(question: str, text: str) -> set[str]:
    """The words of the question, from five letters on, that the text has too."""
    words = [set(re.findall(r"[a-z]{5,}", each.lower())) for each in (question, text)]
    return (words[0] & words[1]) - COMMON


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", help="a model of transformers, by folder or name (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--output", type=Path, default=Path("ppo-example"))
    given = parser.parse_args()

    model.check(given.model)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loaded = model.load(given.model)
    questions = [pair.prompt for pair in data.read(data.SHIPPED)]
    random.Random(0).shuffle(questions)
    questions = [question for question in questions if named(question, question)]
    prompts = [[{"role": "user", "content": question}] for question in questions]  # as the chat template takes them
    asked, trained = prompts[:ASKED], prompts[ASKED:]

    trainer = PPOTrainer(
        loaded.model,
        None,  # the reference: a frozen copy
        loaded.tokenizer,
        PPOConfig(
            learning_rate=3e-5,
            batch_size=EPISODES,
            num_mini_batches=2,
            num_ppo_epochs=1,
            total_episodes=EPISODES * given.steps,
            response_length=TOKENS,
            stop_token_id=loaded.tokenizer(".", add_special_tokens=False)["input_ids"][-1],
            kl_coef=0.02,
            output_dir=str(given.output),
        ),
    )
    before = [answer(trainer, question) for question in asked]
    history = trainer.train(trained, brevity)
    after = [answer(trainer, question) for question in asked]

    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "history.json").write_text(json.dumps(history, indent=1))
    plot(history, given.output / "ppo.png")
    text = report(loaded.name, history, list(zip(questions, before, after, strict=False)))
    (given.output / "report.md").write_text(text)
    print(f"\n{text}\nplot: {given.output / 'ppo.png'}")


def report(name: str, history: list[dict[str, float]], answers: list[tuple[str, str, str]]) -> str:
    """Means of the first and the last quarter of the run, and the answers, as Markdown."""
    part = max(1, len(history) // 4)
    lines = [f"{name}, {EPISODES} episodes a step; {datetime.date.today()}, {processor()}.", ""]
    lines += [f"| | first {part} of {len(history)} steps | last {part} |", "| --- | ---: | ---: |"]
    for key, title in PLOTTED:
        first, last = (sum(stats[key] for stats in steps) / part for steps in (history[:part], history[-part:]))
        lines.append(f"| {title} | {first:.3g} | {last:.3g} |")
    lines += ["", "| question | before | after |", "| --- | --- | --- |"]
    lines += ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in answers]
    return "\n".join(lines) + "\n"


def answer(trainer: PPOTrainer, prompt: list[dict[str, str]]) -> str:
    """The greedy answer to one question."""
    (response,) = trainer.generate([prompt], do_sample=False)
    text = " ".join(trainer.tokenizer.decode(response, skip_special_tokens=True).split())
    return text if text.endswith(".") else f"{text} ..."


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
