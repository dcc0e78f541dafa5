"""The best schedule for a budget: searched, without training and without images.

    python search.py --model emoji --speedup 2       # or --cur 0.5; 4 to 5 minutes of one core
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

A dynamic program adds costs up (costs.py measures them, budget.py adds them). Only the local search
measures how errors of different steps and branches act together.

Notation: T denoising steps, K branches.
"""

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import copy
import dataclasses
import math
import random
from pathlib import Path

import torch

import command
import models
import router as routers
from budget import by_branches, by_steps, even, extended, make_budget
from cache import Cache
from costs import Batch, Uncached, choose_items
from proxy import squared_error
from samplers import Noise, sampler_name, walk

SEARCH, HELD_OUT = 3, 4  # the purposes of their noise
ORDERS = (0, 1, 2)  # of the forecast
FEW = 4  # costs are measured on one of so many images
TAU = 0.1  # any threshold would do: logits are 5 or -5
MOST_IMAGES = 100_000
MOST_STEPS = 100  # the dynamic programs take a time that grows with T^3
VERSION = 1  # of what a state holds

# ------------------------------------------------------------------------------------------------
# Measuring


class Log:
    """Every number that was measured, in order, saved after each. A resumed search asks for the
    same numbers again and finds the first ones here. `path` None: they are not saved."""

    def __init__(self, path=None, about=None, values=(), total=None):
        self.path, self.about, self.values, self.next = path, about, list(values), 0
        self.bar = command.progress(total=total, unit="evaluation", unit_scale=True)

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


# ------------------------------------------------------------------------------------------------
# The search


@dataclasses.dataclass
class Result:
    method: str
    order: int
    schedule: torch.Tensor  # bool (T, K)
    error: float
    held_out: float = math.nan


def starts(uncached, budget, orders, log):
    """The schedules that need no comparing of images: yields method, order and schedule."""
    T, B, K = uncached.T, len(uncached.batch.x), len(budget.weights)
    sensitivity = [0.0] + [log(B * (T - i), lambda i=i: uncached.sensitivity(i))
                           for i in range(1, T)]
    for order in orders:
        yield "even", order, even(T, budget)
        measured = [log(0, lambda j=j, order=order: uncached.step_costs(j, order, sensitivity))
                    for j in range(T)]
        yield "steps", order, by_steps(T, extended(measured), budget)
    if 0 in orders:  # a branch's cost with a forecast would depend on all the others
        measured = [log(B * 3 * K / 2, lambda j=j: [uncached.branch_costs(j, k, sensitivity)
                                                    for k in range(K)]) for j in range(T)]
        costs = [extended([row[k] for row in measured]) for k in range(K)]
        yield "branches", 0, by_branches(T, costs, budget)


def search(batch, few, held_out, budget, orders, tries, seed, log):
    """All methods in turn. `few` is the batch that costs are measured on. -> a list of Results, the
    best one last."""
    T = len(batch.sampler.timesteps)

    def measured(which, schedule, order):
        work = len(batch.x) * T * schedule.float().mean().item()
        return log(work, lambda: which.error(schedule, order))

    results = []
    for method, order, schedule in starts(Uncached(few), budget, orders, log):
        error = measured(batch, budget.check(schedule), order)
        results.append(Result(method, order, schedule, error))
    best = min(results, key=lambda result: result.error)
    climber = Climber(batch, best.order, log, best.schedule)
    for what, pairs in (("steps", step_exchanges(T, seed)),
                        ("entries", entry_exchanges(T, budget.weights, seed))):
        climber.climb(pairs, tries)
        results.append(Result(f"local, {what}", best.order, climber.schedule, climber.error))
    for result in results:
        result.held_out = measured(held_out, result.schedule, result.order)
    return results


def evaluations(T, K, images, few, tries, budget, orders):
    """About how many evaluations of the network for one image a search takes: before its log
    begins, and in all. Reused branches count nothing."""
    before = 2 * images * T + 2 * few * T
    costs = few * T * (T - 1) / 2 + (few * 3 * K / 2 * T if 0 in orders else 0)
    schedules = 2 * len(orders) + (0 in orders)
    walks = 2 * schedules + 3  # on both batches; the local search adds one and two
    # An exchange is evaluated from its first step on, about half of a walk.
    return before, before + costs + images * budget.rows * (walks + tries)


# ------------------------------------------------------------------------------------------------
# The command


def read_flags():
    parser = command.Parser(__doc__)
    command.add_model_flags(parser)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--speedup", type=command.finite, help="by arithmetic (default: 2)")
    asked.add_argument("--cur", type=command.finite,
                       help="a CUR instead, as a share: 0.5 reuses half of all branch outputs")
    parser.add_argument("--forecast", type=int, choices=ORDERS,
                        help="the order of the forecast: 0, 1 or 2 (default: all are tried)")
    parser.add_argument("--images", type=int,
                        help="images to search on, and as many held out (24; official models: 8)")
    parser.add_argument("--tries", type=int, default=30,
                        help="exchanges of steps that the local search tries, and of entries (30)")
    parser.add_argument("--out", type=command.path,
                        help="folder (default: runs/search-MODEL-2x and such)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the search in --out, if any")
    args = parser.parse_args()
    if args.cur is None and args.speedup is None:
        args.speedup = 2.0
    if args.speedup is not None and args.speedup <= 1:  # complains before a download
        raise ValueError(f"--speedup must be above 1, not {args.speedup:g}")
    if args.cur is not None and not 0 < args.cur < 1:
        raise ValueError(f"--cur is a share, like 0.5 for 50 %, not {args.cur:g}")
    if args.images is not None and not 1 <= args.images <= MOST_IMAGES or args.tries < 0:
        raise ValueError(f"--images must be 1 to {MOST_IMAGES:,}, all at once, --tries 0 or more")
    return args


def settings_of(args, model, device):
    """All that the result depends on: a dict."""
    return {
        "version": VERSION, "model": args.model,
        "sampler": sampler_name(args.sampler or model.sampler),
        "steps": model.steps if args.steps is None else args.steps,
        "guidance": model.guidance if args.guidance is None else args.guidance,
        "speedup": args.speedup, "cur": args.cur, "forecast": args.forecast, "seed": args.seed,
        "images": args.images or (8 if model.autoencoder else 24), "tries": args.tries,
        "dtype": models.dtype_name(args.dtype), "device": str(device),
        "contents": model.fingerprint(),
    }


def find_values(path, settings, resume):
    """The numbers that an interrupted search has measured, or none if there is no such search.
    Raises ValueError if it is not to be resumed, or is another one, or its file is damaged."""
    router = path.with_name("router.safetensors")
    for file in (path, router):
        command.check_writable(file)  # found out now, not after the search
    if not path.exists() and router.exists():
        raise ValueError(f"{router} is of no search: choose another --out")
    if not path.exists():
        return []
    if not resume:
        raise ValueError(f"{path.parent} holds a search: --resume goes on with it, or choose "
                         "another --out")
    state = command.load_state(path)
    if not isinstance(state, dict) or not is_measured(state.get("values")):
        raise ValueError(f"{path} is not a state of a search: choose another --out")
    if repr(state.get("about")) != repr(settings):
        raise ValueError(f"{path.parent} holds a search with other settings: choose another --out")
    return state["values"]


def is_measured(values):
    """Whether these can be a log's: a list of finite numbers and of lists of them."""
    try:
        return isinstance(values, list) and all(
            torch.tensor(value).isfinite().all() for value in values)
    except (TypeError, ValueError, RuntimeError):
        return False


def write(path, result, settings, budget_of):
    """The router file of a result. Logits of 5 compute, logits of -5 reuse."""
    speedup, cur = budget_of
    logits = torch.where(result.schedule, routers.LIMIT, -routers.LIMIT)
    about = {key: settings[key] for key in ("model", "sampler", "steps", "guidance", "seed",
                                            "images", "tries")}
    routers.save(path, logits, **about, tau=TAU, objective="search", method=result.method,
                 forecast=result.order, error=result.error, held_out_error=result.held_out,
                 speedup=f"{speedup:.4f}", cur=f"{cur:.4f}")


def reached(model, schedule):
    """The speed-up by arithmetic and the CUR of a schedule."""
    T, reused = len(schedule), (~schedule).sum(0).tolist()
    return model.flops(T) / model.flops(T, reused), routers.cur(schedule)


def report(model, results):
    """Prints what was measured, the errors in thousandths."""
    print("method          forecast  speed-up     CUR  error x 1000  held out x 1000")
    for result in results:
        speedup, cur = reached(model, result.schedule)
        print(f"{result.method:15} {result.order:8}  {speedup:6.2f} x  {100 * cur:4.1f} %  "
              f"{1e3 * result.error:12.4g}  {1e3 * result.held_out:15.4g}")


def run(model, sampler, settings, budget, noises, items, out, values):
    """Searches, and writes the best schedule. -> the Results."""
    T, orders = settings["steps"], ORDERS if settings["forecast"] is None else (
        settings["forecast"],)
    few = max(1, settings["images"] // FEW)
    before, total = evaluations(T, len(budget.weights), settings["images"], few, settings["tries"],
                                budget, orders)
    print(f"2 x {settings['images']} images, about {total:,.0f} evaluations of the network for one "
          "image", flush=True)
    first, held_out = (Batch(model, sampler, settings["guidance"], *pair)
                       for pair in zip(noises, items, strict=True))
    small = Batch(model, sampler, settings["guidance"],
                  Noise(settings["seed"], range(few), SEARCH), items[0][:few])
    log = Log(out / "state.pt", settings, values, total - before)
    results = search(first, small, held_out, budget, orders, settings["tries"], settings["seed"],
                     log)
    log.bar.close()
    write(out / "router.safetensors", results[-1], settings, reached(model, results[-1].schedule))
    report(model, results)
    return results


def main():
    args = read_flags()
    device = models.find_device(args.device)
    # What needs no network is checked before its download.
    model = models.outline(args.model, args.dtype)
    steps = model.steps if args.steps is None else args.steps
    sampler = models.make_sampler(args.model, args.sampler or model.sampler, steps)
    if steps > MOST_STEPS:
        raise ValueError(f"a search is for {MOST_STEPS} --steps at most, not {steps}")
    budget = make_budget(model, steps, args.speedup, args.cur)
    budget.check(even(steps, budget))
    model = models.load(args.model, args.weights, "cpu", args.dtype)
    models.choose_kernels(device)
    settings = settings_of(args, model, device)
    asked = f"{args.speedup:g}x" if args.cur is None else f"cur{args.cur:g}"
    out = args.out or Path("runs") / f"search-{args.model}-{asked}"
    for name in ("router.safetensors", "state.pt"):
        command.check_not_read(out / name, args.weights)
    with command.locked(out):
        values = find_values(out / "state.pt", settings, args.resume)
        noises = [Noise(args.seed, range(settings["images"]), purpose)
                  for purpose in (SEARCH, HELD_OUT)]
        items = [choose_items(model, noise) for noise in noises]
        model.prepare(items[0] + items[1], device)  # the text encoder is gone again before the
        model.to(device)                            # network comes
        print(f"{model.name} on {model.device}: {settings['sampler']}, T = {settings['steps']}, "
              f"guidance {settings['guidance']:g}, {asked}, seed {args.seed} -> {out}")
        run(model, sampler, settings, budget, noises, items, out, values)
    print(f"wrote {out}/router.safetensors")


if __name__ == "__main__":
    command.run(main)
