"""Watch, judge, decide, act: make a trained Mixture-of-Experts model smaller, and prove what was done.

Read in this order: `routing` (what the routers did, in eight sums), `criteria` (an expert's worth), `reconstruction`
(what a layer loses without it), `plan` and `budget` (who stays), `apply` and `cut` (in memory, on disk), `verify`
(the proof), `merge`, `reduce`, `recover`. `layerwise` walks a model layer by layer, `fingerprint` reads published data.
"""
