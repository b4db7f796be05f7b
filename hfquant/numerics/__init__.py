"""Tensor to tensor: the grid, its packing, and how far it is from the original."""
