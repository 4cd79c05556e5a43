"""PPO measured: a step against plain PyTorch with full logits, and learning against a best that is known.

python bench/ppo.py step        # writes bench/results/ppo-step.md
python bench/ppo.py learning    # writes bench/results/ppo-learning.md
python bench/ppo.py batches     # writes bench/results/ppo-batches.md
"""

import argparse
import dataclasses
import datetime
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ppo_batches
from prefkern.commands.benchmark import machine
from prefkern.commands.benchmark.measure import peak_extra_bytes
from prefkern.commands.benchmark.report import si_bytes, si_seconds
from prefkern.commands.demo import model
from prefkern.head.engine import products
from prefkern.integrations.ppo import PPOConfig, PPOTrainer, advantages, known_optimum, rollout, stats
from prefkern.integrations.ppo.optimise import optimise

RESULTS = Path(__file__).parent / "results"
RESPONSE = (96, 193)
PHASES = {name: (name,) for name in ("score", "reference", "data", "forward", "backward", "optimiser")}
ROWS = {**PHASES, "forward + backward": ("forward", "backward"), "the step": tuple(PHASES)}


class Plain:
    """The same step in plain PyTorch, as it is usually written: logits of all positions, a loop over positions, AdamW
    as torch makes it. The trunk is passed as often as by the trainer, and no hidden states but the last are kept."""

    def __init__(self, trainer: PPOTrainer, episodes: rollout.Rollout) -> None:
        self.trainer, self.rollout, self.phases = trainer, episodes, stats.Phases(trainer.device)
        rows = np.arange(len(episodes))
        batch = episodes.batch(rows, trainer.pad_token_id, trainer.device)
        self.input_ids, self.attention_mask = batch.input_ids, batch.attention_mask
        width = self.input_ids.shape[1]
        positions = torch.arange(width - 1)
        start = torch.from_numpy(episodes.starts)[:, None]
        self.mask = (positions >= start) & (positions < start + torch.from_numpy(episodes.counts)[:, None])
        self.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.0, weight_decay=0.0)

    def forward(self, policy: Any, value_head: Any) -> tuple[Tensor, Tensor, Tensor]:
        trunk = policy.base_model
        hidden = trunk(self.input_ids, attention_mask=self.attention_mask, use_cache=False).last_hidden_state[:, :-1]
        logps = policy.get_output_embeddings()(hidden).div_(self.trainer.args.temperature).log_softmax(-1)
        taken = logps.gather(-1, self.input_ids[:, 1:, None]).squeeze(-1)
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1)
        return taken, value_head(hidden).squeeze(-1), entropy

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
            self.optimizer.step()
            self.optimizer.zero_grad()
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


class Trunk:
    """What both share: the passes of the trunk alone, to the hidden states and back from a gradient of them."""

    def __init__(self, trainer: PPOTrainer, plain: Plain) -> None:
        self.trainer, self.plain, self.phases = trainer, plain, stats.Phases(trainer.device)

    def hidden(self, policy: Any) -> Tensor:
        given = {"attention_mask": self.plain.attention_mask, "use_cache": False}
        found: Tensor = policy.base_model(self.plain.input_ids, **given).last_hidden_state
        return found

    def __call__(self) -> dict[str, float]:
        with torch.no_grad():
            for name, policy in (("score", self.trainer.model.policy), ("reference", self.trainer.reference.policy)):
                with self.phases(name):
                    self.hidden(policy)
        with self.phases("forward"):
            hidden = self.hidden(self.trainer.model.policy)
        gradient = torch.ones_like(hidden)
        with self.phases("backward"):
            hidden.backward(gradient)
        self.trainer.optimizer.zero_grad()
        return {}


def step(rounds: int, count: int, layers: int | None) -> str:
    """A table of phases, both ways, on one model and one rollout, with learning rate 0."""
    model.check(None)
    loaded = model.load(None)
    if layers is not None:
        loaded.model.base_model.layers = loaded.model.base_model.layers[:layers]
        loaded.model.config.num_hidden_layers = layers
    args = PPOConfig(learning_rate=0.0, num_ppo_epochs=1, disable_tqdm=True)
    trainer = PPOTrainer(loaded.model, None, loaded.tokenizer, args)
    made = np.random.default_rng(0)
    lengths = made.integers(*RESPONSE, size=count)
    vocabulary = trainer.limits.vocabulary
    episodes = trainer._rollout(
        [made.integers(vocabulary, size=length) for length in made.integers(*ppo_batches.QUERY, size=count)],
        [made.integers(vocabulary, size=length) for length in lengths],
        made.normal(size=count).tolist(),
        None,
        None,
    )
    plain, ours = Plain(trainer, episodes), Ours(trainer, episodes)
    contenders: dict[str, Any] = {"plain": plain, "prefkern": ours, "trunk": Trunk(trainer, plain)}
    with products.count_products() as counted:
        results = {name: each() for name, each in contenders.items()}  # warm, and checked before anything is timed
    for name, expected in results["plain"].items():
        found = results["prefkern"][name]
        if not math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-5):
            raise SystemExit(f"{name} differs: {found} with prefkern, {expected} in plain PyTorch; nothing was timed")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for index in range(rounds):
        for name, each in contenders.items():
            print(f"round {index + 1} of {rounds}: {name}", file=sys.stderr)
            each.phases.seconds.clear()
            each()
            runs[name].append(dict(each.phases.seconds))
            print({phase: round(taken, 2) for phase, taken in each.phases.seconds.items()}, file=sys.stderr)

    def seconds(name: str, phases: tuple[str, ...]) -> float:
        return statistics.median(sum(run.get(phase, 0.0) for phase in phases) for run in runs[name])

    rows = []
    for title, phases in ROWS.items():
        naive, own, alike = (seconds(name, phases) for name in contenders)
        rows.append(
            [title, si_seconds(naive), si_seconds(own), f"{own / naive:.2f}", si_seconds(alike) if alike else ""]
        )
    scored, positions = int(lengths.sum()), plain.input_ids.numel() - count
    V, H = trainer.model.policy.get_output_embeddings().weight.shape
    made_products = counted.products(scored, H, V), 5 * positions / scored
    rows.append(_ratio("products of the head, for each scored token", *made_products[::-1], "{:.2f}".format))
    print("peak memory", file=sys.stderr)
    scoring = _peak(plain.score), _peak(ours.score)
    whole = _peak(plain), _peak(ours)
    trainer.args = dataclasses.replace(args, max_head_memory=0)
    without = whole[0], _peak(ours)
    rows += [
        _ratio("peak memory, scoring with both models", *scoring, si_bytes),
        _ratio("peak memory, the step", *whole, si_bytes),
        _ratio("peak memory, the step, `max_head_memory=0`", *without, si_bytes),
    ]
    title = (
        f"{loaded.name}{'' if layers is None else f', {layers} layers'}, float32, {count} episodes of "
        f"{int(episodes.lengths.sum())} tokens in all, {scored} scored, V = {V}, H = {H}; one epoch, one mini-batch; "
        f"medians of {rounds} interleaved rounds. {_about()}"
    )
    return f"{title}\n\n{_table(['', 'plain PyTorch', 'prefkern', 'ratio', 'trunk alone'], rows)}\n"


def _peak(work: Callable[[], Any]) -> int:
    def run() -> tuple[()]:
        work()
        return ()

    return peak_extra_bytes(run, torch.device("cpu"))


def _ratio(title: str, plain: float, ours: float, shown: Callable[[Any], str]) -> list[str]:
    return [title, shown(plain), shown(ours), f"{ours / plain:.2f}", ""]


def batches(epochs: int = 100) -> str:
    return f"Means of {epochs} epochs.\n\n{_table(*ppo_batches.measured(epochs))}\n"


def learning(steps: int) -> str:
    best = known_optimum.best()
    rows = [["best possible", *(f"{value:.3f}" for value in best), ""]]
    for seed in range(5):
        found = known_optimum.reached(known_optimum.learn(seed, steps))
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
    parser.add_argument("what", choices=("step", "learning", "batches"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--layers", type=int, help="of the model's trunk, for a quick look (default: all)")
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    text = {
        "step": lambda: step(given.rounds, given.episodes, given.layers),
        "learning": lambda: learning(given.steps),
        "batches": batches,
    }[given.what]()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"ppo-{given.what}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
