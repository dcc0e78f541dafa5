"""The best schedule for a budget, if costs add up: even spacing, and two dynamic programs.

    budget = make_budget(model, steps=20, speedup=2)
    schedule = even(20, budget)                     # bool (T, K), True: compute
    schedule = by_steps(20, cost, budget)           # cost[j][i], j < i <= T

cost[j][i] is the error of all steps between j and i, if j computes and i is the next step that
does (i = T: none does). costs.py measures such costs.

Notation: T denoising steps, K branches.
"""

import dataclasses
import itertools
import math

import torch

# ------------------------------------------------------------------------------------------------
# The budget


@dataclasses.dataclass
class Budget:
    """What a schedule may compute: branch k at one step weighs weights[k], and all that is computed
    weighs `spend`, give or take `slack`. With --speedup a weight is FLOP; with --cur it is 1."""

    weights: list
    spend: float
    slack: float

    @property
    def rows(self):
        """The budget in whole steps."""
        return round(self.spend / sum(self.weights), 9)

    def spent(self, schedule):
        """The weight of all that a schedule (T, K) computes."""
        return sum(n * w for n, w in zip(schedule.sum(0).tolist(), self.weights, strict=True))

    def check(self, schedule):
        """-> the schedule. Raises ValueError if it is further from the budget than twice the
        slack, that is 1 % of the arithmetic, or a point of CUR."""
        if abs(self.spent(schedule) - self.spend) > 2 * self.slack:
            raise ValueError("no schedule of so few steps and branches comes close to this budget: "
                             "use more --steps, or ask for another one")
        return schedule


def make_budget(model, steps, speedup=None, cur=None):
    """The budget of a speed-up by arithmetic, or of a CUR.
    Raises ValueError for one that cannot be reached: step 0 always computes."""
    branches, other = model.network.flops(*(model.size or ()))
    if cur is not None:
        K, most = len(branches), (steps - 1) / steps
        if not 0 < cur <= most:
            raise ValueError(f"--cur must be above 0 and at most {most:.3f}, not {cur:g}: step 0 "
                             "always computes")
        return Budget([1] * K, (1 - cur) * steps * K, 0.005 * steps * K)
    everything = steps * (sum(branches) + other)
    most = everything / (sum(branches) + steps * other)
    if not 1 < speedup <= most:
        raise ValueError(f"--speedup must be above 1 and at most {most:.2f} at T = {steps}, not "
                         f"{speedup:g}: step 0 always computes")
    total = everything / speedup
    return Budget([int(f) for f in branches], total - steps * other, 0.005 * total)


def fill(T, steps, partial, budget):
    """`steps` compute everything, step `partial` (None: none) as much as is left of the budget:
    -> schedule (T, K). Of the branches of equal weight the first compute: they feed the others."""
    schedule = torch.zeros(T, len(budget.weights), dtype=torch.bool)
    schedule[steps] = True
    left = budget.spend - budget.spent(schedule)
    if partial is None or left <= 0:
        return schedule
    groups = [[k for k, w in enumerate(budget.weights) if w == weight]
              for weight in sorted(set(budget.weights))]

    def distance(counts):
        pairs = zip(counts, groups, strict=True)
        return abs(left - sum(n * budget.weights[group[0]] for n, group in pairs))

    counts = min(itertools.product(*(range(len(group) + 1) for group in groups)), key=distance)
    for n, group in zip(counts, groups, strict=True):
        schedule[partial, group[:n]] = True
    return schedule


# ------------------------------------------------------------------------------------------------
# Even spacing, and the dynamic programs


def even(T, budget):
    """Every T / rows-th step computes, rounded down; one in the middle what the budget has left."""
    places = [int(m * T / budget.rows) for m in range(math.ceil(budget.rows))]
    partial = None
    if len(places) > int(budget.rows):
        partial = places.pop(len(places) // 2)  # the first and the last steps matter most
    return fill(T, places, partial, budget)


def paths(cost):
    """The cheapest ways from step 0 to the end. cost[j][i], j < i <= T: the error of all steps
    between j and i, if j computes and i is the next that does (i = T: none does).

    -> T pairs (cost, computed steps), one for each number of computed steps n = 1 ... T.
    """
    T = len(cost)
    ways = {0: (0.0, [0])}  # i: the cheapest way to i, if i is the last of n computed steps
    found = []
    for _ in range(T):
        found.append(min((c + cost[j][T], way) for j, (c, way) in ways.items()))
        ways = {i: min((c + cost[j][i], [*way, i]) for j, (c, way) in ways.items() if j < i)
                for i in range(min(ways) + 1, T)}
    return found


def by_steps(T, cost, budget):
    """Whole steps on the cheapest path; what is left of the budget goes where a whole step would
    help most."""
    steps = paths(cost)[int(budget.rows) - 1][1]
    free = sorted(set(range(T)) - set(steps))

    def with_one_more(i):
        way = sorted([*steps, i, T])
        return sum(cost[a][b] for a, b in zip(way, way[1:], strict=False))

    return fill(T, steps, min(free, key=with_one_more, default=None), budget)


def by_branches(T, costs, budget):
    """Each branch k on a cheapest path through its own costs[k]; the knapsack says how long."""
    ways = [paths(cost) for cost in costs]
    counts = knapsack([[c for c, _ in way] for way in ways], budget)
    schedule = torch.zeros(T, len(costs), dtype=torch.bool)
    for k, n in enumerate(counts):
        schedule[ways[k][n - 1][1], k] = True
    return schedule


def knapsack(costs, budget):
    """costs[k][n - 1]: the cost of branch k when it computes n times. -> K counts n that spend the
    budget, within its slack or else as near as possible, at the smallest sum of costs."""
    T, heaviest = len(costs[0]), max(budget.weights)
    # In whole units a total is an index. Above 200,000 of them weights would be rounded.
    most = budget.spend + budget.slack + heaviest
    unit = max(math.gcd(*budget.weights), most / 200_000)
    weights = [round(w / unit) for w in budget.weights]
    size = math.ceil(most / unit) + 1
    best = torch.full((size,), math.inf, dtype=torch.float64)  # best[total] of the branches so far
    best[0] = 0
    chosen = []
    for cost, weight in zip(costs, weights, strict=True):
        options = torch.full((T, size), math.inf, dtype=torch.float64)
        for n in range(1, T + 1):
            if n * weight < size:
                options[n - 1, n * weight :] = best[: size - n * weight] + cost[n - 1]
        best, n = options.min(0)
        chosen.append(n + 1)
    distance = (torch.arange(size) - budget.spend / unit).abs()
    allowed = distance <= max(budget.slack / unit, distance[best.isfinite()].min().item())
    total = torch.where(allowed, best, math.inf).argmin().item()
    counts = []
    for weight, n in zip(reversed(weights), reversed(chosen), strict=True):
        counts.append(n[total].item())
        total -= counts[-1] * weight
    return counts[::-1]


def extended(measured):
    """measured[j]: costs for gap = 1, 2, ..., as above -> cost[j][i] for all j < i <= T. The cost
    of longer gaps is extrapolated: an error grows with the gap, its square summed as gap^4."""
    T = len(measured)
    cost = [[math.inf] * (T + 1) for _ in range(T)]
    for j, known in enumerate(measured):
        for i in range(j + 1, T + 1):
            gap = min(i - j, len(known))
            cost[j][i] = known[gap - 1] * ((i - j) / gap) ** 4
    return cost
