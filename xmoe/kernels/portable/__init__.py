"""The operations in PyTorch alone: any device, no compiler, no library."""
