"""The benchmark of the head: naive eager, TRL, Liger and prefkern on the same tensors."""
