"""Writes docs/losses.md: the tables of losses, and every public function with its signature and docstring.

    python tools/reference.py [--check]

Nothing is written here by hand: formulas and papers are those of the tables' functions and rows, arguments and errors
those of the docstrings. ``--check`` writes nothing and fails where the page would change.
"""

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import prefkern as pk
from prefkern.losses import kto, preference

PAGE = Path(__file__).parent.parent / "docs" / "losses.md"
FAMILIES: dict[str, tuple[str, ...]] = {
    "Token log-probabilities": (
        "token_logprobs",
        "linear_token_logprobs",
        "shift_labels",
        "sequence_logps",
        "pair_logps",
    ),
    "Pairs with a reference": ("dpo_loss", "linear_dpo_loss"),
    "Pairs without a reference": ("orpo_loss", "linear_orpo_loss", "cpo_loss", "linear_cpo_loss"),
    "Unpaired examples": ("kto_loss", "kto_kl", "linear_kto_loss"),
    "Policies": ("ppo_loss", "value_loss", "linear_ppo_loss"),
    "Likelihood and distillation": ("linear_cross_entropy", "kl_divergence", "linear_kl_divergence", "topk_kl"),
    "Your own": ("linear_loss",),
}
TABLES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "Pairs with a reference": ("dpo_loss(loss_type=)", preference.PAIR_LOSSES),
    "Unpaired examples": ("kto_loss(loss_type=)", kto.UNPAIRED_LOSSES),
}
FLAGS = {
    "needs_lengths": "lengths",
    "needs_likelihood": "likelihood",
    "links": "f-divergences",
    "margin": "margin",
    "smoothing": "label smoothing",
}


def formula(function: Any) -> str:
    """The docstring of a table's function, on one line."""
    return re.sub(r"\s+", " ", inspect.getdoc(function) or "").replace("``", "`").replace("|", "\\|")


def reads(row: Any) -> str:
    """What a row says that its loss reads beyond the log-probabilities."""
    found = [text for field, text in FLAGS.items() if getattr(row, field, None)]
    found += [f"`{name}`" for name in getattr(row, "needs", ())]
    return ", ".join(found) or "-"


def table(rows: Mapping[str, Any]) -> list[str]:
    """The table of a family: name, formula, what it reads, coupling, paper, and where it differs on purpose."""
    lines = ["| loss_type | per value | reads | coupling | paper |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        paper = getattr(row, "source", "")
        short = f"[{paper.rpartition('/')[2]}]({paper})" if paper.startswith("https://arxiv.org") else paper or "-"
        text = formula(row.function) + (f" *{row.differs}*" if getattr(row, "differs", "") else "")
        lines.append(f"| `{name}` | {text} | {reads(row)} | {row.function.coupling} | {short} |")
    return lines


def signature(name: str, function: Any) -> str:
    """The call, one argument a line, defaults with their values."""
    parameters = inspect.signature(function).parameters.values()
    shown, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            shown.append("*")
            starred = True
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        shown.append(f"{parameter.name}{default}")
    call = f"{name}({', '.join(shown)})"
    return "\n".join(textwrap.wrap(call, 116, subsequent_indent=" " * (len(name) + 1)))


def entry(name: str) -> list[str]:
    """A public function: its signature and its docstring."""
    function = getattr(pk, name)
    return [f"### `{name}`", "", "```text", signature(name, function), "", inspect.getdoc(function) or "", "```", ""]


def page() -> str:
    """The whole page."""
    lines = [
        "# Losses",
        "",
        "Written by `python tools/reference.py` from the tables and the docstrings. Which one fits your data:",
        "[choosing.md](choosing.md). Notation: `lp` a token's or sequence's log-probability, `D = lp - lp_ref`,",
        "`d = D_c - D_r` of a pair, `e` label smoothing, `ls` log-sigmoid, `s` sigmoid, `A` an advantage,",
        "`w = lp - lp_old`.",
        "",
    ]
    for family, names in FAMILIES.items():
        lines += [f"## {family}", ""]
        if family in TABLES:
            title, rows = TABLES[family]
            lines += [f"`{title}`:", "", *table(rows), ""]
        for name in names:
            lines += entry(name)
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where the page would change; write nothing")
    check = parser.parse_args().check
    missing = {name for name in pk.__all__ if name.endswith("_loss")} - {
        n for names in FAMILIES.values() for n in names
    }
    if missing:
        print(f"reference: no family has {', '.join(sorted(missing))}", file=sys.stderr)
        return 1
    new = page()
    stale = not PAGE.exists() or PAGE.read_text() != new
    if stale and not check:
        PAGE.write_text(new)
    print(f"docs/losses.md: {'stale' if stale and check else 'written' if stale else 'as it was'}")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
