"""The engine as torch operators: schemas, fakes, gradients, and the choice of the tile functions."""
