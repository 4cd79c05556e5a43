"""Policy losses in every layout: padded equals packed, a part is its share of the whole, what is masked does not exist,
hidden states give what log-probabilities give."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefkern.head.logprobs import linear_token_logprobs
from prefkern.losses import grpo_loss, importance_weights, linear_grpo_loss, linear_rloo_loss, ppo_loss, rloo_loss
from prefkern.losses.policy import POLICY_LOSSES

NEEDED = {"epsilon_high": 1.3, "dro_beta": 0.4, "normalizer": 17.0}
COVARIANCE = {"cov_ratio": 1.0, "clip_cov_low": -0.2, "clip_cov_high": 0.3}  # no draw decides
TERMS = {"beta": 0.2, "entropy_coef": 0.1, "positive_nll_coef": 0.3}
SPLITTABLE = [name for name, row in POLICY_LOSSES.items() if row.function.coupling != "batch"]
many = settings(deadline=None, max_examples=20)
shapes = st.lists(st.integers(0, 5), min_size=1, max_size=5)


def options_of(name: str) -> dict[str, float]:
    options = {key: NEEDED[key] for key in POLICY_LOSSES[name].needs if key in NEEDED}
    return options | (COVARIANCE if name in ("clip_cov", "kl_cov") else {})


class Case:
    """Sequences of these lengths, some of their tokens not scored, padded and packed."""

    def __init__(self, lengths: list[int], seed: int, *, share: float = 0.7) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.B, self.T = len(lengths), max(*lengths, 1)
        self.inside = torch.arange(self.T) < torch.tensor(lengths)[:, None]
        self.mask = self.inside & (torch.rand(self.B, self.T, generator=draw) < share)
        self.cu = torch.tensor([0, *lengths]).cumsum(0)
        names = ("logps", "old_logps", "ref_logps", "entropy")
        self.tokens = {name: -torch.rand(self.B, self.T, generator=draw, dtype=torch.float64) for name in names}
        self.advantages = torch.randn(self.B, self.T, generator=draw, dtype=torch.float64)
        self.weights = torch.rand(self.B, self.T, generator=draw, dtype=torch.float64)
        self.right = torch.rand(self.B, generator=draw) < 0.5

    def arguments(self, *, per_sequence: bool = False, **changes: Tensor) -> dict[str, Tensor]:
        A, weights = self.advantages, self.weights
        if per_sequence:
            A, weights = A[:, 0], weights[:, 0]
        given = {**self.tokens, "advantages": A, "token_weights": weights, "mask": self.mask, "is_correct": self.right}
        return {name: x.clone() for name, x in {**given, **changes}.items()}

    def packed(self, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = {name: x[self.inside] if x.shape == self.inside.shape else x for name, x in arguments.items()}
        return {**flat, "cu_seqlens": self.cu}


def run(arguments: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Loss, the gradients of log-probs and entropy, and the metrics."""
    leaves = {name: arguments[name].requires_grad_() for name in ("logps", "entropy")}
    loss, metrics = grpo_loss(**arguments, **options)
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return loss.detach(), *grads, metrics


def close(got: object, want: object) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@many
@given(lengths=shapes, seed=st.integers(0, 99), per_sequence=st.booleans())
def test_padded_equals_packed(name, lengths, seed, per_sequence) -> None:
    assume(per_sequence or sum(lengths) != len(lengths))  # of as many values, one is taken per sequence
    case = Case(lengths, seed)
    arguments = case.arguments(per_sequence=per_sequence)
    length = {"max_completion_length": 9.0}
    padded = run(arguments, loss_type=name, **TERMS, **length, **options_of(name))
    packed = run(
        case.packed(case.arguments(per_sequence=per_sequence)), loss_type=name, **TERMS, **length, **options_of(name)
    )
    close(packed[0], padded[0])
    close(packed[3], padded[3])
    for flat, grid in zip(packed[1:3], padded[1:3], strict=True):
        close(flat, grid[case.inside])
        assert (grid[~case.mask] == 0).all()


@pytest.mark.parametrize("level", ["sequence", "product"])
@many
@given(lengths=shapes, seed=st.integers(0, 99))
def test_other_levels_padded_equals_packed(level, lengths, seed) -> None:
    assume(sum(lengths) != len(lengths))
    case = Case(lengths, seed)
    options = {"loss_type": "grpo", "importance_sampling_level": level, **TERMS}
    padded, packed = run(case.arguments(), **options), run(case.packed(case.arguments()), **options)
    close(packed[0], padded[0])
    close(packed[1], padded[1][case.inside])
    close(packed[3], padded[3])


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_what_is_masked_does_not_exist(name, bad) -> None:
    """More padding, whatever it holds, changes no digit of value, gradient or metrics."""
    case = Case([4, 0, 5, 1], 3)
    options = {"loss_type": name, "max_completion_length": 9.0, **TERMS, **options_of(name)}
    arguments = case.arguments()
    want = run(arguments, **options)
    wider = {
        name: torch.nn.functional.pad(x.detach().double().masked_fill(~case.mask, bad), (0, 3), value=bad)
        if x.shape == case.mask.shape and name != "mask"
        else x
        for name, x in arguments.items()
    }
    wider["mask"] = torch.nn.functional.pad(case.mask, (0, 3))
    with torch.autograd.set_detect_anomaly(True):
        got = run(wider, **options)
    close(got[0], want[0])
    close(got[3], want[3])
    for grad, exact in zip(got[1:3], want[1:3], strict=True):
        close(grad[:, : case.T], exact)
        assert (grad[~wider["mask"]] == 0).all()


@pytest.mark.parametrize("reduction", ["token", "sequence", "sequence_sum", "fixed"])
@pytest.mark.parametrize("name", SPLITTABLE)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 99), cut=st.integers(0, 5))
def test_parts_add_up_to_the_whole(name, reduction, seed, cut) -> None:
    """Gradient accumulation: with the count of the whole batch, as a device tensor, every split gives its loss."""
    case = Case([4, 0, 5, 1, 3], seed)
    count = case.mask.sum() if reduction == "token" else torch.tensor(case.B)
    options = {"loss_type": name, "beta": 0.2, "reduction": reduction, **options_of(name), "normalizer": count}
    arguments = case.arguments() | {"old_logps": case.tokens["old_logps"]}
    drop = ("entropy", "is_correct")
    whole = {key: value for key, value in arguments.items() if key not in drop}
    lp = whole.pop("logps").requires_grad_()
    loss = grpo_loss(lp, **whole, **options).loss
    parts = [
        grpo_loss(lp[s], **{key: value[s] for key, value in whole.items()}, **options).loss
        for s in (slice(0, cut), slice(cut, None))
    ]
    close(sum(parts), loss)
    close(*(torch.autograd.grad(x, lp)[0] for x in (sum(parts), loss)))


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
def test_one_class_only_is_finite(name, sign) -> None:
    case = Case([4, 2, 5], 1)
    loss, grad, _, metrics = run(
        case.arguments(advantages=sign * case.advantages.abs()), loss_type=name, **TERMS, **options_of(name)
    )
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("w", [1e4, -1e4, math.inf, -math.inf])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_extreme_log_ratios_at_scored_tokens_are_held(name, w) -> None:
    """Of the sampler: value and gradient are finite, and that of the ratio is 0 beyond the limit."""
    case = Case([4, 2, 5], 1, share=1.1)
    old = case.tokens["old_logps"].clone()
    old[0, 1] -= w
    loss, grad, _, metrics = run(
        case.arguments(old_logps=old, advantages=-case.advantages.abs()),
        loss_type=name,
        beta=0.2,
        entropy_coef=0.1,
        **options_of(name),
    )
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("name", ["grpo", "sapo", "importance_sampling", "gmpo", "importance_mask", "kl_cov"])
def test_a_held_ratio_has_no_gradient(name) -> None:
    lp, old = torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.tensor([[-1e4, -2.1]])
    grpo_loss(lp, old, torch.tensor([-1.0]), loss_type=name, reduction="token").loss.backward()
    assert lp.grad[0, 0] == 0.0
    assert lp.grad[0, 1] != 0.0


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_an_impossible_token_that_weighs_nothing_is_nothing(name) -> None:
    """lp = -inf, of a token that the trainer's vocabulary leaves out, with an advantage of 0."""
    lp = torch.tensor([[-1.0, -math.inf, -0.5]], requires_grad=True)
    options = {**options_of(name), "loss_type": name, "metrics": False}
    loss = grpo_loss(lp, torch.tensor([[-1.1, -2.0, -0.4]]), torch.tensor([[1.0, 0.0, -1.0]]), **options).loss
    loss.backward()
    assert loss.isfinite()
    assert lp.grad.isfinite().all()
    assert lp.grad[0, 1] == 0.0


@pytest.mark.parametrize("reduction", [None, "token", "sequence", "sequence_sum", "fixed"])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_nothing_scored_is_zero_with_a_graph(name, reduction) -> None:
    options = {**options_of(name), "loss_type": name, "reduction": reduction}
    for shape in ((3, 4), (0, 4), (3, 0)):
        for normalizer in (None, 0, torch.tensor(0), torch.tensor(7)):
            if normalizer is None and "normalizer" in POLICY_LOSSES[name].needs and reduction in (None, "token"):
                continue
            lp = torch.full(shape, math.nan, requires_grad=True)
            other = torch.full(shape, math.inf)
            loss, metrics = grpo_loss(
                lp,
                other,
                other[:, 0] if shape[1] else torch.zeros(3),
                torch.zeros(shape),
                **{**options, "normalizer": normalizer},
            )
            assert loss.item() == 0.0
            assert (torch.autograd.grad(loss, lp)[0] == 0).all()
            assert {value.item() for value in metrics.values()} <= {0.0}


@pytest.mark.parametrize("normalizer", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
def test_a_normalizer_of_zero_gives_zero_with_a_graph(normalizer) -> None:
    lp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    losses = [
        grpo_loss(lp, lp.detach() - 0.1, torch.ones(1), normalizer=normalizer).loss,
        rloo_loss(lp, None, torch.ones(1), normalizer=normalizer).loss,
        ppo_loss(lp, lp.detach(), torch.ones(1), normalizer=normalizer).loss,
    ]
    for loss in losses:
        assert loss.item() == 0.0
        assert torch.equal(torch.autograd.grad(loss, lp)[0], torch.zeros(1, 2))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_linear_grpo_is_grpo_of_the_log_probabilities(name, packed) -> None:
    case, H, V = Case([4, 2, 5, 0], 2), 6, 9
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(case.B, case.T, H, generator=draw, dtype=torch.float64)
    weight = torch.randn(V, H, generator=draw, dtype=torch.float64).requires_grad_()
    targets = torch.randint(V, (case.B, case.T), generator=draw)
    arguments = {key: value for key, value in case.arguments().items() if key not in ("logps", "entropy")}
    arguments["old_logps"] = linear_token_logprobs(hidden, weight, targets).logps.detach() - 0.2 * case.advantages
    if packed:
        hidden, targets, arguments = hidden[case.inside], targets[case.inside], case.packed(arguments)
    hidden.requires_grad_()
    options = {"loss_type": name, "max_completion_length": 9.0, "temperature": 0.8, **TERMS, **options_of(name)}
    got = linear_grpo_loss(hidden, weight, targets, **arguments, **options)
    temperature = options.pop("temperature")
    stats = linear_token_logprobs(
        hidden, weight, targets, outputs=("logps", "entropy"), entropy_grad=True, temperature=temperature
    )
    want = grpo_loss(stats.logps, entropy=stats.entropy, **arguments, **options)
    close(got.loss, want.loss)
    close(got.metrics, want.metrics)
    for ours, theirs in zip(*(torch.autograd.grad(out.loss, [hidden, weight]) for out in (got, want)), strict=True):
        close(ours, theirs)
        assert theirs.abs().max() > 0


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_linear_rloo_is_rloo_of_the_log_probabilities(packed, sums) -> None:
    case, H, V = Case([4, 2, 5, 0], 2), 6, 9
    hidden = torch.randn(case.B, case.T, H, dtype=torch.float64)
    weight = torch.randn(V, H, dtype=torch.float64).requires_grad_()
    targets, mask, A = torch.randint(V, (case.B, case.T)), case.mask, case.advantages[:, 0]
    old = linear_token_logprobs(hidden, weight, targets).logps.detach() - 0.01 * case.advantages
    given = {"old_logps": (old * mask).sum(1) if sums else old}
    padded_logps = linear_token_logprobs(hidden, weight, targets).logps
    want = rloo_loss(padded_logps, given["old_logps"], A, mask)
    (exact,) = torch.autograd.grad(want.loss, weight)
    if packed:
        hidden, targets, mask = hidden[case.inside], targets[case.inside], mask[case.inside]
        given = {key: value if sums else value[case.inside] for key, value in given.items()} | {"cu_seqlens": case.cu}
    got = linear_rloo_loss(hidden, weight, targets, advantages=A, mask=mask, **given)
    close(got.loss, want.loss)
    close(torch.autograd.grad(got.loss, weight)[0], exact)
    close({name: got.metrics[name] for name in want.metrics}, want.metrics)


@many
@given(
    lengths=shapes,
    seed=st.integers(0, 99),
    level=st.sampled_from(["token", "sequence", "geometric"]),
    gate=st.sampled_from([None, "k1", "k2", "k3", "tv", "kl"]),
    gate_level=st.sampled_from(["token", "sequence_mean", "sequence_sum", "sequence_max"]),
    mode=st.sampled_from(["truncate", "mask", "none"]),
)
def test_importance_weights_padded_equal_packed(lengths, seed, level, gate, gate_level, mode) -> None:
    case = Case(lengths, seed)
    lp, rollout = (case.tokens[name] for name in ("logps", "old_logps"))
    options = {"level": level, "mode": mode, "low": 0.8, "high": 1.2}
    options |= {"gate": gate, "gate_level": gate_level, "gate_high": 0.1} if gate else {}
    padded = importance_weights(lp, rollout, case.mask, **options)
    packed = importance_weights(
        lp[case.inside], rollout[case.inside], case.mask[case.inside], cu_seqlens=case.cu, **options
    )
    close(packed.weights, padded.weights[case.inside] if level == "token" else padded.weights)
    assert torch.equal(packed.mask, padded.mask[case.inside])
    assert not (padded.mask & ~case.mask).any()
    close(packed.metrics, padded.metrics)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_no_value_is_read_off_the_cpu(name, packed) -> None:
    """A tensor without values has none to wait for."""
    case = Case([4, 2, 5], 1)
    arguments = case.packed(case.arguments()) if packed else case.arguments()
    there = {key: value.to("meta") for key, value in arguments.items()}
    options = {**TERMS, **options_of(name), "normalizer": torch.zeros((), device="meta"), "max_completion_length": 9.0}
    loss, grad, _, metrics = run(there, loss_type=name, **options)
    assert all(tensor.device.type == "meta" for tensor in (loss, grad, *metrics.values()))
    tensors = {key: there.get(key) for key in ("mask", "cu_seqlens")}
    for level in ("token", "sequence", "geometric"):
        gate = {"gate": "kl", "gate_level": "sequence_max", "gate_high": 1.0, "normalize": True}
        found = importance_weights(there["logps"], there["old_logps"], **tensors, level=level, mode="mask", **gate)
        assert all(tensor.device.type == "meta" for tensor in (found.weights, found.mask, *found.metrics.values()))
