"""What trainers do with logits, on lazy and on real ones: values, gradients, dtypes, how often real ones were made."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny_heads import V, tiny, tokens
from torch import Tensor
from torch.nn import functional
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from prefkern.integrations.transformers import RealLogitsWarning, lazy_logits

IDS = tokens(4, 9)
LABELS = IDS.masked_fill(torch.arange(9) < torch.tensor([[2], [0], [9], [5]]), -100)
SHIFTED = torch.nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:].contiguous()
TEMPERATURES = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=torch.float64).view(4, 1, 1)
MASK = torch.arange(9) % 3 != 0
MASKED = MASK.expand(4, 9)
SMOOTHER = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.1)

ANSWERED: dict[str, Callable[[Tensor], Tensor]] = {
    "shift, flatten, cross entropy": lambda z: functional.cross_entropy(
        z[..., :-1, :].contiguous().view(-1, z.size(-1)), LABELS[:, 1:].reshape(-1)
    ),
    "cross entropy, summed": lambda z: functional.cross_entropy(z.view(-1, V), SHIFTED.view(-1), reduction="sum") / 20,
    "cross entropy of each token": lambda z: functional.cross_entropy(
        z.reshape(-1, V), SHIFTED.flatten(), reduction="none"
    ),
    "cross entropy with another ignored token": lambda z: functional.cross_entropy(
        z.flatten(0, 1), IDS.flatten(), ignore_index=int(IDS[0, 0])
    ),
    "cross entropy with smoothing": lambda z: functional.cross_entropy(
        z.view(-1, V), SHIFTED.view(-1), label_smoothing=0.2
    ),
    "cross entropy of one row of tokens": lambda z: functional.cross_entropy(z[1], IDS[1]),
    "cross entropy, vocabulary in the middle": lambda z: functional.cross_entropy(z.transpose(1, 2), SHIFTED),
    "the same by permute": lambda z: functional.cross_entropy(z.permute(0, 2, 1), SHIFTED, reduction="none"),
    "the same by mT, and back": lambda z: functional.cross_entropy(z.mT.transpose(-1, -2).mT, SHIFTED),
    "module": lambda z: torch.nn.CrossEntropyLoss()(z.view(-1, V), SHIFTED.view(-1)),
    "nll of log_softmax": lambda z: functional.nll_loss(z.log_softmax(-1).view(-1, V), SHIFTED.view(-1)),
    "log_softmax and gather": lambda z: z.log_softmax(-1).gather(-1, IDS[..., None]).squeeze(-1),
    "log_softmax and gather of several": lambda z: torch.log_softmax(z, 2).gather(
        2, torch.stack([IDS, IDS.flip(0)], -1)
    ),
    "softmax and gather": lambda z: torch.softmax(z, -1).gather(-1, IDS.unsqueeze(-1)),
    "log_softmax and a row of indices": lambda z: z[0].log_softmax(-1)[torch.arange(9), IDS[0]],
    "gather": lambda z: torch.gather(z, dim=-1, index=IDS.unsqueeze(-1)),
    "logsumexp": lambda z: torch.logsumexp(z, dim=-1),
    "logsumexp, kept": lambda z: z.logsumexp(-1, keepdim=True),
    "gather less logsumexp": lambda z: z.gather(-1, IDS[..., None]).squeeze(-1) - z.logsumexp(-1),
    "trl: selective_log_softmax": lambda z: selective_log_softmax(z, IDS),
    "trl: with a temperature": lambda z: selective_log_softmax(z, IDS, temperature=0.7),
    "trl: of several": lambda z: selective_log_softmax(z, torch.stack([IDS, IDS.flip(0)], -1)),
    "trl: entropy_from_logits": lambda z: entropy_from_logits(z, chunk_size=5),
    "entropy by softmax": lambda z: z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1),
    "transformers: LabelSmoother": lambda z: SMOOTHER({"logits": z}, LABELS.clone(), shift_labels=True),
    "mean": lambda z: z.mean(-1),
    "sum of log_softmax": lambda z: -z.log_softmax(-1).sum(-1, keepdim=True),
    "mean of everything": lambda z: z[:2, :-1].mean(),
    "one token": lambda z: z[:, -1, 7],
    "one row of each": lambda z: z[torch.arange(4), torch.tensor([1, 3, 8, 0])].logsumexp(-1),
    "mask": lambda z: z[MASKED].log_softmax(-1).gather(-1, IDS[MASKED][:, None]),
    "ellipsis and None": lambda z: z[None, ..., 1:, :].squeeze(0).logsumexp(-1),
    "the first columns": lambda z: functional.cross_entropy(z[..., : V - 6].reshape(-1, V - 6), SHIFTED.view(-1)),
    "columns of columns": lambda z: z[..., 4:][..., :-5].logsumexp(-1),
    "split and stack": lambda z: torch.stack([part.logsumexp(-1) for part in z.split(1)]),
    "chunk": lambda z: torch.cat([part.logsumexp(-1) for part in z.chunk(3, dim=1)], 1),
    "rows one by one": lambda z: torch.stack([row.log_softmax(-1).gather(-1, IDS[0][:, None]) for row in z]),
    "cat": lambda z: torch.cat([z[2:], z[:2]]).logsumexp(-1),
    "narrow, index_select, unsqueeze": lambda z: (
        z.narrow(1, 2, 3).index_select(0, torch.tensor([3, 1])).unsqueeze(1).logsumexp(-1)
    ),
    "divided by a number": lambda z: (z / 0.7).logsumexp(-1),
    "times a tensor": lambda z: (torch.tensor(1.5) * z * 2).mul(0.5).logsumexp(-1),
    "divided by a temperature per row": lambda z: (
        (z / TEMPERATURES.to(z.dtype)).log_softmax(-1).gather(-1, IDS[..., None])
    ),
    "temperatures of flat rows": lambda z: (
        z.view(-1, V) / TEMPERATURES.to(z.dtype).expand(4, 9, 1).reshape(-1, 1)
    ).logsumexp(-1),
    "capped": lambda z: (2.0 * torch.tanh(z / 2.0)).log_softmax(-1).gather(-1, IDS[..., None]),
    "capped, negative and divided": lambda z: (-(torch.tanh(-z / 3.0) * 3.0) / 0.8).logsumexp(-1),
    "divided in place": lambda z: (
        z.float().div_(0.7).logsumexp(-1) if z.dtype != torch.float64 else z.div_(0.7).logsumexp(-1)
    ),
    "in place by an operator": lambda z: _halved(z).logsumexp(-1),
    "clone and detach": lambda z: z.clone().detach().logsumexp(-1) + z.logsumexp(-1),
    "casts": lambda z: z.double().type_as(z).to(z.device).to(z).to(dtype=torch.float64).logsumexp(-1),
}
MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "topk": lambda z: z.topk(3, -1).values,
    "added to": lambda z: (z + 1.0).logsumexp(-1),
    "over another dimension": lambda z: z.softmax(1)[..., 3],
    "max with a gradient": lambda z: z.max(-1).values,
    "weighted classes": lambda z: functional.cross_entropy(
        z.view(-1, V), SHIFTED.view(-1), torch.linspace(0.1, 1, V, dtype=z.dtype)
    ),
    "probabilities as targets": lambda z: functional.cross_entropy(z.view(-1, V), z.detach().view(-1, V).softmax(-1)),
    "an autograd function": lambda z: _Doubled.apply(z).logsumexp(-1),
    "written to": lambda z: _masked(z).logsumexp(-1),
    "divided by what has a gradient": lambda z: (z / z.mean(-1, keepdim=True).exp()).logsumexp(-1),
    "product with itself": lambda z: (z * z).mean(-1),
    "divided by whole rows": lambda z: (z / torch.linspace(1, 2, V, dtype=z.dtype)).logsumexp(-1),
    "the real one twice": lambda z: z.sort(-1).values[..., 0] + z[:, :1].sort(-1).values[..., 0],
}


def _halved(z: Tensor) -> Tensor:
    z /= 2.0
    return z


def _masked(z: Tensor) -> Tensor:
    z = z.clone()
    z[..., 3:9] = -torch.inf
    return z


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return 2 * z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -3 * grad  # its own business


def _run(model: Any, ask: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    got = ask(model(input_ids=IDS, use_cache=False).logits)
    assert type(got) is Tensor
    if got.requires_grad:
        (got * torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)).sum().backward()
    return got.detach(), [each.grad.clone() for each in model.parameters() if each.grad is not None]


def _compare(model: Any, ask: Callable[[Tensor], Tensor], tolerance: float) -> Any:
    expected, gradients = _run(model, ask)
    with lazy_logits(model) as lazy:
        got, found = _run(model, ask)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert len(found) == len(gradients)
    for one, other in zip(found, gradients, strict=True):
        assert float((one - other).norm()) <= tolerance * max(1.0, float(other.norm()))
    return lazy


@pytest.mark.parametrize("case", ANSWERED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_answers_as_real_logits_do(case: str, dtype: torch.dtype) -> None:
    tolerance = 2e-5 if dtype == torch.float32 or "LabelSmoother" in case else 1e-10  # which sums in float32
    lazy = _compare(tiny("llama", dtype), ANSWERED[case], tolerance)
    assert lazy.made_real == 0
    assert lazy.answered >= 1


@pytest.mark.parametrize("case", MADE)
def test_makes_the_real_logits_once_for_anything_else(case: str) -> None:
    with pytest.warns(RealLogitsWarning, match=r"needs the logits themselves, .* \(4, 9, 48\), 0.0138 MB") as told:
        lazy = _compare(tiny("llama", torch.float64), MADE[case], 1e-10)
    assert lazy.made_real == 1
    assert told[0].filename == __file__


@pytest.mark.parametrize("case", ["a bias", "a cap", "a factor", "a divisor", "a tied head"])
@pytest.mark.parametrize("question", ["log_softmax and gather", "logsumexp", "module", "entropy by softmax"])
def test_answers_for_every_form_of_head(case: str, question: str) -> None:
    kind, changes = {
        "a bias": ("phi", {}),
        "a cap": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        "a factor": ("cohere", {"logit_scale": 0.25}),
        "a divisor": ("granite", {"logits_scaling": 3.0}),
        "a tied head": ("qwen3", {"tie_word_embeddings": True}),
    }[case]
    lazy = _compare(tiny(kind, torch.float64, **changes), ANSWERED[question], 1e-10)
    assert lazy.made_real == 0


@pytest.mark.parametrize("question", ["gather", "logsumexp", "mean", "module", "one token"])
def test_answers_for_a_lora_on_the_head(question: str) -> None:
    from tiny_heads import adapted

    model = adapted(tiny("llama", torch.float64), target_modules=["lm_head", "q_proj"]).double()
    lazy = _compare(model, ANSWERED[question], 1e-10)
    assert lazy.made_real == 0


def test_the_largest_logit_is_found_without_a_gradient() -> None:
    model = tiny()
    expected = model(input_ids=IDS).logits.detach()
    with lazy_logits(model) as lazy:
        logits = model(input_ids=IDS).logits
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        assert torch.equal(logits[:, :-1].argmax(dim=-1, keepdim=True), expected[:, :-1].argmax(-1, keepdim=True))
        values, places = logits.detach().max(-1)
        torch.testing.assert_close(values, expected.max(-1).values)
        assert torch.equal(places, expected.max(-1).indices)
    assert lazy.made_real == 0


def test_the_mean_of_capped_logits_is_answered_where_it_has_no_gradient() -> None:
    model = tiny("gemma2", head_dim=8, final_logit_softcapping=3.0)
    expected = model(input_ids=IDS).logits.detach()
    with lazy_logits(model) as lazy:
        torch.testing.assert_close(model(input_ids=IDS).logits.detach().mean(), expected.mean())
    assert lazy.made_real == 0
    with lazy_logits(model), pytest.warns(RealLogitsWarning, match="Tensor.mean"):
        model(input_ids=IDS).logits.mean()


def test_nothing_scored_is_not_a_number_as_in_torch() -> None:
    model, none = tiny(), torch.full_like(IDS, -100)
    with lazy_logits(model):
        loss = model(input_ids=IDS, labels=none).loss
    assert loss.isnan()


def test_knows_its_shape_dtype_and_device_without_being_made() -> None:
    model = tiny()
    with lazy_logits(model) as lazy:
        logits = model(input_ids=IDS).logits
        assert logits.shape == (4, 9, V)
        assert (logits.dtype, logits.device.type, logits.ndim) == (torch.float32, "cpu", 3)
        assert logits.requires_grad
        assert not logits.detach().requires_grad
        assert logits.new_zeros(2).tolist() == [0.0, 0.0]
        assert repr(logits) == "LazyLogits(logits, shape=(4, 9, 48), dtype=torch.float32, device=cpu, not made)"
        assert set(logits.stride()) == {0}
    assert lazy.made_real == 0


def test_logits_in_a_lower_dtype_answer_in_it() -> None:
    """As exact as float32 logits: not worse than what the model's own rounded logits give."""
    model, exact = tiny("llama", torch.bfloat16), tiny("llama", torch.bfloat16).double()

    def ask(z: Tensor) -> Tensor:
        return z.float().log_softmax(-1).gather(-1, IDS[..., None])

    expected, own = ask(exact(input_ids=IDS).logits.double()), ask(model(input_ids=IDS).logits)
    with lazy_logits(model) as lazy:
        logits = model(input_ids=IDS).logits
        assert logits.dtype == torch.bfloat16
        assert functional.log_softmax(logits, -1).gather(-1, IDS[..., None]).dtype == torch.bfloat16
        ours = ask(logits)
    assert (ours - expected).abs().max() <= 1.2 * (own - expected).abs().max()
    assert lazy.made_real == 0


def test_changing_a_slice_in_place_makes_what_it_is_a_slice_of_unusable() -> None:
    model = tiny()
    expected = (model(input_ids=IDS).logits[:, 2:] / 0.7).logsumexp(-1)
    with lazy_logits(model) as lazy:
        whole = model(input_ids=IDS).logits
        part = whole[:, 2:]
        part.div_(0.7)
        torch.testing.assert_close(part.logsumexp(-1), expected)
        assert whole.shape == (4, 9, V)
        with pytest.raises(
            RuntimeError, match=r"changed in place \(div_ at .*test_lazy_answers.py:\d+\).*use the changed"
        ):
            whole.logsumexp(-1)
    assert lazy.made_real == 0


def test_what_was_made_before_a_change_in_place_keeps_its_numbers() -> None:
    model = tiny()
    expected = model(input_ids=IDS).logits
    with lazy_logits(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", RealLogitsWarning)
        logits = model(input_ids=IDS).logits
        halves = logits / 2
        logits.add_(1.0)
        torch.testing.assert_close(logits.sort(-1).values, (expected + 1).sort(-1).values)
        torch.testing.assert_close(halves.logsumexp(-1), (expected / 2).logsumexp(-1))
        with pytest.raises(RuntimeError, match="share memory with others that were changed in place"):
            halves.sort(-1)


def test_real_logits_and_their_slices_share_memory_as_usual() -> None:
    model = tiny().requires_grad_(False)
    expected = model(input_ids=IDS).logits
    with lazy_logits(model), pytest.warns(RealLogitsWarning, match="__setitem__"):  # noqa: PT031
        logits = model(input_ids=IDS).logits
        part = logits[:, :2]
        part[..., 0] = 9.0
        assert logits[0, 0, 0] == 9.0
    torch.testing.assert_close(logits[:, 2:].logsumexp(-1), expected[:, 2:].logsumexp(-1))
