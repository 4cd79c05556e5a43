"""Batching, packing and advantage estimation on the CPU, in Rust: numpy arrays, torch CPU tensors, Python lists and
Arrow list arrays in, read without a copy where their memory allows it."""

from prefkern.data.advantages import gae
from prefkern.data.collators import collate_pairs
from prefkern.data.packing import pack

__all__ = ["collate_pairs", "gae", "pack"]
