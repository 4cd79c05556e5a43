"""The calls of ``prefkern.data`` that `recorded_calls` makes, as `recorded_cases` has the others."""

import itertools
from typing import Any

import numpy as np
import torch

import prefkern
from recorded_inputs import F32, F64, Case, Cases, choices, flags, normal, token_ids

LENGTHS = [5, 3, 9, 2, 4, 7, 7, 1, 6, 8, 12, 3]


def advantages() -> Cases:
    for dtype, (rows, length) in itertools.product((F32, F64), ((4, 6), (5, 133))):
        cells = {
            name: normal(rows, length, seed=seed, dtype=dtype) for seed, name in enumerate(("rewards", "values"), 1)
        }
        done, mask = flags(rows, length, seed=3, share=0.1), flags(rows, length, seed=4)
        last = {"bootstrap": normal(rows, seed=5, dtype=dtype)}
        for masked, more in itertools.product(("skip", "zero", "none"), ({}, {"exact": True}, {"whiten": True})):
            yield Case(
                "gae",
                f"{dtype}[{length}]",
                {**cells, **last, "terminated": done, "mask": mask},
                {"masked": masked, **more},
            )
            if not more:
                given = {"rewards": cells["rewards"], **last, "terminated": done, "mask": mask}
                yield Case("discounted_returns", f"{dtype}[{length}]", given, {"masked": masked, "gamma": 0.9})
        packed = {name: value.flatten() for name, value in cells.items()}
        packed["cu_seqlens"] = torch.tensor([0, 5, 5, 17, rows * length])
        yield Case("gae", f"packed {dtype}[{length}]", packed, {"lam": 0.8})
        del packed["values"]
        yield Case("discounted_returns", f"packed {dtype}[{length}]", packed)
        yield Case("gae", f"numpy {dtype}[{length}]", {name: value.numpy() for name, value in cells.items()})
        for options in ({}, {"mask": mask}, {"mask": mask, "keep_mean": True}):
            yield Case("whiten", f"{dtype}[{length}]", {"x": cells["values"]}, options)
        for options in ({}, {"mask": mask}):
            yield Case("masked_stats", f"{dtype}[{length}]", {"x": cells["values"]}, options)
        tokens = {"logps": cells["rewards"], "ref_logps": cells["values"], "scores": last["bootstrap"], "mask": mask}
        for options in choices(kl_estimator=("k1", "k2", "k3"), score_at=("last", "after_last")):
            yield Case("token_rewards", f"{dtype}[{length}]", tokens, options)
    into = {**cells, "out": tuple(torch.empty_like(value) for value in cells.values())}
    yield Case("gae", "into given memory", into)
    yield Case("whiten", "lists", {"x": [[1.0, 2.0, 4.0], [3.0]]})
    yield Case("whiten", "numpy", {"x": cells["values"].numpy()})
    yield Case("gae", "lists", {"rewards": [[1.0, 2.0], [3.0]], "values": [[0.5, 0.25], [1.5]]})
    rewards = normal(12, seed=6, dtype=F64).index_fill(0, torch.tensor([3]), torch.nan)
    for groups, dtype in itertools.product((4, torch.tensor([7, 7, 1, 1, 1, 7, 2, 2, 9, 9, 2, 2])), (F32, F64)):
        label = f"{'sizes' if isinstance(groups, int) else 'ids'} {dtype}"
        given = {"rewards": rewards.to(dtype), "groups": groups}
        for scale in ("group", "batch", "none"):
            yield Case("group_advantages", label, given, {"scale": scale})
        for method in ("dr_grpo", "rloo", "reinforce++"):
            yield Case("group_advantages", label, given, {"method": method})
    batch = {
        "advantages": torch.tensor([0.0, 0.0, 1.0, -1.0]),
        "completion_mask": flags(4, 6, seed=1),
        "ids": [1, 2, 3, 4],
    }
    for groups in (1, 2):
        yield Case("drop_zero_advantage", "", {"batch": batch}, {"groups": groups})


def _texts(*names: str) -> list[dict[str, Any]]:
    """Rows of token ids of unequal lengths."""
    return [
        {
            name: token_ids(1 + (3 * row + 2 * column) % 5, V=50, seed=10 * row + column, ignored=0).tolist()
            for column, name in enumerate(names)
        }
        | {"row": row}
        for row in range(5)
    ]


def batches() -> Cases:
    pad = {"pad_token_id": 0}
    cuts: tuple[dict[str, Any], ...] = ({}, {"pad_to_multiple_of": 8}, {"padding_free": True})
    limits: tuple[dict[str, Any], ...] = ({}, {"max_length": 6}, {"max_length": 5, "truncation_mode": "keep_end"})
    pairs = [
        row | {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}
        for row in _texts("prompt_ids", "chosen_ids", "rejected_ids")
    ]
    unpaired = [row | {"label": bool(row["row"] % 2)} for row in _texts("prompt_ids", "completion_ids")]
    scored = [row | {"score": 0.5 * row["row"]} for row in _texts("prompt_ids", "response_ids")]
    for cut, limit in itertools.product(cuts, limits):
        for layout in ("concatenated", "interleaved"):
            yield Case("collate_pairs", "", {"rows": pairs}, {**pad, **cut, **limit, "layout": layout})
        given = [row | {"KL_completion_ids": row["completion_ids"][::-1]} for row in unpaired]
        yield Case("collate_unpaired", "KL completions", {"rows": given}, {**pad, **cut, **limit})
        for mismatched in (False, True):
            yield Case("collate_unpaired", "", {"rows": unpaired}, {**pad, **cut, **limit, "mismatched": mismatched})
        yield Case("collate_scored", "", {"rows": scored}, {**pad, **cut, **limit})
    packed = [
        {
            "input_ids": row["chosen_ids"] + row["rejected_ids"],
            "seq_lengths": [len(row["chosen_ids"]), len(row["rejected_ids"])],
        }
        for row in pairs
    ]
    for options in (*cuts, {"return_position_ids": True}):
        yield Case("collate_language", "packed", {"rows": packed}, {**pad, **options})
        yield Case("collate_language", "", {"rows": _texts("input_ids")}, {**pad, **options})
    masks = [row | {"response_mask": [token % 3 > 0 for token in row["response_ids"]]} for row in scored]
    yield Case("collate_rollouts", "masked", {"rows": masks}, pad)
    sampled = [
        row | {"score": 1.0 * row["row"], "values": [0.5 * token for token in row["response_ids"]]} for row in scored
    ]
    for options in choices(
        layout=("concatenated", "left_padded"), align=("targets", "tokens"), pad_to_multiple_of=(None, 8)
    ):
        yield Case("collate_rollouts", "", {"rows": sampled}, {**pad, **options})

    ids, mask = token_ids(4, 6, V=50, seed=1, ignored=0), flags(4, 6, seed=2)
    flat = prefkern.data.flatten(ids, mask)
    yield Case("flatten", "padded", {"input_ids": ids, "mask": mask})
    yield Case("flatten", "rows", {"input_ids": [row["input_ids"] for row in _texts("input_ids")]})
    yield Case("unflatten", "", {"x": normal(len(flat.input_ids), 3, seed=3, grad=True), "flat": flat}, {"fill": -1})
    for kind in (list, np.array, torch.tensor):
        yield Case("pack", kind.__name__, {"lengths": kind(LENGTHS), "capacity": 14})
        for equal_size in (False, True):
            yield Case("balance", kind.__name__, {"lengths": kind(LENGTHS), "k": 3}, {"equal_size": equal_size})
    for ranks, padded in itertools.product((1, 2), (False, True)):
        yield Case(
            "token_batches", "", {"lengths": LENGTHS, "budget": 20, "seed": 5}, {"ranks": ranks, "padded": padded}
        )


EVERY = (advantages, batches)
