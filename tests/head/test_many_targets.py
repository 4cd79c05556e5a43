"""Several targets per row, an adapter on the head, a mask of allowed vocabulary: against float64 and autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor

import prefkern as pk
from prefkern import testing
from prefkern.head.engine.products import count_products

N, H, V, KT, R = 21, 16, 311, 4, 3
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cap, scale, row temperature": {"logit_scale": 1.3, "softcap": 5.0, "temperature": torch.linspace(0.5, 1.5, N)},
}


def head(dtype: torch.dtype) -> tuple[testing.HeadCase, Tensor]:
    """A head, and targets with ignored entries, an ignored row, and one token asked for twice."""
    case = testing.head_case(N, H, V, dtype=dtype, bias=True, ignored=0.0)
    targets = torch.randint(V, (N, KT), generator=torch.Generator().manual_seed(8))
    targets[:, 0] = case.targets
    targets[3, 1:], targets[5] = -100, -100
    targets[7, 2] = targets[7, 0]
    return case, targets


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    lora: tuple[Tensor, Tensor, float] | None = None,
    allowed: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy by plain torch, in float32 or wider after the product."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = (hidden @ weight.T).to(wide) + bias.to(wide)
    if lora is not None:
        z = z + lora[2] * ((hidden @ lora[0].T) @ lora[1].T).to(wide)
    if allowed is not None:
        z = z.masked_fill(~allowed, -torch.inf)
    z = z * options.get("logit_scale", 1.0)
    cap, temperature = options.get("softcap"), options.get("temperature", 1.0)
    z = z if cap is None else (cap * torch.tanh(z / cap)).masked_fill(z == -torch.inf, -torch.inf)
    z = z / (temperature.to(wide).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    logp = torch.log_softmax(z, -1)
    index = targets.clamp(min=0)
    lp = logp.gather(1, index if index.ndim == 2 else index.unsqueeze(1)).view(targets.shape)
    scored = targets != -100
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    return lp.masked_fill(~scored, 0.0), entropy.masked_fill(~(scored.any(1) if scored.ndim == 2 else scored), 0.0)


def compare(ours: list[Tensor], leaves: list[Tensor], want: Any, loss: Any) -> None:
    """Gradients against the same in float64; no worse than those of the plain computation in the same dtype."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    eager = [leaf.detach().requires_grad_() for leaf in leaves]
    oracle = torch.autograd.grad(loss(*want(exact)), exact)
    rounded = torch.autograd.grad(loss(*want(eager)), eager)
    for index, (got, truth, same) in enumerate(zip(ours, oracle, rounded, strict=True)):
        assert got.dtype == leaves[index].dtype
        if got.dtype == torch.float64:
            torch.testing.assert_close(got, truth, rtol=0, atol=1e-12 * max(1.0, truth.abs().max().item()))
        else:
            testing.assert_not_worse(got, truth, same, name=f"gradient {index}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_targets(dtype: torch.dtype, entropy: bool, form: str) -> None:
    case, targets = head(dtype)
    generator = torch.Generator().manual_seed(2)
    c, e = torch.randn(N, KT, generator=generator), torch.randn(N, generator=generator)
    leaves = [value.clone().requires_grad_() for value in case[:3]]

    def loss(logps: Tensor, entropies: Tensor) -> Tensor:
        return (logps * c).sum() + (entropies * e).sum() * entropy

    with count_products() as count, testing.poison_empty():
        stats = pk.linear_token_logprobs(
            leaves[0], leaves[1], targets, bias=leaves[2], outputs=("entropy",), entropy_grad=entropy, **FORMS[form]
        )
        got = torch.autograd.grad(loss(stats.logps, stats.entropy if entropy else stats.entropy.detach()), leaves)
    assert count.products(N - 1, H, V) == 4
    want, want_entropy = plain(*(v.double() for v in case[:3]), targets, **FORMS[form])
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert stats.logps.shape == (N, KT)
    assert stats.entropy.shape == (N,)
    assert (stats.logps - want).abs().max() <= bound
    assert (stats.entropy - want_entropy).abs().max() <= bound
    compare(list(got), leaves, lambda given: plain(*given, targets, **FORMS[form]), loss)


def test_several_targets_equal_one_at_a_time() -> None:
    case, targets = head(torch.float32)
    many = pk.linear_token_logprobs(case.hidden.view(3, 7, H), case.weight, targets.view(3, 7, KT)).logps
    for k in range(KT):
        one = pk.linear_token_logprobs(case.hidden, case.weight, targets[:, k]).logps
        assert (many.view(N, KT)[:, k] - one).abs().max() <= 1e-6


def test_several_targets_of_a_confident_row_keep_their_gradient() -> None:
    """1 - p of the first target is 9e-5: its entry is C expm1(lp) and the other upstream gradients, not C p - c."""
    hidden = torch.tensor([[10.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    logps = pk.linear_token_logprobs(hidden, weight, torch.tensor([[0, 1]])).logps
    (got,) = torch.autograd.grad(logps[0, 0], hidden)
    exact = hidden.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(torch.log_softmax(exact @ weight.double().T, -1)[0, 0], exact)
    assert ((got - want).abs() <= 2e-3 * want.abs().max()).all()  # float32 still has 1 - p to three digits


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("max_memory", [None, 8 * V * 4, 0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapter(dtype: torch.dtype, max_memory: int | None, frozen: bool) -> None:
    case, targets = head(dtype)
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(shape, generator=generator).to(dtype) * 0.3 for shape in ((R, H), (V, R)))
    leaves = [case.hidden.clone(), a, b] if frozen else [*(v.clone() for v in case[:3]), a, b]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    c = torch.randn(N, generator=generator)

    def parts(given: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, float]]:
        kind = given[0].dtype
        weight, bias = (case.weight.to(kind), case.bias.to(kind)) if frozen else given[1:3]
        return given[0], weight, bias, (given[-2], given[-1], 0.7)

    def loss(logps: Tensor, _: Tensor) -> Tensor:
        return (logps * c).sum()

    hidden, weight, bias, lora = parts(leaves)
    with count_products() as count:
        stats = pk.linear_token_logprobs(
            hidden, weight, targets[:, 0], bias=bias, lora=lora, max_memory=max_memory, outputs=("entropy",)
        )
        got = torch.autograd.grad(loss(stats.logps, stats.entropy), leaves)
    if max_memory is None:  # x and its gradient, the logits of x, grad of x and of B, A's share of two gradients
        low_rank = 4 * N * R * H / (N * H * V) + 3 * R / H
        assert count.products(N - 1, H, V) == pytest.approx((2 if frozen else 3) + low_rank)
    want = plain(
        *(v.double() for v in (hidden, weight, bias)), targets[:, 0], (lora[0].double(), lora[1].double(), 0.7)
    )
    if dtype in (torch.float64, torch.float32):
        assert (stats.logps - want[0]).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5)

    def reference(given: list[Tensor]) -> tuple[Tensor, Tensor]:
        *three, lora = parts(given)
        return plain(*three, targets[:, 0], lora)

    compare(list(got), leaves, reference, loss)


def test_adapter_is_exact_for_16_bit_operands() -> None:
    """``x = scale h A^T`` is not rounded: the log-probabilities are those of the float64 product of the operands."""
    case, targets = head(torch.bfloat16)
    a, b = torch.randn(R, H).bfloat16(), torch.randn(V, R).bfloat16()
    got = pk.linear_token_logprobs(case.hidden, case.weight, targets[:, 0], bias=case.bias, lora=(a, b, 0.5)).logps
    double = [value.double() for value in case[:3]]
    want = plain(*double, targets[:, 0], (a.double(), b.double(), 0.5))[0]
    assert (got - want).abs().max() <= 1e-5


@pytest.mark.parametrize("max_memory", [None, 0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_allowed_vocabulary(with_bias: bool, max_memory: int | None) -> None:
    case, targets = head(torch.float32)
    allowed = torch.rand(V, generator=torch.Generator().manual_seed(5)) < 0.6
    allowed[targets[:, 0].clamp(min=0)] = True
    bias = case.bias if with_bias else torch.zeros(V)
    leaves = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
    logps = pk.linear_token_logprobs(
        *leaves,
        targets[:, 0],
        bias=bias if with_bias else None,
        vocab_mask=allowed if with_bias else allowed.int(),
        max_memory=max_memory,
    ).logps
    got = torch.autograd.grad(logps.sum(), leaves)
    want, _ = plain(*(v.double() for v in (case.hidden, case.weight, bias)), targets[:, 0], allowed=allowed)
    assert (logps - want).abs().max() <= 1e-5
    assert (got[1][~allowed] == 0).all()
    compare(
        list(got),
        leaves,
        lambda given: plain(*given, bias.to(given[0].dtype), targets[:, 0], allowed=allowed),
        lambda logps, _: logps.sum(),
    )


def test_a_gradient_reaches_the_bias_beside_the_mask() -> None:
    case, targets = head(torch.float32)
    allowed = torch.arange(V) < V - 5
    bias = case.bias.clone().requires_grad_()
    one_of = targets[:, 0].clamp(max=V - 6)
    logps = pk.linear_token_logprobs(case.hidden, case.weight, one_of, bias=bias, vocab_mask=allowed).logps
    (got,) = torch.autograd.grad(logps.sum(), bias)
    assert (got[V - 5 :] == 0).all()
    assert got[: V - 5].abs().min() > 0
