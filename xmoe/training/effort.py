"""Elastic effort: one checkpoint that serves every number of experts per token in the model's `reasoning_effort` table.

Why k = 1 needs help: the routing weights are a softmax over the chosen logits, so with one expert the weight is 1 whatever the
logits are, and the language-model loss gives that router no gradient at all. Only the balancing and z-losses then move it, and
neither knows which expert is the right one. Training at k = 2 alone teaches the first two places and leaves the third and
fourth to experts that no gradient ever put there. Drawing k anew for each step cures both: the steps with two or four experts
teach the router an order, the first of that order is what k = 1 gets, and experts learn to work alone and in company.
"""

from __future__ import annotations

import random


class EffortSampler:
    """Draws how many experts a token visits in a step, so that one checkpoint serves every reasoning effort.

    Args:
        experts: effort -> experts per token, from the model's `reasoning_effort` table, for example {low: 1, medium: 2, high: 4}.
        weights: effort -> how often, in any unit. Compute grows with the mean of k, so this is also the price.
        per_layer: draw for each layer by itself (arXiv 2509.26520) instead of once for the whole step.
        layers: of the model.

    The draw depends on the seed and the step alone, so a resumed run draws what it would have drawn.
    """

    def __init__(
        self, experts: dict[str, int], weights: dict[str, float], per_layer: bool, layers: int, seed: int
    ) -> None:
        self.choices = [experts[effort] for effort in weights]
        self.weights = list(weights.values())
        self.per_layer, self.layers, self.seed = per_layer, layers, seed

    def draw(self, step: int) -> int | list[int]:
        """k of this step, or one a layer."""
        generator = random.Random(f"effort {self.seed} {step}")
        if self.per_layer:
            return generator.choices(self.choices, self.weights, k=self.layers)
        return generator.choices(self.choices, self.weights)[0]
