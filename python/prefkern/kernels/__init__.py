"""Triton kernels and their launchers: no autograd, no torch.library. Each module loads Triton when it is imported."""
