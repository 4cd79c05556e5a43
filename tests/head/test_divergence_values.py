"""Values and gradients of the divergences against float64, under every plan, operand dtype and form of logits."""

import math

import pytest
import torch
from divergence_cases import BETA, DTYPES, FORMS, KINDS, REF_H, H, N, V, arguments, run, upstream

import prefkern as pk
from prefkern import testing
from prefkern.kernels.interface import Logits


def assert_gradient(got: torch.Tensor, want: torch.Tensor, eager: torch.Tensor, name: str) -> None:
    """The derived tolerance; in float64 the oracle is the eager twin itself, so there a bound of its own."""
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13 * max(1.0, want.abs().max().item()), msg=name)
    else:
        testing.assert_not_worse(got, want, eager, name=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_exact_to_1e_5(dtype: torch.dtype, kind: str, form: str) -> None:
    case = testing.divergence_case(N, H, REF_H, V, dtype=dtype, bias=True, masked=0.1)
    policy, reference = FORMS[form]
    scored = case.targets != testing.IGNORE
    want = testing.divergence_from_hidden(case, beta=BETA[kind], scored=scored, form=policy, ref_form=reference)
    got = pk.linear_kl_divergence(
        case.hidden,
        case.weight,
        case.ref_hidden,
        case.ref_weight,
        case.targets,
        bias=case.bias,
        ref_bias=case.ref_bias,
        outputs=("divergence", "entropy"),
        **KINDS[kind],
        **arguments(policy, reference),
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert got.divergence.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert want[scored].min() > 0.1
    torch.testing.assert_close(got.divergence.double(), want, rtol=0, atol=tolerance)
    entropy = testing.stats_from_hidden(
        case.hidden,
        case.weight,
        case.targets,
        bias=case.bias,
        **{k: v for k, v in policy._asdict().items() if k != "bias"},
    ).entropy
    torch.testing.assert_close(got.entropy.double(), entropy, rtol=0, atol=tolerance)
    assert not got.entropy.requires_grad


@pytest.mark.parametrize("form", ["plain", "all"])
@pytest.mark.parametrize("rows", [None, 17, 0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_no_worse_than_eager(dtype: torch.dtype, kind: str, rows: int | None, form: str) -> None:
    case = testing.divergence_case(N, H, REF_H, V, dtype=dtype, bias=True)
    policy, reference = FORMS[form]
    g, scored = upstream(), case.targets != testing.IGNORE
    memory = None if rows is None else rows * V * dtype.itemsize
    _, got = run(case, g, max_memory=memory, **KINDS[kind], **arguments(policy, reference))
    oracle = {"beta": BETA[kind], "scored": scored, "form": policy, "ref_form": reference}
    want, eager = (testing.divergence_grads(case, g, dtype=d, **oracle) for d in (torch.float64, dtype))
    for name, ours, expected, plain in zip(want._fields, got, want, eager, strict=True):
        assert ours.dtype == dtype
        assert_gradient(ours, expected, plain, f"grad_{name}")


def drifted(n: int, h: int, v: int, dtype: torch.dtype) -> testing.DivergenceCase:
    """A policy that has moved away from its reference, as in training: divergences of about 0.5."""
    policy = testing.head_case(n, h, v, dtype=dtype, ignored=0.0, confident=0.0)
    away = torch.randn(n, h, generator=torch.Generator().manual_seed(9)) * 0.4
    moved = (policy.hidden.float() + away).to(dtype)
    return testing.DivergenceCase(moved, policy.weight, None, policy.hidden, policy.weight, None, policy.targets)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_operands_lose_nothing_in_the_logits(dtype: torch.dtype, kind: str) -> None:
    case = drifted(128, 512, 4096, dtype)
    want = testing.divergence_from_hidden(case, beta=BETA[kind])
    rounded = testing.divergence_from_hidden(case, beta=BETA[kind], dtype=dtype)
    got = pk.linear_kl_divergence(*case[:2], *case[3:5], **KINDS[kind])
    error = (got.double() - want).abs().max().item()
    assert error <= 1e-5
    assert (rounded.double() - want).abs().max().item() > 50 * error  # what rounding the logits costs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_far_apart_are_as_exact_as_the_float32_product(dtype: torch.dtype, kind: str) -> None:
    """Divergences of 20, of logits of 60: the rounding of the product's sum dominates, and nothing is added to it."""
    case = testing.divergence_case(128, 512, 256, 4096, dtype=dtype, ignored=0.0, scale=3.0)
    want = testing.divergence_from_hidden(case, beta=BETA[kind])
    plain = testing.divergence_from_hidden(case, beta=BETA[kind], dtype=torch.float32)
    testing.assert_not_worse(pk.linear_kl_divergence(*case[:2], *case[3:5], **KINDS[kind]), want, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_gradients_are_exact_to_1e_5(kind: str) -> None:
    case = drifted(200, 64, 1000, torch.float32)
    g = upstream(n=200) / 200
    _, got = run(case, g, **KINDS[kind])
    want = testing.divergence_grads(case, g, beta=BETA[kind])
    for value, expected in zip(got, want[:2], strict=True):
        assert ((value.double() - expected).abs().max() / expected.abs().max()).item() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_logits(dtype: torch.dtype, kind: str) -> None:
    case, other = (testing.logit_case(N, V, dtype=dtype, seed=seed) for seed in (0, 1))
    logits, ref_logits = case.logits.clone().requires_grad_(), other.logits.clone().requires_grad_()
    for part in (logits, ref_logits):
        part.data[:, 40:60] = -math.inf
    policy = Logits(temperature=torch.linspace(0.6, 1.4, N))
    reference = Logits(temperature=0.9)
    scored, g = case.targets != testing.IGNORE, upstream()
    got = pk.kl_divergence(
        logits, ref_logits, case.targets, temperature=policy.temperature, ref_temperature=0.9, **KINDS[kind]
    )
    (grad,) = torch.autograd.grad((got * g).sum(), logits)
    oracle = {"beta": BETA[kind], "scored": scored, "form": policy, "ref_form": reference}
    want = testing.divergence_from_logits(logits, ref_logits, **oracle)
    assert (got.double() - want).abs().max().item() <= (1e-12 if dtype == torch.float64 else 1e-5)
    assert grad.dtype == dtype
    factor = (g.double() / policy.temperature.double())[:, None]
    wanted, eager = (testing.unscaled_divergence(logits, ref_logits, dtype=d, **oracle) for d in (torch.float64, dtype))
    eager = (factor * eager.double()).to(dtype)
    assert_gradient(grad, factor * wanted, eager, "grad")
    assert (grad[:, 40:60] == 0).all()


def test_mixed_dtypes() -> None:
    """A 16-bit reference of a float32 policy: each side's products take its own operands."""
    case = testing.divergence_case(N, H, REF_H, V, ref_dtype=torch.bfloat16)
    want = testing.divergence_from_hidden(case, beta=0.0, scored=case.targets != testing.IGNORE)
    got = pk.linear_kl_divergence(*case[:2], *case[3:5], case.targets)
    assert (got.double() - want).abs().max().item() <= 1e-5
    logits, ref_logits = torch.randn(3, 7), torch.randn(3, 7).bfloat16()
    torch.testing.assert_close(pk.kl_divergence(logits, ref_logits), pk.kl_divergence(logits, ref_logits.float()))
    assert pk.kl_divergence(logits.double(), ref_logits).dtype == torch.float64
    assert pk.kl_divergence(logits, ref_logits.double()).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    case = testing.divergence_case(7, 5, 4, 11, dtype=torch.float64, bias=True)
    leaves = [value.detach().clone().requires_grad_() for value in case[:3]]
    options = {"softcap": 6.0, "ref_softcap": 5.0, "temperature": 0.8, "logit_scale": 1.2, "ref_logit_scale": 0.9}
    for memory in (None, 3 * 11 * 8, 0):

        def value(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, memory=memory) -> torch.Tensor:
            reference = case.ref_hidden, case.ref_weight, case.targets
            named = {"bias": bias, "ref_bias": case.ref_bias, "max_memory": memory}
            return pk.linear_kl_divergence(hidden, weight, *reference, **named, **options, **KINDS[kind])

        assert torch.autograd.gradcheck(value, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_plan(dtype: torch.dtype, kind: str) -> None:
    case = testing.divergence_case(N, H, REF_H, V, dtype=dtype, bias=True)
    whole, first = run(case, upstream(), **KINDS[kind])
    for memory in (0, V * 4, 20 * V * 4, 44 * V * 4):
        value, grads = run(case, upstream(), max_memory=memory, **KINDS[kind])
        assert (value - whole).abs().max().item() <= 4e-6  # the product's blocking may differ
        for got, expected in zip(grads, first, strict=True):
            bound = 8 * torch.finfo(dtype).eps * expected.abs().max()  # sums of up to N terms in another order
            assert ((got - expected).abs().max() <= bound).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [None, 20, 0])
def test_two_runs_are_bitwise_equal_and_every_output_is_written(rows: int | None, kind: str) -> None:
    case = testing.divergence_case(N, H, REF_H, V, dtype=torch.bfloat16, bias=True)
    memory = None if rows is None else rows * V * 2
    value, grads = run(case, upstream(), max_memory=memory, **KINDS[kind])
    with testing.poison_empty():
        again, poisoned = run(case, upstream(), max_memory=memory, **KINDS[kind])
    for a, b in zip((value, *grads), (again, *poisoned), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_it_is_what_trl_computes(beta: float) -> None:
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    logits, ref_logits = (torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(s)) * 3 for s in (0, 1))
    labels = torch.randint(0, 40, (3, 5)).masked_fill(torch.rand(3, 5) < 0.3, -100)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    got = pk.kl_divergence(ours, ref_logits, labels, jsd_beta=beta, temperature=1.7)
    want = trainer.generalized_jsd_loss(theirs, ref_logits, labels=labels, beta=beta, temperature=1.7, reduction="sum")
    torch.testing.assert_close(got.sum(), want, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    want.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    if beta in (0.0, 1.0):
        named = {0.0: "forward", 1.0: "reverse"}[beta]
        assert torch.equal(got, pk.kl_divergence(logits, ref_logits, labels, direction=named, temperature=1.7))
