"""The one place where the vocabulary appears: hidden states and an output matrix to numbers per token."""
