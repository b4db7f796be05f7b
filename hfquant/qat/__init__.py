"""Quantization-aware training: float weights that are trained for the grid they end up on."""
