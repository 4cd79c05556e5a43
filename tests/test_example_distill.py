"""The examples run, and compute what they say."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def distill() -> dict[str, object]:
    return runpy.run_path(str(EXAMPLES / "distill_topk.py"))


def test_distillation_falls_and_says_so(distill, capsys) -> None:
    distill["main"]()
    first, second = capsys.readouterr().out.splitlines()
    before, after = (float(number) for number in first.partition(": ")[2].split(" -> "))
    assert after < before / 5
    full, kept = (float(part.split()[0]) for part in second.partition(": ")[2].split(", "))
    assert full < kept < 0.0


def test_gradients_are_those_of_the_full_logits(distill) -> None:
    """The first step of the student, against log_softmax over the vocabulary."""
    ids = torch.randint(distill["VOCABULARY"], (2, 9))
    teacher_logps, tokens = distill["teach"](ids)
    student = distill["llama"](32, seed=2)
    logps = student(ids).logits.log_softmax(-1).gather(-1, tokens)
    rest = ((1 - x.exp().sum(-1)) for x in (teacher_logps, logps))
    r_t, r_s = (x.double() for x in rest)
    kl = (teacher_logps.exp() * (teacher_logps - logps)).sum(-1) + r_t * (r_t / r_s).log()
    _, history = distill["distil"](ids, teacher_logps, tokens, steps=1)
    assert history[0] == pytest.approx(kl.mean().item(), rel=1e-4)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (20, 0.6), (1, 0.5)])
def test_kept_set_is_the_policy_of_sampling(distill, top_k, top_p) -> None:
    """The log-softmax of logits whose other entries are -inf, as a sampler computes it, with its gradient."""
    hidden = torch.randn(3, 4, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    logits = hidden @ weight.T
    kept = distill["kept_tokens"](logits, top_k=top_k, top_p=top_p)
    allowed = torch.zeros(3, 4, 41, dtype=torch.bool).scatter(-1, kept.where(kept >= 0, 40), True)[..., :40]
    taken = torch.where(allowed, torch.rand(3, 4, 40), 0.0).argmax(-1)
    want = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1).gather(-1, taken[..., None])[..., 0]
    got = distill["sampled_logps"](hidden, weight, taken, kept)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    upstream = torch.rand(3, 4, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(x, [hidden, weight], upstream) for x in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    if top_p < 1.0 and top_k > 1:
        assert (kept == -100).any()
