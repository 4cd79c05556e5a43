"""Padding-free batches rounded up with `pad_to_multiple_of`: the filling is scored by no loss and counts in none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import prefkern as pk
from prefkern import data

V, H, PAD = 11, 6, 10
PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6, 7], "rejected_ids": [8, 9]},
    {"prompt_ids": [2, 4], "chosen_ids": [1, 3], "rejected_ids": [7, 6, 5, 9]},
]
"""22 tokens, in sequences of 7, 4, 5 and 6."""
SINGLES = [
    {"prompt_ids": row["prompt_ids"], "completion_ids": row[name], "label": name == "chosen_ids"}
    for row in PAIRS
    for name in ("chosen_ids", "rejected_ids")
]
OPTIONS = {"pad_token_id": PAD, "padding_free": True}


class Case:
    """A batch as a loss takes it: hidden states, equal for equal tokens, of a tiny head; targets and boundaries."""

    def __init__(self, batch: dict[str, Any], prefix: str = "") -> None:
        ids, mask = batch[f"{prefix}input_ids"][0], batch[f"{prefix}completion_mask"][0]
        self.cu = batch[f"{prefix}cu_seq_lens_q"]
        self.targets = pk.shift_labels(ids, mask=mask, cu_seqlens=self.cu)
        self.nll_targets = pk.shift_labels(ids.masked_fill(ids == PAD, -100), cu_seqlens=self.cu)
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(V, H, generator=generator, dtype=torch.float64, requires_grad=True)
        hidden = torch.randn(40, H, generator=generator, dtype=torch.float64)
        self.hidden = hidden[: len(ids)].clone().requires_grad_()
        self.old = torch.randn(40, generator=generator, dtype=torch.float64)[: len(ids)]
        self.ref = torch.linspace(-9.0, -4.0, len(self.cu) - 1, dtype=torch.float64)

    def logps(self) -> Tensor:
        return pk.linear_token_logprobs(self.hidden, self.weight, self.targets).logps

    def pairs(self, **options: Any) -> Any:
        return pk.pair_logps(self.logps(), targets=self.targets, cu_seqlens=self.cu, **options)

    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.targets


def flat(out: Any) -> Tensor:
    """A loss with its metrics, or the parts of a tuple of tensors, as one vector."""
    if isinstance(out, Tensor):
        return out.reshape(-1)
    parts = [out.loss, *(value.double() for value in out.metrics.values())] if hasattr(out, "loss") else out
    return torch.cat([part.double().reshape(-1) for part in parts])


def nll(case: Case) -> Tensor:
    chosen = torch.arange(len(case.targets)) < case.cu[(len(case.cu) - 1) // 2]
    return -case.logps()[chosen & (case.targets != -100)].mean()


def kto(case: Case, name: str) -> Any:
    desirable = torch.tensor([1, 0, 1, 0])
    if name == "linear":
        return pk.linear_kto_loss(*case.head(), desirable, case.ref, cu_seqlens=case.cu, kl=0.5)
    logps = pk.sequence_logps(case.logps(), targets=case.targets, cu_seqlens=case.cu)
    return pk.kto_loss(logps, case.ref, desirable, kl=pk.kto_kl(logps.detach() + 30, case.ref), loss_type=name)


def dpo(case: Case, loss_type: str, ld_alpha: float | None = None) -> Any:
    chosen, rejected, *lengths = case.pairs(ld_alpha=ld_alpha)
    given = dict(zip(("chosen_lengths", "rejected_lengths"), lengths, strict=True))
    return pk.dpo_loss(chosen, rejected, *case.ref.chunk(2), loss_type=loss_type, **given)


def ppo(case: Case, reduction: str, linear: bool) -> Any:
    shared = {"reduction": reduction, "cu_seqlens": case.cu, "mask": case.targets != -100}
    given = {"old_logps": case.old - 3, "advantages": case.ref + 6, "values": case.hidden[:, 0], "vf_coef": 0.5}
    given |= {"old_values": case.old, "returns": case.old + 1}
    if linear:
        return pk.linear_ppo_loss(*case.head(), **given, **shared, entropy_coef=0.1)
    return pk.ppo_loss(case.logps(), **given, **shared)


AVERAGED = {"average": True}
LOSSES: dict[str, Callable[[Case], Any]] = {
    "sequence_logps": lambda c: pk.sequence_logps(c.logps(), targets=c.targets, cu_seqlens=c.cu),
    "sequence_logps, averages": lambda c: pk.sequence_logps(c.logps(), targets=c.targets, cu_seqlens=c.cu, **AVERAGED),
    "pair_logps": lambda c: c.pairs(),
    "pair_logps, ld_alpha": lambda c: c.pairs(ld_alpha=0.3),
    "pair_logps, averages": lambda c: c.pairs(average=True),
    "dpo": lambda c: dpo(c, "sigmoid"),
    "dpo, hinge": lambda c: dpo(c, "hinge"),
    "dpo, ipo": lambda c: dpo(c, "ipo"),
    "dpo, ld_alpha": lambda c: dpo(c, "sigmoid", 0.3),
    "orpo": lambda c: pk.orpo_loss(*c.pairs(average=True)[:2], nll(c)),
    "cpo": lambda c: pk.cpo_loss(*c.pairs()[:2], nll(c)),
    "simpo": lambda c: pk.cpo_loss(*c.pairs(average=True)[:2], loss_type="simpo", cpo_alpha=0.0),
    "cpo, ipo": lambda c: pk.cpo_loss(*c.pairs(average=True)[:2], nll(c), loss_type="ipo"),
    "kto": lambda c: kto(c, "kto"),
    "kto, apo": lambda c: kto(c, "apo_zero_unpaired"),
    "linear dpo": lambda c: pk.linear_dpo_loss(*c.head(), c.ref, cu_seqlens=c.cu),
    "linear dpo, ipo": lambda c: pk.linear_dpo_loss(*c.head(), c.ref, cu_seqlens=c.cu, loss_type="ipo"),
    "linear dpo, two models": lambda c: pk.linear_dpo_loss(
        *c.head(), ref_hidden=c.hidden.detach() * 0.5, ref_weight=c.weight.detach(), cu_seqlens=c.cu, ld_alpha=0.3
    ),
    "linear orpo": lambda c: pk.linear_orpo_loss(*c.head(), cu_seqlens=c.cu),
    "linear orpo, whole rows": lambda c: pk.linear_orpo_loss(*c.head(), nll_targets=c.nll_targets, cu_seqlens=c.cu),
    "linear cpo": lambda c: pk.linear_cpo_loss(*c.head(), cu_seqlens=c.cu),
    "linear simpo": lambda c: pk.linear_cpo_loss(*c.head(), cu_seqlens=c.cu, loss_type="simpo", cpo_alpha=0.0),
    "linear kto": lambda c: kto(c, "linear"),
    **{
        f"{'linear ' * linear}ppo, {reduction}": lambda c, reduction=reduction, linear=linear: ppo(c, reduction, linear)
        for reduction in ("token", "sequence", "sequence_sum")
        for linear in (False, True)
    },
}


@pytest.mark.parametrize("multiple", [8, 9, 23, 40])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_that_of_the_batch_without_filling(name: str, multiple: int) -> None:
    """With 2, 5, 1 and 18 tokens of it: odd numbers were refused as half a pair, even ones trained on."""
    cases = [Case(data.collate_pairs(PAIRS, **OPTIONS, pad_to_multiple_of=given)) for given in (None, multiple)]
    assert [len(case.targets) for case in cases] == [22, -(-22 // multiple) * multiple]
    values, gradients = [], []
    for case in cases:
        value = flat(LOSSES[name](case))
        values.append(value.detach())
        upstream = torch.arange(1.0, len(value) + 1, dtype=torch.float64) * value.detach().isfinite()
        if hasattr(out := LOSSES[name](case), "loss"):
            value, upstream = out.loss, torch.ones_like(out.loss)
        gradients.append(torch.autograd.grad(value, [case.hidden, case.weight], upstream))
    torch.testing.assert_close(values[1], values[0], rtol=1e-13, atol=1e-13)
    (hidden, weight), (filled_hidden, filled_weight) = gradients
    torch.testing.assert_close(filled_weight, weight, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(filled_hidden[:22], hidden, rtol=1e-12, atol=1e-13)
    assert weight.abs().max() > 0
    assert not filled_hidden[22:].any()


def test_boundaries_are_those_of_the_sequences() -> None:
    got = data.collate_pairs(PAIRS, **OPTIONS, pad_to_multiple_of=8)
    assert got["cu_seq_lens_q"].tolist() == [0, 7, 11, 16, 24]
    assert got["position_ids"].tolist() == [[*range(7), *range(4), *range(5), *range(6), 6, 6]]
    assert got["seq_idx"].tolist() == [[0] * 7 + [1] * 4 + [2] * 5 + [3] * 8]
    assert got["completion_mask"][0, 22:].tolist() == [0, 0]
    assert got["input_ids"][0, 22:].tolist() == [PAD, PAD]
    assert got["max_length_q"] == got["max_length_k"] == 8


def test_every_collator_of_padding_free_batches() -> None:
    single = data.collate_unpaired(SINGLES, **OPTIONS, mismatched=True, pad_to_multiple_of=16)
    assert single["cu_seq_lens_q"].tolist() == [0, 7, 12, 16, 32]
    assert single["KL_cu_seq_lens_q"].tolist() == [0, 7, 14, 18, 32]
    scored = [row | {"score": 1.0} for row in SINGLES]
    assert data.collate_scored(scored, **OPTIONS, pad_to_multiple_of=16)["cu_seq_lens_k"].tolist() == [0, 7, 12, 16, 32]
    rows = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6]}]
    language = data.collate_language(rows, **OPTIONS, pad_to_multiple_of=5)
    assert language["cu_seq_lens_q"].tolist() == [0, 4, 10]
    assert language["labels"].tolist() == [[-100, 2, 3, 4, -100, 6, -100, -100, -100, -100]]
    assert language["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 3, 3]]
    assert language["seq_idx"].tolist() == [[0] * 4 + [1] * 6]


def test_an_empty_sequence_at_the_end_and_batches_of_single_tokens() -> None:
    rows = [{"prompt_ids": [], "chosen_ids": [5, 6, 7], "rejected_ids": []}]
    got = data.collate_pairs(rows, **OPTIONS, pad_to_multiple_of=8)
    assert got["cu_seq_lens_q"].tolist() == [0, 3, 8]
    assert got["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 2, 2]]
    got = data.collate_language([{"input_ids": [1]}, {"input_ids": [2]}], **OPTIONS, pad_to_multiple_of=4)
    assert got["cu_seq_lens_q"].tolist() == [0, 1, 4]
    assert got["position_ids"].tolist() == [[0, 0, 0, 0]]
