"""A rollout: episodes as packed cells, what is computed for them, and how they are cut into batches."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefkern import data
from prefkern.integrations.ppo.config import PPOConfig
from prefkern.integrations.ppo.episodes import Episode
from prefkern.integrations.ppo.models import Batch

Rows = NDArray[np.int64]


class Rollout:
    """Episodes of all processes. Row i owns the cells ``offsets[i] : offsets[i + 1]`` of every ``[N]`` tensor: one for
    each token of its response, at the position that predicts it, and with ``score_at="after_last"`` one more, at the
    last token, in all rows but the longest.

    ``mask [N]`` marks the tokens that the policy wrote, ``value_mask [N]`` those and the additional cells. The tensors
    that ``logps``, ``values`` ... are filled with are on the CPU, where advantages are computed.
    """

    logps: Tensor
    values: Tensor
    ref_logps: Tensor | None
    kl: Tensor | None
    rewards: Tensor
    advantages: Tensor
    returns: Tensor

    def __init__(self, episodes: list[Episode], args: PPOConfig) -> None:
        self.episodes = episodes
        queries = np.array([len(each.query) for each in episodes])
        responses = np.array([len(each.response) for each in episodes])
        extra = (responses < responses.max()) if args.score_at == "after_last" else np.zeros_like(responses)
        self.starts = queries - 1
        self.lengths = queries + responses
        self.counts = responses + extra
        self.offsets = np.concatenate([[0], np.cumsum(self.counts)])
        padding = np.zeros(1, dtype=np.bool_)
        masks = [part for each, more in zip(episodes, extra, strict=True) for part in (each.mask, padding[: int(more)])]
        self.mask = torch.from_numpy(np.concatenate(masks))
        self.value_mask = self.mask.clone()
        if args.score_at == "after_last":
            self.value_mask[torch.from_numpy(self.offsets[1:][extra] - 1)] = True
        self.scores = torch.tensor([each.score for each in episodes], dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.episodes)

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.from_numpy(self.offsets)

    def spread(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """A field that episodes may have for each token, in cells; None where no episode has it."""
        if all(getattr(each, name) is None for each in self.episodes):
            return None
        cells = torch.zeros(len(self.mask), dtype=dtype)
        for each, start in zip(self.episodes, self.offsets, strict=False):
            row = getattr(each, name)
            if row is not None:
                cells[start : start + len(row)] = torch.from_numpy(row)
        return cells

    def cells(self, rows: Rows) -> Tensor:
        """Indices of the cells of some rows, row after row."""
        return torch.from_numpy(np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in rows]))

    def batch(self, rows: Rows, pad_token_id: int, device: Any, *, blank: bool = False) -> Batch:
        """The model's input for some rows; ``blank``: nothing in it is scored."""
        chosen = [self.episodes[i] for i in rows]
        padded = data.collate_rollouts(
            {
                "query_ids": [each.query for each in chosen],
                "response_ids": [each.response for each in chosen],
                "response_mask": [each.mask for each in chosen],
            },
            pad_token_id=pad_token_id,
        )
        width = padded["input_ids"].shape[1]
        cells = torch.from_numpy(
            np.concatenate([row * width + self.starts[i] + np.arange(self.counts[i]) for row, i in enumerate(rows)])
        )
        targets = padded["targets"].flatten()[cells]
        if blank:
            targets = torch.full_like(targets, -100)
        return Batch(
            padded["input_ids"].to(device),
            padded["attention_mask"].to(device),
            cells.to(device),
            targets.to(device),
            int((targets != -100).sum()),
        )


def mini_batches(lengths: Rows, parts: int, random: np.random.Generator) -> list[Rows]:
    """All rows in so many parts of about as many tokens and of as many rows (one fewer in some where ``parts`` does not
    divide them): where a loss is divided by its mini-batch's tokens, a token then weighs the same in each.

    Lengths are balanced with noise of up to a quarter of their mean, so that other rows meet in every epoch.
    """
    rows = random.permutation(len(lengths))
    noisy = lengths[rows] + random.integers(0, int(lengths.mean()) // 4 + 1, size=len(rows))
    blank = np.zeros(-len(rows) % parts, dtype=np.int64)  # the shortest: each part has one at most
    return [
        rows[part[part < len(rows)]] for part in data.balance(np.concatenate([noisy, blank]), parts, equal_size=True)
    ]


def deal(lengths: Rows, rows: Rows, parts: int, rank: int, ranks: int) -> list[Rows]:
    """The share of one of several processes in ``rows``: as many batches for each process, of about equal size and of
    rows of similar length, which keeps padding small, the longest first. A batch is empty where there are fewer rows
    than batches. The cells of their padded tensors are balanced over the processes.
    """
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    batches = np.array_split(by_length, parts * ranks)
    if ranks == 1:
        return batches
    cells = [len(batch) * int(lengths[batch].max(initial=0)) for batch in batches]
    return [batches[i] for i in data.balance(cells, ranks, equal_size=True)[rank]]
