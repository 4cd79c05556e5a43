"""``python -m prefkern plan``: every plan of the head for given shapes, as a table."""

import argparse
from collections.abc import Sequence

from prefkern.head import plan
from prefkern.head.plan import Line

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def _memory(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a number of bytes >= 0, got {value}")
    return value


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def table(lines: Sequence[Line]) -> str:
    """The lines of `plan.explain`, aligned."""
    rows = [("", "plan", "products", "held", "extra memory", "time, at least")]
    rows += [
        (
            line.wanted,
            line.plan.name,
            f"{line.plan.products:.3g}",
            _bytes(line.plan.held_bytes),
            _bytes(line.plan.extra_bytes),
            _seconds(line.seconds),
        )
        for line in lines
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if at < 2 else cell.rjust(width) for at, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m prefkern plan",
        description="What linear_token_logprobs, linear_cross_entropy and linear_kl_divergence will do: matrix "
        "products of 2 N H V operations, bytes held from forward to backward, peak memory beyond inputs and gradients, "
        "and a floor of the time.",
    )
    parser.add_argument("--tokens", type=_positive, required=True, help="scored tokens N")
    parser.add_argument("--hidden", type=_positive, required=True, help="width H of the hidden states")
    parser.add_argument("--vocab", type=_positive, required=True, help="vocabulary V")
    parser.add_argument("--dtype", choices=SIZES, default="bf16", help="of the operands (default: bf16)")
    parser.add_argument("--weight-dtype", choices=SIZES, help="of the weight, under autocast (default: the same)")
    parser.add_argument("--max-memory", type=_memory, metavar="BYTES", help="as in linear_token_logprobs")
    parser.add_argument("--cpu", action="store_true", help="for a CPU, which works in smaller blocks")
    parser.add_argument("--tflops", type=_rate, default=790.0, help="of the machine (default: 790, an H200 in bf16)")
    parser.add_argument("--bandwidth", type=_rate, default=4300.0, help="of its memory, GB/s (default: 4300)")
    given = parser.parse_args(argv)
    lines = plan.explain(
        given.tokens,
        given.hidden,
        given.vocab,
        itemsize=SIZES[given.dtype],
        weight_itemsize=SIZES[given.weight_dtype or given.dtype],
        max_memory=given.max_memory,
        accelerator=not given.cpu,
        flops=given.tflops * 1e12,
        bandwidth=given.bandwidth * 1e9,
    )
    print(f"N = {given.tokens}, H = {given.hidden}, V = {given.vocab}, {given.dtype}\n\n{table(lines)}")
    return 0
