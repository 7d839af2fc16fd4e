"""Number formats: tensor -> tensor; no module of the model knows about them."""
