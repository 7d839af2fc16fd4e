"""From text to weights: optimizers, losses, metrics, the loop."""
