"""Top-k distillation: hand-computed values, the full divergence at k = V, rounding, and what is refused."""

import math

import pytest
import torch
from torch import Tensor

from prefkern.losses import topk_kl
from prefkern.losses.distillation import log_mass

V = 12


def logps(*probabilities: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().to(dtype)


def random_logps(*shape: int) -> Tensor:
    return (2.0 * torch.randn(*shape, V, dtype=torch.float64)).log_softmax(-1)


def test_by_hand() -> None:
    """Teacher 1/2, 1/4, rest 1/4; student 1/4, 1/8, rest 5/8: (3/4) log 2 + (1/4) log(2/5)."""
    student, teacher = logps(0.25, 0.125).requires_grad_(), logps(0.5, 0.25)
    loss, metrics = topk_kl(student, teacher)
    assert loss.item() == pytest.approx(0.75 * math.log(2) + 0.25 * math.log(0.4), rel=1e-14)
    # -p_t + r_t p_s / r_s = -1/2 + (1/4)(1/4)(8/5), -1/4 + (1/4)(1/8)(8/5)
    assert torch.autograd.grad(loss, student)[0].tolist() == pytest.approx([-0.4, -0.2], rel=1e-14)
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(
        {"kl": loss.item(), "mass/student": 0.375, "mass/teacher": 0.75}
    )
    part = topk_kl(student, teacher, tail=False).loss
    assert part.item() == pytest.approx(0.75 * math.log(2), rel=1e-14)
    assert torch.autograd.grad(part, student)[0].tolist() == pytest.approx([-0.5, -0.25], rel=1e-14)


@pytest.mark.parametrize("k", [1, 3, V - 1])
def test_is_the_divergence_with_all_other_tokens_as_one_and_at_most_the_full_one(k) -> None:
    student, teacher = random_logps(200), random_logps(200)
    order = teacher.argsort(-1, descending=True)
    student, teacher = student.gather(-1, order), teacher.gather(-1, order)
    r_s, r_t = (x[:, k:].exp().sum(-1) for x in (student, teacher))
    terms = teacher.exp() * (teacher - student)
    want = terms[:, :k].sum(-1) + r_t * (r_t / r_s).log()
    got = topk_kl(student[:, :k], teacher[:, :k], reduction="none").loss
    # 1 - sum_k p is off by at most k + 2 roundings of a number up to 1, and the tail moves by its derivatives with it
    eps = torch.finfo(torch.float64).eps
    allowed = (k + 2) * eps * ((r_t / r_s).log().abs() + 1.0 + r_t / r_s + terms.abs().sum(-1))
    assert ((got - want).abs() <= allowed).all()
    assert (got <= terms.sum(-1) + allowed).all()
    assert (got >= -allowed).all()
    assert (got < 0.999 * terms.sum(-1)).any() == (k < V - 1)


def test_is_the_full_divergence_over_the_whole_vocabulary() -> None:
    student, teacher = random_logps(50), random_logps(50)
    got = topk_kl(student, teacher, reduction="none").loss
    # a teacher's remainder of a few roundings, times the logarithm of the least one
    allowed = V * torch.finfo(torch.float64).eps * 40.0
    torch.testing.assert_close(got, (teacher.exp() * (teacher - student)).sum(-1), rtol=0, atol=allowed)


@pytest.mark.parametrize("tail", [True, False])
def test_entries_and_rows_left_out_do_not_matter(tail) -> None:
    """-inf for the teacher leaves an entry out; the student's may be anything there (the waist gives 0)."""
    student, teacher = random_logps(6), random_logps(6)
    kept, tokens = teacher.topk(4)
    student = student.gather(-1, tokens)
    short_t, short_s = kept.clone(), student.clone()
    short_t[:, 2:] = -math.inf
    mask = torch.tensor([1, 1, 0, 1, 1, 0])
    want = topk_kl(student[mask == 1][:, :2], kept[mask == 1][:, :2], tail=tail)
    for bad in (0.0, math.nan, math.inf, -math.inf):
        short_s[:, 2:] = bad
        short_s[mask == 0] = short_t[mask == 0] = bad
        leaf = short_s.clone().requires_grad_()
        got = topk_kl(leaf, short_t, tail=tail, mask=mask)
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
        with torch.autograd.set_detect_anomaly(True):
            got.loss.backward()
        assert (leaf.grad[:, 2:] == 0).all()
        assert (leaf.grad[mask == 0] == 0).all()
        assert (leaf.grad[mask == 1][:, :2] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mass_of_one_or_more_by_rounding_is_finite(dtype) -> None:
    """No remainder for the teacher: no tail. None for the student: held at half a rounding, with no gradient."""
    eps = torch.finfo(dtype).eps
    exact = torch.tensor([[0.5, 0.5], [0.75, 0.25]], dtype=dtype).log()
    above = exact + 4 * eps  # sums to 1 + 4 eps
    some = torch.tensor([[0.4, 0.3], [0.2, 0.1]], dtype=dtype).log()
    for full in (exact, above):
        leaf = some.clone().requires_grad_()
        loss = topk_kl(leaf, full, reduction="none").loss
        torch.testing.assert_close(loss, (full.exp() * (full - some)).sum(-1), rtol=8 * eps, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), leaf)[0], -full.exp(), rtol=8 * eps, atol=0)
        leaf = full.clone().requires_grad_()
        loss = topk_kl(leaf, some, reduction="none").loss
        r_t = 1.0 - some.exp().sum(-1)
        want = (some.exp() * (some - full)).sum(-1) + r_t * (r_t.log() - math.log(eps / 2))
        torch.testing.assert_close(loss, want, rtol=32 * eps, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), leaf)[0], -some.exp(), rtol=8 * eps, atol=0)
        torch.testing.assert_close(topk_kl(full, full).loss, torch.zeros((), dtype=dtype), rtol=0, atol=0)


def test_a_small_remainder_keeps_its_digits() -> None:
    """1 - p of a student sure of one token is in its log-probability; logsumexp would round it off."""
    student = torch.tensor([-2e-6, -14.0], requires_grad=True)
    first, second = (x.item() for x in student.double())
    r_s = -math.expm1(first) - math.exp(second)
    mass = log_mass(student, torch.ones(2, dtype=torch.bool)).item()
    assert -math.expm1(mass) == pytest.approx(r_s, rel=1e-6)
    assert abs(-math.expm1(torch.logsumexp(student, 0).item()) / r_s - 1.0) > 1e-3
    teacher = logps(0.6, 0.2, dtype=torch.float32)
    loss = topk_kl(student, teacher).loss
    want = 0.6 * (math.log(0.6) - first) + 0.2 * (math.log(0.2) - second) + 0.2 * (math.log(0.2) - math.log(r_s))
    assert loss.item() == pytest.approx(want, rel=1e-6)
    grad = torch.autograd.grad(loss, student)[0]
    assert grad[0].item() == pytest.approx(-0.6 + 0.2 * math.exp(first) / r_s, rel=1e-6)
    assert grad[1].item() == pytest.approx(-0.2 + 0.2 * math.exp(second) / r_s, rel=1e-6)


@pytest.mark.parametrize("extreme", [-1e3, -1e30, -math.inf])
def test_a_student_that_excludes_every_kept_token(extreme) -> None:
    student = torch.full((1, 2), extreme, requires_grad=True)
    teacher = logps(0.5, 0.25, dtype=torch.float32)[None]
    loss = topk_kl(student, teacher).loss
    assert loss.item() == pytest.approx(-extreme * 0.75, rel=1e-2)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], -teacher.exp())


def test_nan_propagates() -> None:
    student, teacher = random_logps(2), random_logps(2)
    for x in (student, teacher):
        bad = x.clone()
        bad[0, 3] = math.nan
        assert topk_kl(bad if x is student else student, bad if x is teacher else teacher).loss.isnan()


def test_reductions_and_accumulation() -> None:
    student, teacher = random_logps(2, 5)[..., :7], random_logps(2, 5)[..., :7]
    mask = torch.rand(2, 5) < 0.7
    rows = topk_kl(student, teacher, mask=mask, reduction="none").loss
    assert rows.shape == (2, 5)
    assert (rows[~mask] == 0).all()
    want = rows.sum()
    torch.testing.assert_close(topk_kl(student, teacher, mask=mask, reduction="sum").loss, want)
    torch.testing.assert_close(topk_kl(student, teacher, mask=mask).loss, want / mask.sum())
    parts = [topk_kl(student[i], teacher[i], mask=mask[i], normalizer=torch.tensor(9)).loss for i in range(2)]
    torch.testing.assert_close(sum(parts), want / 9)
    assert topk_kl(student, teacher, metrics=False).metrics == {}


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (4, 3)])
def test_nothing_scored_is_zero_with_a_graph(shape) -> None:
    leaf = torch.full(shape, -1.5, requires_grad=True)
    loss, metrics = topk_kl(leaf, leaf.detach(), mask=torch.zeros(shape[:-1], dtype=torch.bool))
    assert loss.item() == 0.0
    assert (torch.autograd.grad(loss, leaf)[0] == 0).all()
    assert {value.item() for value in metrics.values()} == {0.0}


def test_16_bits_are_widened_and_no_gradient_reaches_the_teacher() -> None:
    student, teacher = random_logps(3)[:, :5].bfloat16().requires_grad_(), random_logps(3)[:, :5].bfloat16()
    loss = topk_kl(student, teacher.requires_grad_()).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, topk_kl(student.float(), teacher.float()).loss, rtol=0, atol=0)
    loss.backward()
    assert teacher.grad is None
    assert student.grad.dtype == torch.bfloat16


X = logps(0.3, 0.2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, X[:1]), ValueError, r"logps_k and teacher_logps_k must have the same shape, got \(2,\) and \(1,\)"),
        ((X, [0.1]), TypeError, r"teacher_logps_k must be a torch\.Tensor"),
        ((X, X.long()), TypeError, "teacher_logps_k must be float16"),
        ((X[:0], X[:0]), ValueError, r"logps_k must be \[\.\.\., Kt\] with Kt >= 1"),
        ((X[0], X[0]), ValueError, r"logps_k must be \[\.\.\., Kt\]"),
        ((X, X + 3.0), ValueError, "teacher_logps_k must hold log-probabilities .* a row that sums to 10.04"),
        ((X + 3.0, X), ValueError, " logps_k must hold log-probabilities .* apply log_softmax"),
    ],
)
def test_refused(arguments, error, message) -> None:
    with pytest.raises(error, match=rf"^prefkern\.topk_kl:.*{message}"):
        topk_kl(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.ones(2)}, r"mask must have shape \(3,\)"),
        ({"reduction": "token"}, "reduction must be one of 'mean', 'sum', 'none'"),
        ({"reduction": "sum", "normalizer": 2}, "reduction='sum' divides by nothing"),
    ],
)
def test_refused_options(options, message) -> None:
    x = random_logps(3)[:, :2]
    with pytest.raises(ValueError, match=rf"^prefkern\.topk_kl: {message}"):
        topk_kl(x, x, **options)
