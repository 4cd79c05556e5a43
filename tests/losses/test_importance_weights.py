"""Importance weights: values worked out by hand, gates, what is rejected, what reaches a loss."""

import math

import pytest
import torch

from prefkern.losses import grpo_loss, importance_weights

LP = torch.tensor([[0.6, 0.2, 0.5], [0.8, 0.9, 0.9]]).log()
ROLLOUT = torch.tensor([[0.4, 0.4, 0.5], [0.2, 0.9, 0.1]]).log()  # ratios 1.5, 0.5, 1; 4, 1, (9)
MASK = torch.tensor([[True, True, True], [True, True, False]])


def values(x: torch.Tensor) -> object:
    return pytest.approx(x.tolist(), rel=1e-6)


def kept(**options: object) -> list[list[bool]]:
    return importance_weights(LP, ROLLOUT, MASK, mode="none", **options).mask.tolist()


@pytest.mark.parametrize(
    ("options", "weights", "mask"),
    [
        ({}, [[1.5, 0.5, 1.0], [2.0, 1.0, 0.0]], [[1, 1, 1], [1, 1, 0]]),
        ({"low": 0.7, "high": 1.2}, [[1.2, 0.7, 1.0], [1.2, 1.0, 0.0]], [[1, 1, 1], [1, 1, 0]]),
        ({"mode": "mask"}, [[1.5, 0.5, 1.0], [0.0, 1.0, 0.0]], [[1, 1, 1], [0, 1, 0]]),
        ({"mode": "mask", "low": 0.7, "high": 9.0}, [[1.5, 0.0, 1.0], [4.0, 1.0, 0.0]], [[1, 0, 1], [1, 1, 0]]),
        ({"mode": "icepop", "low": 0.6}, [[1.5, 0.0, 1.0], [4.0, 1.0, 0.0]], [[1, 0, 1], [1, 1, 0]]),
        ({"mode": "icepop", "low": 0.4, "high": 3.0}, [[1.5, 0.5, 1.0], [0.0, 1.0, 0.0]], [[1, 1, 1], [0, 1, 0]]),
        ({"mode": "none"}, [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], [[1, 1, 1], [1, 1, 0]]),
        ({"mode": "none", "high": 99.0}, [[1.5, 0.5, 1.0], [4.0, 1.0, 0.0]], [[1, 1, 1], [1, 1, 0]]),
        ({"level": "sequence"}, [0.75, 2.0], [[1, 1, 1], [1, 1, 0]]),
        ({"level": "sequence", "mode": "mask"}, [0.75, 0.0], [[1, 1, 1], [0, 0, 0]]),
        ({"level": "geometric", "mode": "mask"}, [0.75 ** (1 / 3), 2.0], [[1, 1, 1], [1, 1, 0]]),
        ({"level": "geometric", "high": 1.5}, [0.75 ** (1 / 3), 1.5], [[1, 1, 1], [1, 1, 0]]),
    ],
)
def test_weights_and_masks(options, weights, mask) -> None:
    got = importance_weights(LP, ROLLOUT, MASK, **options)
    torch.testing.assert_close(got.weights, torch.tensor(weights), rtol=1e-6, atol=1e-6)
    assert got.mask.int().tolist() == mask
    assert not got.weights.requires_grad


@pytest.mark.parametrize(("mode", "low", "high"), [("mask", 0.0, 2.0), ("icepop", 0.5, 5.0), ("none", 0.0, 1e8)])
def test_bounds_of_a_mode(mode, low, high) -> None:
    ratios = torch.tensor([low * 0.99, low * 1.01 + 1e-8, high * 0.99, high * 1.01])
    got = importance_weights(ratios.log(), torch.zeros(4), mode=mode).mask.tolist()
    assert got == ([True] * 4 if mode == "none" else [low == 0.0, True, True, False])


def test_gates() -> None:
    """w = log of 1.5, 0.5, 1; 4, 1."""
    assert kept(gate="k1", gate_high=0.5) == [[True, False, True], [True, True, False]]  # -w: -0.41 0.69 0; -1.39 0
    assert kept(gate="k1", gate_low=-0.5, gate_high=0.7) == [[True, True, True], [False, True, False]]
    assert kept(gate="k2", gate_high=0.2) == [[True, False, True], [False, True, False]]  # 0.08 0.24 0; 0.96 0
    assert kept(gate="k3", gate_high=0.15) == [[True, False, True], [False, True, False]]  # 0.09 0.19 0; 1.61 0
    assert kept(gate="tv", gate_high=0.3) == [[True, True, True], [False, True, False]]  # 0.2 0.2 0; 0.6 0
    # 0.2 log 1.5 = 0.081; 0.4 log 2 + 0.6 log(0.6/0.8) = 0.105; 0.2 log(1/4) + 0.8 log 4 = 0.832
    assert kept(gate="kl", gate_high=0.1) == [[True, False, True], [False, True, False]]


def test_gates_of_sequences() -> None:
    k1 = {"gate": "k1", "mode": "none"}
    everything, first, second = (
        [[True] * 3, [True, True, False]],
        [[True] * 3, [False] * 3],
        [[False] * 3, [True, True, False]],
    )
    assert kept(gate="k1", gate_level="sequence_sum", gate_high=0.2) == second  # 0.288; -1.386
    assert kept(gate="k1", gate_level="sequence_mean", gate_high=0.1) == everything  # 0.096; -0.693
    assert kept(gate="k1", gate_level="sequence_mean", gate_high=0.09) == second
    assert kept(gate="k1", gate_level="sequence_max", gate_high=0.5) == second  # 0.69; 0
    assert kept(gate="k2", gate_level="sequence_max", gate_high=0.3) == first  # 0.24; 0.96
    assert kept(gate="tv", gate_level="sequence_mean", gate_high=0.2) == first  # 0.13; 0.3
    veto = importance_weights(LP, ROLLOUT, MASK, **k1, gate_level="sequence_max", gate_high=math.log(1.9))
    assert veto.mask.tolist() == second  # a token half as likely as the sampler thought: 1 / 1.9 of it is the limit


def test_what_is_rejected_leaves_the_denominator() -> None:
    weights, mask, _ = importance_weights(LP, ROLLOUT, MASK, mode="mask")
    options = {"loss_type": "reinforce", "token_weights": weights}
    left = grpo_loss(LP, None, torch.ones(2), mask, **options).loss
    want = -(1.5 * LP[0, 0] + 0.5 * LP[0, 1] + LP[0, 2] + LP[1, 1])
    assert left.item() == pytest.approx(want.item() / 4)
    counted = grpo_loss(LP, None, torch.ones(2), MASK, **options).loss  # TRL's: it weighs 0 and counts
    assert counted.item() == pytest.approx(want.item() / 5)


def test_normalized_weights_have_mean_one_over_what_is_kept() -> None:
    got = importance_weights(LP, ROLLOUT, MASK, mode="mask", normalize=True)
    torch.testing.assert_close(got.weights, torch.tensor([[1.5, 0.5, 1.0], [0.0, 1.0, 0.0]]), rtol=1e-6, atol=0)
    got = importance_weights(LP, ROLLOUT, MASK, normalize=True)
    assert got.weights[MASK].mean().item() == pytest.approx(1.0)
    got = importance_weights(LP, ROLLOUT, MASK, level="sequence", normalize=True)
    assert got.weights.tolist() == pytest.approx([0.75 / 1.25, 2.0 / 1.25])  # by tokens: (3 x 0.75 + 2 x 2) / 5


def test_metrics() -> None:
    metrics = importance_weights(LP, ROLLOUT, MASK, mode="mask").metrics
    logs = [math.log(1.5), math.log(2.0), 0.0, math.log(4.0), 0.0]
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": sum(logs) / 5,
            "sampling/sampling_logp_difference/max": logs[3],
            "sampling/importance_sampling_ratio/mean": 8.0 / 5,
            "sampling/importance_sampling_ratio/min": 0.5,
            "sampling/importance_sampling_ratio/max": 4.0,
            "sampling/kept": 4 / 5,
        },
        abs=1e-6,
    )
    assert importance_weights(LP, ROLLOUT, MASK, metrics=False).metrics == {}


@pytest.mark.parametrize("lengths", [[0, 2], [2, 0, 1], [3]])
def test_metrics_of_sequences_leave_empty_ones_out(lengths) -> None:
    """Also where there are as many sequences as tokens."""
    cu, total = torch.tensor([0, *lengths]).cumsum(0), sum(lengths)
    lp, rollout = LP.flatten()[:total], torch.full((total,), -3.0)
    metrics = importance_weights(lp, rollout, level="geometric", cu_seqlens=cu).metrics
    ratios = [part.mean().exp().item() for part in (lp - rollout).split(lengths) if len(part)]
    for name, value in (("mean", sum(ratios) / len(ratios)), ("min", min(ratios)), ("max", max(ratios))):
        assert metrics[f"sampling/importance_sampling_ratio/{name}"].item() == pytest.approx(value)


def test_a_gate_keeps_its_bounds() -> None:
    lp, rollout = torch.tensor([-1.0, -1.5]), torch.tensor([-1.0, -1.0])  # k2: 0, 1/8
    for bounds in ({"gate_high": 0.125}, {"gate_low": 0.0}):
        assert importance_weights(lp, rollout, gate="k2", **bounds).mask.all()
    assert importance_weights(lp, rollout, gate="tv", gate_low=0.1).mask.tolist() == [False, True]  # p fell


def test_what_the_sampler_did_not_tell_has_ratio_one() -> None:
    rollout = ROLLOUT.clone()
    rollout[1, 0] = math.nan
    got = importance_weights(LP, rollout, MASK, mode="mask", gate="k3", gate_high=0.5)
    assert got.weights[1, 0] == 1.0
    assert got.mask[1, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
def test_masked_values_do_not_exist_and_extremes_are_held(bad) -> None:
    want = importance_weights(
        LP, ROLLOUT, MASK, level="geometric", gate="k3", gate_level="sequence_mean", gate_high=9.0
    )
    dirty = [torch.where(MASK, x, bad) for x in (LP, ROLLOUT)]
    got = importance_weights(*dirty, MASK, level="geometric", gate="k3", gate_level="sequence_mean", gate_high=9.0)
    torch.testing.assert_close(got, want)
    far = importance_weights(torch.tensor([-1.0, -1e4]), torch.tensor([-1e4, -1.0]), high=1e12)
    assert far.weights.tolist() == pytest.approx([math.exp(20.0), math.exp(-20.0)])


def test_nothing_scored() -> None:
    for shape in ((2, 3), (0, 3), (2, 0)):
        x, nothing = torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.bool)
        for level in ("token", "sequence", "geometric"):
            for gate_level in ("token", "sequence_mean", "sequence_max"):
                options = {"level": level, "gate": "kl", "gate_level": gate_level, "gate_high": 1.0, "normalize": True}
                got = importance_weights(x, x, nothing, **options)
                assert not got.weights.any()
                assert not got.mask.any()
                assert {value.item() for value in got.metrics.values()} == {0.0}
