"""Rows of token ids into batches: collation, packing, sampling, filtering."""
