"""What the kernel tests share: options of the waist, poisoned statistics, and comparison with the oracle."""

from typing import Any

import torch
from torch import Tensor

from prefkern import testing
from prefkern.kernels.interface import RowStats

ROWS = 12
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "cold": {"temperature": 0.3},
    "rows": {"temperature": "rows"},
    "all": {"softcap": 4.0, "temperature": "rows"},
}


def options_of(name: str, device: torch.device, rows: int = ROWS) -> dict[str, Any]:
    """``softcap``, ``temperature`` and ``ignore_index`` of a case; ``rows`` stands for one temperature per row."""
    options = {"softcap": None, "temperature": 1.0} | OPTIONS[name]
    if options["temperature"] == "rows":
        options["temperature"] = torch.linspace(0.5, 1.7, rows).to(device)
    return options | {"ignore_index": testing.IGNORE}


def poisoned_stats(rows: int, device: torch.device, guard: testing.Guards, wanted: str = "eqmt") -> RowStats:
    """Unwritten statistics behind guard bands; ``wanted``: entropy, log sum p^2, mean logit, top-1."""

    def new(dtype: torch.dtype) -> Tensor:
        return guard(testing.poisoned(rows, dtype=dtype, device=device))

    floats = [new(torch.float32) if letter in wanted else None for letter in "eqm"]
    top1 = new(torch.bool) if "t" in wanted else None
    return RowStats(new(torch.float32), new(torch.float32), new(torch.float32), *floats, top1)


def assert_stats(got: RowStats, logits: Tensor, targets: Tensor, **options: Any) -> None:
    """Every statistic that was asked for, against float64 and against plain float32."""
    want = testing.stats_from_logits(logits, targets, **options)
    eager = testing.stats_from_logits(logits, targets, dtype=torch.float32, **options)
    for name, value in got._asdict().items():
        if name == "is_top1" and value is not None:
            assert torch.equal(value, want.is_top1), name
        elif value is not None:
            testing.assert_not_worse(value, getattr(want, name), getattr(eager, name), name=name)


def with_special_rows(case: testing.LogitCase) -> testing.LogitCase:
    """Rows 3 to 8: no finite logit, a target of -inf, whole tiles of -inf, targets just outside the vocabulary.
    Rows 9 to 11: targets at the edges of a small tile."""
    logits, targets = case.logits.clone(), case.targets.clone()
    V = logits.shape[1]
    logits[3] = float("-inf")
    targets[3] = 5
    targets[4] = V // 2
    logits[4, V // 2] = float("-inf")
    logits[5, : V - 3] = float("-inf")
    targets[5] = V - 2
    logits[6, 3:] = float("-inf")
    targets[6] = 1
    targets[7], targets[8] = V, -1
    targets[9], targets[10], targets[11] = 127, 128, 256
    return testing.LogitCase(logits, targets)
