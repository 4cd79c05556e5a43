"""Policy losses written again from their formulas, in float64, one sequence after the other, for the tests to compare
with: nothing of the library is used. Gradients by autograd, `sg` is detach."""

import math

import torch
from torch import Tensor

DEFAULTS = {
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "importance_sampling_level": "token",
    "beta": 0.0,
    "use_bias_correction_kl": True,
    "kl_estimator": "k3",
    "kl_gradient": "plain",
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "importance_tau": 1e-3,
    "cov_ratio": 2e-4,
    "clip_cov_low": 1.0,
    "clip_cov_high": 5.0,
    "kl_cov_coef": 0.1,
    "dro_beta": None,
    "max_completion_length": None,
}
OWN = {
    **dict.fromkeys(["grpo", "sapo", "gspo_token", "gmpo"], "sequence"),
    **dict.fromkeys(["bnpo", "dapo", "cispo", "vespo", "dppo_tv", "dppo_kl", "importance_mask"], "token"),
    **dict.fromkeys(["clip_cov", "kl_cov", "importance_sampling", "reinforce", "dro"], "token"),
    "dr_grpo": "fixed",
    "luspo": "sequence_sum",
}


def hold(x: Tensor) -> Tensor:
    return x.clamp(-20.0, 20.0)


def ppo(c: Tensor, A: Tensor, o: dict) -> Tensor:
    high = o["epsilon"] if o["epsilon_high"] is None else o["epsilon_high"]
    first = c if o["delta"] is None else c.clamp(max=o["delta"])
    return -torch.minimum(first * A, c.clamp(1 - o["epsilon"], 1 + high) * A)


def binary_kl(p: Tensor, q: Tensor) -> Tensor:
    return q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()


def ratio_of(lp: Tensor, old: Tensor, level: str) -> Tensor:
    if level == "token":
        return hold(lp - old).exp()
    rows = (lp - old).mean() if level == "sequence" else (lp - old).sum()
    return hold(rows).exp().expand(lp.shape)


def of_sequence(name: str, lp: Tensor, old: Tensor, A: Tensor, weights: Tensor | None, o: dict) -> Tensor:
    """The losses of the tokens of one sequence; of one that is not empty."""
    c, w = ratio_of(lp, old, o["importance_sampling_level"]), hold(lp - old)
    high = o["epsilon"] if o["epsilon_high"] is None else o["epsilon_high"]
    p, q = lp.detach().exp(), old.exp()
    if name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        return ppo(c, A, o)
    if name == "cispo":
        return -c.clamp(max=o["epsilon_high"]).detach() * A * lp
    if name == "sapo":
        t = torch.tensor([o["sapo_temperature_pos"] if a > 0 else o["sapo_temperature_neg"] for a in A], dtype=A.dtype)
        return -A * (4 / t) * torch.sigmoid(t * (c - 1))
    if name == "vespo":
        total = w.detach().sum()
        if weights is not None:
            total = total + weights.log().clamp(math.log(1e-8), 20.0).sum()
        log_w = total.clamp(math.log(1e-8), 20.0)
        phi = []
        for a in A:
            k, lam = (o["vespo_k_pos"], o["vespo_lambda_pos"]) if a >= 0 else (o["vespo_k_neg"], o["vespo_lambda_neg"])
            phi.append(torch.exp(lam + k * log_w - lam * log_w.exp()))
        return -torch.stack(phi) * A * lp
    if name == "gspo_token":
        return ppo(hold(lp - lp.detach() + (lp - old).mean().detach()).exp(), A, o)
    if name == "gmpo":
        parts = []
        for a, x in zip(A, w, strict=True):
            clamped = x.clamp(-o["epsilon"], high)
            parts.append(torch.minimum(x, clamped) if a > 0 else torch.maximum(x, clamped) if a < 0 else 0.0 * x)
        return (-A.mean() * torch.stack(parts).mean().exp()).expand(lp.shape)
    if name in ("dppo_tv", "dppo_kl"):
        if name == "dppo_tv":
            inside = torch.where(A > 0, p - q <= high, p - q >= -o["epsilon"])
        else:
            d = binary_kl(p, q)
            inside = torch.where(A > 0, (d <= high) | (p <= q), (d <= o["epsilon"]) | (p >= q))
        return -A * c.clamp(max=20.0 if o["delta"] is None else o["delta"]).detach() * lp * inside
    if name == "importance_mask":
        return -A * c * ((p - q >= -o["epsilon"]) & (p - q <= high)) + o["importance_tau"] * w**2
    if name == "importance_sampling":
        return -A * c
    if name == "reinforce":
        return -A * lp
    if name == "dro":
        return -(A * lp - o["dro_beta"] / 2 * w**2)
    raise KeyError(name)


def of_batch(name: str, lp: Tensor, old: Tensor, A: Tensor, o: dict) -> Tensor:
    """clip_cov, with every eligible token set to 0 (the tests give it a share that takes all), and kl_cov, of all
    scored tokens."""
    c = hold(lp - old).exp()
    covariance = ((A - A.mean()) * (lp - lp.mean())).detach()
    share = max(int(o["cov_ratio"] * len(lp)), 1)
    if name == "clip_cov":
        losses = ppo(c, A, o)
        eligible = (covariance > o["clip_cov_low"]) & (covariance < o["clip_cov_high"]) & (losses <= -A * c)
        assert eligible.sum() <= share
        return torch.where(eligible, 0.0, losses)
    chosen = set(covariance.argsort(descending=True)[:share].tolist())
    pull = torch.tensor([float(i in chosen) for i in range(len(lp))], dtype=lp.dtype)
    return -A * c + o["kl_cov_coef"] * pull * hold(lp - old).abs()


def divergence(lp: Tensor, ref: Tensor, c: Tensor, o: dict) -> Tensor:
    x = hold(ref - lp)
    k = {"k1": -x, "k2": x**2 / 2, "k3": x.exp() - x - 1}[o["kl_estimator"]]
    if o["kl_gradient"] == "unbiased":
        moving = (c * -x).detach() * lp
        return k.detach() + moving - moving.detach()
    return k * c if o["use_bias_correction_kl"] else k


def oracle(
    name: str,
    lp: Tensor,
    old: Tensor,
    A: Tensor,
    mask: Tensor,
    *,
    ref: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str | None = None,
    normalizer: float | None = None,
    **options: object,
) -> Tensor:
    """The loss of ``[B, T]`` tensors in float64; advantages and weights per token."""
    o = {**DEFAULTS, **options}
    reduction = reduction or OWN[name]
    B, T = lp.shape
    rows = [mask[i].nonzero()[:, 0].tolist() for i in range(B)]
    if name in ("clip_cov", "kl_cov"):
        everything = iter(of_batch(name, lp[mask], old[mask], A[mask], o).split([len(row) for row in rows]))
    per_row = []
    for i, row in enumerate(rows):
        if not row:
            per_row.append(torch.zeros(0, dtype=lp.dtype))
            if name in ("clip_cov", "kl_cov"):
                next(everything)
            continue
        a, b, c = lp[i, row], old[i, row], A[i, row]
        v = None if weights is None else weights[i, row]
        losses = next(everything) if name in ("clip_cov", "kl_cov") else of_sequence(name, a, b, c, v, o)
        if v is not None and name != "vespo":
            losses = losses * v
        if o["beta"]:
            losses = losses + o["beta"] * divergence(a, ref[i, row], ratio_of(a, b, o["importance_sampling_level"]), o)
        per_row.append(losses)
    if reduction == "token":
        count = sum(map(len, rows)) if normalizer is None else normalizer
        return sum(row.sum() for row in per_row) / count
    if reduction == "sequence":
        parts = [row.mean() if len(row) else row.sum() for row in per_row]
    else:
        parts = [row.sum() for row in per_row]
    length = 1.0 if reduction != "fixed" else o["max_completion_length"] or T
    return sum(parts) / (B if normalizer is None else normalizer) / length
