"""Making a model: optimizers, losses, metrics and the one loop that uses them."""
