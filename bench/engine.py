"""The engine of the head: its products counted, its time as N and V grow, its memory under a ``max_memory``.

    python bench/engine.py [--quick] [--device cpu] [--markdown bench/results/engine.md]
                           [--plot bench/results/engine.png]

Times are medians of three runs after one that is not counted; growth is time per token and per entry of the vocabulary,
which is constant where the time is linear. Extra memory is the peak beyond inputs and returned gradients.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import prefkern as pk
from prefkern.commands.benchmark.measure import peak_extra_bytes, seconds
from prefkern.commands.benchmark.report import si_bytes, si_seconds
from prefkern.head.engine.products import count_products

H = 128
TOKENS = (256, 1024, 4096, 16384)
VOCABULARIES = (1024, 8192, 32768, 131072, 262144)
BOUND = 64 << 20


class Point(NamedTuple):
    """One shape: seconds of a forward and backward, and extra bytes with at most `BOUND` bytes held."""

    N: int
    V: int
    seconds: float
    extra: int


def operands(N: int, V: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * 2 / H**0.5
    return hidden.to(device), weight.to(device), torch.randint(V, (N,), generator=generator).to(device)


def point(N: int, V: int, device: torch.device) -> Point:
    hidden, weight, targets = operands(N, V, device)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def step(max_memory: int | None = None) -> Sequence[Tensor]:
        logps = pk.linear_token_logprobs(*leaves, targets, num_scored=N, max_memory=max_memory).logps
        return torch.autograd.grad(logps.mean(), leaves)

    step()
    time = statistics.median(seconds(step, device) for _ in range(3))
    return Point(N, V, time, peak_extra_bytes(lambda: step(BOUND), device))


def counted(device: torch.device) -> dict[str, float]:
    """Products of ``2 N H V`` operations of a forward and backward, by what is trained."""
    N, V, r = 64, 4096, 2
    hidden, weight, targets = operands(N, V, device)
    a, b = torch.randn(r, H, device=device), torch.randn(V, r, device=device)

    def run(*trained: Tensor, **options: object) -> float:
        for tensor in (hidden, weight, a, b):
            tensor.requires_grad_(any(tensor is one for one in trained))
        with count_products() as count:
            logps = pk.linear_token_logprobs(hidden, weight, targets, **options).logps  # type: ignore[arg-type]
            if trained:
                torch.autograd.grad(logps.sum(), trained)
        return count.products(N, H, V)

    def other(function: Callable[[], Tensor]) -> float:
        hidden.requires_grad_()
        weight.requires_grad_()
        with count_products() as count:
            torch.autograd.grad(function(), (hidden, weight))
        return count.products(N, H, V)

    return {
        "trainable head": run(hidden, weight),
        "trainable head, max_memory=0": run(hidden, weight, max_memory=0),
        "frozen head": run(hidden),
        f"adapter of rank {r} on a frozen head": run(hidden, a, b, lora=(a, b, 1.0)),
        "scoring": run(),
        "cross-entropy in bounded memory": other(lambda: pk.linear_cross_entropy(hidden, weight, targets).loss),
        "four targets per row": other(
            lambda: pk.linear_token_logprobs(hidden, weight, targets[:, None].expand(-1, 4)).logps.sum()
        ),
        "exact KL to a reference": other(
            lambda: pk.linear_kl_divergence(hidden, weight, hidden.detach(), weight.detach() + 0.1).sum()  # type: ignore[union-attr]
        ),
    }


def tables(products: dict[str, float], by_tokens: list[Point], by_vocabulary: list[Point]) -> str:
    lines = ["| | products |", "| --- | ---: |"]
    lines += [f"| {name} | {count:.3g} |" for name, count in products.items()]
    lines += ["", f"Float32, H = {H}, trainable; extra memory with `max_memory` of {si_bytes(BOUND)}.", ""]
    lines += ["| N | V | time | per token and entry | extra memory |", "| ---: | ---: | ---: | ---: | ---: |"]
    for one in by_tokens + by_vocabulary:
        unit = one.seconds / (one.N * one.V) * 1e9
        lines.append(f"| {one.N} | {one.V} | {si_seconds(one.seconds)} | {unit:.2f} ns | {si_bytes(one.extra)} |")
    return "\n".join(lines)


def plot(path: Path, by_tokens: list[Point], by_vocabulary: list[Point]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(10, 4))
    for points, label in ((by_tokens, f"N, V = {by_tokens[0].V}"), (by_vocabulary, f"V, N = {by_vocabulary[0].N}")):
        grown = [one.N if points is by_tokens else one.V for one in points]
        times.loglog(grown, [one.seconds for one in points], "o-", label=f"growing {label}")
        memory.semilogx(grown, [one.extra / 1e6 for one in points], "o-", label=f"growing {label}")
    first = by_tokens[-1]
    grown = [one.N for one in by_tokens]
    times.loglog(grown, [first.seconds * n / first.N for n in grown], ":", color="grey", label="linear")
    times.set(title="forward and backward", ylabel="seconds")
    memory.set(title=f"extra memory, max_memory = {BOUND >> 20} MiB", ylabel="MB", ylim=(0, None))
    for axes in (times, memory):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes: seconds, to see that it runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    tokens, vocabularies = (TOKENS[:2], VOCABULARIES[:2]) if options.quick else (TOKENS, VOCABULARIES)
    by_tokens = [point(N, 8192, device) for N in tokens]
    by_vocabulary = [point(1024, V, device) for V in vocabularies]
    text = tables(counted(device), by_tokens, by_vocabulary)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if options.plot:
        plot(options.plot, by_tokens, by_vocabulary)


if __name__ == "__main__":
    main()
