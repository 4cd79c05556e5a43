"""GRPO and RLOO against TRL's own ``_compute_loss``, run on the same tensors: losses, gradients and metrics."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from prefkern.losses import grpo_loss, importance_weights, rloo_loss

pytest.importorskip("trl")

B, T = 6, 8
LENGTHS = torch.tensor([8, 3, 5, 6, 1, 2])
MASK = torch.arange(T) < LENGTHS[:, None]
TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]
DEFAULTS = {
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "beta": 0.0,
    "importance_sampling_level": "token",
    "use_bias_correction_kl": True,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "entropy_coef": 0.0,
}


def accelerator() -> SimpleNamespace:
    def same(x: Tensor, **kwargs: object) -> Tensor:
        return x

    return SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, sync_gradients=False, gather=same, reduce=same, backward=None
    )


def trl_loss(trainer: type, x: dict[str, Tensor], **attributes: object) -> tuple[Tensor, dict[str, list[float]]]:
    """The loss of a trainer on these log-probabilities, unbound."""

    def scripted(*args: object, **kwargs: object) -> tuple[Tensor, Tensor, None]:
        return x["logps"], x["entropy"], None

    self = SimpleNamespace(
        _get_per_token_logps_and_entropies=scripted,
        accelerator=accelerator(),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
        **attributes,
    )
    ids = torch.ones(B, T, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": MASK.long(),
        "num_items_in_batch": MASK.sum(),
        "old_per_token_logps": x["old_logps"],
        "old_logps": (x["old_logps"] * MASK).sum(1),
        "ref_per_token_logps": x["ref_logps"],
        "advantages": x["advantages"],
        **({"importance_sampling_ratio": x["weights"]} if "weights" in x else {}),
    }
    return trainer._compute_loss(self, self.model, inputs), self._metrics["train"]


def trl_grpo(x: dict[str, Tensor], loss_type: str, **options: object) -> tuple[Tensor, dict[str, list[float]]]:
    from trl import GRPOTrainer

    o = {**DEFAULTS, **options}
    high = o["epsilon_high"] if o["epsilon_high"] is not None else o["epsilon"]
    return trl_loss(
        GRPOTrainer,
        x,
        loss_type=loss_type,
        epsilon_low=o["epsilon"],
        epsilon_high=high,
        importance_sampling_level=o["importance_sampling_level"],
        beta=o["beta"],
        max_completion_length=o.get("max_completion_length"),
        entropy_coef=o["entropy_coef"],
        _entropy_bonus_enabled=o["entropy_coef"] != 0.0,
        use_vllm="weights" in x,
        vllm_importance_sampling_correction=True,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        args=SimpleNamespace(steps_per_generation=1, **o),
    )


def batch(spread: float = 0.3) -> dict[str, Tensor]:
    logps = -torch.rand(B, T) * 3
    return {
        "logps": logps.requires_grad_(),
        "old_logps": logps.detach() + spread * torch.randn(B, T),
        "ref_logps": logps.detach() + 0.5 * torch.randn(B, T),
        "entropy": torch.rand(B, T, requires_grad=True),
        "advantages": torch.randn(B),
    }


def assert_same(ours: Tensor, theirs: Tensor, x: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(loss, x["logps"], retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)
    assert grads[1].abs().max() > 0


def compare(loss_type: str, x: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    needed = {"epsilon_high": 1.2} if loss_type == "cispo" else {}
    needed |= {"max_completion_length": 30} if loss_type == "dr_grpo" else {}
    options = {**needed, **options}
    theirs, log = trl_grpo(x, loss_type, **options)
    ours = grpo_loss(
        x["logps"],
        x["old_logps"],
        x["advantages"],
        MASK,
        loss_type=loss_type,
        ref_logps=x["ref_logps"] if options.get("beta") else None,
        entropy=x["entropy"],
        token_weights=x.get("weights"),
        normalizer=MASK.sum() if loss_type in ("dapo", "cispo", "vespo") else None,
        **options,
    )
    assert_same(ours.loss, theirs, x)
    shared = [name for name in ours.metrics if name in log]
    assert "entropy" in shared
    if options.get("importance_sampling_level") == "sequence" and x["advantages"].ndim == 2:
        shared = ["entropy"]  # a ratio per sequence, an advantage per token: TRL means over tokens, we over sequences
    for name in shared:
        assert ours.metrics[name].item() == pytest.approx(log[name][0], rel=1e-5, abs=1e-6), name
    return ours.metrics


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TYPES)
def test_grpo(loss_type, level) -> None:
    x = batch()
    options = {"importance_sampling_level": level} | ({"epsilon": 0.02} if level == "sequence" else {})
    metrics = compare(loss_type, x, **options)
    compare(loss_type, {**x, "advantages": torch.randn(B, T)}, **options)
    for corrected in (True, False):
        compare(loss_type, x, beta=0.3, use_bias_correction_kl=corrected, **options)
    compare(loss_type, x, entropy_coef=0.2, **options)
    if loss_type in ("grpo", "luspo"):
        assert metrics["clip_ratio/region_mean"] > 0
        compare(loss_type, x, **{**options, "epsilon_high": 0.4, "delta": 1.6})


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("sapo", {"sapo_temperature_pos": 0.6, "sapo_temperature_neg": 1.7}),
        ("vespo", {"vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.5, "vespo_lambda_neg": 0.4}),
        ("cispo", {"epsilon_high": 5.0}),
    ],
)
def test_options_of_a_type(loss_type, options) -> None:
    compare(loss_type, batch(), **options)


@pytest.mark.parametrize("loss_type", TYPES)
def test_corrections_for_the_sampler(loss_type) -> None:
    """Truncated and masked weights as TRL makes them of vLLM's log-probs, where a masked token counts and weighs 0."""
    for mode in ("truncate", "mask"):
        x = batch()
        sampled = x["old_logps"] + 0.4 * torch.randn(B, T)
        ratio = ((x["old_logps"] - sampled) * MASK).exp()
        x["weights"] = ratio.clamp(max=1.3) if mode == "truncate" else ratio.masked_fill(ratio > 1.3, 0.0)
        ours = importance_weights(x["old_logps"], sampled, MASK, mode=mode, high=1.3)
        torch.testing.assert_close(ours.weights, x["weights"] * MASK, rtol=1e-6, atol=1e-6)
        compare(loss_type, x, beta=0.1)


@pytest.mark.parametrize("per_token", [True, False])
def test_rloo(per_token) -> None:
    from trl import RLOOTrainer

    x = batch(0.15)
    theirs, log = trl_loss(RLOOTrainer, x, epsilon_low=0.02, epsilon_high=0.01)
    old = x["old_logps"] if per_token else (x["old_logps"] * MASK).sum(1)
    ours = rloo_loss(x["logps"], old, x["advantages"], MASK, entropy=x["entropy"], epsilon=0.02, epsilon_high=0.01)
    assert_same(ours.loss, theirs, x)
    for name, value in ours.metrics.items():
        if name in log:
            assert value.item() == pytest.approx(log[name][0], rel=1e-5, abs=1e-6), name
    assert ours.metrics["clip_ratio/region_mean"] > 0
