"""Runs verl's registered policy losses on small batches and writes inputs, values and gradients for the tests.

    uv venv VENV && uv pip install --python VENV verl==0.9.1 torch
    VENV/bin/python tools/verl_golden.py tests/losses/verl_golden.json

verl stays out of the development environment: it pins much that nothing else here needs. The file names the versions.
"""

import argparse
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn, kl_penalty
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights, compute_rollout_rejection_mask
from verl.workers.config import ActorConfig, PolicyLossConfig

B, T = 4, 9
LENGTHS = torch.tensor([9, 2, 6, 5])

# loss, how it aggregates, options of the actor, options of the policy loss
LOSSES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("vanilla", "token-mean", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 1.5}, {}),
    ("vanilla", "seq-mean-token-mean", {}, {}),
    ("vanilla", "seq-mean-token-sum", {}, {}),
    ("vanilla", "seq-mean-token-sum-norm", {"loss_scale_factor": 20}, {}),
    ("gspo", "seq-mean-token-mean", {"clip_ratio_low": 0.03, "clip_ratio_high": 0.04}, {}),
    ("gspo", "token-mean", {"clip_ratio_low": 0.03, "clip_ratio_high": 0.04}, {}),
    ("sapo", "seq-mean-token-mean", {"tau_pos": 0.8, "tau_neg": 1.7}, {}),
    ("cispo", "token-mean", {"clip_ratio_low": 1.0, "clip_ratio_high": 0.2}, {}),
    ("dppo_tv", "token-mean", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08, "clip_ratio_c": 1.6}, {}),
    ("dppo_kl", "token-mean", {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02, "clip_ratio_c": 1.6}, {}),
    ("geo_mean", "unused", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2}, {}),
    ("clip_cov", "token-mean", {}, {"clip_cov_ratio": 0.5, "clip_cov_lb": 0.1, "clip_cov_ub": 1.5}),
    ("kl_cov", "token-mean", {}, {"kl_cov_ratio": 0.3, "ppo_kl_coef": 0.7}),
    ("gpg", "token-mean", {}, {}),
    ("dro", "token-mean", {}, {"dro_beta": 0.3}),
]
WEIGHTED = {"vanilla", "gspo", "sapo", "cispo", "dppo_tv", "gpg", "dro", "kl_cov"}
GATES = {
    "token_k1": "0.7_1.4",
    "token_k2": 0.03,
    "token_k3": 0.03,
    "seq_sum_k1": "0.6_1.5",
    "seq_sum_k2": 0.2,
    "seq_sum_k3": 0.2,
    "seq_mean_k1": "0.9_1.1",
    "seq_mean_k2": 0.03,
    "seq_mean_k3": 0.03,
    "seq_max_k2": 0.15,
    "seq_max_k3": 0.11,
}


def actor(mode: str, aggregation: str, options: dict[str, Any], policy: dict[str, Any]) -> ActorConfig:
    used = "token-mean" if aggregation == "unused" else aggregation
    shared = {"strategy": "fsdp", "rollout_n": 1, "use_dynamic_bsz": True, "loss_agg_mode": used}
    if "loss_scale_factor" in options:  # the trainer passes it on in this way
        shared["global_batch_info"] = {"loss_scale_factor": options["loss_scale_factor"]}
    return ActorConfig(**shared, **options, policy_loss=PolicyLossConfig(loss_mode=mode, **policy))


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logps = -2.0 * torch.rand(B, T, generator=generator)
    return {
        "logps": logps,
        "old_logps": (logps + 0.25 * torch.randn(B, T, generator=generator)).clamp(max=-1e-3),
        "advantages": torch.randn(B, generator=generator)[:, None].expand(B, T).contiguous(),
        "token_advantages": torch.randn(B, T, generator=generator),
        "mask": (torch.arange(T) < LENGTHS[:, None]).float(),
        "weights": 2.0 * torch.rand(B, T, generator=generator),
    }


def policy_losses(x: dict[str, Tensor]) -> list[dict[str, Any]]:
    found = []
    for mode, aggregation, options, policy in LOSSES:
        config = actor(mode, aggregation, options, policy)
        for weighted in [False, True] if mode in WEIGHTED else [False]:
            for advantages in ("advantages", "token_advantages"):
                logps = x["logps"].clone().requires_grad_()
                loss, _ = get_policy_loss_fn(mode)(
                    x["old_logps"],
                    logps,
                    x[advantages].clone(),
                    x["mask"],
                    config.loss_agg_mode,
                    config,
                    x["weights"] if weighted else None,
                )
                (grad,) = torch.autograd.grad(loss, logps)
                found.append(
                    {
                        "loss": mode,
                        "aggregation": aggregation,
                        "options": {**options, **policy},
                        "advantages": advantages,
                        "weighted": weighted,
                        "value": loss.item(),
                        "gradient": grad.tolist(),
                    }
                )
    return found


def corrections(x: dict[str, Tensor]) -> dict[str, Any]:
    """Weights (before any rejection) and masks of rollout correction; the bounds of k1 are those of its exponential."""
    difference = x["logps"] - x["old_logps"]
    weights = {}
    for level in ("token", "sequence"):
        for name, bounds in (("truncate", 1.2), ("mask", "0.7_1.4")):
            found, _ = compute_rollout_correction_weights(difference, x["mask"], level, bounds)
            weights[f"{level} {name}"] = found.tolist()
    gates = []
    for name, bounds in GATES.items():
        kept, _ = compute_rollout_rejection_mask(difference, x["mask"], name, bounds)
        low, high = (math.log(float(b)) for b in bounds.split("_")) if isinstance(bounds, str) else (None, bounds)
        gates.append({"gate": name, "low": low, "high": high, "kept": kept.tolist()})
    return {"weights": weights, "gates": gates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    x = batch()
    divergences = {name: kl_penalty(x["logps"], x["old_logps"], name).tolist() for name in ("k1", "k2", "k3")}
    written = {
        "versions": {name: version(name) for name in ("verl", "torch")},
        "inputs": {name: value.tolist() for name, value in x.items()},
        "losses": policy_losses(x),
        "divergences": divergences,
        "corrections": corrections(x),
    }
    args.file.write_text(json.dumps(written) + "\n")


if __name__ == "__main__":
    main()
