"""Batching, packing and advantage estimation on the CPU, in Rust: numpy arrays, torch CPU tensors, Python lists and
Arrow list arrays in, read without a copy where their memory allows it."""

from prefkern.data.advantages.gae import gae
from prefkern.data.advantages.groups import group_advantages
from prefkern.data.advantages.moments import masked_stats, whiten
from prefkern.data.advantages.returns import discounted_returns
from prefkern.data.advantages.rewards import token_rewards
from prefkern.data.batches.filtering import drop_zero_advantage
from prefkern.data.batches.language import collate_language
from prefkern.data.batches.packing import pack
from prefkern.data.batches.padding_free import flatten, unflatten
from prefkern.data.batches.preferences import collate_pairs, collate_scored, collate_unpaired
from prefkern.data.batches.rollouts import collate_rollouts
from prefkern.data.batches.sampling import TokenBatches, balance, token_batches
from prefkern.data.text.arrow_rows import ArrowRows
from prefkern.data.text.prepare import RefusedRows, prepare

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
