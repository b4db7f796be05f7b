"""How good a quantized model is, measured against the original."""
