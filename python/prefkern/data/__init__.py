"""Batching, packing and advantage estimation on the CPU, in Rust: numpy arrays, torch CPU tensors, Python lists and
Arrow list arrays in, read without a copy where their memory allows it."""

from prefkern.data.advantages import gae
from prefkern.data.collators import collate_pairs, collate_scored, collate_unpaired
from prefkern.data.groups import group_advantages
from prefkern.data.moments import masked_stats, whiten
from prefkern.data.packing import pack
from prefkern.data.returns import discounted_returns
from prefkern.data.rewards import token_rewards
from prefkern.data.rollouts import collate_rollouts

__all__ = [
    "collate_pairs",
    "collate_rollouts",
    "collate_scored",
    "collate_unpaired",
    "discounted_returns",
    "gae",
    "group_advantages",
    "masked_stats",
    "pack",
    "token_rewards",
    "whiten",
]
