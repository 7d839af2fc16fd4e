"""Tensors in, tensors out: each operation as a plain reference and as fast paths, chosen in `dispatch`."""
