"""The best schedule for a budget: searched, without training and without images.

    python search.py --model emoji --speedup 2       # or --cur 0.5; under 3 minutes on two cores
    python search.py --speedup 2.5 --forecast 1      # by default all orders are tried: 0, 1, 2
    python sample.py --router runs/search-emoji-2x/router.safetensors --model emoji

The error of a schedule is the mean squared difference between its images and the uncached ones from
the same noise. The search compares schedules by this error on a batch of its own. It reports the
error on a second batch too, which it never searches on. Four methods, from simple to slow:

    even      whole steps compute, evenly spaced
    steps     whole steps compute, chosen by a dynamic program: each pair of computed steps j < i
              has a cost, the error that the steps between them make
    branches  each branch has computed steps of its own, chosen by a dynamic program and a knapsack
    local     from the best of these: exchanges two steps, then two entries, and keeps what helps

A dynamic program adds costs up. Costs are measured at the steps of the uncached images: the squared
error of a step's prediction, times the step's sensitivity,

    sensitivity(i) = squared error of the final image / squared error of the prediction at step i,

both measured when step i alone repeats all outputs of step i - 1. Only the local search measures
how errors of different steps and branches act together.

Notation: B images, T denoising steps, K branches, j a computed step, i a later one.
"""

if __name__ == "__main__":
    import interrupt  # noqa: F401, before the slow imports

import copy
import dataclasses
import math
import random
from pathlib import Path

import torch
from tqdm import tqdm

import command
import models
import router as routers
from cache import ORDERS, Cache, forecast
from samplers import Noise, denoise, guided, make_sampler, split, walk

SEARCH, HELD_OUT = 3, 4  # the purposes of their noise
LONGEST = 5  # steps: costs of reusing older outputs are extrapolated, not measured
FEW = 4  # costs are measured on one of so many images
VERSION = 1  # of what a state holds

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
        return self.spend / sum(self.weights) + 1e-9

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
    """`steps` compute everything, step `partial` as much as is left of the budget, its first
    branches first because they feed the later ones: -> schedule (T, K)."""
    schedule = torch.zeros(T, len(budget.weights), dtype=torch.bool)
    schedule[steps] = True
    left = budget.spend - budget.spent(schedule)
    for k, weight in enumerate(budget.weights):
        if partial is not None and left >= weight / 2:
            schedule[partial, k] = True
            left -= weight
    return schedule


# ------------------------------------------------------------------------------------------------
# Even spacing, and the dynamic programs


def even(T, budget):
    """Every T / rows-th step computes, rounded; the last of them as much as the budget has left."""
    places = [round(m * T / budget.rows) for m in range(math.ceil(budget.rows))]
    whole = int(budget.rows)
    return fill(T, places[:whole], places[whole] if places[whole:] else None, budget)


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


# ------------------------------------------------------------------------------------------------
# Measuring


class Log:
    """Every number that was measured, in order, saved after each. A resumed search asks for the
    same numbers again and finds the first ones here. `path` None: they are not saved."""

    def __init__(self, path=None, about=None, values=(), total=None):
        self.path, self.about, self.values, self.next = path, about, list(values), 0
        self.bar = tqdm(total=total, unit="evaluation", disable=None, unit_scale=True)

    def __call__(self, work, measure):
        """The next number, or list of numbers; `measure()` gives it if it is not here yet. `work`
        is for the progress bar, in evaluations of the network for one image.
        Raises ValueError for a number that is not finite."""
        if self.next == len(self.values):
            value = measure()
            if not torch.tensor(value).isfinite().all():
                raise ValueError("an error is not finite: the network overflows; try --dtype "
                                 "float32")
            self.values.append(value)
            if self.path:
                command.save_state(self.path, {"about": self.about, "values": self.values})
        self.next += 1
        self.bar.update(round(work))
        return self.values[self.next - 1]


class Batch:
    """B images and how they come about: noise, items, and x_0 without a cache."""

    def __init__(self, model, sampler, guidance, seed, count, purpose):
        self.model, self.sampler, self.guidance = model, sampler, guidance
        self.noise = Noise(seed, range(count), purpose)
        choices = model.prompts() or range(model.network.num_classes)
        items = [choices[n] for n in self.noise.labels(len(choices)).tolist()]
        model.prepare(items, model.device)
        self.condition = model.condition(items)
        self.x = self.noise.start(model.shape, model.device)
        self.full = self.denoise()

    def denoise(self, cache=None):
        return self.go_on(self.x, self.sampler, cache, first=0)

    def go_on(self, x, sampler, cache, first):
        """x (B, C, H, W) before step `first`, and a copy of the sampler made there -> x_0."""
        return denoise(self.model.network, sampler, x, self.condition, self.guidance, cache,
                       self.noise, first)

    def predict(self, x, i, cache):
        """The guided prediction at step i."""
        return guided(self.model.network, x, self.sampler.timesteps[i], self.condition,
                      self.guidance, cache, self.sampler.guidance_channels)

    def error(self, schedule, order):
        """The mean squared error of the images under a schedule."""
        return squared_error(self.denoise(Cache(schedule, order)), self.full)


def squared_error(a, b):
    return (a.double() - b.double()).square().mean().item()


class Replay:
    """A cache for one evaluation: it gives the outputs {k: output} and computes the others, which
    it adds to them."""

    def __init__(self, outputs):
        self.outputs = outputs

    def __call__(self, k, branch):
        if k not in self.outputs:
            self.outputs[k] = branch()
        return self.outputs[k]


class Uncached:
    """The uncached steps of a batch, and what other outputs would change there. Lists of T: `x`
    before a step, `samplers` as they are there, `outputs` {k: output}, `predictions` (B, C, H, W).
    """

    def __init__(self, batch):
        self.batch, self.T = batch, len(batch.sampler.timesteps)
        self.x, self.samplers, self.outputs, self.predictions = [], [], [], []
        x, sampler = batch.x, copy.copy(batch.sampler)
        for i in range(self.T):
            outputs = {}
            prediction = batch.predict(x, i, Replay(outputs))
            self.x.append(x)
            self.samplers.append(copy.copy(sampler))
            self.outputs.append(outputs)
            self.predictions.append(split(prediction, x)[0])
            x = sampler.step(prediction, i, x, batch.noise)

    def sensitivity(self, i):
        """Error of the final image / error of the prediction, when step i repeats step i - 1."""
        x, sampler = self.x[i], copy.copy(self.samplers[i])
        prediction = self.batch.predict(x, i, Replay(dict(self.outputs[i - 1])))
        error = squared_error(split(prediction, x)[0], self.predictions[i])
        x = sampler.step(prediction, i, x, self.batch.noise)
        final = self.batch.go_on(x, sampler, None, i + 1)
        return squared_error(final, self.batch.full) / error if error else 0.0

    def prediction_error(self, i, outputs):
        """The squared error of step i's prediction with these outputs, the others computed."""
        prediction = self.batch.predict(self.x[i], i, Replay(outputs))
        return squared_error(split(prediction, self.x[i])[0], self.predictions[i])

    def step_costs(self, j, order, sensitivity):
        """If step j and the one `gap` steps later compute: the cost of the steps between them, for
        gap = 1 ... The steps before j are taken to compute at the same distance."""
        costs = []
        for gap in range(1, min(LONGEST + 1, self.T - j) + 1):
            computed = [s for s in range(j - order * gap, j + 1, gap) if s >= 0]
            cost = 0.0
            for i in range(j + 1, j + gap):
                outputs = {k: forecast([(s, self.outputs[s][k]) for s in computed], i)
                           for k in self.outputs[j]}
                cost += sensitivity[i] * self.prediction_error(i, outputs)
            costs.append(cost)
        return costs

    def branch_costs(self, j, k, sensitivity):
        """The same for branch k alone, which repeats its output of step j."""
        costs = [0.0]
        for i in range(j + 1, min(j + LONGEST + 1, self.T)):
            # Branches before k are as they are without a cache; those after it feel the change.
            outputs = {before: self.outputs[i][before] for before in range(k)}
            outputs[k] = self.outputs[j][k]
            costs.append(costs[-1] + sensitivity[i] * self.prediction_error(i, outputs))
        return costs


def table(measured):
    """measured[j]: costs for gap = 1, 2, ..., as above -> cost[j][i] for all j < i <= T. The cost
    of longer gaps is extrapolated: an error grows with the gap, its square summed as gap^3."""
    T = len(measured)
    cost = [[math.inf] * (T + 1) for _ in range(T)]
    for j, known in enumerate(measured):
        for i in range(j + 1, T + 1):
            gap = min(i - j, len(known))
            cost[j][i] = known[gap - 1] * ((i - j) / gap) ** 3
    return cost


# ------------------------------------------------------------------------------------------------
# The local search


class Snapshots(Cache):
    """A cache that can be forked to another schedule: it keeps what that one may read."""

    def __init__(self, schedule, order):
        super().__init__(schedule, order)
        self.read = [[order + 1] * schedule.shape[1]] * len(schedule)

    def fork(self, schedule):
        twin = Snapshots(schedule, self.order)
        twin.step, twin.kept = self.step, dict(self.kept)
        return twin


class Climber:
    """Hill climbing: exchanges two places of the schedule and keeps what lowers the error."""

    def __init__(self, batch, order, log, schedule):
        self.batch, self.order, self.log = batch, order, log
        self.states = None  # before each step of the schedule: x, sampler and cache
        self.schedule, self.error = schedule, math.inf
        self.attempt(schedule, 0)

    def attempt(self, candidate, first):
        """Takes the candidate, whose rows before `first` are the schedule's, if it is better."""
        states = None

        def measure():
            nonlocal states
            if first and self.states is None:  # resumed: its error was in the log
                self.states, _ = self.walk(self.schedule, 0)
            states, x = self.walk(candidate, first)
            return squared_error(x, self.batch.full)

        work = len(self.batch.x) * candidate[first:].float().mean(1).sum().item()
        error = self.log(work, measure)
        if error < self.error:
            self.schedule, self.error, self.states = candidate, error, states
            return True
        return False

    def walk(self, schedule, first):
        """-> the states before each step, and x_0."""
        batch = self.batch
        states = self.states[:first] if first else []
        x, sampler, cache = self.states[first] if first else (
            batch.x, batch.sampler, Snapshots(schedule, self.order))
        sampler, cache = copy.copy(sampler), cache.fork(schedule)
        steps = walk(batch.model.network, sampler, x, batch.condition, batch.guidance, cache,
                     batch.noise, first)
        for _ in range(first, len(schedule)):
            states.append((x, copy.copy(sampler), cache.fork(schedule)))
            x = next(steps)
        return states, x

    def climb(self, exchanges, tries):
        """Tries exchanges of two places, again and again, until none of them helps any more or
        after so many tries. A place is i, a whole step, or (i, k)."""
        failed = 0  # since the last that helped
        while failed < len(exchanges):
            for a, b in exchanges:
                if failed >= len(exchanges) or tries == 0:
                    return
                failed += 1
                if not torch.equal(self.schedule[a], self.schedule[b]):
                    candidate = self.schedule.clone()
                    candidate[a], candidate[b] = self.schedule[b], self.schedule[a]
                    tries -= 1
                    first = min(a, b) if isinstance(a, int) else min(a[0], b[0])
                    if self.attempt(candidate, first):
                        failed = 0


def step_exchanges(T, seed):
    """All pairs of steps but step 0: neighbours first, the others in random order."""
    pairs = [(i, j) for i in range(1, T) for j in range(i + 1, T)]
    random.Random(seed).shuffle(pairs)
    return sorted(pairs, key=lambda pair: pair[1] - pair[0] > 1)


def entry_exchanges(T, weights, seed):
    """All pairs of entries of equal weight but those of step 0, in random order."""
    entries = [(i, k) for i in range(1, T) for k in range(len(weights))]
    pairs = [(a, b) for a in entries for b in entries if a < b and weights[a[1]] == weights[b[1]]]
    random.Random(seed).shuffle(pairs)
    return pairs
