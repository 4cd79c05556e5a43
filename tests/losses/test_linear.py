"""Linear forms equal the loss of the waist's log-probabilities, in value and gradient, with the waist's options."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.head.logprobs import linear_token_logprobs
from prefkern.losses import dpo_loss, linear_cross_entropy, linear_dpo_loss, pair_logps, wpo_weights

R, T, H, V, K = 4, 6, 8, 11, 5
HEAD = {
    "plain": {},
    "bias scale softcap temperature": {"bias": True, "logit_scale": 0.7, "softcap": 3.0, "temperature": 1.3},
    "recomputed": {"max_memory": 0},
}


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    targets = torch.randint(0, V, (R, T))
    for row, length in enumerate((6, 3, 5, 0)):
        targets[row, length:] = -100
    tensors = {
        "hidden": torch.randn(R, T, H, dtype=dtype).requires_grad_(),
        "weight": torch.randn(V, H, dtype=dtype).requires_grad_(),
        "ref_hidden": torch.randn(R, T, K, dtype=dtype),
        "ref_weight": torch.randn(V, K, dtype=dtype),
        "bias": torch.randn(V, dtype=dtype).requires_grad_(),
        "ref_bias": torch.randn(V, dtype=dtype),
    }
    return {**tensors, "targets": targets}


def split(case: dict[str, Tensor], options: dict[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """The waist's options of the policy and of the reference."""
    options = dict(options)
    with_bias = options.pop("bias", False)
    policy = {**options, "bias": case["bias"] if with_bias else None}
    return policy, {**options, "bias": case["ref_bias"] if with_bias else None}


def leaves(case: dict[str, Tensor], options: dict[str, object]) -> list[Tensor]:
    return [case[name] for name in ("hidden", "weight", *(["bias"] if options.get("bias") else []))]


def assert_equal(got: Tensor, want: Tensor, on: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad(loss.sum(), on) for loss in (got, want))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert theirs.abs().max() > 0


REF = {"ref_logps": None, "ref_hidden": torch.zeros(R, T, H), "ref_weight": torch.zeros(V, H)}


@pytest.mark.parametrize("reference", ["logps", "hidden"])
@pytest.mark.parametrize("head", HEAD)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "ipo", "ld_alpha": 0.3, "reduction": "none", "weights": torch.tensor([2.0, 0.5])},
        {"loss_type": "hinge", "ld_alpha": 0.0},
        {"loss_type": ["exo_pair", "sft"], "loss_weights": [0.8, 0.3], "label_smoothing": 0.1, "ld_alpha": 0.3},
        {"loss_type": "robust", "label_smoothing": 0.2, "use_weighting": True, "margin": torch.tensor([0.5, 0.1])},
        {"loss_type": "aot", "beta": 0.7},
        {"loss_type": "nca_pair", "use_weighting": True, "weights": torch.tensor([2.0, 0.5])},
        {"beta": 0.4, "label_smoothing": 0.1, "metrics": False},
    ],
)
def test_linear_dpo(head, options, reference) -> None:
    case = inputs()
    policy_head, ref_head = split(case, HEAD[head])
    hidden, weight, targets = case["hidden"], case["weight"], case["targets"]
    rest = dict(options)
    ld_alpha = rest.pop("ld_alpha", None)
    outputs = ("logps", "log_sum_sq_probs")
    stats = linear_token_logprobs(hidden, weight, targets, **policy_head, outputs=outputs)
    policy = pair_logps(stats.logps, targets=targets, ld_alpha=ld_alpha)
    if rest.pop("use_weighting", False):
        own = wpo_weights(stats.logps, stats.log_sum_sq_probs, targets=targets)
        rest["weights"] = own * rest.get("weights", 1.0)
    if "sft" in rest.get("loss_type", ()):  # of whole answers, whatever ld_alpha discounts
        rest["chosen_nll"] = -stats.logps[: R // 2][targets[: R // 2] != -100].mean()
    ref = linear_token_logprobs(case["ref_hidden"], case["ref_weight"], targets, **ref_head).logps
    ref = pair_logps(ref, targets=targets, ld_alpha=ld_alpha)
    lengths = {"chosen_lengths": policy.chosen_lengths, "rejected_lengths": policy.rejected_lengths}
    want = dpo_loss(policy.chosen, policy.rejected, ref.chosen, ref.rejected, **lengths, **rest)
    given = {"ref_logps": torch.cat([ref.chosen, ref.rejected])}
    if reference == "hidden":
        form = {f"ref_{name}": ref_head[name] for name in ("logit_scale", "softcap", "bias") if name in ref_head}
        given = {"ref_hidden": case["ref_hidden"], "ref_weight": case["ref_weight"], **form}
    got = linear_dpo_loss(hidden, weight, targets, **given, **options, **policy_head)
    assert_equal(got.loss, want.loss, leaves(case, HEAD[head]))
    assert {name: got.metrics[name].item() for name in want.metrics} == pytest.approx(
        {name: value.item() for name, value in want.metrics.items()}
    )


@pytest.mark.parametrize("none", [False, True])
def test_a_reference_has_a_form_of_its_own(none) -> None:
    case = inputs()
    hidden, weight, targets = case["hidden"], case["weight"], case["targets"]
    form = {"logit_scale": 1.0, "softcap": None} if none else {"logit_scale": 0.7, "softcap": 2.0, "temperature": 0.6}
    ref = linear_token_logprobs(case["ref_hidden"], case["ref_weight"], targets, **({"temperature": 1.3} | form)).logps
    ref = pair_logps(ref, targets=targets)
    given = {f"ref_{name}": math.inf if value is None else value for name, value in form.items()}
    given |= {"ref_hidden": case["ref_hidden"], "ref_weight": case["ref_weight"]}
    head = {"logit_scale": 1.2, "softcap": 5.0, "temperature": 1.3}
    got = linear_dpo_loss(hidden, weight, targets, **given, **head)
    want = linear_dpo_loss(hidden, weight, targets, torch.cat([ref.chosen, ref.rejected]), **head)
    assert_equal(got.loss, want.loss, [hidden, weight])


def test_linear_dpo_packed_equals_padded_with_its_token_metrics() -> None:
    case = inputs()
    hidden, weight, targets = case["hidden"], case["weight"], case["targets"]
    inside = torch.arange(T) < torch.tensor([6, 4, 5, 0])[:, None]
    cu = torch.tensor([0, 6, 10, 15, 15])
    ref_logps = torch.randn(R).double()
    padded = linear_dpo_loss(hidden, weight, targets, ref_logps, ld_alpha=0.5)
    packed = linear_dpo_loss(hidden[inside], weight, targets[inside], ref_logps, ld_alpha=0.5, cu_seqlens=cu)
    torch.testing.assert_close(packed, padded, rtol=1e-12, atol=1e-12)

    logits = (hidden @ weight.T).detach()
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    scored, chosen = targets != -100, torch.arange(R)[:, None] < R // 2
    want = {
        "entropy": entropy[scored].mean(),
        "logits/chosen": logits.mean(-1)[scored & chosen].mean(),
        "logits/rejected": logits.mean(-1)[scored & ~chosen].mean(),
        "mean_token_accuracy": (logits.argmax(-1) == targets)[scored & chosen].double().mean(),
    }
    for name, value in want.items():
        assert padded.metrics[name].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12), name
    assert not any(value.requires_grad for value in padded.metrics.values())


@pytest.mark.parametrize("head", HEAD)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"normalizer": torch.tensor(40)},
        {"token_weights": torch.linspace(0.0, 2.0, R * T, dtype=torch.float64).view(R, T)},
    ],
)
def test_linear_cross_entropy(head, options) -> None:
    case = inputs()
    policy_head, _ = split(case, HEAD[head])
    hidden, weight, targets = case["hidden"], case["weight"], case["targets"]
    z = hidden @ weight.T + (case["bias"] if HEAD[head].get("bias") else 0.0)
    z = z * policy_head.get("logit_scale", 1.0)
    if policy_head.get("softcap"):
        z = policy_head["softcap"] * torch.tanh(z / policy_head["softcap"])
    z = z / policy_head.get("temperature", 1.0)
    per_token = F.cross_entropy(z.view(-1, V), targets.view(-1), reduction="none").view(R, T)
    if "token_weights" in options:
        per_token = per_token * options["token_weights"]
    count = options.get("normalizer", (targets != -100).sum())
    want = {"sum": per_token.sum(), "none": per_token}.get(options.get("reduction"), per_token.sum() / count)
    got = linear_cross_entropy(hidden, weight, targets, **options, **policy_head)
    assert_equal(got.loss, want, leaves(case, HEAD[head]))
    scored = targets != -100
    logps = z.detach().log_softmax(-1)
    assert got.metrics["entropy"].item() == pytest.approx((-(logps.exp() * logps).sum(-1))[scored].mean().item())
    accuracy = (z.argmax(-1) == targets)[scored].float().mean()
    assert got.metrics["mean_token_accuracy"].item() == pytest.approx(accuracy.item())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("head", HEAD)
def test_dft_weighs_every_token_by_its_probability(head, reduction) -> None:
    """-sg[p] lp, which token weights multiply too."""
    case = inputs()
    policy_head, _ = split(case, HEAD[head])
    hidden, weight, targets = case["hidden"], case["weight"], case["targets"]
    stats = linear_token_logprobs(hidden, weight, targets, **policy_head)
    scored, weights = targets != -100, torch.rand(R, T).double()
    per_token = torch.where(scored, -weights * stats.logps.detach().exp() * stats.logps, 0.0)
    want = {"sum": per_token.sum(), "none": per_token, "mean": per_token.sum() / scored.sum()}[reduction]
    options = {"dft": True, "reduction": reduction, "token_weights": weights}
    got = linear_cross_entropy(hidden, weight, targets, **options, **policy_head)
    assert_equal(got.loss, want, leaves(case, HEAD[head]))


def test_token_weights_get_no_gradient_and_never_change_the_count() -> None:
    case = inputs()
    weights = torch.full((R, T), 2.0, dtype=torch.float64, requires_grad=True)
    plain = linear_cross_entropy(case["hidden"], case["weight"], case["targets"]).loss
    doubled = linear_cross_entropy(case["hidden"], case["weight"], case["targets"], token_weights=weights).loss
    torch.testing.assert_close(doubled, 2 * plain)
    doubled.backward()
    assert weights.grad is None


def test_linear_cross_entropy_accumulates() -> None:
    case = inputs()
    hidden, weight, targets = case["hidden"], case["weight"], case["targets"]
    whole = linear_cross_entropy(hidden, weight, targets).loss
    count = (targets != -100).sum()
    parts = [
        linear_cross_entropy(hidden[s], weight, targets[s], normalizer=count).loss for s in (slice(0, 3), slice(3, 4))
    ]
    assert_equal(sum(parts), whole, [hidden, weight])


def test_nothing_scored_is_zero_with_zero_gradients() -> None:
    case = inputs(torch.float32)
    hidden, weight = case["hidden"], case["weight"]
    nothing = torch.full((R, T), -100)
    for loss in (
        linear_cross_entropy(hidden, weight, nothing).loss,
        linear_cross_entropy(hidden[:0], weight, nothing[:0]).loss,
        linear_dpo_loss(hidden[:0], weight, nothing[:0], torch.zeros(0)).loss,
    ):
        assert loss.item() == 0.0
        grads = torch.autograd.grad(loss, [hidden, weight])
        assert all((grad == 0).all() for grad in grads)
    loss, metrics = linear_dpo_loss(hidden, weight, nothing, torch.zeros(R))
    assert loss.item() == pytest.approx(0.6931472)
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, [hidden, weight]))
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": torch.zeros(3, T, dtype=torch.long)}, ValueError, "pairs must come as 2B rows"),
        ({"targets": None}, TypeError, r"targets must be a torch\.Tensor"),
        ({"ref_logps": torch.zeros(3)}, ValueError, r"ref_logps must have shape \(4,\)"),
        (
            {"ref_logps": None},
            ValueError,
            r"the reference must be either ref_logps \[2B\], or ref_hidden and ref_weight",
        ),
        ({"ref_hidden": torch.zeros(R, T, H)}, ValueError, "the reference must be either"),
        ({"weights": torch.zeros(4)}, ValueError, r"weights must have shape \(2,\)"),
        ({"loss_type": "bogus"}, ValueError, "loss_type must be one of"),
        ({"cu_seqlens": torch.tensor([0, 1, 2])}, ValueError, r"targets must be packed \[N\], as cu_seqlens is given"),
        ({"targets": torch.zeros(R, T, 2, dtype=torch.long)}, ValueError, r"targets must be padded \[B, T\] or packed"),
        (
            {
                "ref_logps": None,
                "ref_hidden": torch.zeros(R, T, H),
                "ref_weight": torch.zeros(V, H),
                "bias": torch.zeros(V),
            },
            ValueError,
            "bias is given, so the reference's head needs its own: pass ref_bias",
        ),
        ({**REF, "softcap": 3.0}, ValueError, r"softcap is given, .*: pass ref_softcap \(math.inf: none\)"),
        ({**REF, "logit_scale": 0.5}, ValueError, r"logit_scale is given, .*: pass ref_logit_scale \(1.0: none\)"),
        ({**REF, "ref_softcap": -1.0}, ValueError, "ref_softcap must be"),
        ({"ref_logit_scale": 2.0}, ValueError, "the reference must be either ref_logps"),
    ],
)
def test_linear_dpo_refuses(change, error, message) -> None:
    arguments = {"targets": torch.zeros(R, T, dtype=torch.long), "ref_logps": torch.zeros(R), **change}
    with pytest.raises(error, match=rf"^prefkern\.linear_dpo_loss: .*{message}"):
        linear_dpo_loss(torch.zeros(R, T, H), torch.zeros(V, H), **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reduction": "token"}, ValueError, "reduction must be one of 'mean', 'sum', 'none'"),
        ({"reduction": "sum", "normalizer": 3}, ValueError, "reduction='sum' divides by nothing"),
        ({"token_weights": torch.zeros(R)}, ValueError, "targets and token_weights must have the same shape"),
        ({"token_weights": torch.zeros(R, T, dtype=torch.long)}, TypeError, "token_weights must be float16"),
    ],
)
def test_linear_cross_entropy_refuses(change, error, message) -> None:
    with pytest.raises(error, match=rf"^prefkern\.linear_cross_entropy: {message}"):
        linear_cross_entropy(torch.zeros(R, T, H), torch.zeros(V, H), torch.zeros(R, T, dtype=torch.long), **change)
