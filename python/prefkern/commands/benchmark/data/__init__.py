"""The benchmark of batching and advantages beside their peers and a copy."""
