"""Adapters for training libraries. Nothing of prefkern imports them, and each imports its library at first use."""

from prefkern.integrations import ppo, transformers, trl

__all__ = ["ppo", "transformers", "trl"]
