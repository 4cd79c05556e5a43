"""Exact divergences of two heads with their backward: naive eager, TRL's own function, prefkern. One interleaved run.

    python bench/divergence.py [--tokens 1024] [--hidden 1024] [--vocab 32768] [--dtype float32] [--rounds 5]
                               [--kind forward] [--markdown bench/results/divergence.md]

Errors are the largest against float64 of the same operands, on the first 64 rows. The two heads are a policy and the
reference that it has moved away from, as in training.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import prefkern as pk
from prefkern import testing
from prefkern.commands.benchmark.head.operands import DTYPES, Shape, make_operands
from prefkern.commands.benchmark.measure import Budget, interleave, peak_extra_bytes
from prefkern.commands.benchmark.report import si_bytes, si_seconds
from prefkern.head.engine.products import count_products

BETAS = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}
CHECKED = 64
Divergence = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(hidden, weight, ref_hidden, ref_weight) -> [N]``."""


def eager(beta: float, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    lp = F.log_softmax(F.linear(hidden, weight), dim=-1, dtype=torch.float32)
    with torch.no_grad():
        lq = F.log_softmax(F.linear(ref_hidden, ref_weight), dim=-1, dtype=torch.float32)
    if beta in (0.0, 1.0):
        return F.kl_div(*((lp, lq) if beta == 0.0 else (lq, lp)), reduction="none", log_target=True).sum(-1)
    m = torch.log((1 - beta) * lp.exp() + beta * lq.exp())
    parts = (F.kl_div(m, of, reduction="none", log_target=True).sum(-1) for of in (lq, lp))
    return beta * next(parts) + (1 - beta) * next(parts)


def trl(beta: float, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    with torch.no_grad():
        teacher = F.linear(ref_hidden, ref_weight)
    every = GKDTrainer.generalized_jsd_loss(F.linear(hidden, weight), teacher, beta=beta, reduction="none")
    return every.sum(-1).float()


def ours(
    memory: int | None, beta: float, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> Tensor:
    return pk.linear_kl_divergence(hidden, weight, ref_hidden, ref_weight, jsd_beta=beta, max_memory=memory)


def step(function: Divergence, operands: Sequence[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    hidden, weight = (value.detach().requires_grad_() for value in operands[:2])
    value = function(hidden, weight, *operands[2:])
    return value.detach(), *torch.autograd.grad(value, (hidden, weight), upstream.to(value.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 1024), ("hidden", 1024), ("vocab", 32768), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--kind", choices=BETAS, default="forward")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    device, beta = torch.device(options.device), BETAS[options.kind]
    shape = Shape(options.tokens, options.hidden, options.vocab)
    given = make_operands(shape, DTYPES[options.dtype], device)
    moved = given.hidden + 0.3 * torch.randn_like(given.hidden)
    operands = (moved, given.weight, given.hidden, given.weight)
    contenders: dict[str, Divergence] = {
        "naive eager": partial(eager, beta),
        "TRL's generalized_jsd_loss": partial(trl, beta),
        "**prefkern**": partial(ours, None, beta),
        "prefkern, max_memory=0": partial(ours, 0, beta),
    }
    steps = {name: partial(step, function, operands, given.upstream) for name, function in contenders.items()}
    rows = testing.DivergenceCase(
        *(t[:CHECKED] for t in operands[:1]),
        operands[1],
        None,
        given.hidden[:CHECKED],
        operands[3],
        None,
        given.targets,
    )
    want = testing.divergence_from_hidden(rows, beta=beta)
    spreads = interleave(steps, device, rounds=options.rounds + 1, budget=Budget(None), on_round=lambda _: None)
    lines = [
        f"{options.kind}, {options.dtype}, {shape}, on {device.type}; medians of {options.rounds} interleaved rounds "
        "after one that is not counted.",
        "",
        "| | time | x eager | extra memory | largest error | products |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    medians = {name: sorted(spread.runs[1:])[options.rounds // 2] for name, spread in spreads.items()}
    for name, run in steps.items():
        with count_products() as count:
            error = (run()[0][:CHECKED].double() - want).abs().max().item()
        products = f"{count.products(*shape):.3g}" if "prefkern" in name else "-"
        cells = si_seconds(medians[name]), f"{medians[name] / medians['naive eager']:.2f}"
        extra = si_bytes(peak_extra_bytes(run, device))
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {extra} | {error:.0e} | {products} |")
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
