"""The options of PPO. Names and defaults are those of TRL 1.12's PPOConfig where it has them."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from prefkern import check
from prefkern.integrations.ppo import names

WHERE = "PPOConfig"
C = TypeVar("C")


def _in_sentences(config: type[C]) -> type[C]:
    """Answers names that are not options, and refuses changes, in sentences."""
    fields = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]

    def refuse(self: object, name: str, *_: object) -> None:
        names.refuse_unknown(WHERE, [name], fields, names.OPTIONS)
        raise dataclasses.FrozenInstanceError(
            f"prefkern.{WHERE}: {name} is fixed once the options are made, as a trainer reads some of them when it is "
            f"made only: make others with dataclasses.replace(options, {name}=...)"
        )

    for method, own in (
        ("__init__", names.answered(WHERE, names.OPTIONS)(config.__init__)),
        ("__setattr__", refuse),
        ("__delattr__", refuse),
    ):
        setattr(config, method, own)
    return config


@_in_sentences
@dataclass(kw_only=True, frozen=True)
class PPOConfig:
    """Options of `PPOTrainer`, checked when made and fixed from then on: ``dataclasses.replace`` makes others of them.

    Attributes:
        learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon: of AdamW.
        lr_scheduler_type: ``constant``, or ``linear`` or ``cosine`` down to 0 over the steps of `PPOTrainer.train` (or
            ``total_episodes``, for `PPOTrainer.step`).
        warmup_steps: steps over which the learning rate rises to its value.
        max_grad_norm: the gradient's norm is clipped to it; None does not clip.

        batch_size: episodes (one query with its response) in a step of `PPOTrainer.train`, over all processes.
        mini_batch_size, num_mini_batches: episodes between two optimiser steps, over all processes, or the number of
            parts a rollout is cut into; one of them, or both where they agree (by default one part).
        per_device_train_batch_size, gradient_accumulation_steps: episodes of one forward and backward on one process,
            or the number of parts a mini-batch is cut into there; one of them, or both where they agree (by default one
            part). Neither changes a gradient: every part is divided by the token count of the whole mini-batch.
        local_rollout_forward_batch_size: episodes of one forward without a gradient, on one process.
        num_ppo_epochs: passes over each rollout.
        total_episodes: what `PPOTrainer.train` runs; by default the dataset once.

        response_length: the most tokens that are generated.
        temperature: of sampling, and of all log-probabilities.
        stop_token, stop_token_id: ``"eos"``, or the id or ids at any of which a response ends. By default, where there
            is a tokenizer, its end and those of the model's ``generation_config`` (``"eos"``: also without one).
        missing_eos_penalty: subtracted from the score of a response without any of them.

        kl_coef, kl_estimator: the penalty on ``KL(policy || reference)`` and its estimate: k1 ``-x``, k2 ``x^2 / 2``,
            k3 ``e^x - x - 1``, ``x = lp_ref - lp``.
        kl_in: ``reward`` puts the penalty into the rewards of the tokens, ``loss`` adds it to the loss (k2 or k3).
        kl_controller: ``fixed``, or ``adaptive``: after each step the coefficient is multiplied by
            ``1 + clip(kl / kl_target - 1, -0.2, 0.2) episodes / kl_horizon``.
        kl_target, kl_horizon: of the adaptive controller: summed over a response; in episodes.
        target_kl: no further update in a step once ``E[(lp - lp_old)^2] / 2`` of a mini-batch exceeds 1.5 times this.

        score_at: where a response's score is added: ``last``, its last scored token, or ``after_last``, the position
            after it (TRL's place).
        whiten_rewards: scale rewards to variance 1, keeping their mean.
        whiten_advantages: shift and scale advantages to mean 0 and variance 1.
        gamma, lam: discount and lambda of generalised advantage estimation.

        cliprange, cliprange_high: distances of the ratio's clip below and above 1; above defaults to below.
        dual_clip: the largest ratio that a negative advantage is multiplied by, above 1.
        cliprange_value: of the value clip. vf_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.

        reference: ``auto``: the model given, else the policy without its adapter (peft), else a frozen copy of it, or
            none where ``kl_coef`` is 0; ``given``: `PPOTrainer.step` gets ``ref_logps``.
        gradient_checkpointing: recompute the trunk in the backward. The head keeps what it needs by itself.
        max_head_memory: bytes the head may hold from forward to backward (``max_memory`` of `linear_token_logprobs`).
        mixed_precision: ``no``, ``bf16`` or ``fp16``; by default what ``accelerate config`` or ``launch`` says.
        seed: of everything random.

        output_dir, save_steps, save_total_limit: a checkpoint every so many steps of `PPOTrainer.train`, the newest so
            many kept. logging_steps: of trackers. report_to: names of accelerate's trackers (``"none"`` is None).
            disable_tqdm.
    """

    learning_rate: float = 3e-6
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = 1.0

    batch_size: int = 64
    mini_batch_size: int | None = None
    num_mini_batches: int | None = None
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    local_rollout_forward_batch_size: int = 64
    num_ppo_epochs: int = 4
    total_episodes: int | None = None

    response_length: int = 53
    temperature: float = 0.7
    stop_token: Literal["eos"] | None = None
    stop_token_id: int | Sequence[int] | None = None
    missing_eos_penalty: float | None = None

    kl_coef: float = 0.05
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_in: Literal["reward", "loss"] = "reward"
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    kl_target: float = 6.0
    kl_horizon: int = 10_000
    target_kl: float | None = None

    score_at: Literal["last", "after_last"] = "last"
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    gamma: float = 1.0
    lam: float = 0.95

    cliprange: float = 0.2
    cliprange_high: float | None = None
    dual_clip: float | None = None
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0

    reference: Literal["auto", "given"] = "auto"
    gradient_checkpointing: bool = False
    max_head_memory: int | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    seed: int = 42

    output_dir: str = "ppo"
    save_steps: int | None = None
    save_total_limit: int | None = 2
    logging_steps: int = 1
    report_to: str | Sequence[str] | None = None
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        for name, low in _WHOLE.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                self._whole(name, value, low)
        for name, interval in _REAL.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                self._set(name, check.number(WHERE, name, value, **interval))
        for name, allowed in _CHOICES.items():
            check.one_of(WHERE, name, getattr(self, name), allowed)
        self._set("stop_token_id", self._stop_token_ids())
        self._set("report_to", self._trackers())
        if self.stop_token is not None and self.stop_token_id is not None:
            check.fail(WHERE, "stop_token and stop_token_id say the same thing: give one of them, not both")
        if self.mini_batch_size is not None and self.num_mini_batches is not None:
            made = math.ceil(self.batch_size / self.mini_batch_size)
            if made != self.num_mini_batches:
                check.fail(
                    WHERE,
                    "mini_batch_size and num_mini_batches say the same thing: give one of them, or both so that they "
                    f"agree: batch_size={self.batch_size} in mini-batches of {self.mini_batch_size} makes {made}, "
                    f"got num_mini_batches={self.num_mini_batches}",
                )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            check.fail(
                WHERE,
                "kl_in='loss' needs kl_estimator='k2' or 'k3', got 'k1', whose gradient knows no reference",
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _whole(self, name: str, value: Any, low: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            check.fail(WHERE, f"{name} must be an integer of at least {low}, got {value!r}")

    def _stop_token_ids(self) -> int | tuple[int, ...] | None:
        given = self.stop_token_id
        if not isinstance(given, Sequence) or isinstance(given, str):
            if given is not None:
                self._whole("stop_token_id", given, 0)
            return given
        if not given:
            check.fail(WHERE, "stop_token_id must be an id or several, got none: None leaves it to the tokenizer")
        for index, each in enumerate(given):
            self._whole(f"stop_token_id[{index}]", each, 0)
        return tuple(given)

    def _trackers(self) -> str | tuple[str, ...] | None:
        given = (self.report_to,) if isinstance(self.report_to, str) else self.report_to
        if given is None or (isinstance(given, Sequence) and list(given) in ([], ["none"])):
            return None
        if not isinstance(given, Sequence) or not all(isinstance(each, str) for each in given):
            check.fail_type(WHERE, f"report_to must be names of trackers, or 'none', got {type(given).__name__}")
        return self.report_to if isinstance(self.report_to, str) else tuple(given)

    def check_processes(self, processes: int) -> None:
        """Refuses ``per_device_train_batch_size`` and ``gradient_accumulation_steps`` that do not agree."""
        size, steps = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if size is None or steps is None:
            return
        mini = math.ceil(self.batch_size / self.parts(self.batch_size))
        made = math.ceil(mini / (size * processes))
        if made != steps:
            check.fail(
                WHERE,
                "per_device_train_batch_size and gradient_accumulation_steps say the same thing: give one of them, or "
                f"both so that they agree: a mini-batch of {mini} episodes on {processes} "
                f"process{'es' * (processes > 1)} in parts of {size} makes {made}, got {steps}",
            )

    def parts(self, episodes: int) -> int:
        """The number of mini-batches that so many episodes are cut into."""
        if self.num_mini_batches is not None:
            return self.num_mini_batches
        return 1 if self.mini_batch_size is None else math.ceil(episodes / self.mini_batch_size)

    def schedule(self, step: int, total: int | None) -> float:
        """What the learning rate is multiplied by in step 0, 1, ... of ``total``; 1 where the total is not known."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.lr_scheduler_type == "constant" or total is None or total <= self.warmup_steps:
            return 1.0
        done = min((step - self.warmup_steps) / (total - self.warmup_steps), 1.0)
        return 1.0 - done if self.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * done)) / 2

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_POSITIVE: dict[str, Any] = {"low": 0.0, "open_low": True}
_WHOLE = {
    "warmup_steps": 0,
    "batch_size": 1,
    "mini_batch_size": 1,
    "num_mini_batches": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "local_rollout_forward_batch_size": 1,
    "num_ppo_epochs": 1,
    "total_episodes": 1,
    "response_length": 1,
    "kl_horizon": 1,
    "max_head_memory": 0,
    "seed": 0,
    "save_steps": 1,
    "save_total_limit": 1,
    "logging_steps": 1,
}
_REAL: dict[str, dict[str, Any]] = {
    "learning_rate": {"low": 0.0},
    "weight_decay": {"low": 0.0},
    "adam_beta1": {"low": 0.0, "high": 1.0, "open_high": True},
    "adam_beta2": {"low": 0.0, "high": 1.0, "open_high": True},
    "adam_epsilon": {"low": 0.0},
    "max_grad_norm": _POSITIVE,
    "temperature": _POSITIVE,
    "missing_eos_penalty": _POSITIVE,
    "kl_coef": {"low": 0.0},
    "kl_target": _POSITIVE,
    "target_kl": _POSITIVE,
    "gamma": {"low": 0.0, "high": 1.0},
    "lam": {"low": 0.0, "high": 1.0},
    "cliprange": {"low": 0.0, "high": 1.0},
    "cliprange_high": {"low": 0.0},
    "dual_clip": {"low": 1.0, "open_low": True},
    "cliprange_value": _POSITIVE,
    "vf_coef": {"low": 0.0},
    "entropy_coef": {"low": 0.0},
}
_OPTIONAL = {
    "mini_batch_size",
    "num_mini_batches",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "total_episodes",
    "max_head_memory",
    "save_steps",
    "save_total_limit",
    "max_grad_norm",
    "missing_eos_penalty",
    "target_kl",
    "cliprange_high",
    "dual_clip",
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "lr_scheduler_type": ("constant", "linear", "cosine"),
    "stop_token": ("eos", None),
    "kl_estimator": ("k1", "k2", "k3"),
    "kl_in": ("reward", "loss"),
    "kl_controller": ("fixed", "adaptive"),
    "score_at": ("last", "after_last"),
    "reference": ("auto", "given"),
    "mixed_precision": ("no", "bf16", "fp16", None),
}
