"""The tile functions in Triton; loaded at first use on an accelerator."""
