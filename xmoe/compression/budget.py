"""How many experts each layer keeps: the same everywhere, by scores over all layers, or by what layers lose."""

from __future__ import annotations

from collections.abc import Sequence

from xmoe.compression.criteria import Scores
from xmoe.errors import ConfigError

BUDGETS = ("uniform", "global", "sensitivity")


def uniform_counts(
    num_experts: Sequence[int], keep: int | float | None, remove: Sequence[tuple[int, int]] = ()
) -> list[int]:
    """Experts to keep in each layer: `keep` itself where it is a count, that share of each layer (rounded, at least 1)
    where it is a fraction in (0, 1), and all that are not in `remove` where it is None.
    """
    if keep is None:
        if not remove:
            raise ConfigError("nothing says how many experts stay; give keep (16, or 0.5 of them) or experts to remove")
        return [E - len({e for i, e in remove if i == layer}) for layer, E in enumerate(num_experts)]
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise ConfigError(f"keep is {keep!r}; expected a count (16) or a share between 0 and 1 (0.5)")
    if isinstance(keep, float):
        if not 0.0 < keep < 1.0:
            raise ConfigError(f"keep is {keep}; a share must lie between 0 and 1, both left out (a count has no point)")
        return [max(1, round(E * keep)) for E in num_experts]
    if keep < 1:
        raise ConfigError(f"keep is {keep}; at least 1 expert of each layer must stay")
    if keep > min(num_experts):
        raise ConfigError(f"keep is {keep}, more than the {min(num_experts)} experts that the smallest layer has")
    return [keep] * len(num_experts)


def layer_limits(
    num_experts: Sequence[int],
    total: int,
    floor: int,
    must_stay: set[tuple[int, int]],
    must_go: set[tuple[int, int]],
) -> list[tuple[int, int]]:
    """The fewest and the most experts each layer may keep.

    At least `floor` (K, so that every layer can still route; the even share where the budget is smaller than that) and
    all that are protected; at most those that are not removed.
    """
    floor = min(floor, total // len(num_experts))
    limits = []
    for layer, E in enumerate(num_experts):
        most = E - sum(i == layer for i, _ in must_go)
        limits.append((min(max(floor, sum(i == layer for i, _ in must_stay)), most), most))
    if not sum(low for low, _ in limits) <= total <= sum(high for _, high in limits):
        raise ConfigError(
            f"{total} experts in all cannot be kept: protected experts and the {floor} that each layer needs make "
            f"{sum(low for low, _ in limits)}, all that are not removed {sum(high for _, high in limits)}"
        )
    return limits


def counts_globally(scores: Scores, total: int, limits: Sequence[tuple[int, int]]) -> list[int]:
    """How the `total` experts with the largest share s_e / sum s of their layer's score fall on the layers, in limits.

    Criteria that go below zero (aimer) are shifted by each layer's least score first. Equal shares: earlier layers first.
    """
    counts, rest = [], []
    for layer, (row, (low, high)) in enumerate(zip(scores, limits)):
        shifted = row - min(0.0, float(row.min()))
        shares = (shifted / shifted.sum().clamp(min=1e-300)).sort(descending=True).values.tolist()
        counts.append(low)
        rest.extend((-share, layer) for share in shares[low:high])
    for _, layer in sorted(rest)[: total - sum(counts)]:
        counts[layer] += 1
    return counts


def counts_by_sensitivity(
    errors: Sequence[Sequence[float]], total: int, limits: Sequence[tuple[int, int]]
) -> list[int]:
    """Counts n_l within `limits` that sum to `total` and minimise sum_l errors[l][n_l], exactly.

    errors[l][n] is the loss of layer l with n experts left, n = 0 .. E_l. Dynamic programming over (layer, experts
    spent). Of equal sums the one that gives the last layers more wins.
    """
    infinity = float("inf")
    best = [0.0] + [infinity] * total  # best[b]: least error of the layers so far with b experts spent on them
    choices: list[list[int]] = []
    for row, (low, high) in zip(errors, limits):
        new, chosen = [infinity] * (total + 1), [0] * (total + 1)
        for spent, error in enumerate(best):
            if error == infinity:
                continue
            for n in range(low, min(high, total - spent) + 1):
                if error + row[n] < new[spent + n]:
                    new[spent + n], chosen[spent + n] = error + row[n], n
        best = new
        choices.append(chosen)
    assert best[total] < infinity, "limits that allow the total always leave a way to it"
    counts, left = [], total
    for chosen in reversed(choices):
        counts.append(chosen[left])
        left -= chosen[left]
    return counts[::-1]
