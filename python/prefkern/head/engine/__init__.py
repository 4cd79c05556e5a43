"""The head's forward and backward in blocks; it knows the tile functions by their interface only."""
