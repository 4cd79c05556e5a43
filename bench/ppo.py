"""PPO measured: a step against plain PyTorch with full logits, and learning against a best that is known.

python bench/ppo.py step        # writes bench/results/ppo-step.md
python bench/ppo.py learning    # writes bench/results/ppo-learning.md
"""

import argparse
import datetime
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefkern.benchmark import machine
from prefkern.benchmark.measure import peak_extra_bytes
from prefkern.benchmark.report import si_bytes, si_seconds
from prefkern.demo import model
from prefkern.integrations.ppo import PPOConfig, PPOTrainer, advantages, known, rollout, stats
from prefkern.integrations.ppo.optimise import optimise

RESULTS = Path(__file__).parent / "results"
QUERY, RESPONSE = 24, (40, 72)
PHASES = ("score", "reference", "data", "forward", "backward", "optimiser")


class Plain:
    """The same step in plain PyTorch, as it is usually written: logits of all positions, a loop over positions."""

    def __init__(self, trainer: PPOTrainer, episodes: rollout.Rollout) -> None:
        self.trainer, self.rollout, self.phases = trainer, episodes, stats.Phases(trainer.device)
        rows = np.arange(len(episodes))
        batch = episodes.batch(rows, trainer.pad_token_id, trainer.device)
        self.input_ids, self.attention_mask = batch.input_ids, batch.attention_mask
        width = self.input_ids.shape[1]
        positions = torch.arange(width - 1)
        start = torch.from_numpy(episodes.starts)[:, None]
        self.mask = (positions >= start) & (positions < start + torch.from_numpy(episodes.counts)[:, None])

    def forward(self, policy: Any, value_head: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = policy(self.input_ids, attention_mask=self.attention_mask, output_hidden_states=True, use_cache=False)
        logits = output.logits[:, :-1] / self.trainer.args.temperature
        logps = logits.log_softmax(-1)
        taken = logps.gather(-1, self.input_ids[:, 1:, None]).squeeze(-1)
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1)
        return taken, value_head(output.hidden_states[-1][:, :-1]).squeeze(-1), entropy

    def score(self) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            with self.phases("score"):
                logps, values, _ = self.forward(self.trainer.model.policy, self.trainer.model.value_head)
            with self.phases("reference"):
                ref_logps, *_ = self.forward(self.trainer.reference.policy, self.trainer.model.value_head)
        return logps, values, ref_logps

    def __call__(self) -> dict[str, float]:
        args, mask = self.trainer.args, self.mask
        logps, values, ref_logps = self.score()
        with torch.no_grad(), self.phases("data"):
            rewards = -args.kl_coef * (logps - ref_logps)
            last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
            rewards[torch.arange(len(rewards)), last] += self.rollout.scores.float()
            rewards, values = rewards * mask, values * mask
            following, reversed_advantages = torch.zeros(len(rewards)), []
            for t in reversed(range(mask.shape[1])):
                after = values[:, t + 1] if t + 1 < mask.shape[1] else 0.0
                delta = rewards[:, t] + args.gamma * after - values[:, t]
                following = delta + args.gamma * args.lam * following
                reversed_advantages.append(following)
            advantage = torch.stack(reversed_advantages[::-1], 1)
            returns = advantage + values
            scored = advantage[mask]
            advantage = (advantage - scored.mean()) / (scored.var() + 1e-8).sqrt() * mask
        self.trainer.model.train()
        with self.phases("forward"):
            new, predicted, entropy = self.forward(self.trainer.model.policy, self.trainer.model.value_head)
            ratio = ((new - logps) * mask).exp()
            clipped = ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
            policy = -torch.minimum(ratio * advantage, clipped * advantage)[mask].mean()
            near = values + (predicted - values).clamp(-args.cliprange_value, args.cliprange_value)
            value = torch.maximum((predicted - returns) ** 2, (near - returns) ** 2)[mask].mean() / 2
            loss = policy + args.vf_coef * value
        with self.phases("backward"):
            loss.backward()
        with self.phases("optimiser"):
            norm = torch.nn.utils.clip_grad_norm_(self.trainer.model.parameters(), args.max_grad_norm)
            self.trainer.optimizer.step()
            self.trainer.optimizer.zero_grad()
        return {
            "loss/policy_avg": float(policy.detach()),
            "loss/value_avg": float(value.detach()),
            "policy/entropy_avg": float(entropy[mask].mean()),
            "grad_norm": float(norm),
        }


class Ours:
    """The step of the trainer, after its checks."""

    def __init__(self, trainer: PPOTrainer, episodes: rollout.Rollout) -> None:
        self.trainer, self.rollout, self.phases = trainer, episodes, trainer.phases

    def score(self) -> None:
        self.trainer._score(self.rollout)

    def __call__(self) -> dict[str, float]:
        self.score()
        with self.phases("data"):
            advantages.fill(self.rollout, self.trainer.args, self.trainer.controller.coef)
        return optimise(self.trainer, self.rollout)


def step(rounds: int, count: int) -> str:
    """A table of phases, both ways, on one model, one rollout and one optimiser (with learning rate 0)."""
    model.check(None)
    loaded = model.load(None)
    args = PPOConfig(learning_rate=0.0, num_ppo_epochs=1, temperature=1.0, disable_tqdm=True)
    trainer = PPOTrainer(loaded.model, None, loaded.tokenizer, args)
    made = np.random.default_rng(0)
    lengths = made.integers(*RESPONSE, size=count)
    vocabulary = trainer.limits.vocabulary
    episodes = trainer._rollout(
        [made.integers(vocabulary, size=QUERY) for _ in lengths],
        [made.integers(vocabulary, size=length) for length in lengths],
        made.normal(size=count).tolist(),
        None,
        None,
    )
    contenders: dict[str, Any] = {"plain": Plain(trainer, episodes), "prefkern": Ours(trainer, episodes)}
    results = {name: each() for name, each in contenders.items()}  # warm, and checked before anything is timed
    for name, expected in results["plain"].items():
        found = results["prefkern"][name]
        if not math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-5):
            raise SystemExit(f"{name} differs: {found} with prefkern, {expected} in plain PyTorch; nothing was timed")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for index in range(rounds):
        print(f"round {index + 1} of {rounds}", file=sys.stderr)
        for name, each in contenders.items():
            each.phases.seconds.clear()
            each()
            runs[name].append(dict(each.phases.seconds))
    peaks = {}
    for name, each in contenders.items():
        peaks[name] = {
            "scoring, both models": peak_extra_bytes(lambda each=each: each.score() or (), trainer.device),
            "the whole step": peak_extra_bytes(lambda each=each: each() and (), trainer.device),
        }
    rows = []
    for phase in (*PHASES, "the step"):
        times = {
            name: statistics.median(sum(run.values()) if phase == "the step" else run[phase] for run in found)
            for name, found in runs.items()
        }
        ratio = f"{times['prefkern'] / times['plain']:.2f}"
        rows.append([phase, si_seconds(times["plain"]), si_seconds(times["prefkern"]), ratio])
    for phase in peaks["plain"]:
        plain, ours = peaks["plain"][phase], peaks["prefkern"][phase]
        rows.append([f"peak memory, {phase}", si_bytes(plain), si_bytes(ours), f"{ours / plain:.2f}"])
    title = (
        f"{loaded.name}, float32, {count} episodes of {int(episodes.lengths.sum())} tokens in all, "
        f"{int(lengths.sum())} scored; one epoch, one mini-batch; medians of {rounds} interleaved rounds. {_about()}"
    )
    return f"{title}\n\n{_table(['', 'plain PyTorch', 'prefkern', 'ratio'], rows)}\n"


def learning(steps: int) -> str:
    best = known.best()
    rows = [["best possible", *(f"{value:.3f}" for value in best), ""]]
    for seed in range(5):
        found = known.reached(known.learn(seed, steps))
        rows.append([f"seed {seed}", *(f"{value:.3f}" for value in found), f"{found.objective / best.objective:.1%}"])
    title = f"{steps} steps of 32 episodes; means of the last 20 steps. {_about()}"
    return f"{title}\n\n{_table(['', 'reward - kl_coef KL', 'reward', 'KL', 'of the best'], rows)}\n"


def _about() -> str:
    found = machine.versions(("prefkern", "torch", "transformers", "accelerate"))
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    here = machine.describe(torch.device("cpu"))
    return f"{datetime.date.today()}; {here['processor']}, {here['threads']} threads; {versions}."


def _table(columns: list[str], rows: list[list[str]]) -> str:
    align = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, align, *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("step", "learning"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    text = step(given.rounds, given.episodes) if given.what == "step" else learning(given.steps)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"ppo-{given.what}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
