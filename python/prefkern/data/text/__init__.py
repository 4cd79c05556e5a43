"""Rows of text or messages into rows of token ids."""
