"""Products of float activations with packed weights, shared by the linear ops and the experts."""
