"""Where the time of the head on a CPU goes: the products in each dtype, and the passes over a tile of logits.

    .venv/bin/python bench/cpu_head.py [--threads 1] [--markdown bench/results/cpu-head.md]

Processor time of the process (medians), divided by the threads: on a busy machine it says more than the clock does.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from prefkern.commands.benchmark.machine import describe
from prefkern.head.engine.products import mm
from prefkern.kernels.interface import Logits, RowStats
from prefkern.kernels.reference import logprobs

C, H, V = 256, 1024, 4096  # of the products
ROWS, COLUMNS = 512, 8192  # of the passes: a tile of 16 MB


def measure(step: Callable[[], object], *, runs: int, before: Callable[[], object] | None = None) -> float:
    """Seconds of processor time per thread."""
    step()
    times = []
    for _ in range(runs):
        if before is not None:
            before()
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return statistics.median(times) / torch.get_num_threads()


def table(columns: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def products() -> str:
    """GFLOP/s of the head's three products: torch's in three dtypes, and prefkern's of 16-bit operands."""
    hidden, weight, tile = torch.randn(C, H), torch.randn(V, H), torch.randn(C, V)
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        h, w, u = hidden.to(dtype), weight.to(dtype), tile.to(dtype)
        pairs = {"h W^T": (h, w.T), "u W": (u, w), "u^T h": (u.T, h)}
        runs = 7 if dtype == torch.float32 else 1
        rates = [2e-9 * C * H * V / measure(lambda a=a, b=b: torch.mm(a, b), runs=runs) for a, b in pairs.values()]
        rows.append([f"`torch.mm`, {str(dtype).removeprefix('torch.')}", *(f"{rate:.1f}" for rate in rates)])
        if dtype != torch.float32:
            wide = {name: torch.empty(a.shape[0], b.shape[1]) for name, (a, b) in pairs.items()}
            rates = [
                2e-9 * C * H * V / measure(lambda a=a, b=b, out=wide[name]: mm(a, b, out), runs=3)
                for name, (a, b) in pairs.items()
            ]
            name = f"`products.mm`, {str(dtype).removeprefix('torch.')}, float32 out"
            rows.append([name, *(f"{rate:.1f}" for rate in rates)])
    return table(["GFLOP/s a thread", "h W^T", "u W", "u^T h"], rows)


def passes() -> str:
    """Each pass over a tile, and the fold that is made of them, as a share of the product that made the tile."""
    fresh = torch.randn(ROWS, COLUMNS).mul_(3)
    x, other = fresh.clone(), fresh.clone()
    targets = torch.randint(COLUMNS, (ROWS,))
    row_max = fresh.amax(-1, keepdim=True)
    narrow = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)

    def stats(*, metrics: bool) -> RowStats:
        rows = [torch.empty(ROWS) for _ in range(4)]
        top1 = torch.empty(ROWS, dtype=torch.bool)
        return RowStats(*rows, None, None, top1) if metrics else RowStats(*rows[:3])

    def fold(held: Tensor | None, *, metrics: bool = False) -> Callable[[], object]:
        return lambda: logprobs.tile_fwd(x, targets, stats(metrics=metrics), held, Logits())

    hidden, weight = torch.randn(ROWS, H), torch.randn(COLUMNS, H)
    product = measure(lambda: torch.mm(hidden, weight.T, out=other), runs=3)
    steps: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2, lambda: x.copy_(fresh)),
        "amax": (1, lambda: x.amax(-1)),
        "subtract the maximum": (2, lambda: x.sub_(row_max)),
        "softmax in place": (2, lambda: torch.softmax(x, -1, out=x)),
        "exp, sum in levels, multiply in its stead": (5, lambda: x.exp_().mul_(x.sum(-1, keepdim=True).reciprocal())),
        "argmax (top-1 metric)": (1, lambda: x.argmax(-1)),
        "sum of p z (entropy metric)": (2, lambda: (x * other).sum(-1)),
        "**the fold**, statistics": (2, fold(None)),
        "**the fold**, and u in place": (2, fold(x)),
        "**the fold**, and u in bfloat16": (2, fold(narrow)),
        "**the fold**, u in place, both metrics": (2, fold(x, metrics=True)),
    }
    rows = []
    for name, (moves, step) in steps.items():
        seconds = measure(step, runs=7, before=lambda: x.copy_(fresh))
        rate = moves * x.nbytes / seconds / 1e9
        rows.append([name, f"{1e3 * seconds:.1f}", f"{rate:.1f}", f"{100 * seconds / product:.1f} %"])
    rows.append([f"the product, H = {H}", f"{1e3 * product:.0f}", "-", "100 %"])
    return table(["pass over a tile", "ms", "GB/s", "of one product"], rows)


def facts() -> str:
    """What torch offers for a product of 16-bit operands whose result is not rounded."""
    a, b = torch.randn(64, 256).bfloat16(), torch.randn(256, 512).bfloat16()
    truth = a.double() @ b.double()

    def error(got: Tensor) -> str:
        return f"{float((got.double() - truth).abs().amax() / truth.abs().amax()):.0e}"

    rows = []
    calls: dict[str, Callable[[], Tensor]] = {
        "`torch.mm(out_dtype=float32)`": lambda: torch.mm(a, b, out_dtype=torch.float32),
        "`torch.bmm(out_dtype=float32)`": lambda: torch.bmm(a[None], b[None], out_dtype=torch.float32)[0],
        "`torch.addmm(out_dtype=float32)`": lambda: torch.addmm(torch.zeros(64, 512), a, b, out_dtype=torch.float32),
        "`torch.mm`, result in bfloat16": lambda: torch.mm(a, b),
        "`torch.mm` of upcast operands": lambda: torch.mm(a.float(), b.float()),
    }
    for name, call in calls.items():
        try:
            rows.append([name, error(call())])
        except (NotImplementedError, RuntimeError, TypeError):
            rows.append([name, "not on a CPU"])
    setting = torch.backends.mkldnn.matmul
    before, seen = setting.fp32_precision, []
    setting.fp32_precision = "bf16"
    try:
        rows.append(["the same under `mkldnn.matmul.fp32_precision = 'bf16'`", error(torch.mm(a.float(), b.float()))])
        thread = threading.Thread(target=lambda: seen.append(setting.fp32_precision))
        thread.start()
        thread.join()
    finally:
        setting.fp32_precision = before
    scope = "every thread" if seen == ["bf16"] else "its own thread"
    rows.append(["that setting, made in one thread, holds in", scope])
    native = {"AVX-512 bf16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}
    has = [name for name, function in native.items() if getattr(torch.cpu, function, lambda: False)()]
    rows.append(["this processor's own bfloat16 products", ", ".join(has) or "none"])
    return table(["bfloat16 operands on this CPU", "largest error"], rows)


def sums() -> str:
    """The error of ``log sum exp`` of logits of deviation 3 beside one of probability near 1, added up in two ways."""
    x = torch.randn(64, 32768) * 3
    x[:, 0] = 22.0
    z = x - x.amax(-1, keepdim=True)
    truth = z.double().logsumexp(-1)
    found = {"softmax": -torch.softmax(z, -1).amax(-1).log(), "sum in levels": z.exp().sum(-1).log()}
    rows = [[name, f"{float((value.double() - truth).abs().amax()):.0e}"] for name, value in found.items()]
    return table(["log of the sum of 32768 exponentials, by", "largest error"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="also write the tables there")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    machine = describe(torch.device("cpu"))
    about = (
        f"{machine['processor']}, {given.threads} thread{'s' if given.threads > 1 else ''}, torch {torch.__version__}"
    )
    about += f"; products [{C}, {H}] x [{H}, {V}], tile [{ROWS}, {COLUMNS}]; processor time."
    text = "\n\n".join([about, products(), facts(), passes(), sums()]) + "\n"
    print(text)
    if given.markdown is not None:
        given.markdown.write_text(text)


if __name__ == "__main__":
    main()
