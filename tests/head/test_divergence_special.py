"""Divergences at the edges: masked vocabulary, offsets, near-equal heads, nothing scored, layouts."""

import math

import pytest
import torch
from divergence_cases import BETA, KINDS, upstream

import prefkern as pk
from prefkern import testing
from prefkern.kernels.interface import Logits


def pair(n: int = 6, v: int = 40, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    one, two = (torch.randn(n, v, generator=torch.Generator().manual_seed(s)) * scale for s in (0, 1))
    return one, two


@pytest.mark.parametrize("shape", [(0,), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", [None, 0])
def test_nothing_scored_is_zero_with_a_graph(memory: int | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    hidden, ref_hidden = torch.randn(*shape, 8).to(dtype).requires_grad_(), torch.randn(*shape, 4).to(dtype)
    weight, bias = (torch.randn(*s).to(dtype).requires_grad_() for s in ((50, 8), (50,)))
    ref_weight, ref_bias = torch.randn(50, 4).to(dtype), torch.zeros(50).to(dtype)
    logits = torch.randn(*shape, 50).to(dtype).requires_grad_()
    targets = torch.full(shape, -100)
    got = pk.linear_kl_divergence(
        hidden, weight, ref_hidden, ref_weight, targets, bias=bias, ref_bias=ref_bias, max_memory=memory
    )
    (got.sum() + pk.kl_divergence(logits, logits.detach() * 2, targets).sum()).backward()
    assert got.shape == shape
    assert (got == 0).all()
    for leaf in (hidden, weight, bias, logits):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_rows_may_hold_anything(kind: str) -> None:
    logits, ref_logits = pair()
    targets = torch.tensor([0, -100, 3, 39, -100, 7])
    logits[1], ref_logits[4] = math.nan, math.inf
    leaf = logits.clone().requires_grad_()
    got = pk.kl_divergence(leaf, ref_logits, targets, **KINDS[kind])
    got.sum().backward()
    assert (got[targets == -100] == 0).all()
    assert (leaf.grad[targets == -100] == 0).all()
    kept = targets != -100
    assert torch.equal(got[kept], pk.kl_divergence(logits[kept], ref_logits[kept], **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [None, 0])
def test_columns_masked_in_both_heads_do_not_exist(memory: int | None, kind: str) -> None:
    case = testing.divergence_case(12, 8, 6, 50, bias=True, ignored=0.0)
    columns = slice(10, 40)
    keep = [*range(10), *range(40, 50)]
    for bias in (case.bias, case.ref_bias):
        bias[columns] = -math.inf
    leaves = [value.clone().requires_grad_() for value in case[:3]]
    got = pk.linear_kl_divergence(
        leaves[0],
        leaves[1],
        case.ref_hidden,
        case.ref_weight,
        bias=leaves[2],
        ref_bias=case.ref_bias,
        max_memory=memory,
        **KINDS[kind],
    )
    want = pk.linear_kl_divergence(
        case.hidden,
        case.weight[keep],
        case.ref_hidden,
        case.ref_weight[keep],
        bias=case.bias[keep],
        ref_bias=case.ref_bias[keep],
        **KINDS[kind],
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(got.sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[1][columns] == 0).all()
    assert (grads[2][columns] == 0).all()


def test_a_token_of_one_head_only() -> None:
    logits, ref_logits = pair(4)
    logits[0, 3] = -math.inf  # the reference alone may say it
    ref_logits[1, 5] = -math.inf  # the policy alone
    ref_logits[2, 5] = -1e4  # nearly so: its probability underflows, and a whole float is not infinite
    for kind, options in KINDS.items():
        leaf = logits.clone().requires_grad_()
        got = pk.kl_divergence(leaf, ref_logits, **options)
        (grad,) = torch.autograd.grad(got, leaf, torch.ones(4))
        want = testing.divergence_from_logits(logits, ref_logits, beta=BETA[kind])
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
        unscaled = testing.unscaled_divergence(logits, ref_logits, beta=BETA[kind])
        torch.testing.assert_close(grad.double(), unscaled, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert grad[0, 3] == 0
        infinite = {"forward": [0], "reverse": [1], "jsd": []}[kind]
        assert got.isinf().nonzero().flatten().tolist() == infinite
        assert grad.isnan().any(-1).nonzero().flatten().tolist() == (infinite if kind == "reverse" else [])


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_whatever_underflows(kind: str) -> None:
    """The reference gives a token e^-200, no float32, and the policy nothing: still not absolutely continuous."""
    logits, ref_logits = pair(2)
    logits[0, 3], ref_logits[0, 3] = -math.inf, -200.0
    ref_logits[1, 3], logits[1, 3] = -math.inf, -200.0
    got = pk.kl_divergence(logits, ref_logits, **KINDS[kind])
    assert got.isinf().tolist() == {"forward": [True, False], "reverse": [False, True], "jsd": [False, False]}[kind]
    assert not got.isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_a_finite_logit_is_nan_and_alone(kind: str) -> None:
    logits, ref_logits = pair(4)
    logits[1] = -math.inf
    ref_logits[2] = -math.inf
    got = pk.kl_divergence(logits, ref_logits, **KINDS[kind])
    assert got.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
def test_a_common_offset_costs_nothing(offset: float, kind: str) -> None:
    logits, ref_logits = (torch.randint(-64, 64, (2, 6, 40)).float() / 8).unbind(0)  # exact with the offset added
    for temperature in (1.0, 0.3):
        plain = pk.kl_divergence(logits, ref_logits, temperature=temperature, **KINDS[kind])
        moved = pk.kl_divergence(logits + offset, ref_logits - offset, temperature=temperature, **KINDS[kind])
        assert (plain - moved).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_equal_heads_have_none_and_near_ones_a_small_one(kind: str) -> None:
    logits, _ = pair(8, 500)
    leaf = logits.clone().requires_grad_()
    got = pk.kl_divergence(leaf, logits, **KINDS[kind])
    got.sum().backward()
    assert (got == 0).all()
    assert leaf.grad.abs().max() <= 1e-8
    near = logits + 1e-3 * torch.randn(logits.shape)
    got = pk.kl_divergence(near, logits, **KINDS[kind])
    want = testing.divergence_from_logits(near, logits, beta=BETA[kind])
    assert (got >= 0).all()
    assert (got - want).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_confident_heads(kind: str) -> None:
    """Probabilities that underflow on either side, also under a low temperature."""
    logits, ref_logits = pair(8, 300, scale=30.0)
    for temperature in (1.0, 0.05):
        got = pk.kl_divergence(logits, ref_logits, temperature=temperature, **KINDS[kind])
        form = Logits(temperature=temperature)
        want = testing.divergence_from_logits(logits, ref_logits, beta=BETA[kind], form=form, ref_form=form)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [None, 0])
def test_float16_with_near_equal_heads_and_a_mean_over_many_tokens(memory: int | None, kind: str) -> None:
    """Differences of probabilities of 1e-8 and an upstream gradient of 1e-8: neither is a float16 number."""
    case = testing.divergence_case(16, 16, 16, 4000, dtype=torch.float16, ignored=0.0, scale=0.3, confident=0.0)
    reference = case.weight.float() * 1.0005
    case = case._replace(weight=case.weight.float(), ref_hidden=case.hidden.float(), ref_weight=reference)
    weight = case.weight.requires_grad_()
    got = pk.linear_kl_divergence(case.hidden, weight, *case[3:5], max_memory=memory, **KINDS[kind])
    (got.sum() * 1e-8).backward()
    want = testing.divergence_grads(case, torch.full((16,), 1e-8), beta=BETA[kind]).weight
    assert ((weight.grad.double() - want).abs().max() / want.abs().max()).item() <= 2e-3


def test_float16_with_very_different_heads_does_not_overflow() -> None:
    case = testing.divergence_case(16, 64, 64, 200, dtype=torch.float16, ignored=0.0, scale=100.0)
    weight = case.weight.clone().requires_grad_()
    got = pk.linear_kl_divergence(case.hidden, weight, *case[3:5], direction="reverse")
    assert got.max() > 100
    got.mean().backward()
    want = testing.divergence_grads(case, torch.full((16,), 1 / 16), beta=1.0).weight
    assert ((weight.grad.double() - want).abs().max() / want.abs().max()).item() <= 2e-3


def test_upstream_gradients_of_every_layout() -> None:
    case = testing.divergence_case(12, 8, 6, 50)
    leaves = [value.clone().requires_grad_() for value in case[:2]]
    got = pk.linear_kl_divergence(*leaves, *case[3:5], case.targets, direction="reverse")
    scored = case.targets != -100
    for g in (torch.randn(24)[::2], torch.ones(1).expand(12), torch.zeros(12), torch.randn(12, 2)[:, 1]):
        grads = torch.autograd.grad(got, leaves, g, retain_graph=True)
        want = testing.divergence_grads(case, g, beta=1.0, scored=scored)
        for value, expected in zip(grads, want[:2], strict=True):
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


def test_two_backward_passes_leave_the_first_result_alone() -> None:
    case = testing.divergence_case(12, 8, 6, 50, dtype=torch.bfloat16)
    leaves = [value.clone().requires_grad_() for value in case[:2]]
    got = pk.linear_kl_divergence(*leaves, *case[3:5], case.targets)
    first = torch.autograd.grad(got.sum(), leaves, retain_graph=True)
    copies = [value.clone() for value in first]
    torch.autograd.grad((got * 3).sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(got.sum(), leaves)
    for value, copy, repeated in zip(first, copies, again, strict=True):
        assert torch.equal(value, copy)
        assert torch.equal(value, repeated)


def test_strides_and_leading_dimensions() -> None:
    case = testing.divergence_case(24, 8, 6, 50)
    want = pk.linear_kl_divergence(*case[:2], *case[3:5], case.targets)
    hidden = torch.cat([case.hidden, case.hidden], 1)[:, :8].view(2, 3, 4, 8)
    weight = case.weight.T.contiguous().T
    targets = torch.stack([case.targets, case.targets], 1)[:, 0].to(torch.int32).view(2, 3, 4)
    got = pk.linear_kl_divergence(hidden, weight, case.ref_hidden.view(2, 3, 4, 6), case.ref_weight, targets)
    torch.testing.assert_close(got, want.view(2, 3, 4))
    logits, ref_logits = case.hidden @ case.weight.T, case.ref_hidden @ case.ref_weight.T
    sideways = logits.T.contiguous().T
    torch.testing.assert_close(pk.kl_divergence(sideways, ref_logits, case.targets), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "h", "v"), [(1, 1, 1), (3, 7, 1), (1, 5, 257), (9, 3, 1021)])
def test_odd_shapes(n: int, h: int, v: int) -> None:
    case = testing.divergence_case(n, h, h + 1, v, ignored=0.0)
    for memory in (None, 0):
        leaves = [value.clone().requires_grad_() for value in case[:2]]
        got = pk.linear_kl_divergence(*leaves, *case[3:5], max_memory=memory)
        grads = torch.autograd.grad((got * upstream(n=n)).sum(), leaves)
        want = testing.divergence_grads(case, upstream(n=n), beta=0.0)
        for value, expected in zip(grads, want[:2], strict=True):
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


def test_num_scored_and_no_targets_give_the_same_numbers() -> None:
    case = testing.divergence_case(30, 8, 6, 50, ignored=0.5)
    count = int((case.targets != -100).sum())
    temperature = torch.linspace(0.5, 1.5, 30)
    options = {"temperature": temperature, "ref_temperature": temperature.flip(0)}
    got = pk.linear_kl_divergence(*case[:2], *case[3:5], case.targets, num_scored=count, **options)
    assert torch.equal(got, pk.linear_kl_divergence(*case[:2], *case[3:5], case.targets, **options))
    alone = pk.linear_kl_divergence(*case[:2], *case[3:5], **options)
    assert ((alone - got)[case.targets != -100].abs() <= 1e-5).all()
    zeros = torch.zeros(30, dtype=torch.long)  # the numbers in targets are not used
    assert torch.equal(alone, pk.linear_kl_divergence(*case[:2], *case[3:5], zeros, **options))
    assert torch.equal(alone, pk.linear_kl_divergence(*case[:2], *case[3:5], None, ignore_index=0, **options))


def test_the_references_temperature_is_by_default_the_policys() -> None:
    logits, ref_logits = pair()
    temperature = torch.linspace(0.5, 1.5, 6)
    for given in (0.6, temperature):
        got = pk.kl_divergence(logits, ref_logits, temperature=given)
        assert torch.equal(got, pk.kl_divergence(logits, ref_logits, temperature=given, ref_temperature=given))


def test_mixed_weights_and_autocast() -> None:
    case = testing.divergence_case(16, 32, 16, 64, dtype=torch.bfloat16)
    weight = case.weight.float().requires_grad_()  # float32 master weight whose values are bfloat16 ones
    want = pk.linear_kl_divergence(*case[:2], *case[3:5])
    got = pk.linear_kl_divergence(case.hidden, weight, *case[3:5])
    assert torch.equal(got, want)
    got.sum().backward()
    assert weight.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = pk.linear_kl_divergence(case.hidden.float(), weight, case.ref_hidden.float(), case.ref_weight.float())
    assert torch.equal(cast, want)
    exact = pk.linear_kl_divergence(*case[:2], *case[3:5], compute_dtype=torch.float64)
    assert exact.dtype == torch.float64
