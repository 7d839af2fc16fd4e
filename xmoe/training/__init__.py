"""Making a model: optimizers, losses, metrics and the one loop that uses them.

Read in this order: `config` (what a run is made from), `trainer` (the loop), `start` (the model before its first step, with
`adapters` beside it or without), `loss`, `optim`, `selection_bias` and `effort` (what a step does), `guard` and `interrupt`
(what stops it), `metrics` and `run_folder` (what is left on the disk).
"""
