"""The accuracy of the elementwise mathematics, each function seen through a kernel that shows it alone."""

import pytest
import torch
from torch import Tensor

from prefkern.kernels.interface import Factors, Logits, RowStats

EPS = torch.finfo(torch.float32).eps


def relative(got: Tensor, want: Tensor) -> Tensor:
    return ((got.double().cpu() - want) / want).abs()


def test_expm1_of_confident_log_probabilities(device: torch.device) -> None:
    """``u_y = expm1(lp)``: 1 - p from a rounded p would have no digit left at lp = -1e-8."""
    from prefkern.kernels.triton import logprobs

    lp = -torch.logspace(-12, 1.9, 99)
    lp = torch.cat([lp, -torch.linspace(0.3, 0.7, 21)])
    N = len(lp)
    held, out = torch.zeros(N, 1, device=device), torch.empty(N, 1, device=device)
    one, row = torch.ones(N, device=device), torch.zeros(N, device=device)
    stats = RowStats(lp.to(device), row, row, row)
    logprobs.held_bwd(held, row.long(), stats, Factors(one, row), out, Logits())
    assert relative(out[:, 0], torch.expm1(lp.double())).max() <= 4 * EPS


def test_log2_of_probabilities(device: torch.device) -> None:
    """``e p log p`` of every held p, with the target elsewhere; 0 log 0 is 0."""
    from prefkern.kernels.triton import logprobs

    p = torch.cat([torch.logspace(-37, 0, 301), torch.linspace(0.4, 1.0, 98), torch.zeros(1)])[None]
    out, one = torch.empty_like(p).to(device), torch.ones(1, device=device)
    stats = RowStats(-one, 0 * one, 0 * one, 0 * one)
    logprobs.held_bwd(p.to(device), -one.long(), stats, Factors(0 * one, one), out, Logits())
    want = torch.special.xlogy(p.double(), p.double())
    assert out[0, -1] == 0
    error = (out.double().cpu() - want).abs()
    assert (error <= 2 * EPS * want.abs() + EPS * p / 2).all()


@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_softcap_and_its_slope(cap: float, device: torch.device) -> None:
    """A row of one logit: its maximum is ``c tanh(x / c)``, and with a probability of 1 its gradient is the slope."""
    from prefkern.kernels.triton import logprobs

    size = torch.cat([torch.logspace(-6, 2, 61), torch.linspace(0.5, 0.7, 21)])
    x = torch.cat([size, -size]) * cap
    N = len(x)
    row = torch.zeros(N, device=device)
    stats = RowStats(row.clone(), row.clone(), row.clone())
    logprobs.tile_fwd(x[:, None].to(device), row.long(), stats, None, Logits(softcap=cap))
    t = torch.tanh(x.double() / cap)
    assert relative(stats.row_max, cap * t).max() <= 4 * EPS
    assert not stats.logps.any()
    out = torch.empty(N, 1, device=device)
    elsewhere = torch.full((N,), 9, device=device)
    flat = RowStats(row, stats.row_max, row)  # p = 1
    logprobs.tile_bwd(x[:, None].to(device), elsewhere, flat, Factors(), out, Logits(softcap=cap))
    slope = 1 / torch.cosh(x.double() / cap) ** 2
    # exp(-2 x) has a relative error that grows with x, where the slope itself vanishes
    error = (out[:, 0].double().cpu() - slope).abs()
    assert (error <= EPS * slope * (8 + 2 * (x.double() / cap).abs()) + 1e-30).all()
    assert (out[:, 0] >= 0).all()


def test_infinite_logits_under_the_cap(device: torch.device) -> None:
    from prefkern.kernels.triton import logprobs

    inf = float("inf")
    tile = torch.tensor([[1.0, -inf, 2.0], [inf, 1.0, 0.0]], device=device)
    row = torch.zeros(2, device=device)
    stats, held = RowStats(row, row.clone(), row.clone()), torch.empty(2, 3, device=device)
    logprobs.tile_fwd(tile, row.long(), stats, held, Logits(softcap=3.0))
    assert held[0, 1] == 0
    assert held[1, 0] == 0  # saturated
    assert stats.row_max.tolist() == pytest.approx([3 * torch.tensor(2 / 3).tanh().item(), 3.0])
