"""The textbook forms and the loss of reward models: formulas in float64, linear forms in both layouts, bad input."""

import copy
import doctest
import importlib
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import prefkern as pk
from prefkern.types import LossOutput

R, T, H, V, K = 4, 5, 6, 9, 3
LENGTHS = torch.tensor([5, 3, 4, 1])
INSIDE = torch.arange(T) < LENGTHS[:, None]
CU = torch.tensor([0, 5, 8, 12, 13])
SCORES = torch.tensor([0.9, 0.1, 0.5, 0.7])


class Case:
    """A head, a reference's head and targets, padded or packed, in float64."""

    def __init__(self, *, packed: bool = False) -> None:
        self.cu = CU if packed else None
        targets = torch.randint(0, V, (R, T)).masked_fill(~INSIDE, -100)
        targets[0, 0] = -100
        hidden, ref_hidden = torch.randn(R, T, H).double(), torch.randn(R, T, K).double()
        self.hidden, self.ref_hidden, self.targets = (x[INSIDE] if packed else x for x in (hidden, ref_hidden, targets))
        self.weight, self.ref_weight = torch.randn(V, H).double(), torch.randn(V, K).double()
        self.hidden.requires_grad_()
        self.weight.requires_grad_()

    @property
    def model(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.targets

    @property
    def ref(self) -> dict[str, Tensor]:
        return {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight}

    def logps(self) -> Tensor:
        return pk.linear_token_logprobs(*self.model).logps

    def ref_logps(self) -> Tensor:
        return pk.linear_token_logprobs(self.ref_hidden, self.ref_weight, self.targets).logps

    def pairs(self, logps: Tensor) -> pk.PairLogps:
        return pk.pair_logps(logps, targets=self.targets, cu_seqlens=self.cu)


def assert_same(case: Case, got: LossOutput, want: LossOutput) -> None:
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x.loss.sum(), [case.hidden, case.weight]) for x in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert all(x.abs().max() > 0 for x in theirs)
    for name, value in want.metrics.items():
        torch.testing.assert_close(got.metrics[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["guided", "weighted", "dpo"])
def test_worked_examples(name) -> None:
    found = doctest.testmod(importlib.import_module(f"prefkern.losses.{name}"))
    assert found.attempted >= 3
    assert found.failed == 0


def test_the_page_on_introductions_computes_what_it_says() -> None:
    page = Path(__file__).parents[2] / "docs" / "textbook.md"
    found = doctest.testfile(str(page), module_relative=False)
    assert found.attempted >= 12
    assert found.failed == 0


# ------------------------------------------------------------------------------------------------ KL-guided DPO


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_exact_kl_is_the_reverse_divergence_over_the_vocabulary(packed) -> None:
    """Against the full logits: L_DPO + 0.3 mean_t sum_v p (log p - log p_ref)."""
    case = Case(packed=packed)
    got = pk.linear_kl_guided_dpo_loss(*case.model, **case.ref, cu_seqlens=case.cu, kl_coef=0.3, beta=0.4)
    p, q = (case.hidden @ case.weight.T).log_softmax(-1), (case.ref_hidden @ case.ref_weight.T).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)[case.targets != -100].mean()
    policy, ref = case.pairs(case.logps()), case.pairs(case.ref_logps())
    d = (policy.chosen - ref.chosen) - (policy.rejected - ref.rejected)
    want = LossOutput(-F.logsigmoid(0.4 * d).mean() + 0.3 * kl, {"kl": kl.detach()})
    assert_same(case, got, want)


@pytest.mark.parametrize("by_logps", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimates_are_means_over_the_scored_tokens(estimator, packed, by_logps) -> None:
    case = Case(packed=packed)
    scored = case.targets != -100
    options = {"loss_type": "ipo", "kl_coef": 0.7, "reduction": "none", "weights": torch.tensor([0.5, 2.0])}
    logps, ref = case.logps(), case.ref_logps()
    policy, reference = case.pairs(logps), case.pairs(ref)
    x = (ref - logps)[scored]
    kl = {"k1": -x, "k2": x**2 / 2, "k3": x.exp() - x - 1}[estimator].mean()
    lengths = {"chosen_lengths": policy.chosen_lengths, "rejected_lengths": policy.rejected_lengths}
    want = pk.kl_guided_dpo_loss(*policy[:2], *reference[:2], kl, **lengths, **options)
    given = {"ref_logps": ref} if by_logps else case.ref
    got = pk.linear_kl_guided_dpo_loss(*case.model, **given, cu_seqlens=case.cu, kl_estimator=estimator, **options)
    assert got.loss.shape == (2,)
    assert_same(case, got, want)


def test_kl_guided_dpo_is_dpo_plus_the_penalty() -> None:
    lp = [-torch.rand(3) for _ in range(4)]
    dpo = pk.dpo_loss(*lp, beta=0.5, reduction="none", loss_type="hinge")
    kl = torch.tensor([0.1, 0.4, 2.0], requires_grad=True)
    out = pk.kl_guided_dpo_loss(*lp, kl, beta=0.5, loss_type="hinge", kl_coef=0.3)
    torch.testing.assert_close(out.loss, (dpo.loss + 0.3 * kl).mean())
    torch.testing.assert_close(torch.autograd.grad(out.loss, kl)[0], torch.full((3,), 0.1))
    assert out.metrics["kl"].item() == pytest.approx(2.5 / 3)
    assert out.metrics.keys() - dpo.metrics.keys() == {"kl"}
    scalar = pk.kl_guided_dpo_loss(*lp, torch.tensor(0.4), beta=0.5, loss_type="hinge", reduction="sum")
    torch.testing.assert_close(scalar.loss, dpo.loss.sum() + 3 * 0.1 * 0.4)
    assert pk.kl_guided_dpo_loss(*lp, kl, metrics=False).metrics == {}


# -------------------------------------------------------------------------------- likelihoods with a reward or a score


def test_reward_regularized_is_orpo_with_the_odds_ratio_as_reward() -> None:
    averages = [(-torch.rand(5, dtype=torch.float64) - 0.1).requires_grad_() for _ in range(2)]
    nll = torch.rand(5, dtype=torch.float64)
    odds = [a - torch.log(1 - a.exp()) for a in averages]
    reward = F.logsigmoid(odds[0] - odds[1])
    got = pk.reward_regularized_loss(nll, reward, reward_coef=0.3)
    want = pk.orpo_loss(*averages, nll, beta=0.3)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x.loss, averages) for x in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert {name: value.item() for name, value in got.metrics.items()} == pytest.approx(
        {"nll_loss": nll.mean().item(), "reward": reward.mean().item()}
    )


def test_a_constant_reward_changes_the_value_and_not_the_gradient() -> None:
    case = Case()
    plain = pk.linear_cross_entropy(*case.model)
    got = pk.linear_reward_regularized_loss(*case.model, SCORES.double(), reward_coef=0.2)
    torch.testing.assert_close(got.loss, plain.loss - 0.2 * SCORES.double().mean())
    ours, theirs = (torch.autograd.grad(x.loss, [case.hidden, case.weight]) for x in (got, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert set(got.metrics) == {"nll_loss", "reward", "entropy", "mean_token_accuracy"}
    none = pk.linear_reward_regularized_loss(*case.model, SCORES.double(), reduction="none").loss
    torch.testing.assert_close(none, plain.loss - 0.1 * SCORES.double())


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_score_weighted_likelihood(packed, average) -> None:
    """Against log_softmax: mean over the answers of (0.4 - score) lp."""
    case = Case(packed=packed)
    scores = SCORES.double().requires_grad_()
    got = pk.linear_score_weighted_loss(*case.model, scores, average=average, cu_seqlens=case.cu, baseline=0.4)
    full = (case.hidden @ case.weight.T).log_softmax(-1)
    tokens = full.gather(-1, case.targets.clamp(min=0)[..., None])[..., 0] * (case.targets != -100)
    rows = [tokens[r] if case.cu is None else tokens[CU[r] : CU[r + 1]] for r in range(R)]
    counts = [int((row != 0).sum()) for row in rows]
    logps = torch.stack([row.sum() / (n if average else 1) for row, n in zip(rows, counts, strict=True)])
    metrics = {"score": SCORES.double().mean(), "logps": logps.detach().mean()}
    assert_same(case, got, LossOutput(((0.4 - scores.detach()) * logps).mean(), metrics))
    assert torch.autograd.grad(got.loss, scores, allow_unused=True)[0] is None


# ------------------------------------------------------------------------------------------------ reward models


@pytest.mark.parametrize("margin", [None, torch.tensor([0.5, 0.0, 2.0, 1.0])])
@pytest.mark.parametrize("center", [0.0, 0.3])
def test_reward_loss_is_its_formula_and_trls(margin, center) -> None:
    """Value and gradient; ``RewardTrainer.compute_loss``, unbound, with its metrics."""
    trl = pytest.importorskip("trl")
    rewards = torch.tensor([1.0, -2.0, 30.0, 0.2, 0.5, 1.0, -60.0, 0.3], requires_grad=True)
    chosen, rejected = rewards.chunk(2)
    out = pk.reward_loss(chosen, rejected, margin=margin, center_coefficient=center)
    logs: dict[str, list[float]] = {}
    metrics = {"train": {name: logs.setdefault(name, []) for name in (*out.metrics, "num_tokens")}}
    keep = lambda x: x  # noqa: E731
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=center or None),
        accelerator=SimpleNamespace(gather=keep, gather_for_metrics=keep),
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(8, 3)} | ({} if margin is None else {"margin": margin})
    model = lambda **kwargs: SimpleNamespace(logits=rewards[:, None])  # noqa: E731
    theirs = trl.RewardTrainer.compute_loss(trainer, model, inputs)
    exact = rewards.detach().double().requires_grad_()
    c, r = exact.chunk(2)
    lead = c - r - (0.0 if margin is None else margin.double())
    formula = (torch.log1p(torch.exp(-lead)) + center * (c + r) ** 2).mean()
    for want, leaf in ((theirs, rewards), (formula, exact)):
        torch.testing.assert_close(out.loss, want, rtol=1e-6, atol=1e-6, check_dtype=False)
        ours, other = (torch.autograd.grad(x, y, retain_graph=True)[0] for x, y in ((out.loss, rewards), (want, leaf)))
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(
        {name: logs[name][0] for name in out.metrics}
    )


def test_reward_loss_without_margin_is_the_logarithm_of_exponentials() -> None:
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    torch.testing.assert_close(
        pk.reward_loss(chosen, rejected, reduction="none").loss, torch.log(1 + torch.exp(rejected - chosen))
    )
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    out = pk.reward_loss(far, -far)
    assert out.loss.item() == 1e4
    assert torch.autograd.grad(out.loss, far)[0].tolist() == [0.0, -1.0]


# ------------------------------------------------------------------------------------------------ all of them


def test_empty_batches_are_zero_with_a_graph() -> None:
    x = torch.zeros(0, requires_grad=True)
    for loss, metrics in (
        pk.reward_loss(x, x, center_coefficient=0.1),
        pk.kl_guided_dpo_loss(x, x, x, x, torch.tensor(1.0)),
        pk.kl_guided_dpo_loss(x, x, x, x, x),
        pk.reward_regularized_loss(x, torch.tensor(1.0)),
        pk.score_weighted_loss(x, x),
    ):
        assert loss.item() == 0.0
        assert torch.autograd.grad(loss, x)[0].shape == (0,)
        assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("scored", [0, 1])
def test_nothing_scored_is_finite_with_zero_gradients(scored) -> None:
    case = Case()
    nothing = torch.full((R, T), -100)
    if scored:
        nothing[0, 1] = 3
    ref = torch.zeros(R, T).double()
    for loss, metrics in (
        pk.linear_kl_guided_dpo_loss(case.hidden, case.weight, nothing, ref, kl_estimator="k3"),
        pk.linear_kl_guided_dpo_loss(case.hidden, case.weight, nothing, **case.ref),
        pk.linear_reward_regularized_loss(case.hidden, case.weight, nothing, SCORES),
        pk.linear_score_weighted_loss(case.hidden, case.weight, nothing, SCORES),
    ):
        assert loss.isfinite()
        assert all(value.isfinite() for value in metrics.values())
        grads = torch.autograd.grad(loss, [case.hidden, case.weight])
        assert all((grad == 0).all() for grad in grads) == (not scored)
        assert (grads[0][nothing == -100] == 0).all()


def test_modules_can_be_copied_and_pickled() -> None:
    for module in (pk.RewardLoss(0.1), pk.KLGuidedDPOLoss(0.2, kl_coef=0.3), pk.ScoreWeightedLoss(0.1)):
        assert repr(pickle.loads(pickle.dumps(module))) == repr(copy.deepcopy(module)) == repr(module)
    with pytest.raises(ValueError, match=r"KLGuidedDPOLoss: f_divergence_type='js' is for loss_type="):
        pk.KLGuidedDPOLoss(loss_type="aot", f_divergence_type="js")


def test_compiled_to_one_graph() -> None:
    torch._dynamo.reset()
    lp = [-torch.rand(4) for _ in range(4)]

    def every(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        guided = pk.kl_guided_dpo_loss(a, b, c, d, (a - c).square().mean(), margin=d).loss
        reward = pk.reward_loss(a, b, margin=d, center_coefficient=0.1)
        likelihood = pk.reward_regularized_loss(-a, b).loss + pk.score_weighted_loss(a, d).loss
        return guided + reward.loss + reward.metrics["max_reward"] + likelihood

    torch.testing.assert_close(torch.compile(every, fullgraph=True, backend="eager")(*lp), every(*lp))


X, Y = -torch.rand(4), -torch.rand(3)
MODEL = (torch.zeros(R, T, H), torch.zeros(V, H), torch.zeros(R, T, dtype=torch.long))
HEADS = {"ref_hidden": torch.zeros(R, T, K), "ref_weight": torch.zeros(V, K)}
REFUSED = [
    (lambda: pk.reward_loss(X, Y), "reward_loss: .*must have the same shape"),
    (lambda: pk.reward_loss(X, X, margin=Y), "reward_loss: .*margin must have the same shape"),
    (lambda: pk.reward_loss(X, X, center_coefficient=-1), "reward_loss: center_coefficient must be"),
    (lambda: pk.kl_guided_dpo_loss(X, X, X, X, Y), r"kl_guided_dpo_loss: kl must be a scalar or \(4,\), got"),
    (lambda: pk.kl_guided_dpo_loss(X, X, X, X, X, kl_coef=-1), "kl_guided_dpo_loss: kl_coef must be"),
    (lambda: pk.reward_regularized_loss(X, Y), r"reward_regularized_loss: rewards must be a scalar or \(4,\)"),
    (
        lambda: pk.reward_regularized_loss(X[0], X.view(2, 2)),
        r"rewards must be a scalar or \[B\], got float32 \(2, 2\)",
    ),
    (lambda: pk.reward_regularized_loss(X.view(2, 2), X), r"reward_regularized_loss: nll must be \[B\]"),
    (lambda: pk.score_weighted_loss(X, Y), "score_weighted_loss: logps and scores must have the same shape"),
    (
        lambda: pk.linear_kl_guided_dpo_loss(*MODEL, torch.zeros(R, T)),
        "linear_kl_guided_dpo_loss: kl_estimator='exact' compares vocabularies and needs ref_hidden and ref_weight, "
        "got ref_logps: give them, or estimate",
    ),
    (lambda: pk.linear_kl_guided_dpo_loss(*MODEL), "kl_estimator='exact' .* got no reference"),
    (
        lambda: pk.linear_kl_guided_dpo_loss(*MODEL, **HEADS, lora=(X[:1], X[:1], 1.0)),
        "kl_estimator='exact' takes no lora",
    ),
    (
        lambda: pk.linear_kl_guided_dpo_loss(*MODEL, kl_estimator="k3"),
        "the reference must be either ref_logps shaped like targets, or",
    ),
    (
        lambda: pk.linear_kl_guided_dpo_loss(*MODEL, torch.zeros(R), kl_estimator="k3"),
        r"targets and ref_logps must have the same shape, got \(4, 5\) and \(4,\)",
    ),
    (lambda: pk.linear_kl_guided_dpo_loss(*MODEL, kl_estimator="k4"), "kl_estimator must be one of 'exact', 'k1'"),
    (
        lambda: pk.linear_score_weighted_loss(*MODEL, Y),
        "score_weighted_loss: logps and scores must have the same shape",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
