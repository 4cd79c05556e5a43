"""Log-probabilities with their backward: prefkern beside naive eager, small enough to repeat often."""

import pytest
import torch
import torch.nn.functional as F

from prefkern import linear_token_logprobs, token_logprobs

N, H, V = 256, 256, 8192


def naive(logits, targets):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.log_softmax(logits, -1, dtype=wide).gather(-1, targets[:, None]).squeeze(-1)


FROM_LOGITS = {
    "naive eager": naive,
    "prefkern": lambda logits, targets: token_logprobs(logits, targets).logps,
}
FROM_HIDDEN = {
    "naive eager": lambda hidden, weight, targets: naive(F.linear(hidden, weight), targets),
    "prefkern": lambda hidden, weight, targets: linear_token_logprobs(hidden, weight, targets).logps,
    "prefkern, max_memory=0": lambda hidden, weight, targets: (
        linear_token_logprobs(hidden, weight, targets, max_memory=0).logps
    ),
}


def close(got, want, dtype):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=8 * torch.finfo(dtype).eps * float(b.abs().max()))


@pytest.mark.parametrize("name", FROM_LOGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_logprobs(benchmark, name, dtype):
    logits = torch.randn(N, V).mul_(3).to(dtype).requires_grad_()
    targets, upstream = torch.randint(V, (N,)), torch.randn(N)

    def step(forward=FROM_LOGITS[name], x=logits):
        logps = forward(x, targets)
        return logps.detach(), *torch.autograd.grad(logps, x, upstream.to(logps.dtype))

    close(step(), step(naive, logits.detach().double().requires_grad_()), dtype)
    benchmark.group = f"token_logprobs {N} x {V} {dtype}"
    benchmark(step)


@pytest.mark.parametrize("name", FROM_HIDDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_token_logprobs(benchmark, name, dtype):
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    weight = torch.randn(V, H).mul_(3 / H**0.5).to(dtype).requires_grad_()
    targets, upstream = torch.randint(V, (N,)), torch.randn(N)

    def step(forward=FROM_HIDDEN[name], inputs=(hidden, weight)):
        logps = forward(*inputs, targets)
        return logps.detach(), *torch.autograd.grad(logps, inputs, upstream.to(logps.dtype))

    exact = step(FROM_HIDDEN["naive eager"], tuple(x.detach().double().requires_grad_() for x in (hidden, weight)))
    close(step(), exact, dtype)
    benchmark.group = f"linear_token_logprobs {N} x {H} x {V} {dtype}"
    benchmark(step)
