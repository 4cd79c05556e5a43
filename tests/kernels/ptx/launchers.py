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
from prefkern.testing import divergences
from prefkern.types import DivergenceRows, LogitForm, RowStats
from ptx.cases import DTYPES, FLOAT, Case, Launcher, Result, Shape, empty, matrix

STATS = {"e": "entropy", "q": "log_sum_sq_probs", "m": "mean_logit", "t": "is_top1"}
PEAK = 2.0**14


def _stats(rows: int, wanted: str) -> RowStats:
    def new(dtype: torch.dtype = FLOAT) -> Tensor:
        return testing.poisoned(rows, dtype=dtype)

    optional = [new(torch.bool if letter == "t" else FLOAT) if letter in wanted else None for letter in STATS]
    return RowStats(new(), new(), new(), *optional)


def _row_options(shape: Shape, softcap: bool, temperature: str) -> dict[str, Any]:
    rows = torch.linspace(0.5, 1.7, shape.rows)
    chosen = {"one": 1.0, "cold": 0.3, "rows": rows}[temperature]
    return {"softcap": 5.0 if softcap else None, "temperature": chosen, "ignore_index": testing.IGNORE}


def _compare_stats(got: RowStats, logits: Tensor, targets: Tensor, options: dict[str, Any]) -> dict[str, Result]:
    want, eager = (testing.stats_from_logits(logits, targets, dtype=d, **options) for d in (torch.float64, FLOAT))
    given = {name: value for name, value in got._asdict().items() if value is not None}
    return {name: (value, getattr(want, name), getattr(eager, name)) for name, value in given.items()}


def _scored(targets: Tensor) -> int:
    return int((targets != testing.IGNORE).sum())


def logprobs_fwd(shape: Shape, dtype: str, wanted: str, softcap: bool, temperature: str = "one") -> Case:
    from prefkern.kernels import rowwise

    case = testing.logit_case(shape.rows, shape.columns, dtype=DTYPES[dtype])
    logits, options = matrix(case.logits, shape), _row_options(shape, softcap, temperature)
    stats = _stats(shape.rows, wanted)
    read = _scored(case.targets) * shape.columns * logits.element_size()
    return Case(
        lambda: rowwise.logprobs_fwd(logits, case.targets, stats, **options),
        lambda: _compare_stats(stats, case.logits, case.targets, options),
        read,
        0,
    )


def logprobs_bwd(shape: Shape, dtype: str, entropy: bool, softcap: bool, temperature: str = "one") -> Case:
    from prefkern.kernels import rowwise

    case = testing.logit_case(shape.rows, shape.columns, dtype=DTYPES[dtype])
    logits, options = matrix(case.logits, shape), _row_options(shape, softcap, temperature)
    stats = _exact_stats(case, options)
    c, e = torch.randn(2, shape.rows)
    grad = empty(shape, DTYPES[dtype])

    def results() -> dict[str, Result]:
        wide = [
            testing.grads_from_logits(*case, c, e if entropy else None, dtype=d, **options)
            for d in (torch.float64, DTYPES[dtype])
        ]
        return {"grad": (grad, *wide)}

    size = shape.columns * logits.element_size()
    return Case(
        lambda: rowwise.logprobs_bwd(logits, case.targets, stats, c, e if entropy else None, grad, **options),
        results,
        _scored(case.targets) * size,
        shape.rows * size,
    )


def _exact_stats(case: testing.LogitCase, options: dict[str, Any], **more: Any) -> RowStats:
    want = testing.stats_from_logits(*case, **options, **more)
    return RowStats._make(value.float() if value.is_floating_point() else value for value in want)


def tile_fwd(
    shape: Shape, held: str | None, wanted: str, softcap: bool, bias: bool = False, temperature: str = "one"
) -> Case:
    from prefkern.kernels import fold

    case = testing.logit_case(shape.rows, shape.columns)
    tile, options = matrix(case.logits, shape), _row_options(shape, softcap, temperature)
    add = torch.randn(shape.columns) if bias else None
    stats = _stats(shape.rows, wanted)
    out = None if held is None else empty(shape, DTYPES[held])
    more = {"bias": add, "logit_scale": 0.8}

    def results() -> dict[str, Result]:
        found = _compare_stats(stats, *case, options | more)
        if out is not None:
            want, eager = (
                testing.unscaled_from_logits(*case, dtype=d, **options, **more) for d in (torch.float64, FLOAT)
            )
            found["u"] = (out, want, eager.to(out.dtype))
        return found

    read = _scored(case.targets) * shape.columns * 4
    return Case(
        lambda: fold.tile_fwd(tile, add, case.targets, stats, out, logit_scale=0.8, **options),
        results,
        read * (1 if out is None else 2) + 4 * shape.columns * bias * (1 if out is None else 2),
        0 if out is None else shape.rows * shape.columns * out.element_size(),
    )


def tile_bwd(
    shape: Shape, dtype: str, c: bool, e: bool, softcap: bool, bias: bool = False, temperature: str = "one"
) -> Case:
    from prefkern.kernels import fold

    case = testing.logit_case(shape.rows, shape.columns)
    tile, options = matrix(case.logits, shape), _row_options(shape, softcap, temperature)
    add = torch.randn(shape.columns) if bias else None
    more = {"bias": add, "logit_scale": 0.8}
    stats = _exact_stats(case, options, **more)
    given = [torch.randn(shape.rows) if on else None for on in (c, e)]
    out = empty(shape, DTYPES[dtype])

    def results() -> dict[str, Result]:
        ones = torch.ones(shape.rows) if given[0] is None else given[0]
        factor = options["temperature"]
        factor = factor[:, None] if isinstance(factor, Tensor) else factor
        wide = []
        for d in (torch.float64, FLOAT):
            grad = testing.grads_from_logits(*case, ones, given[1], dtype=d, **options, **more)
            wide.append(-grad * factor / 0.8)
        return {"out": (out, wide[0], wide[1].to(out.dtype))}

    return Case(
        lambda: fold.tile_bwd(tile, add, case.targets, stats, *given, out, v_start=0, logit_scale=0.8, **options),
        results,
        _scored(case.targets) * shape.columns * 4 + 4 * shape.columns * bias,
        shape.rows * shape.columns * out.element_size(),
    )


def held_bwd(shape: Shape, dtype: str) -> Case:
    from prefkern.kernels import fold

    case = testing.logit_case(shape.rows, shape.columns)
    options = _row_options(shape, False, "one")
    stats = _exact_stats(case, options)
    u = testing.unscaled_from_logits(*case, **options)
    held, out = matrix(u, shape, DTYPES[dtype]), empty(shape, DTYPES[dtype])
    c, e = torch.randn(2, shape.rows)

    def results() -> dict[str, Result]:
        wide = []
        for d in (torch.float64, FLOAT):  # of the same rounded tile
            got, lp = held.to(d), stats.logps.to(d)
            at_target = torch.arange(shape.columns) == case.targets[:, None]
            p = torch.where(at_target, lp.exp()[:, None], got)
            once = torch.where(at_target, lp.expm1()[:, None], got)
            log = torch.where(p > 0, p, 1.0).log() + stats.entropy[:, None].to(d)  # type: ignore[index, union-attr]
            sum_ = c[:, None].to(d) * once + e[:, None].to(d) * p * log
            wide.append(sum_.masked_fill((case.targets == testing.IGNORE)[:, None], 0.0))
        return {"out": (out, wide[0], wide[1].to(out.dtype))}

    size = shape.columns * held.element_size()
    return Case(
        lambda: fold.held_bwd(held, case.targets, stats.logps, stats.entropy, c, e, out, ignore_index=testing.IGNORE),
        results,
        _scored(case.targets) * size,
        shape.rows * size,
    )


def scale_rows(shape: Shape, dtype: str, written: str, post: bool, other: bool) -> Case:
    from prefkern.kernels import scale

    x = matrix(torch.randn(shape[:2]), shape, DTYPES[dtype])
    row = torch.randn(shape.rows)
    factor = torch.tensor(2.0**-9) if post else None
    second = (matrix(torch.randn(shape[:2]), shape, DTYPES[dtype]), torch.randn(shape.rows)) if other else None
    out = empty(shape, DTYPES[written])

    def results() -> dict[str, Result]:
        wide = []
        for d in (torch.float64, FLOAT):
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


def _pair(shape: Shape, dtype: str, full: bool) -> tuple[Any, ...]:
    """Two tiles, which rows count, and how logits are made of the tiles (``full``: bias, scale, softcap, rows)."""
    one = testing.logit_case(shape.rows, shape.columns, dtype=DTYPES[dtype])
    two = testing.logit_case(shape.rows, shape.columns, dtype=DTYPES[dtype], seed=1)
    scored = one.targets != testing.IGNORE if full else None
    forms = LogitForm(), LogitForm()
    if full:
        bias, ref_bias = torch.randn(2, shape.columns)
        rows = torch.linspace(0.5, 1.7, shape.rows)
        forms = LogitForm(bias, 0.8, 5.0, rows), LogitForm(ref_bias, 1.3, 7.0, rows.flip(0).contiguous())
    return matrix(one.logits, shape), matrix(two.logits, shape), scored, forms


def divergence_fwd(shape: Shape, beta: float, dtype: str, held: str | None, entropy: bool, full: bool) -> Case:
    from prefkern.kernels import divergence

    tile, ref, scored, (form, ref_form) = _pair(shape, dtype, full)
    rows = DivergenceRows._make(testing.poisoned(shape.rows, dtype=FLOAT) for _ in range(5))
    value, spread = (testing.poisoned(shape.rows, dtype=FLOAT) for _ in range(2))
    out = None if held is None else empty(shape, DTYPES[held])
    peak = PEAK if held == "fp16" else None
    oracle = {"beta": beta, "scored": scored, "form": form, "ref_form": ref_form}

    def results() -> dict[str, Result]:
        wide = [testing.divergence_from_logits(tile, ref, dtype=d, **oracle) for d in (torch.float64, FLOAT)]
        found: dict[str, Result] = {"divergence": (value, wide[0], wide[1])}
        exact, eager = (_divergence_rows(tile, ref, dtype=d, **oracle) for d in (torch.float64, FLOAT))
        for name, got in rows._asdict().items():
            found[name] = (got, getattr(exact, name), getattr(eager, name))
        if out is not None and peak is None:  # a peak scales rows by their bound
            u = [testing.unscaled_divergence(tile, ref, dtype=d, **oracle) for d in (torch.float64, FLOAT)]
            found["u"] = (out, u[0], u[1].to(out.dtype))
        return found

    live = shape.rows if scored is None else int(scored.sum())
    passes = (2 if beta not in (0.0, 1.0) else 1) + (out is not None)
    return Case(
        lambda: divergence.tile_fwd(
            tile,
            ref,
            scored,
            value,
            spread if entropy else None,
            rows,
            out,
            form=form,
            ref_form=ref_form,
            beta=beta,
            peak=peak,
        ),
        results,
        passes * (2 * live * shape.columns * tile.element_size() + 8 * shape.columns * full),
        0 if out is None else shape.rows * shape.columns * out.element_size(),
    )


def divergence_bwd(shape: Shape, beta: float, dtype: str, written: str, c: bool, full: bool) -> Case:
    from prefkern.kernels import divergence

    tile, ref, scored, (form, ref_form) = _pair(shape, dtype, full)
    oracle = {"beta": beta, "scored": scored, "form": form, "ref_form": ref_form}
    rows = DivergenceRows._make(value.float() for value in _divergence_rows(tile, ref, dtype=torch.float64, **oracle))
    factor = torch.randn(shape.rows) if c else None
    out = empty(shape, DTYPES[written])

    def results() -> dict[str, Result]:
        scale = 1.0 if factor is None else factor[:, None].double()
        u = [testing.unscaled_divergence(tile, ref, dtype=d, **oracle) * scale for d in (torch.float64, FLOAT)]
        return {"out": (out, u[0], u[1].to(out.dtype))}

    live = shape.rows if scored is None else int(scored.sum())
    return Case(
        lambda: divergence.tile_bwd(
            tile, ref, scored, rows, factor, out, form=form, ref_form=ref_form, beta=beta, peak=None
        ),
        results,
        2 * live * shape.columns * tile.element_size() + 8 * shape.columns * full,
        shape.rows * shape.columns * out.element_size(),
    )


def _divergence_rows(
    tile: Tensor,
    ref: Tensor,
    *,
    beta: float,
    scored: Tensor | None,
    form: LogitForm,
    ref_form: LogitForm,
    dtype: torch.dtype,
) -> DivergenceRows:
    """Returns what the forward leaves for the backward, by the oracle."""
    targets = torch.zeros(len(tile), dtype=torch.int64)
    if scored is not None:
        targets = targets.masked_fill(~scored, testing.IGNORE)
    pairs = ((tile, form), (ref, ref_form))
    one, two = (testing.stats_from_logits(t, targets, dtype=dtype, **f._asdict()) for t, f in pairs)
    where = {"scored": scored, "form": form, "ref_form": ref_form}
    if beta in (0.0, 1.0):
        center = testing.divergence_from_logits(tile, ref, beta=beta, dtype=dtype, **where)
    else:  # KL(p || m)
        lp, lq = (divergences._log_probs(t.to(dtype), f)[0] for t, f in pairs)
        center = divergences._gap(lp, divergences._mixture(lp, lq, beta)).sum(-1)
        center = center if scored is None else center.masked_fill(~scored, 0.0)
    return DivergenceRows(one.row_max, one.log_sum, two.row_max, two.log_sum, center)


_SUBSETS = tuple("".join(letters) for n in range(5) for letters in itertools.combinations("eqmt", n))
_ALL, _FLAG, _SOME = tuple(DTYPES), (False, True), ("", "e", "q", "m", "t", "eqmt")
LAUNCHERS: dict[str, Launcher] = {
    "logprobs_fwd": Launcher(
        logprobs_fwd, {"dtype": _ALL, "wanted": _SUBSETS, "softcap": _FLAG, "temperature": ("one", "rows")}
    ),
    "logprobs_bwd": Launcher(
        logprobs_bwd, {"dtype": _ALL, "entropy": _FLAG, "softcap": _FLAG, "temperature": ("one", "rows")}
    ),
    "tile_fwd": Launcher(tile_fwd, {"held": (None, *_ALL), "wanted": _SOME, "softcap": _FLAG, "bias": _FLAG}),
    "tile_bwd": Launcher(tile_bwd, {"dtype": _ALL, "c": _FLAG, "e": _FLAG, "softcap": _FLAG, "bias": _FLAG}),
    "held_bwd": Launcher(held_bwd, {"dtype": _ALL}),
    "scale_rows": Launcher(scale_rows, {"dtype": _ALL, "written": _ALL, "post": _FLAG, "other": _FLAG}),
    "divergence_fwd": Launcher(
        divergence_fwd,
        {"beta": (0.0, 1.0, 0.3), "dtype": _ALL, "held": (None, *_ALL), "entropy": _FLAG, "full": _FLAG},
    ),
    "divergence_bwd": Launcher(
        divergence_bwd, {"beta": (0.0, 1.0, 0.3), "dtype": _ALL, "written": _ALL, "c": _FLAG, "full": _FLAG}
    ),
}
