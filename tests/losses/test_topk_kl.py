"""Top-k distillation: hand-computed values, the full divergence at k = V, rounding, and what is refused."""

import math

import pytest
import torch
from torch import Tensor

from prefkern.losses import ref_kl_advantages, topk_kl
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


# ------------------------------------------------------------------------------------------------ reverse


def test_reverse_by_hand() -> None:
    """Student 1/4, 1/8, rest 5/8; teacher 1/2, 1/4, rest 1/4: (3/8) log(1/2) + (5/8) log(5/2)."""
    student, teacher = logps(0.25, 0.125).requires_grad_(), logps(0.5, 0.25)
    loss, metrics = topk_kl(student, teacher, direction="reverse")
    assert loss.item() == pytest.approx(0.375 * math.log(0.5) + 0.625 * math.log(2.5), rel=1e-14)
    assert metrics["kl"].item() == loss.item()
    # p_s [(log p_s - log p_t) - (log r_s - log r_t)]
    bracket = math.log(0.5) - math.log(2.5)
    assert torch.autograd.grad(loss, student)[0].tolist() == pytest.approx([0.25 * bracket, 0.125 * bracket], rel=1e-13)
    part = topk_kl(student, teacher, direction="reverse", tail=False).loss
    assert part.item() == pytest.approx(0.375 * math.log(0.5), rel=1e-14)
    wanted = [0.25 * (math.log(0.5) + 1), 0.125 * (math.log(0.5) + 1)]
    assert torch.autograd.grad(part, student)[0].tolist() == pytest.approx(wanted, rel=1e-13)


def test_reverse_over_the_whole_vocabulary_is_the_full_divergence_with_its_gradient() -> None:
    logits, teacher = torch.randn(20, V, dtype=torch.float64, requires_grad=True), random_logps(20)
    student = logits.log_softmax(-1)
    got = topk_kl(student, teacher, direction="reverse", reduction="sum").loss
    want = (student.exp() * (student - teacher)).sum()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3, V - 1])
def test_reverse_is_at_most_the_full_divergence(k) -> None:
    student, teacher = random_logps(200), random_logps(200)
    own, tokens = student.topk(k)
    got = topk_kl(own, teacher.gather(-1, tokens), direction="reverse", reduction="none").loss
    full = (student.exp() * (student - teacher)).sum(-1)
    assert (got <= full + 1e-12).all()
    assert (got >= -1e-12).all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("k", [1, 4])
def test_is_trls_divergence_with_a_tail_on_the_students_own_tokens(direction, k) -> None:
    """``compute_topk_self_distillation_loss`` of TRL's SDPO, alpha 0 and 1, value and gradient."""
    utils = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    logits, teacher = torch.randn(5, V, requires_grad=True), torch.randn(5, V)
    alpha = {"forward": 0.0, "reverse": 1.0}[direction]
    options = {"distillation_topk": k, "distillation_alpha": alpha, "distillation_add_tail": True}
    theirs = utils.compute_topk_self_distillation_loss(logits, teacher, **options)
    tokens = logits.topk(k).indices
    student, other = (x.log_softmax(-1).gather(-1, tokens) for x in (logits, teacher))
    ours = topk_kl(student, other, direction=direction, reduction="none").loss
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    got, want = (torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", [True, False])
def test_reverse_leaves_out_entries_and_rows_whatever_they_hold(tail) -> None:
    student, teacher = random_logps(6), random_logps(6)
    own, tokens = student.topk(4)
    other = teacher.gather(-1, tokens)
    mask = torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    want = topk_kl(own[mask][:, :2], other[mask][:, :2], direction="reverse", tail=tail)
    for bad in (0.0, math.nan, math.inf, -math.inf):
        s, t = own.clone(), other.clone()
        s[:, 2:], t[:, 2:] = bad, -math.inf
        s[~mask] = t[~mask] = bad
        leaf = s.requires_grad_()
        got = topk_kl(leaf, t, direction="reverse", tail=tail, mask=mask)
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
        with torch.autograd.set_detect_anomaly(True):
            got.loss.backward()
        assert (leaf.grad[:, 2:] == 0).all()
        assert (leaf.grad[~mask] == 0).all()
        assert leaf.grad[mask][:, :2].isfinite().all()


def test_reverse_of_certainties_is_finite() -> None:
    """Remainders that rounding leaves at 0, of the student, of the teacher, of both; a token that one never writes."""
    eps = torch.finfo(torch.float32).eps
    sure, some = torch.tensor([[0.0, -200.0]]), torch.tensor([[-1.0, -2.0]])
    for s, t in ((sure, some), (some, sure), (sure, sure), (torch.tensor([[-math.inf, -1.0]]), some)):
        leaf = s.clone().requires_grad_()
        loss = topk_kl(leaf, t, direction="reverse").loss
        assert loss.isfinite()
        assert torch.autograd.grad(loss, leaf)[0].isfinite().all()
    r_s = 1 - math.exp(-1) - math.exp(-2)
    got = topk_kl(some, sure, direction="reverse").loss.item()
    want = math.exp(-1) * -1.0 + math.exp(-2) * (-2.0 + 200.0) + r_s * (math.log(r_s) - math.log(eps / 2))
    assert got == pytest.approx(want, rel=1e-5)


def test_ref_kl_advantages_are_the_gradient_of_the_reverse_divergence() -> None:
    """Over all actions of one token: sum_v p_v A_v grad lp_v = -grad KL(p || q)."""
    logits, ref = torch.randn(V, dtype=torch.float64, requires_grad=True), random_logps()
    lp = logits.log_softmax(-1)
    advantages = ref_kl_advantages(lp, ref)
    assert not advantages.requires_grad
    surrogate = -(lp.exp().detach() * advantages * lp).sum()
    kl = (lp.exp() * (lp - ref)).sum()
    got, want = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (surrogate, kl))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    mask = torch.rand(V) < 0.5
    masked = ref_kl_advantages(torch.where(mask, lp, math.nan), torch.where(mask, ref, math.inf), mask=mask)
    torch.testing.assert_close(masked, torch.where(mask, ref - lp.detach(), 0.0), rtol=0, atol=0)
    assert ref_kl_advantages(lp.detach().bfloat16(), ref.bfloat16()).dtype == torch.float32


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
        ({"direction": "sideways"}, "direction must be one of 'forward', 'reverse'"),
        ({"reduction": "token"}, "reduction must be one of 'mean', 'sum', 'none'"),
        ({"reduction": "sum", "normalizer": 2}, "reduction='sum' divides by nothing"),
    ],
)
def test_refused_options(options, message) -> None:
    x = random_logps(3)[:, :2]
    with pytest.raises(ValueError, match=rf"^prefkern\.topk_kl: {message}"):
        topk_kl(x, x, **options)
