"""Policy losses, corrections and divergences against verl's own, as `tools/verl_golden.py` recorded them."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prefkern.losses import grpo_loss, importance_weights
from prefkern.losses.ratios import kl_penalty

GOLDEN = json.loads((Path(__file__).parent / "verl_golden.json").read_text())
X = {name: torch.tensor(value) for name, value in GOLDEN["inputs"].items()}
MASK = X["mask"].bool()
TYPES = {"vanilla": "bnpo", "gspo": "gspo_token", "geo_mean": "gmpo", "gpg": "reinforce"}
REDUCTIONS = {
    "token-mean": "token",
    "seq-mean-token-mean": "sequence",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "fixed",
    "unused": None,
}
NAMES = {
    "clip_ratio_low": "epsilon",
    "clip_ratio_high": "epsilon_high",
    "clip_ratio_c": "delta",
    "tau_pos": "sapo_temperature_pos",
    "tau_neg": "sapo_temperature_neg",
    "clip_cov_ratio": "cov_ratio",
    "kl_cov_ratio": "cov_ratio",
    "clip_cov_lb": "clip_cov_low",
    "clip_cov_ub": "clip_cov_high",
    "ppo_kl_coef": "kl_cov_coef",
    "dro_beta": "dro_beta",
    "loss_scale_factor": "max_completion_length",
}


def options_of(case: dict) -> dict:
    """verl's options under our names; its dual clip is at 3 where none is given, also that of the trust regions."""
    options = {NAMES[name]: value for name, value in case["options"].items()}
    if case["loss"] == "vanilla":
        options.setdefault("delta", 3.0)
    if case["loss"] == "cispo":
        options["epsilon_high"] += 1.0  # ours is the cap itself
    return options


def assert_same(got: Tensor, want: object) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    GOLDEN["losses"],
    ids=lambda case: " ".join([case["loss"], case["aggregation"], case["advantages"], "weighted" * case["weighted"]]),
)
def test_policy_loss(case) -> None:
    logps = X["logps"].clone().requires_grad_()
    loss = grpo_loss(
        logps,
        X["old_logps"],
        X[case["advantages"]],
        MASK,
        loss_type=TYPES.get(case["loss"], case["loss"]),
        reduction=REDUCTIONS[case["aggregation"]],
        normalizer=MASK.sum() if case["loss"] == "cispo" else None,
        token_weights=X["weights"] if case["weighted"] else None,
        **options_of(case),
    ).loss
    assert_same(loss, case["value"])
    (grad,) = torch.autograd.grad(loss, logps)
    assert_same(grad, case["gradient"])


def test_every_registered_loss_that_we_have_is_compared() -> None:
    assert GOLDEN["versions"]["verl"] == "0.9.1"
    compared = {case["loss"] for case in GOLDEN["losses"]}
    assert compared == {*TYPES, "sapo", "cispo", "dppo_tv", "dppo_kl", "clip_cov", "kl_cov", "dro"}


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergence(estimator) -> None:
    assert_same(kl_penalty(X["logps"], X["old_logps"], estimator), GOLDEN["divergences"][estimator])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("mode", "bounds"), [("truncate", {"high": 1.2}), ("mask", {"low": 0.7, "high": 1.4})])
def test_correction_weights(level, mode, bounds) -> None:
    weights = importance_weights(X["logps"], X["old_logps"], MASK, level=level, mode=mode, **bounds).weights
    per_token = weights if level == "token" else weights[:, None] * MASK
    assert_same(per_token, GOLDEN["corrections"]["weights"][f"{level} {mode}"])


@pytest.mark.parametrize("case", GOLDEN["corrections"]["gates"], ids=lambda case: case["gate"])
def test_gate(case) -> None:
    level, _, gate = case["gate"].rpartition("_")
    options = {"gate_level": level.replace("seq", "sequence"), "gate_low": case["low"], "gate_high": case["high"]}
    kept = importance_weights(X["logps"], X["old_logps"], MASK, mode="none", gate=gate, **options).mask
    want = torch.tensor(case["kept"]).bool()
    assert torch.equal(kept, want)
    assert 0 < want.sum() < MASK.sum()
