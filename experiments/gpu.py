"""Checks and measures on a GPU what cannot be seen on a CPU: one command, no download, about 8
minutes at most. The networks have full size and random weights.

    python -m experiments.gpu                     # with CUDA: DiT-XL/2 and PixArt-256
    python -m experiments.gpu --model digits      # small ones, the default without CUDA, a minute

Checked (gpu_checks.py); a value beyond its limit is printed as FAILED, and the exit code is 1:
reference    a forward, sampling and a training trajectory against the CPU's float32, TF32 off; on
             a CPU against float64
resume       a training that is interrupted and resumed, and one made twice: the same router, bit
             for bit
batch size   images made 8 at once and one by one, TF32 off
memory       the peak of training, 32 images and --micro-batch 8, against the formula
graphs       torch.compile makes one graph for each kind of branch, whatever the schedule

Measured, medians over rounds: an iteration of training beside the official code's way, a step
beside diffusers' networks, cached steps beside cache-dit's (benchmark_cache_dit.py), sampling with
schedules (real speed-up beside the one by arithmetic), in float32 (TF32 on a GPU) and bfloat16,
plain and with torch.compile. Listed as not measured: parts for which no time is left, and those
beside diffusers or cache-dit (`pip install cache-dit`) where that is not installed.

Notation: T denoising steps, K cacheable branches.
"""

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import contextlib
import dataclasses
import gc
import math
import platform
import statistics
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch

import command
import dit
import models
import pixart
import router as routers
from cache import Cache
from experiments import gpu_checks
from experiments.benchmark import (
    GUIDANCE,
    SEED,
    Iteration,
    in_turn,
    median_ratio,
    official_iteration,
    our_iteration,
    random_condition,
    random_model,
)
from experiments.gpu_checks import Row, at_most
from sample import counted_flops, timed_denoise
from samplers import DDIM, Noise

SCHEDULES = ("fora:2", "random:0.375")
COMPILING = 60  # seconds that are set aside for torch.compile on a GPU


@dataclasses.dataclass
class Plan:
    """How large the parts are. The first of the two `networks` is the one that is measured most."""

    networks: dict  # {name: (class, its arguments)}
    reference_steps: int  # T, where the reference is computed on a CPU
    steps: int  # T of sampling
    repeats: int  # rounds
    batches: tuple  # images at once, in sampling
    dtypes: tuple
    images: int  # in one iteration of training; the official way with 4 fits into 24 GB
    depth: int  # blocks of the networks that are put beside those of diffusers, of XL's width


PLANS = {
    "dit256": Plan(
        {"DiT-XL/2": (dit.DiT, dit.SIZES["XL/2"]),
         "PixArt-256": (pixart.PixArt, pixart.SIZES["alpha256"])},
        reference_steps=3, steps=20, repeats=3, batches=(1, 8, 64),
        dtypes=("float32", "bfloat16"), images=4, depth=28,
    ),
    "digits": Plan(
        {"DiT digits": (dit.DiT, dit.SIZES["digits"]),
         "PixArt emoji": (pixart.PixArt, pixart.SIZES["emoji"])},
        reference_steps=4, steps=8, repeats=1, batches=(1, 4),
        dtypes=("float32",), images=2, depth=1,
    ),
}

# ------------------------------------------------------------------------------------------------
# The report


class NotMeasured(Exception):
    """A part cannot be measured here; the message says why."""


class Report:
    """Runs the parts, within `minutes` together, and keeps their rows in the file `out`."""

    def __init__(self, out, minutes, about):
        self.out, self.about = out, about
        self.end = time.perf_counter() + 60 * minutes
        self.rows, self.not_measured = [], {}

    def part(self, name, measure, expected=0.0):
        """Calls `measure` if `expected` seconds are left. -> its rows, or none. An error is a row
        that FAILED, and the other parts go on."""
        rows, start = [], time.perf_counter()
        print(name, flush=True)
        try:
            left = self.end - start
            if left <= expected:
                raise NotMeasured(f"it takes about {expected:.0f} s, {max(0, left):.0f} s are left")
            rows = measure()
        except NotMeasured as reason:
            self.not_measured[name] = command.one_line(reason)
        except Exception as error:  # whatever is wrong on this machine
            if command.is_lack_of_memory(error):
                self.not_measured[name] = "out of memory"
            else:
                traceback.print_exc()
                words = f"{name}: {type(error).__name__}: {command.one_line(error)}"
                rows = [Row(words, math.nan, ok=False)]
        self.add(name, rows, time.perf_counter() - start)
        if torch.cuda.is_available():  # the next part finds the memory free
            gc.collect()
            torch.cuda.empty_cache()
        return rows

    def add(self, name, rows, seconds):
        """Prints how a part ended and writes the file, so that a run that is killed leaves one."""
        self.rows += rows
        reason = self.not_measured.get(name)
        print(f"    {seconds:.1f} s" + (f", not measured: {reason}" if reason else ""))
        for row in rows:
            if row.ok is False:
                print(f"    {row}", flush=True)
        command.write_json(self.out, {**self.about, "not_measured": self.not_measured,
                                      "rows": [dataclasses.asdict(row) for row in self.rows]})

    @property
    def failed(self):
        return [row for row in self.rows if row.ok is False]

    def __str__(self):
        lines = [f"{key} {value}" for key, value in self.about.items()]
        lines += ["", f"{'':58}{'value':>18}  {'reference':23}{'ratio':>8}", *map(str, self.rows)]
        lines += [f"not measured: {name} ({reason})" for name, reason in self.not_measured.items()]
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# Measurements


def measure_iteration(model, images, repeats):
    """An iteration of training beside the same one in the official code's way."""
    try:
        seconds = in_turn({"ours": Iteration(model, images, our_iteration),
                           "official": Iteration(model, images, official_iteration)}, repeats)
    finally:
        model.network.requires_grad_(False).zero_grad()  # the official way may run out of memory
    ours, official = (1000 * statistics.median(seconds[name]) for name in seconds)
    return [Row(f"iteration of training, {images} images", ours, "ms", official, "official way")]


@contextlib.contextmanager
def compiled_branches(network, backend):
    """`with compiled_branches(network, backend) as count:` every branch is compiled meanwhile, and
    count() says how many graphs that took."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    modules = models.compile_branches(network, backend)
    try:
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    finally:
        for module in modules:
            module._compiled_call_impl = None  # what `compile` set: there is no call that undoes it


def measure_sampling(name, model, images, steps, repeats):
    """Sampling without a cache, and under each schedule how much faster it is, beside arithmetic.
    The first row is milliseconds per image without a cache."""
    K, noise = len(model.network.branches), Noise(SEED, range(images))
    x, condition = noise.start(model.shape, model.device), random_condition(model.network, images)
    caches = {key: Cache(routers.named(key, steps, K, SEED)) for key in SCHEDULES}
    seconds = in_turn({
        key: lambda cache=cache: timed_denoise(model, DDIM(steps), x, condition, GUIDANCE, cache)[1]
        for key, cache in {"none": None, **caches}.items()
    }, repeats)
    plain = seconds["none"]
    rows = [Row(f"{name}, no cache", 1000 * statistics.median(plain) / images, "ms / image")]
    for key, cache in caches.items():
        arithmetic = model.flops(steps) / counted_flops(model, cache)
        rows.append(Row(f"{name}, {key}", median_ratio(plain, seconds[key]), "x", arithmetic,
                        "arithmetic"))
    return rows


def measure_compiled(backend, name, model, images, steps, repeats):
    """The same with compiled branches; checks that the schedules need no graphs of their own."""
    kinds = len({branch.split()[0] for branch in model.network.branches})
    with compiled_branches(model.network, backend) as count:
        rows = measure_sampling(name, model, images, steps, repeats)
        return [*rows, at_most(f"{name}, graphs", count(), kinds)]


def measure_samplings(report, title, model, plan):
    """Sampling in every batch size, plain and compiled, and dtype. How long a part will take is
    reckoned from its arithmetic, at the speed of the last part in that dtype."""
    gpu, speed = model.device.type == "cuda", {}
    backend = "inductor" if gpu else "eager"  # the latter compiles nothing, but counts the graphs
    for images in plan.batches:
        for compiled in (False, True):
            for dtype in plan.dtypes:
                model.network.to(getattr(torch, dtype))
                name = f"{title}, batch {images}, {dtype}"
                name += f", compiled ({backend})" if compiled else ""
                measure = partial(measure_compiled, backend) if compiled else measure_sampling
                flops = model.flops(plan.steps)  # at most, for each image and pass
                passes = (1 + len(SCHEDULES)) * (1 + plan.repeats)
                expected = images * passes * flops / speed.get(dtype, math.inf)
                expected += COMPILING if compiled and gpu else 0
                rows = report.part(
                    name, partial(measure, name, model, images, plan.steps, plan.repeats), expected)
                if rows and rows[0].ok is None:
                    speed[dtype] = 1000 * flops / rows[0].value  # FLOP / s


def measure_diffusers(kind, depth, dtype, model, repeats):
    """A step (two rows) of our network beside the same one in diffusers, where `model` is."""
    try:
        from experiments.benchmark_networks import pair, seconds

        ours, theirs = pair(kind, depth, getattr(torch, dtype), model.device)
    except (ImportError, ValueError) as error:
        raise NotMeasured(error) from error
    models.choose_kernels(model.device)
    times = in_turn({"ours": partial(seconds, ours, model.device),
                     "theirs": partial(seconds, theirs, model.device)}, repeats)
    ours, theirs = (1000 * statistics.median(times[key]) for key in times)
    return [Row(f"{kind}, {depth} blocks, {dtype}, a step", ours, "ms", theirs, "diffusers")]


def measure_cache_dit(depth, dtype, device, repeats):
    """How much faster caching makes our DiT, and how much cache-dit diffusers', at the same steps,
    each beside its own arithmetic."""
    try:
        from experiments.benchmark_cache_dit import SCHEDULE, speed_ups

        found = speed_ups(depth, getattr(torch, dtype), device, repeats)
    except (ImportError, ValueError) as error:
        raise NotMeasured(error) from error
    return [Row(f"DiT-XL/2, {depth} blocks, {dtype}, {SCHEDULE}, {name}", real, "x", arithmetic,
                "arithmetic") for name, (real, arithmetic) in found.items()]


# ------------------------------------------------------------------------------------------------
# The command


def run_all(report, plan, device):
    """Every part: the checks first, what takes longest last."""
    (name, (kind, sizes)), (other, (other_kind, other_sizes)) = plan.networks.items()
    small = gpu_checks.strong(random_model(other_sizes, other_kind))
    report.part(f"reference, {other}", partial(
        gpu_checks.check_reference, other, small, plan.reference_steps, device))
    small.to("cpu")
    model = gpu_checks.strong(random_model(sizes, kind))
    report.part(f"reference, {name}", partial(
        gpu_checks.check_reference, name, model, plan.reference_steps, device))
    model.network.to(device, torch.float32)
    models.choose_kernels(device)

    report.part("resume", partial(gpu_checks.check_resume, model, plan.batches[1]))
    report.part("batch size", partial(gpu_checks.check_batch_size, model, plan.steps))
    report.part("memory", partial(gpu_checks.check_memory, model))
    report.part("iteration", partial(measure_iteration, model, plan.images, plan.repeats))
    for theirs in ("DiT-XL/2", "PixArt-XL/2"):
        for dtype in plan.dtypes:
            report.part(f"diffusers, {theirs}, {dtype}", partial(
                measure_diffusers, theirs, plan.depth, dtype, model, plan.repeats))
    for dtype in plan.dtypes:
        report.part(f"cache-dit, DiT-XL/2, {dtype}", partial(
            measure_cache_dit, plan.depth, dtype, device, plan.repeats))
    models.choose_kernels(device)  # even if the networks beside diffusers' ran out of memory
    measure_samplings(report, name, model, plan)
    model.to("cpu")
    small.network.to(device, torch.float32)
    models.choose_kernels(device)
    other = f"{other}, batch {plan.batches[1]}, float32"
    report.part(other, partial(measure_sampling, other, small, plan.batches[1], plan.steps,
                               plan.repeats))


def main():
    parser = command.Parser(__doc__)
    parser.add_argument("--model", choices=PLANS,
                        help="dit256 (default with CUDA) or digits (default without)")
    parser.add_argument("--device", type=command.name, help="cpu or cuda (default: cuda if any)")
    parser.add_argument("--minutes", type=command.finite, default=8.0,
                        help="no part begins later, or that is known to end later (8)")
    parser.add_argument("--out", type=command.path, default=Path("runs/gpu.json"),
                        help="the table as JSON (runs/gpu.json)")
    args = parser.parse_args()
    if args.minutes <= 0:
        raise ValueError(f"--minutes must be more than 0, not {args.minutes:g}")
    device = models.find_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device == "mps":
        raise ValueError("this is for CUDA, or for a CPU: use --device cpu")
    command.check_writable(args.out)
    name = args.model or ("digits" if device == "cpu" else "dit256")
    machine = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    if device != "cpu":
        machine = torch.cuda.get_device_name(device)
    plan = PLANS[name]
    report = Report(args.out, args.minutes, {
        "device": machine, "torch": torch.__version__, "seed": SEED, "model": name,
        "steps": plan.steps, "rounds": plan.repeats})
    run_all(report, plan, device)
    print(f"\n{report}\nwrote {args.out}")
    if report.failed:
        print(f"{len(report.failed)} FAILED", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)
