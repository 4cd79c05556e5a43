"""The tile functions in plain torch: the CPU, float64, and the oracle of the kernels."""
