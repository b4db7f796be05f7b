"""Post-training quantization: one file per algorithm, and the loop over a model."""
