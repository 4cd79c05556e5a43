"""Advantages, returns, rewards and their moments."""
