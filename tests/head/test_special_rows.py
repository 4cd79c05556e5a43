"""Rows, logits and gradients at the edges: each line breaks some loss kernel somewhere."""

import math

import pytest
import torch

import prefkern as pk
from prefkern import testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def small(n: int = 12, h: int = 8, v: int = 50, dtype: torch.dtype = torch.float32, **options):
    case = testing.head_case(n, h, v, dtype=dtype, **options)
    return case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(), case.targets


@pytest.mark.parametrize("shape", [(0,), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_scored_is_zero_with_a_graph(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    hidden = torch.randn(*shape, 8).to(dtype).requires_grad_()
    weight = torch.randn(50, 8).to(dtype).requires_grad_()
    logits = torch.randn(*shape, 50).to(dtype).requires_grad_()
    targets = torch.full(shape, -100)
    stats = pk.linear_token_logprobs(hidden, weight, targets, outputs=("logps", "entropy"), entropy_grad=True)
    (stats.logps.sum() + stats.entropy.sum() + pk.token_logprobs(logits, targets).logps.sum()).backward()
    assert stats.logps.shape == shape
    assert (stats.logps == 0).all()
    for leaf in (hidden, weight, logits):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize("max_memory", [None, 0])
def test_rows_of_minus_infinity(max_memory: int | None) -> None:
    hidden, weight, targets = small(ignored=0.0)
    bias = torch.zeros(50)
    bias[10:40] = -math.inf
    targets[0], targets[1] = 20, 5  # a target that is masked, and one that is not
    stats = pk.linear_token_logprobs(
        hidden, weight, targets, bias=bias, outputs=("logps", "entropy"), max_memory=max_memory
    )
    assert stats.logps[0] == -math.inf
    assert stats.logps[1].isfinite()
    assert stats.entropy.isfinite().all()
    grads = torch.autograd.grad(stats.logps[1:].sum(), (hidden, weight), retain_graph=True)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][10:40] == 0).all()

    stats = pk.linear_token_logprobs(
        hidden,
        weight,
        targets,
        bias=torch.full((50,), -math.inf),
        outputs=("logps", "entropy"),
        entropy_grad=True,
        max_memory=max_memory,
    )
    assert (stats.logps == -math.inf).all()
    assert (stats.entropy == 0).all()
    grads = torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), (hidden, weight))
    assert all((g == 0).all() for g in grads)


def test_minus_infinity_survives_the_softcap() -> None:
    logits = torch.randn(3, 9)
    logits[:, 4:] = -math.inf
    got = pk.token_logprobs(logits, torch.tensor([0, 1, 5]), softcap=2.0)
    want = torch.log_softmax(2 * torch.tanh(logits[:, :4] / 2), -1)
    torch.testing.assert_close(got.logps[:2], torch.stack([want[0, 0], want[1, 1]]))
    assert got.logps[2] == -math.inf


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
def test_a_common_offset_costs_nothing(offset: float) -> None:
    logits = torch.randint(-64, 64, (6, 40)).float() / 8  # exact with the offset added
    targets = torch.arange(6)
    for temperature in (1.0, 0.3):
        plain = pk.token_logprobs(logits, targets, temperature=temperature, outputs=("entropy",))
        moved = pk.token_logprobs(logits + offset, targets, temperature=temperature, outputs=("entropy",))
        assert (plain.logps - moved.logps).abs().max() <= 1e-6
        assert (plain.entropy - moved.entropy).abs().max() <= 1e-6


def test_confident_tokens_keep_their_gradient() -> None:
    logits = torch.zeros(4, 1000, dtype=torch.float64)
    logits[:, 7] = torch.tensor([10.0, 14.0, 18.0, 22.0])
    targets = torch.full((4,), 7)
    leaf = logits.float().requires_grad_()
    pk.token_logprobs(leaf, targets).logps.sum().backward()
    want = testing.grads_from_logits(logits, targets, torch.ones(4))
    error = (leaf.grad[:2, 7].double() - want[:2, 7]).abs() / want[:2, 7]
    assert error.max() <= 2e-3  # 1 - p is 4.5e-2 and 8e-4: float32 still has it
    assert (leaf.grad[:, 7] >= 0).all()


def test_low_temperature_entropy_does_not_cancel() -> None:
    logits = torch.randn(8, 500, generator=torch.Generator().manual_seed(0)) * 5
    got = pk.token_logprobs(logits, torch.zeros(8, dtype=torch.long), temperature=0.01, outputs=("entropy",)).entropy
    want = testing.stats_from_logits(logits, torch.zeros(8, dtype=torch.long), temperature=0.01).entropy
    assert (got >= 0).all()
    assert (got - want).abs().max() <= 1e-6


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("max_memory", [None, 0])
def test_float16_with_a_mean_over_many_tokens(max_memory: int | None, entropy: bool) -> None:
    """c = 1e-8 underflows in float16; normalised by a power of two it does not."""
    case = testing.head_case(64, 16, 200, dtype=torch.float16, weight_dtype=torch.float32, ignored=0.0)
    weight = case.weight.half().float().requires_grad_()
    stats = pk.linear_token_logprobs(
        case.hidden, weight, case.targets, max_memory=max_memory, outputs=("logps", "entropy"), entropy_grad=True
    )
    ((stats.logps.sum() + entropy * stats.entropy.sum()) * 1e-8).backward()
    scale = torch.full((64,), 1e-8)
    want = testing.grads_from_hidden(case.hidden, weight, case.targets, scale, scale * entropy).weight
    assert ((weight.grad.double() - want).abs().max() / want.abs().max()).item() <= 2e-3


def test_upstream_gradients_of_every_layout() -> None:
    hidden, weight, targets = small()
    logps = pk.linear_token_logprobs(hidden, weight, targets).logps
    for grad in (torch.randn(24)[::2], torch.ones(1).expand(12), torch.zeros(12), torch.randn(12, 2)[:, 1]):
        got = torch.autograd.grad(logps, (hidden, weight), grad, retain_graph=True)
        want = testing.grads_from_hidden(hidden, weight, targets, grad)
        for value, expected in zip(got, want[:2], strict=True):
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_two_backward_passes_leave_the_first_result_alone() -> None:
    hidden, weight, targets = small(dtype=torch.bfloat16)
    stats = pk.linear_token_logprobs(hidden, weight, targets, outputs=("logps", "entropy"), entropy_grad=True)
    first = torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), (hidden, weight), retain_graph=True)
    copies = [value.clone() for value in first]
    torch.autograd.grad((stats.logps * 3).sum(), (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), (hidden, weight))
    for value, copy, repeated in zip(first, copies, again, strict=True):
        assert torch.equal(value, copy)
        assert torch.equal(value, repeated)


@pytest.mark.parametrize("max_memory", [None, 0])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_not_written_in_a_backward(compute_dtype: torch.dtype, max_memory: int | None) -> None:
    hidden, weight, targets = small()
    before = hidden.clone(), weight.clone()
    logps = pk.linear_token_logprobs(
        hidden, weight, targets, compute_dtype=compute_dtype, max_memory=max_memory, outputs=("logps", "entropy")
    ).logps
    logps.sum().backward()
    assert torch.equal(before[0], hidden)
    assert torch.equal(before[1], weight)


def test_inputs_are_not_written_and_unneeded_gradients_not_made() -> None:
    hidden, weight, targets = small()
    before = hidden.clone(), weight.clone(), targets.clone()
    frozen = weight.detach()
    pk.linear_token_logprobs(hidden, frozen, targets).logps.sum().backward()
    assert frozen.grad is None
    assert hidden.grad is not None
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, targets), strict=True))


def test_several_forwards_before_one_backward_and_tied_weights() -> None:
    embedding = torch.randn(50, 8, requires_grad=True)
    tokens = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    total = torch.zeros(())
    for row in tokens:
        total = total + pk.linear_token_logprobs(embedding[row], embedding, row.roll(-1)).logps.sum()
    total.backward()
    double = embedding.detach().double().requires_grad_()
    want = sum(torch.log_softmax(double[r] @ double.T, -1).gather(1, r.roll(-1)[:, None]).sum() for r in tokens)
    (expected,) = torch.autograd.grad(want, double)
    torch.testing.assert_close(embedding.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_strides_and_dtypes_of_the_inputs() -> None:
    case = testing.head_case(24, 8, 50)
    want = pk.linear_token_logprobs(case.hidden, case.weight, case.targets).logps
    hidden = torch.cat([case.hidden, case.hidden], 1)[:, :8]
    weight = case.weight.T.contiguous().T
    targets = torch.stack([case.targets, case.targets], 1)[:, 0].to(torch.int32)
    torch.testing.assert_close(pk.linear_token_logprobs(hidden, weight, targets).logps, want)
    torch.testing.assert_close(
        pk.linear_token_logprobs(hidden.view(2, 3, 4, 8), weight, targets.view(2, 3, 4)).logps, want.view(2, 3, 4)
    )
    logits = case.hidden @ case.weight.T
    sideways = logits.T.contiguous().T
    torch.testing.assert_close(pk.token_logprobs(sideways, targets).logps, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "h", "v"), [(1, 1, 1), (3, 7, 1), (1, 5, 257), (9, 3, 1021)])
def test_odd_shapes(n: int, h: int, v: int) -> None:
    hidden, weight, _ = small(n, h, v, ignored=0.0)
    targets = torch.arange(n) % v
    for memory in (None, 0):
        logps = pk.linear_token_logprobs(hidden, weight, targets, max_memory=memory).logps
        got = torch.autograd.grad(logps.sum(), (hidden, weight))
        want = testing.grads_from_hidden(hidden, weight, targets, torch.ones(n))
        for value, expected in zip(got, want[:2], strict=True):
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_rows_result_does_not_depend_on_the_rows_beside_it() -> None:
    logits = torch.randn(40, 300)
    targets = torch.arange(40)
    whole = pk.token_logprobs(logits, targets, outputs=("logps", "entropy"))
    alone = pk.token_logprobs(logits[17:18], targets[17:18], outputs=("logps", "entropy"))
    assert torch.equal(whole.logps[17:18], alone.logps)
    assert torch.equal(whole.entropy[17:18], alone.entropy)


def test_mixed_dtypes_compute_in_the_hidden_states_dtype_and_autocast_in_its_own() -> None:
    case = testing.head_case(16, 32, 64, dtype=torch.bfloat16)
    weight = case.weight.float().requires_grad_()  # float32 master weight whose values are bfloat16 ones
    got = pk.linear_token_logprobs(case.hidden, weight, case.targets).logps
    want = pk.linear_token_logprobs(case.hidden, case.weight, case.targets).logps
    assert torch.equal(got, want)
    got.sum().backward()
    assert weight.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = pk.linear_token_logprobs(case.hidden.float(), weight, case.targets).logps
    assert torch.equal(cast, want)
    exact = pk.linear_token_logprobs(case.hidden, weight, case.targets, compute_dtype=torch.float64).logps
    assert exact.dtype == torch.float64


@pytest.mark.parametrize("max_memory", [None, 0])
def test_autocast_does_not_reach_into_a_float32_head(max_memory: int | None) -> None:
    hidden, weight, targets = small()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logps = pk.linear_token_logprobs(
                hidden, weight, targets, compute_dtype=torch.float32, max_memory=max_memory
            ).logps
            results.append((logps, *torch.autograd.grad(logps.sum(), (hidden, weight))))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


def test_num_scored_gives_the_same_numbers() -> None:
    hidden, weight, targets = small(30, ignored=0.5)
    count = int((targets != -100).sum())
    got = pk.linear_token_logprobs(hidden, weight, targets, num_scored=count).logps
    assert torch.equal(got, pk.linear_token_logprobs(hidden, weight, targets).logps)


def test_small_probabilities_are_not_lost_beside_a_large_one() -> None:
    """Added one after the other to 1, each would be rounded the same way: over a vocabulary that is 4e-5."""
    V = 65536
    logits = torch.full((1, V), -13.0)
    logits[0, 5] = 0.0
    small = (V - 1) * math.exp(-13.0)
    targets = torch.tensor([5])
    stats = pk.token_logprobs(logits, targets, outputs=("logps", "entropy"))
    eps = torch.finfo(torch.float32).eps
    # a sum in four levels of sixteen
    assert float(stats.logps) == pytest.approx(-math.log1p(small), abs=8 * eps)
    assert float(stats.entropy) == pytest.approx(math.log1p(small) + 13 * small / (1 + small), rel=8 * eps)
    hidden = torch.eye(1, 4).requires_grad_()
    weight = torch.zeros(V, 4)
    weight[:, 0] = logits[0]
    logps = pk.linear_token_logprobs(hidden, weight.requires_grad_(), targets).logps
    (grad,) = torch.autograd.grad(logps.sum(), weight)
    p = math.exp(-13.0) / (1 + small)
    assert float((grad[6:, 0] + p).abs().max()) <= 8 * eps * p


@pytest.mark.parametrize("max_memory", [None, 0])
def test_what_stands_in_ignored_rows_reaches_no_gradient(max_memory: int | None) -> None:
    """Also where they are multiplied, as under compilation."""
    hidden, weight, targets = small(ignored=0.4)
    ignored = targets == -100
    assert ignored.any()
    with torch.no_grad():
        hidden[ignored] = math.nan

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return pk.linear_token_logprobs(hidden, weight, targets, max_memory=max_memory).logps.sum()

    every_row = torch.compile(loss, backend="eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(hidden, weight), (hidden, weight)) for f in (every_row, loss))
    assert not got[0][ignored].any()
    for ours, eager in zip(got, want, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
