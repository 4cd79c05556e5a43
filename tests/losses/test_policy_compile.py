"""Policy losses under torch.compile: one graph, forward and backward, with the eager numbers."""

import pytest
import torch

from prefkern.losses import grpo_loss, importance_weights, rloo_loss
from prefkern.losses.policy import POLICY_LOSSES

NEEDED = {"epsilon_high": 1.3, "dro_beta": 0.4}
CU = torch.tensor([0, 3, 9, 12])


def assert_one_graph(function, *arguments: torch.Tensor) -> None:
    """Loss, gradient and metrics, through AOT autograd, without a break."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    lp = arguments[0].requires_grad_()
    (want, shown), (got, same) = function(*arguments), compiled(*arguments)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(same, shown)
    torch.testing.assert_close(*(torch.autograd.grad(loss, lp)[0] for loss in (got, want)))
    torch._dynamo.reset()


WHERE_SEQUENCES_MATTER = [name for name, row in POLICY_LOSSES.items() if row.function.coupling != "token"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "packed"),
    [*((name, False) for name in POLICY_LOSSES), *((name, True) for name in ["grpo", *WHERE_SEQUENCES_MATTER])],
)
def test_every_type_is_one_graph(name, packed) -> None:
    options = {key: NEEDED[key] for key in POLICY_LOSSES[name].needs if key in NEEDED}
    options |= {"cov_ratio": 0.3} if name == "kl_cov" else {}
    options |= {"cov_ratio": 1.0, "clip_cov_low": 0.1} if name == "clip_cov" else {}
    shape = (12,) if packed else (3, 4)

    def loss(lp, old, A, mask, ref, weights, count):
        cu = CU if packed else None
        given = {"token_weights": weights, "normalizer": count, "cu_seqlens": cu, "max_completion_length": 9.0}
        return grpo_loss(lp, old, A, mask, loss_type=name, ref_logps=ref, beta=0.1, **given, **options)

    lp = -torch.rand(shape)
    others = lp + 0.3 * torch.randn(shape), torch.randn(3), torch.rand(shape) < 0.8, lp - 0.1, torch.rand(shape)
    assert_one_graph(loss, lp, *others, torch.tensor(7))


@pytest.mark.parametrize("level", ["sequence", "product"])
def test_other_levels_are_one_graph(level) -> None:
    def loss(lp, old, A):
        return grpo_loss(lp, old, A, loss_type="grpo", importance_sampling_level=level, kl_gradient="unbiased")

    lp = -torch.rand(3, 4)
    assert_one_graph(loss, lp, lp.detach() + 0.1, torch.randn(3))
    assert_one_graph(lambda lp, A: rloo_loss(lp, None, A), lp.detach().clone(), torch.randn(3))


def test_corrections_are_one_graph() -> None:
    def loss(lp, old, A, mask):
        options = {"level": "sequence", "mode": "mask", "gate": "kl", "gate_level": "sequence_max", "gate_high": 0.5}
        weights, kept, shown = importance_weights(old, old - 0.1, mask, **options)
        out = grpo_loss(lp, old, A, kept, token_weights=weights, loss_type="grpo")
        return out.loss, out.metrics | shown

    lp = -torch.rand(3, 4)
    assert_one_graph(loss, lp, lp.detach() + 0.1, torch.randn(3), torch.rand(3, 4) < 0.8)


@pytest.mark.parametrize("name", ["dapo", "clip_cov", "kl_cov", "vespo"])
def test_lengths_are_run_time_values(name) -> None:
    """One compilation for every length, the number of the tokens that clip_cov and kl_cov take included."""
    options = {"cov_ratio": 0.3} if name == "kl_cov" else {"cov_ratio": 1.0, "clip_cov_low": 0.1}

    def loss(lp, old, A, mask):
        return grpo_loss(lp, old, A, mask, loss_type=name, normalizer=7.0, **options).loss

    graphs = 0

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for T in (7, 9, 16, 31):
        lp = -torch.rand(4, T)
        arguments = lp, lp + 0.3 * torch.randn(4, T), torch.randn(4), torch.rand(4, T) < 0.8
        torch.testing.assert_close(compiled(*arguments), loss(*arguments))
    assert graphs == 1
    torch._dynamo.reset()
