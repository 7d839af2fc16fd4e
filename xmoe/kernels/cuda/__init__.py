"""The operations as Triton kernels for CUDA, their tiles, and the proof that they compile well."""
