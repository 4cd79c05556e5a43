"""Records what the public functions return, values and gradients, and compares later code with it, bit for bit.

    python tools/recorded_calls.py record FILE     before a change that must change no digit
    python tools/recorded_calls.py compare FILE    after it: prints the calls that differ, exit 1 if there are any

On one machine with one torch: other processors and libraries add in another order. The calls are those of
`recorded_cases`, `recorded_pair_cases` and `recorded_data_cases`; every argument that requires a gradient is
differentiated, each result with an upstream of its own. CPU only, one thread.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import prefkern
import recorded_cases
import recorded_data_cases
import recorded_pair_cases
from prefkern import data, plan
from recorded_inputs import Case, normal

PUBLIC = {name: getattr(part, name) for part in (prefkern, data) for name in part.__all__}
PUBLIC |= {"plan.explain": plan.explain}
NOT_CALLED = {
    *("LossOutput", "PairLogps", "TokenDivergence", "TokenStats"),  # results
    *("MissingDependency", "RefusedRows", "data", "integrations", "plan"),
    *("ArrowRows", "TokenBatches", "prepare"),  # of datasets and tokenizers; token_batches is called
}
Record = dict[str, Any]
"""Tensors and plain values by where they stand in the result."""


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and plain values of a nested result, with their places."""
    if isinstance(value, Mapping):
        inside = list(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        inside = list(zip(value._fields, value, strict=True))
    elif isinstance(value, list | tuple | data.TokenBatches):
        inside = list(enumerate(value))
    else:
        array = isinstance(value, np.ndarray)
        yield place + " (numpy)" * array, torch.from_numpy(value) if array else value
        return
    for name, part in inside:
        yield from leaves(part, f"{place}.{name}" if place else str(name))


def run(case: Case) -> Record:
    """The results of a call, and the gradients of its inputs."""
    call, given = PUBLIC[case.name], {**case.arguments, **case.options}
    if isinstance(call, type) and issubclass(call, torch.nn.Module):
        call, given = call(**case.options), case.arguments
    inputs = {place: x for place, x in leaves({**case.arguments, **case.options}) if isinstance(x, Tensor)}
    inputs = {place: x for place, x in inputs.items() if x.requires_grad}
    with case.context:
        found = dict(leaves(call(**given)))
    outputs = [x for x in found.values() if isinstance(x, Tensor) and x.requires_grad]
    if inputs:
        upstream = [normal(*x.shape, seed=seed, dtype=x.dtype) for seed, x in enumerate(outputs)]
        for _ in range(1 + case.retain):
            grads = torch.autograd.grad(outputs, list(inputs.values()), upstream, case.retain, allow_unused=True)
        found |= {f"gradient of {place}": grad for place, grad in zip(inputs, grads, strict=True)}
    return {place: x.detach() if isinstance(x, Tensor) else x for place, x in found.items()}


def run_all() -> dict[str, Record]:
    records: dict[str, Record] = {}
    for cases in (*recorded_cases.EVERY, *recorded_pair_cases.EVERY, *recorded_data_cases.EVERY):
        start, before = time.perf_counter(), len(records)
        for case in cases():
            if str(case) in records:
                raise ValueError(f"two cases are called {case}: give one another label")
            try:
                records[str(case)] = run(case)
            except Exception as error:
                error.add_note(f"in the case {case}")
                raise
        print(f"{cases.__name__}: {len(records) - before} calls in {time.perf_counter() - start:.1f} s", flush=True)
    called = {name.split("(")[0] for name in records}
    print(f"{len(records)} calls; public names without any: {sorted(set(PUBLIC) - called - NOT_CALLED) or 'none'}")
    return records


def difference(old: Any, new: Any) -> str | None:
    """How two values differ; None for the same bits (any NaN is as good as another)."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return None if type(old) is type(new) and repr(old) == repr(new) else f"{old!r} became {new!r}"
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return f"{old.dtype}{list(old.shape)} became {new.dtype}{list(new.shape)}"
    same = old == new
    if old.is_floating_point():
        same = same & (old.signbit() == new.signbit()) | (old.isnan() & new.isnan())
    if same.all():
        return None
    apart = (old.double() - new.double()).abs()[~same].nan_to_num(torch.inf, torch.inf).max()
    return f"{(~same).sum()} of {same.numel()} differ, by at most {apart:.3g}"


def compare(old: dict[str, Record], new: dict[str, Record]) -> int:
    """Prints what differs; the number of calls that do. A case that was not recorded is none."""
    failed = 0
    for name, record in old.items():
        if name not in new:
            lines = ["is no longer called"]
        else:
            places = dict.fromkeys([*record, *new[name]])
            nothing = "nothing"
            found = {place: difference(record.get(place, nothing), new[name].get(place, nothing)) for place in places}
            lines = [f"{place or 'result'}: {text}" for place, text in found.items() if text]
        if lines:
            failed += 1
            print("\n    ".join([name, *lines]))
    print(f"{failed} of {len(old)} recorded calls differ; {len(new.keys() - old.keys())} were not recorded")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("file", help="of torch.save")
    args = parser.parse_args()
    torch.set_num_threads(1)
    old = torch.load(args.file) if args.command == "compare" else None
    new = run_all()
    if old is None:
        torch.save(new, args.file)
        return 0
    return int(compare(old, new) > 0)


if __name__ == "__main__":
    sys.exit(main())
