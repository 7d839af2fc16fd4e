"""Watch, judge, decide, act: make a trained Mixture-of-Experts model smaller, and prove what was done.

Read in this order: `calibration` (what the model is watched on), `routing` (what the routers did, in eight sums), `criteria`
(an expert's worth), `reconstruction` (what a layer loses without it), `plan` and `budget` (who stays), `recipe` (all of that
as a file), `apply` and `cut` (in memory, on disk), `verify` (the proof), `merge`, `reduce` (with `magnitude`,
`neurons` and `low_rank`), `reduce_checkpoint` (the same from disk), `recover` (with `unpacked`). `layerwise` walks a model
layer by layer, `expert_inputs` gathers what each expert is fed, `fingerprint` reads published data and compares domains.
"""
