"""Every causal architecture of the installed transformers against `head_of`, `last_hidden` and `without_noise`.

    python bench/architectures.py --markdown bench/results/architectures.md

Each is built small (`small_models`). A row is right, refused with a sentence, or wrong.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.metadata
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import prefkern as pk
from prefkern.integrations.transformers import head_of, last_hidden, without_noise
from small_models import V, build

T = 10  # tokens in a row


@dataclasses.dataclass
class Row:
    """What one architecture showed; the differences are the largest, in nats."""

    kind: str
    name: str = ""
    verdict: str = ""
    head: str = ""
    error: float | None = None
    plain: float | None = None  # trunk times matrix
    noise: float | None = None  # two passes in train mode as it is
    quiet: float | None = None  # and under without_noise
    left: str = ""
    packed: str = ""


def measure(kind: str) -> Row:
    row = Row(kind)
    try:
        model = build(kind)
        row.name = type(model).__name__
        ids = 3 + torch.randint(V - 10, (2, T), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            output = model(input_ids=ids, use_cache=False)
        own = output.logits
        if not torch.isfinite(own).all() or own.ndim != 3:
            raise ValueError(f"logits {tuple(own.shape)}, finite {bool(torch.isfinite(own).all())}")
    except Exception as error:
        row.verdict, row.head = "not built", f"{type(error).__name__}: {str(error)[:150]}"
        return row
    targets = ids.roll(-1, 1)
    expected = own.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    with torch.no_grad():
        row.plain = _plain(model, ids, targets, expected)
        try:
            head: Any = head_of(model)
            hidden = last_hidden(model, ids)
        except (ValueError, TypeError) as error:
            row.verdict, row.head = "refused", str(error)
            return row
        row.head = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else name
            for name, value in head.items()
            if name != "weight"
        )
        row.error = float((pk.linear_token_logprobs(hidden, targets=targets, **head).logps - expected).abs().max())
        row.noise = _two_passes(model.train(), ids, targets)
        without_noise(model)
        row.quiet = _two_passes(model.train(), ids, targets)
        quiet = pk.linear_token_logprobs(last_hidden(model, ids), targets=targets, **head_of(model)).logps
        row.error = max(row.error, float((quiet - expected).abs().max()))
        model.eval()
        row.left, row.packed = _padded(model, ids), _packed(model, ids)
    row.verdict = "right" if row.error < 1e-5 and row.quiet == 0.0 and "wrong" not in row.left + row.packed else "wrong"
    return row


def _plain(model: Any, ids: torch.Tensor, targets: torch.Tensor, expected: torch.Tensor) -> float | None:
    with contextlib.suppress(Exception):
        hidden = model.base_model(input_ids=ids)[0]
        logps = pk.linear_token_logprobs(hidden, model.get_output_embeddings().weight, targets).logps
        return float((logps - expected).abs().max())
    return None


def _two_passes(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> float:
    head: Any = head_of(model)
    first, second = (pk.linear_token_logprobs(last_hidden(model, ids), targets=targets, **head).logps for _ in range(2))
    return float(((first - second).exp() - 1).abs().max())  # the ratio of PPO, less one


def _padded(model: Any, ids: torch.Tensor) -> str:
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    return _compared(lambda: last_hidden(model, padded, mask)[:, 3:], last_hidden(model, ids))


def _packed(model: Any, ids: torch.Tensor) -> str:
    rows = ids[0, :4], ids[1, :6]
    alone = torch.cat([last_hidden(model, each[None])[0] for each in rows])
    return _compared(lambda: last_hidden(model, torch.cat(rows), cu_seqlens=torch.tensor([0, 4, 10])), alone)


def _compared(call: Any, expected: torch.Tensor) -> str:
    try:
        apart = float((call() - expected).abs().max() / expected.abs().max())
    except ValueError:
        return "refused"
    return "equal" if apart < 1e-3 else f"wrong ({apart:.1g})"


def sweep(kinds: list[str]) -> Iterator[Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        for kind in kinds:
            yield measure(kind)
            gc.collect()


def kinds() -> list[str]:
    """Model types, one for each class of models."""
    by_class: dict[Any, str] = {}
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        by_class.setdefault(name if isinstance(name, str) else tuple(name), kind)
    return list(by_class.values())


def markdown(rows: list[Row]) -> str:
    count = {
        verdict: sum(row.verdict == verdict for row in rows) for verdict in ("right", "refused", "wrong", "not built")
    }
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
    lines = [
        f"{len(rows)} causal architectures of transformers ({versions}; CPU, float32): "
        + ", ".join(f"{number} {verdict}" for verdict, number in count.items())
        + ". Largest differences in nats over 20 tokens.",
        "",
        "| model | head_of | log-probs | trunk x matrix | ratio - 1, train() | without_noise | left padding | packed |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        if row.verdict == "not built":
            continue
        numbers = [_number(each) for each in (row.error, row.plain, row.noise, row.quiet)]
        verdict = row.head if row.verdict == "right" else f"{row.verdict}: {row.head}"
        lines.append(" | ".join([f"| {row.name}", verdict or "matrix", *numbers, row.left, f"{row.packed} |"]))
    lines += ["", "Not built by the rules:", ""]
    lines += [f"- {row.kind}: {row.head}".replace("\n", " ") for row in rows if row.verdict == "not built"]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="model types (all)")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    rows = []
    for row in sweep(arguments.kinds or kinds()):
        rows.append(row)
        print(
            row.kind,
            row.name,
            row.verdict,
            row.head,
            _number(row.error),
            _number(row.plain),
            _number(row.noise),
            _number(row.quiet),
            row.left,
            row.packed,
            sep=" | ",
            flush=True,
        )
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows))
    return int(any(row.verdict == "wrong" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
