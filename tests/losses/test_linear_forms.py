"""KTO, ORPO and PPO on hidden states equal the loss of the waist's log-probabilities, in both layouts."""

import pytest
import torch
from torch import Tensor

from prefkern import losses
from prefkern.head.engine.products import count_products
from prefkern.head.logprobs import linear_token_logprobs
from prefkern.losses import (
    cpo_loss,
    kto_loss,
    linear_cpo_loss,
    linear_dpo_loss,
    linear_kto_loss,
    linear_orpo_loss,
    linear_ppo_loss,
    orpo_loss,
    pair_logps,
    ppo_loss,
    sequence_logps,
)
from prefkern.losses.cpo import AVERAGED
from prefkern.types import LossOutput

R, T, H, V, K = 4, 6, 8, 11, 5
LENGTHS = torch.tensor([6, 4, 5, 0])
INSIDE = torch.arange(T) < LENGTHS[:, None]
CU = torch.tensor([0, 6, 10, 15, 15])
LABELS = torch.tensor([1, 0, 0, 1])
HEAD = {
    "plain": {},
    "bias scale softcap temperature": {"bias": True, "logit_scale": 0.7, "softcap": 3.0, "temperature": 1.3},
    "recomputed": {"max_memory": 0},
    "another ignore_index": {"ignore_index": 7},
}


class Case:
    """One batch in one layout: ``pick`` takes a padded ``[R, T, ...]`` tensor to it."""

    def __init__(self, head: str, *, packed: bool) -> None:
        self.cu = CU if packed else None
        self.options = dict(HEAD[head])
        self.ignore = self.options.get("ignore_index", -100)
        with_bias = self.options.pop("bias", False)
        # row by row: completions within the prompt-and-completion likelihood targets
        nll = torch.randint(0, V, (R, T))
        nll = torch.where(nll == self.ignore, 0, nll).masked_fill(~INSIDE, self.ignore)
        targets = nll.masked_fill(torch.arange(T) < torch.tensor([2, 1, 0, 0])[:, None], self.ignore)
        hidden = torch.randn(R, T, H).double()
        self.hidden, self.ref_hidden = self.pick(hidden).requires_grad_(), self.pick(torch.randn(R, T, K).double())
        self.targets, self.nll_targets = self.pick(targets), self.pick(nll)
        self.weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
        self.bias = torch.randn(V, dtype=torch.float64, requires_grad=True) if with_bias else None
        self.ref_weight = torch.randn(V, K).double()
        self.ref_bias = torch.randn(V).double() if with_bias else None

    def pick(self, x: Tensor) -> Tensor:
        return x if self.cu is None else x[INSIDE]

    def tokens(self) -> Tensor:
        return self.pick(torch.randn(R, T).double())

    def stats(self, **options: object) -> object:
        return linear_token_logprobs(
            self.hidden, self.weight, **{"targets": self.targets, "bias": self.bias, **self.options, **options}
        )

    def ref(self) -> Tensor:
        """The reference's log-probabilities of the tokens."""
        options = {"bias": self.ref_bias, **self.options, "max_memory": None}
        return linear_token_logprobs(self.ref_hidden, self.ref_weight, self.targets, **options).logps

    def reference(self, kind: str, logps: Tensor) -> dict[str, Tensor | None]:
        if kind == "logps":
            return {"ref_logps": logps}
        given = {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight, "ref_bias": self.ref_bias}
        return given | {
            f"ref_{name}": self.options[name] for name in ("logit_scale", "softcap") if name in self.options
        }

    def linear(self, form: object, *arguments: object, **options: object) -> LossOutput:
        head = {"bias": self.bias, **self.options}
        return form(self.hidden, self.weight, self.targets, *arguments, **options, **head)

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]


def assert_same(case: Case, got: LossOutput, want: LossOutput, *extra: Tensor) -> None:
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(out.loss.sum(), [*case.leaves, *extra]) for out in (got, want)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert theirs.abs().max() > 0
    for name, value in want.metrics.items():
        torch.testing.assert_close(got.metrics[name], value, rtol=1e-12, atol=1e-12)
    assert not any(value.requires_grad for value in got.metrics.values())


in_every_layout_and_head = pytest.mark.parametrize(
    ("head", "packed", "reference"),
    [
        ("plain", False, "logps"),
        ("plain", True, "hidden"),
        ("bias scale softcap temperature", True, "logps"),
        ("bias scale softcap temperature", False, "hidden"),
        ("recomputed", True, "hidden"),
        ("another ignore_index", True, "logps"),
        ("another ignore_index", False, "hidden"),
    ],
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl": torch.tensor(0.7), "beta": 0.3, "desirable_weight": 2.0, "undesirable_weight": 0.5, "reduction": "sum"},
        {"kl": torch.linspace(0.0, 1.0, R), "reduction": "none", "metrics": False},
        {"loss_type": "apo_zero_unpaired"},
    ],
)
@in_every_layout_and_head
def test_linear_kto(head, packed, options, reference) -> None:
    case = Case(head, packed=packed)
    logps, ref = (
        sequence_logps(x, targets=case.targets, cu_seqlens=case.cu, ignore_index=case.ignore)
        for x in (case.stats().logps, case.ref())
    )
    given = case.reference(reference, ref)
    got = case.linear(linear_kto_loss, LABELS, **given, **options, cu_seqlens=case.cu)
    assert_same(case, got, kto_loss(logps, ref, LABELS, **options))


@pytest.mark.parametrize("nll", ["targets", "nll_targets"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.4, "reduction": "none"}, {"reduction": "sum", "metrics": False}])
@in_every_layout_and_head
def test_linear_orpo(head, packed, reference, options, nll) -> None:
    """With its own targets the likelihood is that of a second pass over them, and costs none."""
    case = Case(head, packed=packed)
    nll_targets = case.nll_targets if nll == "nll_targets" else case.targets
    pairs = pair_logps(
        case.stats().logps, targets=case.targets, cu_seqlens=case.cu, ignore_index=case.ignore, average=True
    )
    chosen = case.pick(torch.arange(R)[:, None].expand(R, T) < R // 2) & (nll_targets != case.ignore)
    want = orpo_loss(pairs.chosen, pairs.rejected, -case.stats(targets=nll_targets).logps[chosen].mean(), **options)
    given = {"nll_targets": nll_targets} if nll == "nll_targets" else {}
    got = case.linear(linear_orpo_loss, **given, **options, cu_seqlens=case.cu)
    assert_same(case, got, want)


@pytest.mark.parametrize("nll", ["targets", "nll_targets"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "cpo_simpo", "beta": 0.4, "label_smoothing": 0.1, "cpo_alpha": 0.3, "simpo_gamma": 0.7},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.2},
        {"loss_type": "ipo", "alpha": 0.2, "reduction": "none", "metrics": False},
        {"loss_type": "hinge", "cpo_alpha": 0, "reduction": "sum"},
    ],
)
@in_every_layout_and_head
def test_linear_cpo(head, packed, reference, options, nll) -> None:
    case = Case(head, packed=packed)
    nll_targets = case.nll_targets if nll == "nll_targets" else case.targets
    pairs = pair_logps(
        case.stats().logps,
        targets=case.targets,
        cu_seqlens=case.cu,
        ignore_index=case.ignore,
        average=options.get("loss_type") in AVERAGED,
    )
    chosen = case.pick(torch.arange(R)[:, None].expand(R, T) < R // 2) & (nll_targets != case.ignore)
    want = cpo_loss(pairs.chosen, pairs.rejected, -case.stats(targets=nll_targets).logps[chosen].mean(), **options)
    given = {"nll_targets": nll_targets} if nll == "nll_targets" else {}
    assert_same(case, case.linear(linear_cpo_loss, **given, **options, cu_seqlens=case.cu), want)


PPO = {
    "policy": {},
    "clip": {"cliprange": 0.1, "cliprange_high": 0.3, "delta": 3.0, "reduction": "sequence", "metrics": False},
    "kl": {"kl_coef": 0.2, "kl_estimator": "k2", "reduction": "sequence_sum", "normalizer": 11},
    "entropy": {"entropy_coef": 0.1, "normalizer": torch.tensor(9)},
    "entropy alone": {"entropy_coef": 0.1, "metrics": False},
    "value": {"vf_coef": 0.4, "cliprange_value": 0.3, "values": True},
    "per token": {"reduction": "none", "kl_coef": 0.1},
}


@pytest.mark.parametrize("name", PPO)
@in_every_layout_and_head
def test_linear_ppo(head, packed, name, reference) -> None:
    case = Case(head, packed=packed)
    options, extra = dict(PPO[name]), []
    scored = case.targets != case.ignore
    mask = case.pick(torch.rand(R, T) < 0.8) if name in ("policy", "value") else None
    if options.pop("values", False):
        extra = [case.tokens().requires_grad_()]
        options |= {"values": extra[0], "old_values": case.tokens(), "returns": case.tokens()}
        options["value_mask"] = case.pick(torch.rand(R, T) < 0.8)
    stats = case.stats(outputs=("logps", "entropy"), entropy_grad=True)
    old, advantages = stats.logps.detach() + 0.3 * case.tokens(), torch.randn(R).double()
    ref = case.ref()
    seen = stats.entropy if "entropy_coef" in options else stats.entropy.detach()
    want = ppo_loss(
        stats.logps,
        old,
        advantages,
        scored if mask is None else scored & mask,
        ref_logps=ref,
        entropy=seen,
        cu_seqlens=CU if packed else None,
        **options,
    )
    given = case.reference(reference, ref)
    got = case.linear(linear_ppo_loss, old, advantages, mask, **given, **options, cu_seqlens=case.cu)
    assert_same(case, got, want, *extra)
    assert set(got.metrics) == set(want.metrics)


def test_linear_ppo_without_a_reference_has_no_kl() -> None:
    case = Case("plain", packed=False)
    old, advantages = case.tokens(), case.tokens()
    got = case.linear(linear_ppo_loss, old, advantages)
    want = ppo_loss(case.stats().logps, old, advantages, case.targets != -100)
    assert_same(case, got, want)
    assert "kl" not in got.metrics


def test_what_the_mask_excludes_may_hold_any_target_and_costs_no_product() -> None:
    case = Case("plain", packed=True)
    case.targets = torch.randint(0, V, case.targets.shape)
    mask = torch.arange(len(case.targets)) % 3 != 0
    old, advantages = case.tokens(), case.tokens()
    want = case.linear(linear_ppo_loss, old, advantages, mask)
    case.targets = torch.where(mask, case.targets, 10**6)
    with count_products() as count:
        got = case.linear(linear_ppo_loss, old, advantages, mask, num_scored=int(mask.sum()))
        grads = torch.autograd.grad(got.loss, case.leaves)
    assert count.products(int(mask.sum()), H, V) == 3
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(grads, torch.autograd.grad(want.loss, case.leaves), rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_metrics_of_the_tokens(packed) -> None:
    """Means over the scored completion tokens, whatever else is scored for the likelihood."""
    case = Case("plain", packed=packed)
    logits = (case.hidden @ case.weight.T).detach()
    logps = logits.log_softmax(-1)
    entropy, scored = -(logps.exp() * logps).sum(-1), case.targets != -100
    ref = torch.randn(R).double()
    per_row = {
        linear_cpo_loss: (torch.arange(R) < R // 2, {"nll_targets": case.nll_targets}),
        linear_orpo_loss: (torch.arange(R) < R // 2, {"nll_targets": case.nll_targets}),
        linear_dpo_loss: (torch.arange(R) < R // 2, {"ref_logps": ref}),
        linear_kto_loss: (LABELS.bool(), {"ref_logps": ref, "is_desirable": LABELS}),
    }
    for form, (chosen, arguments) in per_row.items():
        first = case.pick(chosen[:, None].expand(R, T))
        want = {
            "entropy": entropy[scored].mean(),
            "logits/chosen": logits.mean(-1)[scored & first].mean(),
            "logits/rejected": logits.mean(-1)[scored & ~first].mean(),
            "mean_token_accuracy": (logits.argmax(-1) == case.targets)[scored & first].float().mean(),
        }
        metrics = case.linear(form, **arguments, cu_seqlens=case.cu).metrics
        got = {name: metrics[name].item() for name in want}
        assert got == pytest.approx({name: value.item() for name, value in want.items()}, rel=1e-9, abs=1e-12)
        assert case.linear(form, **arguments, cu_seqlens=case.cu, metrics=False).metrics == {}


@pytest.mark.parametrize(
    ("form", "arguments", "products"),
    [
        ("linear_dpo_loss", {"ref_logps": torch.zeros(4)}, 3),
        ("linear_dpo_loss", {"ref": True}, 4),
        ("linear_kto_loss", {"is_desirable": LABELS, "ref_logps": torch.zeros(4)}, 3),
        ("linear_cpo_loss", {"nll": True}, 3),
        ("linear_orpo_loss", {"nll": True}, 3),
        ("linear_ppo_loss", {"old_logps": torch.zeros(4, 9), "advantages": torch.zeros(4)}, 3),
        ("linear_ppo_loss", {"old_logps": torch.zeros(4, 9), "advantages": torch.zeros(4), "entropy_coef": 0.1}, 3),
        ("linear_ppo_loss", {"old_logps": torch.zeros(4, 9), "advantages": torch.zeros(4), "max_memory": 0}, 4),
        ("linear_grpo_loss", {"old_logps": None, "advantages": torch.zeros(4), "normalizer": 36}, 3),
        ("linear_grpo_loss", {"old_logps": None, "advantages": torch.zeros(4), "normalizer": 36, "ref": True}, 4),
        ("linear_rloo_loss", {"old_logps": None, "advantages": torch.zeros(4), "entropy_coef": 0.1}, 3),
    ],
)
def test_products(form, arguments, products) -> None:
    """Metrics included, the likelihood beside the pairs too: those of one pass of the head, and one per reference."""
    N, H, V = 36, 16, 300
    hidden, weight = torch.randn(4, 9, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    targets, arguments = torch.randint(0, V, (4, 9)), dict(arguments)
    if arguments.pop("ref", False):
        arguments |= {"ref_hidden": hidden.detach(), "ref_weight": weight}
    if arguments.pop("nll", False):
        arguments["nll_targets"] = targets
        targets = targets.masked_fill((torch.arange(9) < 4) & (torch.arange(4) < 2)[:, None], -100)
    with count_products() as count:
        getattr(losses, form)(hidden, weight, targets, **arguments).loss.backward()
    assert count.products(N, H, V) == products


def test_nothing_scored_is_finite_with_zero_gradients() -> None:
    hidden, weight = torch.randn(R, T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    nothing, tokens, ref = torch.full((R, T), -100), torch.zeros(R, T), torch.zeros(R)
    for rows in (R, 0):
        h, t = hidden[:rows], nothing[:rows]
        for loss, metrics in (
            linear_kto_loss(h, weight, t, LABELS[:rows], ref[:rows]),
            linear_cpo_loss(h, weight, t, nll_targets=t),
            linear_orpo_loss(h, weight, t, nll_targets=t),
            linear_ppo_loss(h, weight, t, tokens[:rows], ref[:rows], entropy_coef=0.1),
        ):
            assert loss.isfinite()
            assert all((grad == 0).all() for grad in torch.autograd.grad(loss, [hidden, weight]))
            assert all(value.isfinite() for value in metrics.values())


def test_a_likelihood_target_that_differs_is_refused_on_the_cpu_and_nan_elsewhere(monkeypatch) -> None:
    case = Case("plain", packed=False)
    other = case.nll_targets.clone()
    other[0, 5] = (other[0, 5] + 1) % V
    with pytest.raises(ValueError, match=r"linear_orpo_loss: nll_targets must equal targets wherever both are scored"):
        case.linear(linear_orpo_loss, nll_targets=other)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on an accelerator: no value is read
    assert case.linear(linear_orpo_loss, nll_targets=other).loss.isnan()


def test_the_likelihood_does_not_read_rejected_rows() -> None:
    case = Case("plain", packed=False)
    want = case.linear(linear_orpo_loss, nll_targets=case.nll_targets)
    case.nll_targets[2:] = 10**6
    torch.testing.assert_close(case.linear(linear_orpo_loss, nll_targets=case.nll_targets), want, rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_no_value_is_read_off_the_cpu(packed) -> None:
    """With the number of scored tokens given: a tensor without values has none to wait for, metrics included."""
    shape, device = ((R * T,) if packed else (R, T)), torch.device("meta")
    hidden = torch.zeros(*shape, H, device=device, requires_grad=True)
    weight = torch.zeros(V, H, device=device, requires_grad=True)
    targets = torch.zeros(shape, dtype=torch.long, device=device)
    cu = torch.zeros(R + 1, dtype=torch.long, device=device) if packed else None
    rows, tokens = torch.zeros(R, device=device), torch.zeros(shape, device=device)
    options = {"cu_seqlens": cu, "num_scored": 9, "compute_dtype": torch.float32}
    for loss, metrics in (
        linear_dpo_loss(hidden, weight, targets, rows, **options),
        linear_kto_loss(hidden, weight, targets, rows, rows, kl=rows[0], **options),
        linear_cpo_loss(hidden, weight, targets, nll_targets=targets, **options),
        linear_orpo_loss(hidden, weight, targets, nll_targets=targets, **options),
        linear_ppo_loss(hidden, weight, targets, tokens, tokens, tokens > 0, entropy_coef=0.1, **options),
    ):
        grads = torch.autograd.grad(loss, [hidden, weight])
        assert all(tensor.device == device for tensor in (loss, *grads, *metrics.values()))
