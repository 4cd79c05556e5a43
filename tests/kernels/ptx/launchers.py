"""The launchers of the library as the machine's tests call them: one table, and the only place that knows signatures.

An entry makes a `Case` of a shape and options: what launches the kernel, what it should have written (by float64 and by
plain float32, for `testing.assert_not_worse`), and how many bytes it must move at least. The axes span every
specialisation that the launcher can ask of the compiler: the sweep compiles them all, `cases` names those that run.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from prefkern import testing
from prefkern.kernels.interface import DivergenceResults, DivergenceStats, Factors, Logits, RowStats, TilePair
from prefkern.testing import divergences
from ptx.cases import DTYPES, FLOAT, Case, Launcher, Result, Shape, empty, matrix

WIDE = (torch.float64, FLOAT)
STATS = {"e": "entropy", "q": "log_sum_sq_probs", "m": "mean_logit", "t": "is_top1"}
PEAK = 2.0**14


def logits_of(shape: Shape, softcap: bool, bias: bool, scale: bool, temperature: str) -> Logits:
    """Returns how logits are made of a tile: every part of it present or absent."""
    chosen: dict[str, Any] = {"one": 1.0, "rows": torch.linspace(0.5, 1.7, shape.rows)}
    return Logits(
        bias=torch.randn(shape.columns) if bias else None,
        logit_scale=0.8 if scale else 1.0,
        softcap=5.0 if softcap else None,
        temperature=chosen[temperature],
        ignore_index=testing.IGNORE,
    )


def scored(targets: Tensor) -> int:
    return int((targets != testing.IGNORE).sum())


def exact_stats(case: testing.LogitCase, logits: Logits) -> RowStats:
    """Returns the statistics that a forward would have left, by float64."""
    want = testing.stats_from_logits(case.logits, case.targets, **logits._asdict())
    exact = [value if value is None or value.dtype == torch.bool else value.float() for value in want]
    return RowStats._make(exact)


def tile_fwd(
    shape: Shape,
    dtype: str,
    held: str | None,
    wanted: str,
    softcap: bool,
    bias: bool = False,
    scale: bool = False,
    temperature: str = "one",
) -> Case:
    """Statistics of rows, and with ``held`` their unscaled gradient: two passes."""
    from prefkern.kernels.triton import logprobs

    case = testing.logit_case(shape.rows, shape.columns, dtype=DTYPES[dtype])
    tile, logits = matrix(case.logits, shape), logits_of(shape, softcap, bias, scale, temperature)
    optional = {
        name: testing.poisoned(shape.rows, dtype=_kind(name)) for letter, name in STATS.items() if letter in wanted
    }
    stats = RowStats(*(testing.poisoned(shape.rows, dtype=FLOAT) for _ in range(3)), **optional)
    u = None if held is None else empty(shape, DTYPES[held])

    def results() -> dict[str, Result]:
        want, eager = (testing.stats_from_logits(*case, dtype=d, **logits._asdict()) for d in WIDE)
        names = [name for name, value in stats._asdict().items() if value is not None]
        found = {name: (getattr(stats, name), getattr(want, name), getattr(eager, name)) for name in names}
        if u is not None:
            exact, plain = (testing.unscaled_from_logits(*case, dtype=d, **logits._asdict()) for d in WIDE)
            found["u"] = (u, exact, plain.to(u.dtype))
        return found

    passes = 1 if u is None else 2
    return Case(
        lambda: logprobs.tile_fwd(tile, case.targets, stats, u, logits),
        results,
        passes * shape.columns * (scored(case.targets) * tile.element_size() + 4 * bias),
        0 if u is None else shape.rows * shape.columns * u.element_size(),
    )


def _kind(name: str) -> torch.dtype:
    return torch.bool if name == "is_top1" else FLOAT


def tile_bwd(
    shape: Shape,
    dtype: str,
    written: str,
    c: bool,
    e: bool,
    softcap: bool,
    bias: bool = False,
    scale: bool = False,
    temperature: str = "one",
) -> Case:
    """The gradient of a loss with factors c and e for each row, recomputed from the tile."""
    from prefkern.kernels.triton import logprobs

    case = testing.logit_case(shape.rows, shape.columns, dtype=DTYPES[dtype])
    tile, logits = matrix(case.logits, shape), logits_of(shape, softcap, bias, scale, temperature)
    stats = exact_stats(case, logits)
    factors = Factors(*(torch.randn(shape.rows) if on else None for on in (c, e)))
    out = empty(shape, DTYPES[written])

    def results() -> dict[str, Result]:
        ones = torch.ones(shape.rows) if factors.c is None else factors.c
        factor = logits.temperature[:, None] if isinstance(logits.temperature, Tensor) else logits.temperature
        wide = [
            testing.grads_from_logits(*case, ones, factors.e, dtype=d, **logits._asdict())
            * -factor
            / logits.logit_scale
            for d in WIDE
        ]
        return {"out": (out, wide[0], wide[1].to(out.dtype))}

    return Case(
        lambda: logprobs.tile_bwd(tile, case.targets, stats, factors, out, logits),
        results,
        shape.columns * (scored(case.targets) * tile.element_size() + 4 * bias),
        shape.rows * shape.columns * out.element_size(),
    )


def held_bwd(shape: Shape, dtype: str, written: str) -> Case:
    """The same from the held unscaled gradient, without softcap."""
    from prefkern.kernels.triton import logprobs

    case, logits = testing.logit_case(shape.rows, shape.columns), Logits(ignore_index=testing.IGNORE)
    stats = exact_stats(case, logits)
    u = testing.unscaled_from_logits(case.logits, case.targets, **logits._asdict())
    held, out = matrix(u, shape, DTYPES[dtype]), empty(shape, DTYPES[written])
    c, e = torch.randn(2, shape.rows)

    def results() -> dict[str, Result]:
        wide = []
        for d in WIDE:  # of the same rounded tile
            got, lp, entropy = held.to(d), stats.logps.to(d)[:, None], stats.entropy
            at_target = torch.arange(shape.columns) == case.targets[:, None]
            p, once = torch.where(at_target, lp.exp(), got), torch.where(at_target, lp.expm1(), got)
            assert entropy is not None
            log = torch.where(p > 0, p, 1.0).log() + entropy.to(d)[:, None]
            both = c[:, None].to(d) * once + e[:, None].to(d) * p * log
            wide.append(both.masked_fill((case.targets == testing.IGNORE)[:, None], 0.0))
        return {"out": (out, wide[0], wide[1].to(out.dtype))}

    return Case(
        lambda: logprobs.held_bwd(held, case.targets, stats, Factors(c, e), out, logits),
        results,
        scored(case.targets) * shape.columns * held.element_size(),
        shape.rows * shape.columns * out.element_size(),
    )


def scale_rows(shape: Shape, dtype: str, written: str, post: bool, other: bool) -> Case:
    """Rows times a factor each, and a second matrix with factors of its own."""
    from prefkern.kernels.triton import scale

    x, row = matrix(torch.randn(shape[:2]), shape, DTYPES[dtype]), torch.randn(shape.rows)
    factor = torch.tensor(2.0**-9) if post else None
    second = (matrix(torch.randn(shape[:2]), shape, DTYPES[dtype]), torch.randn(shape.rows)) if other else None
    out = empty(shape, DTYPES[written])

    def results() -> dict[str, Result]:
        wide = []
        for d in WIDE:
            y = x.to(d) * row.to(d)[:, None]
            y = y if second is None else y + second[0].to(d) * second[1].to(d)[:, None]
            wide.append(y if factor is None else y * factor.to(d))
        return {"out": (out, wide[0], wide[1].to(out.dtype))}

    cells = shape.rows * shape.columns
    return Case(
        lambda: scale.scale_rows(x, row, out, post=factor, other=second),
        results,
        cells * x.element_size() * (1 + other),
        cells * out.element_size(),
    )


def pair_of(shape: Shape, dtype: str, full: bool) -> TilePair:
    """Returns two tiles; ``full``: some rows not scored; bias, scale, softcap and a temperature per row of both."""
    one = testing.logit_case(shape.rows, shape.columns, dtype=DTYPES[dtype])
    two = testing.logit_case(shape.rows, shape.columns, dtype=DTYPES[dtype], seed=1)
    forms = [logits_of(shape, full, full, full, "rows" if full else "one") for _ in range(2)]
    if full:
        forms[1] = forms[1]._replace(softcap=7.0, temperature=torch.linspace(1.7, 0.5, shape.rows))
    rows = one.targets != testing.IGNORE if full else None
    return TilePair(matrix(one.logits, shape), matrix(two.logits, shape), rows, *forms)


def oracle(pair: TilePair) -> dict[str, Any]:
    return {"scored": pair.scored, "form": pair.logits, "ref_form": pair.ref_logits}


def divergence_bytes(pair: TilePair, passes: int) -> int:
    """Returns the bytes of both tiles' scored rows, and of their biases."""
    live = len(pair.tile) if pair.scored is None else int(pair.scored.sum())
    biases = sum(4 for logits in (pair.logits, pair.ref_logits) if logits.bias is not None)
    return passes * pair.tile.shape[1] * (2 * live * pair.tile.element_size() + biases)


def divergence_fwd(shape: Shape, beta: float, dtype: str, held: str | None, entropy: bool, full: bool) -> Case:
    """The divergence of rows, and with ``held`` its unscaled gradient (float16: times a power of two per row)."""
    from prefkern.kernels.triton import divergence

    pair = pair_of(shape, dtype, full)
    new = [testing.poisoned(shape.rows, dtype=FLOAT) for _ in range(7)]
    results_ = DivergenceResults(new[0], new[1] if entropy else None, DivergenceStats(*new[2:]))
    u, peak = None if held is None else empty(shape, DTYPES[held]), PEAK if held == "fp16" else None
    tiles = pair.tile, pair.ref_tile

    def results() -> dict[str, Result]:
        wide = [testing.divergence_from_logits(*tiles, beta=beta, dtype=d, **oracle(pair)) for d in WIDE]
        found: dict[str, Result] = {"divergence": (new[0], wide[0], wide[1])}
        exact, eager = (divergence_stats(pair, beta, d) for d in WIDE)
        for name, got in results_.stats._asdict().items():
            found[name] = (got, getattr(exact, name), getattr(eager, name))
        if u is not None and peak is None:
            both = [testing.unscaled_divergence(*tiles, beta=beta, dtype=d, **oracle(pair)) for d in WIDE]
            found["u"] = (u, both[0], both[1].to(u.dtype))
        return found

    return Case(
        lambda: divergence.tile_fwd(pair, results_, u, beta=beta, peak=peak),
        results,
        divergence_bytes(pair, (2 if beta not in (0.0, 1.0) else 1) + (u is not None)),
        0 if u is None else shape.rows * shape.columns * u.element_size(),
    )


def divergence_bwd(shape: Shape, beta: float, dtype: str, written: str, c: bool, full: bool) -> Case:
    """The divergence's gradient times a factor for each row, recomputed from the tiles."""
    from prefkern.kernels.triton import divergence

    pair = pair_of(shape, dtype, full)
    stats = DivergenceStats._make(value.float() for value in divergence_stats(pair, beta, torch.float64))
    factor, out = torch.randn(shape.rows) if c else None, empty(shape, DTYPES[written])

    def results() -> dict[str, Result]:
        scale = 1.0 if factor is None else factor[:, None].double()
        tiles = pair.tile, pair.ref_tile
        both = [testing.unscaled_divergence(*tiles, beta=beta, dtype=d, **oracle(pair)) * scale for d in WIDE]
        return {"out": (out, both[0], both[1].to(out.dtype))}

    return Case(
        lambda: divergence.tile_bwd(pair, stats, factor, out, beta=beta, peak=None),
        results,
        divergence_bytes(pair, 1),
        shape.rows * shape.columns * out.element_size(),
    )


def divergence_stats(pair: TilePair, beta: float, dtype: torch.dtype) -> DivergenceStats:
    """Returns what the forward leaves for the backward, by the oracle."""
    targets = torch.zeros(len(pair.tile), dtype=torch.int64)
    if pair.scored is not None:
        targets = targets.masked_fill(~pair.scored, testing.IGNORE)
    heads = ((pair.tile, pair.logits), (pair.ref_tile, pair.ref_logits))
    one, two = (testing.stats_from_logits(t, targets, dtype=dtype, **f._asdict()) for t, f in heads)
    if beta in (0.0, 1.0):
        center = testing.divergence_from_logits(pair.tile, pair.ref_tile, beta=beta, dtype=dtype, **oracle(pair))
    else:  # KL(p || m)
        lp, lq = (divergences._log_probs(t.to(dtype), f)[0] for t, f in heads)
        center = divergences._gap(lp, divergences._mixture(lp, lq, beta)).sum(-1)
        center = center if pair.scored is None else center.masked_fill(~pair.scored, 0.0)
    return DivergenceStats(one.row_max, one.log_sum, two.row_max, two.log_sum, center)


_SUBSETS = tuple("".join(letters) for n in range(5) for letters in itertools.combinations("eqmt", n))
_ALL, _FLAG, _TEMPERATURES = tuple(DTYPES), (False, True), ("one", "rows")
_MADE = {"softcap": _FLAG, "bias": _FLAG, "scale": _FLAG}
LAUNCHERS: dict[str, Launcher] = {
    "scoring": Launcher(
        tile_fwd, {"dtype": _ALL, "held": (None,), "wanted": _SUBSETS, "softcap": _FLAG, "temperature": _TEMPERATURES}
    ),
    "fold": Launcher(tile_fwd, {"dtype": ("fp32",), "held": (None, *_ALL), "wanted": ("", "e", "m", "eqmt")} | _MADE),
    "tile_bwd": Launcher(tile_bwd, {"dtype": ("fp32",), "written": _ALL, "c": _FLAG, "e": _FLAG} | _MADE),
    "logits_bwd": Launcher(
        tile_bwd,
        {"dtype": _ALL, "written": _ALL, "c": (True,), "e": _FLAG, "softcap": _FLAG, "temperature": _TEMPERATURES},
    ),
    "held_bwd": Launcher(held_bwd, {"dtype": _ALL, "written": _ALL}),
    "scale_rows": Launcher(scale_rows, {"dtype": _ALL, "written": _ALL, "post": _FLAG, "other": _FLAG}),
    "divergence_fwd": Launcher(
        divergence_fwd,
        {"beta": (0.0, 1.0, 0.3), "dtype": _ALL, "held": (None, *_ALL), "entropy": _FLAG, "full": _FLAG},
    ),
    "divergence_bwd": Launcher(
        divergence_bwd, {"beta": (0.0, 1.0, 0.3), "dtype": _ALL, "written": _ALL, "c": _FLAG, "full": _FLAG}
    ),
}
