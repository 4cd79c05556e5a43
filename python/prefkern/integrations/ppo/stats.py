"""What a step reports, under TRL's names, and where its time went."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from prefkern.integrations.ppo.rollout import Rollout

PHASES = ("generate", "score", "reference", "data", "forward", "backward", "optimiser")


class Phases:
    """Seconds and tokens of each phase. On an accelerator a phase waits for its end, so that its time is its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, int] = defaultdict(int)

    @contextlib.contextmanager
    def __call__(self, name: str, tokens: int = 0) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type != "cpu":
                torch.accelerator.synchronize(self._device)
            self.seconds[name] += time.perf_counter() - began
            self.tokens[name] += tokens

    def table(self) -> str:
        """One line for each phase: seconds, share of all, tokens per second."""
        total = sum(self.seconds.values())
        lines = [f"{'phase':<12}{'seconds':>10}{'share':>8}{'tokens/s':>12}"]
        for name in (*PHASES, *sorted(set(self.seconds) - set(PHASES))):
            seconds, tokens = self.seconds.get(name, 0.0), self.tokens.get(name, 0)
            if seconds:
                rate = f"{tokens / seconds:,.0f}" if tokens else "-"
                lines.append(f"{name:<12}{seconds:>10.2f}{seconds / total:>8.0%}{rate:>12}")
        return "\n".join([*lines, f"{'all':<12}{total:>10.2f}"])


class Means:
    """Means over tokens, collected from parts of mini-batches on several processes, then over mini-batches.

    A part adds ``share * value`` with its share of the mini-batch's tokens; nothing waits for the device until `read`.
    """

    def __init__(self) -> None:
        self._updates: list[dict[str, Tensor]] = []

    def begin(self) -> None:
        self._updates.append({})

    def add(self, values: dict[str, Tensor], share: float) -> None:
        update = self._updates[-1]
        values = dict(values)
        if "val/ratio_var" in values:  # variances do not add up, second moments do
            values["val/ratio_var"] = values["val/ratio_var"] + values["val/ratio"].square()
        for name, value in values.items():
            update[name] = update.get(name, 0.0) + share * value.detach()

    def last(self, name: str, reduce: "Reduce") -> float:
        """One mean of the mini-batch at hand."""
        return float(reduce(self._updates[-1][name]))

    def read(self, reduce: "Reduce") -> dict[str, float]:
        """Floats, averaged over the updates; ``reduce`` sums a tensor over processes."""
        if not self._updates:
            return {}
        names = sorted(self._updates[0])
        table = reduce(torch.stack([torch.stack([update[name] for name in names]) for update in self._updates]))
        means = dict(zip(names, table.T.double(), strict=True))
        if "val/ratio_var" in means:
            means["val/ratio_var"] = (means["val/ratio_var"] - means["val/ratio"].square()).clamp(min=0)
        return {name: float(values.mean()) for name, values in means.items()}


class Reduce:
    """Sums a tensor over all processes."""

    def __init__(self, accelerator: object) -> None:
        self._accelerator = accelerator

    def __call__(self, value: Tensor) -> Tensor:
        return self._accelerator.reduce(value, reduction="sum")  # type: ignore[attr-defined, no-any-return]


def of_rollout(
    rollout: Rollout, *, kl_coef: float, kl_in_reward: bool, stop_token_ids: tuple[int, ...]
) -> dict[str, float]:
    """TRL's ``objective/*`` and ``val/*`` of a rollout: sums over a response, averaged over responses."""
    episodes = len(rollout)
    scores = rollout.scores.clone()
    for index, each in enumerate(rollout.episodes):
        if each.rewards is not None:
            scores[index] += float(each.rewards.sum())
    stats = {
        "objective/scores": float(scores.mean()),
        "objective/scores_std": float(scores.std()) if episodes > 1 else 0.0,
        "objective/entropy": -float(rollout.logps[rollout.mask].double().sum()) / episodes,
        "objective/kl_coef": kl_coef,
    }
    penalty = 0.0
    if rollout.kl is not None:
        stats["objective/kl"] = float(rollout.kl.double().sum()) / episodes
        penalty = -kl_coef * stats["objective/kl"] if kl_in_reward else 0.0
    stats["objective/non_score_reward"] = penalty
    stats["objective/rlhf_reward"] = penalty + stats["objective/scores"]
    returns, values = rollout.returns[rollout.value_mask].double(), rollout.values[rollout.value_mask].double()
    variance = float(returns.var()) if len(returns) > 1 else 0.0
    stats["val/var_explained"] = 1.0 - float((returns - values).var()) / variance if variance else 0.0
    stats["val/response_length"] = float(sum(len(each.response) for each in rollout.episodes)) / episodes
    if stop_token_ids:
        stats["val/num_eos_tokens"] = sum(
            int(np.isin(each.response, stop_token_ids).sum()) for each in rollout.episodes
        )
    return stats
