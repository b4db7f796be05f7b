"""The grid inside kernels: what ``numerics`` defines (rounding, packing), in the languages of kernels."""
