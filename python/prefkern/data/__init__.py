"""Batching, packing and advantage estimation on the CPU, in Rust: numpy arrays, torch CPU tensors, Python lists and
Arrow list arrays in, read without a copy where their memory allows it."""

from prefkern.data.advantages import gae
from prefkern.data.arrow_rows import ArrowRows
from prefkern.data.collators import collate_pairs, collate_scored, collate_unpaired
from prefkern.data.groups import group_advantages
from prefkern.data.language import collate_language
from prefkern.data.moments import masked_stats, whiten
from prefkern.data.packing import pack
from prefkern.data.padding_free import flatten, unflatten
from prefkern.data.prepare import RefusedRows, prepare
from prefkern.data.returns import discounted_returns
from prefkern.data.rewards import token_rewards
from prefkern.data.rollouts import collate_rollouts
from prefkern.data.sampling import TokenBatches, balance, token_batches
from prefkern.data.sparsity import drop_zero_advantage

__all__ = [
    "ArrowRows",
    "RefusedRows",
    "TokenBatches",
    "balance",
    "collate_language",
    "collate_pairs",
    "collate_rollouts",
    "collate_scored",
    "collate_unpaired",
    "discounted_returns",
    "drop_zero_advantage",
    "flatten",
    "gae",
    "group_advantages",
    "masked_stats",
    "pack",
    "prepare",
    "token_batches",
    "token_rewards",
    "unflatten",
    "whiten",
]
