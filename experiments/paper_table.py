"""The tables of the paper (https://arxiv.org/abs/2410.01723, section 4), re-run: every way to save
time beside the others, on the same noise.

    python -m experiments.paper_table                              # digits, T = 20
    python -m experiments.paper_table --steps 10 --curs 40
    python -m experiments.paper_table --model emoji --curs 40 --speedups 1.5,2,2.5,3
    python -m experiments.paper_table --model dit256 --curs 35 --num-samples 50000 \\
        --reference VIRTUAL_imagenet256_labeled.npz --images train

Rows: no cache; fewer steps; FORA, both readings; and for each target CUR a random schedule and the
routers of Learning-to-Cache (below 50 %, for a model that takes labels), SDT + LTC, HarmoniCa, and
HarmoniCa with the official code's cumulative proxy. Some methods are not in the paper and come with
--methods only: "HarmoniCa from alternation" starts from that schedule instead of random logits,
"sensitivity" weights errors by lambda / MSE, the same with "forecast 1" forecasts as well, and
"direct" trains on the image error itself. Routers that are not in checkpoints/table are trained
first, with --target-cur.

With dpm-solver-2s a U-ViT has rows of DeepCache and Faster Diffusion too, which reuse hidden states
(deepcache.py).

For each of the --speedups there are rows of equal arithmetic: fewer steps without a cache, whole
steps evenly spaced with forecasts of order 0, 1 and 2, and the schedule that search.py finds.

The folder --out gets table.md, table.json, quality.png, and error.png (how far x_t is from the
uncached trajectory, step by step). Rows that are there already are not made again, so an
interrupted command goes on where it was. The table and the figures show the last command's rows.

Notation: T denoising steps, K branches, CUR the cache utilisation ratio.
"""

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import dataclasses
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import budget
import command
import features
import metrics
import models
import pictures
import router as routers
import sample
import shipped
from cache import Cache
from deepcache import DeepCache, FasterDiffusion, key_evaluations
from experiments.table_files import is_row, read_json, read_training
from experiments.table_text import markdown, paper_figures, summary
from experiments.train_ltc import SINGLE_STEPS
from samplers import Noise, sampler_name, walk
from training import named_alike

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "checkpoints" / "table"
FEWER = {("ddim", 50): 39, ("ddim", 20): 14, ("ddim", 10): 9, ("dpm-solver++", 20): 15,
         ("ddpm", 100): 75, ("sa-solver", 25): 20}  # steps of the paper's own first baseline
HIDDEN = {  # method, for a U-ViT with dpm-solver-2s: T -> its cache
    "DeepCache, m = 1": lambda T: DeepCache(key_evaluations(T, "middles"), 1),
    "DeepCache, m = 2": lambda T: DeepCache(key_evaluations(T, "middles"), 2),
    "DeepCache, m = 1, keys at starts": lambda T: DeepCache(key_evaluations(T, "starts"), 1),
    "Faster Diffusion": lambda T: FasterDiffusion(key_evaluations(T, "middles")),
    "Faster Diffusion, keys at starts": lambda T: FasterDiffusion(key_evaluations(T, "starts")),
}
TRAINED = {  # method: the module that trains its routers, and its flags
    "Learning-to-Cache": ("experiments.train_ltc", []),
    "SDT + LTC": ("train_stepwise", ["--objective", "ltc"]),
    "HarmoniCa": ("train_stepwise", []),
    "HarmoniCa, cumulative": ("train_stepwise", ["--proxy", "cumulative"]),
    "HarmoniCa from alternation": ("train_stepwise", ["--start", "fora-paper:2"]),
    "sensitivity": ("train_stepwise", ["--objective", "sensitivity"]),
    "sensitivity, forecast 1": ("train_stepwise", [
        "--objective", "sensitivity", "--forecast", "1", "--start", "fora-paper:2"]),
    "direct": ("experiments.train_direct", []),
}
EVEN = {"even": 0, "even, forecast 1": 1, "even, forecast 2": 2}  # method: order of the forecast
AT_SPEEDUPS = ["fewer steps", *EVEN, "searched"]
# Not in the paper: made by --methods only
EXTRA = ["HarmoniCa from alternation", "sensitivity", "sensitivity, forecast 1", "direct"]
USUAL = ["random", *(method for method in TRAINED if method not in EXTRA)]
MOST_IMAGES, MOST_SEEDS = 1_000_000, 1000
TIMED = 5  # batches of a row that are timed beside the same without a cache
FIXED = {"no cache": "none", "fewer steps": "none", "FORA, released code": "fora:2",
         "FORA, as reported": "fora-paper:2"}

# ------------------------------------------------------------------------------------------------
# The rows


@dataclasses.dataclass
class Row:
    """One set of images: a method at a target CUR or a speed-up by arithmetic (both None: it has
    its own), from one seed."""

    model: str
    sampler: str
    steps: int
    method: str
    target: float | None = None
    seed: int = 0
    speedup: float | None = None

    @property
    def name(self):
        words = [self.model, self.sampler, self.steps, self.method]
        words += [] if self.target is None else [f"{100 * self.target:g}", self.seed]
        words += [] if self.speedup is None else [f"{self.speedup:g}x", self.seed]
        return "-".join(str(word).lower() for word in words).translate(
            {ord(","): None, ord(" "): "_", ord("+"): "p", ord(":"): "_"})


def plan(model, sampler, steps, curs, seeds, methods=USUAL, speedups=()):
    """The rows of a table: a list. `methods` are those to have at each target CUR."""
    rows = [Row(model.name, sampler, steps, "no cache")]
    fewer = FEWER.get((sampler, steps), fewer_steps(sampler, steps, 4 / 3))
    rows.append(Row(model.name, sampler, fewer, "fewer steps"))
    fixed = [*list(FIXED)[2:], *(HIDDEN if sampler == "dpm-solver-2s" else ())]
    rows += [Row(model.name, sampler, steps, name) for name in fixed]
    for target in curs:
        for method in methods:
            if model.text and method in ("Learning-to-Cache", "direct"):
                continue  # written for classes
            if method == "Learning-to-Cache" and (target >= 0.5 or sampler not in SINGLE_STEPS):
                continue  # it reuses at every other step at most, and is defined for single steps
            rows += [Row(model.name, sampler, steps, method, target, s) for s in range(seeds)]
    for speedup in speedups:
        for method in AT_SPEEDUPS:
            T = fewer_steps(sampler, steps, speedup) if method == "fewer steps" else steps
            rows += [Row(model.name, sampler, T, method, None, s, speedup)
                     for s in range(seeds if method == "searched" else 1)]
    return rows


def fewer_steps(sampler, steps, speedup):
    """The number of steps that is so much faster, to the nearest: an even one for dpm-solver-2s."""
    unit = 2 if sampler == "dpm-solver-2s" else 1
    return unit * round(steps / speedup / unit)


def find_router(row, args, out):
    """The router file of a trained row: shipped, made in `out` before, or trained now.
    -> its path, and what its training took, a dict."""
    for folder in (SHIPPED, out / "routers"):
        path = folder / f"{row.name}.safetensors"
        if path.exists():
            return path, {} if row.speedup else read_training(path.with_suffix(".json"))
    run = out.resolve() / "training" / row.name  # the trainer runs in another folder
    module, flags = ("search", []) if row.method == "searched" else TRAINED[row.method]
    flags = ["--model", row.model, "--steps", row.steps, "--sampler", row.sampler,
             *(["--speedup", row.speedup] if row.speedup else ["--target-cur", row.target]),
             "--seed", row.seed, *flags, "--out", run, "--resume"]
    learning_to_cache = row.method == "Learning-to-Cache"
    for key in ("images", "vae"):
        if learning_to_cache and getattr(args, key) is not None:
            flags += [f"--{key}", from_anywhere(getattr(args, key))]
    if not learning_to_cache:
        flags += ["--guidance", args.guidance]
    for key in ("weights", "device", "dtype", "prompts"):
        if key == "prompts" and module == "search":
            continue  # it draws from the model's own
        if getattr(args, key) is not None:
            flags += [f"--{key}", from_anywhere(getattr(args, key))]
    print(f"training {row.name}")
    done = subprocess.run([sys.executable, "-m", module, *map(str, flags)], cwd=ROOT)
    if done.returncode:
        raise ValueError(f"the training of {row.name} ended as said above; if it was interrupted, "
                         "the same command goes on with it")
    if not row.speedup:  # a search trains nothing
        with command.replacing(path.with_suffix(".json")) as temporary:
            temporary.write_text((run / "results.json").read_text())
    with command.replacing(path) as temporary:
        temporary.write_bytes((run / "router.safetensors").read_bytes())
    return path, {} if row.speedup else read_training(path.with_suffix(".json"))


def from_anywhere(name):
    """A file's name as it is found from every folder; another name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def schedule_of(row, model, args, out):
    """-> the row's schedule (steps, K), the order of its forecast, and what its training took."""
    branches = len(model.network.branches)
    if row.method in FIXED:
        return routers.named(FIXED[row.method], row.steps, branches), 0, {}
    if row.method == "random":
        return routers.random(row.steps, branches, row.target, row.seed), 0, {}
    if row.method in EVEN:
        schedule = budget.even(row.steps, budget.make_budget(model, row.steps, row.speedup))
        return schedule, EVEN[row.method], {}
    path, training = find_router(row, args, out)
    file = routers.load(path)
    file.check(row.model, row.sampler, row.steps, branches)
    return file.schedule(), file.forecast, training


def cache_of(row, model, args, out):
    """-> the row's cache, how many branches each step computes, a list of T, and what its training
    took."""
    if row.method in HIDDEN:
        cache, K = HIDDEN[row.method](row.steps), len(model.network.branches)
        return cache, [K if key else 2 * cache.outer(model.network) for key in cache.keys], {}
    schedule, order, training = schedule_of(row, model, args, out)
    return Cache(schedule, order), schedule.sum(1).tolist(), training


# ------------------------------------------------------------------------------------------------
# What is measured


def draw(model, row, steps, cache, guidance, items, seed, batch_size, decode, path):
    """Makes a row's images and writes them, uint8 (N, H, W, 3) as `arr_0` of an npz. -> a dict of
    what sampling them took. Image j has the same noise, by `seed`, in every row.

    The first batches are also made without a cache at T = `steps`, in turn with the row's own: rows
    are minutes apart, and the speed of a machine drifts."""
    sampler = models.make_sampler(model.name, row.sampler, row.steps)
    images, seconds, faster = [], [], []
    for batch in sample.generate(model, sampler, guidance, items, seed, batch_size, cache,
                                 twice=TIMED, words=row.name, full_sampler=models.make_sampler(
                                     model.name, row.sampler, steps)):
        images.append(decode(batch.x))
        seconds.append(batch.seconds / len(batch.x))
        if batch.full is not None:
            faster.append(batch.full_seconds / batch.seconds)
    pictures.write(path, np.concatenate(images))
    return {
        "cur": cache.cur, "seconds": statistics.median(seconds),
        "faster": statistics.median(faster),
        "gflop": sample.counted_flops(model, cache, guidance) / 1e9,
        "cache_mb": cache.peak_bytes / 1e6,
    }


def error_to(uncached, path, batch_size=500):
    """The mean squared error of an npz's images to those of another, pixels in [-1, 1]."""
    (total, a), (_, b) = pictures.read(str(path)), pictures.read(str(uncached))
    pairs = zip(pictures.batches(a, total, batch_size, "error"),
                pictures.batches(b, total, batch_size, "uncached"), strict=True)
    sums = [len(x) * np.square((x.astype(np.float64) - y) / 127.5).mean() for x, y in pairs]
    return sum(sums) / total


def measure(row, model, guidance, items, args, out, look):
    """One row of the table: a dict of numbers, made or found in `out`. Raises ValueError if what
    is found was measured otherwise."""
    about = {**dataclasses.asdict(row), "images": len(items), "guidance": guidance,
             "reference": args.reference, "batch_size": args.batch_size,
             "dtype": models.dtype_name(args.dtype), "noise": args.seed, "timed": TIMED,
             "contents": look.contents}
    known = out / "rows" / f"{row.name}.json"
    images = out / "images" / f"{row.name}.npz"
    # The uncached images are needed by every row that is still to come.
    if known.exists() and (row != look.first or images.exists()):
        values = read_json(known, is_row)
        if named_alike(values["about"]) != about:
            raise ValueError(f"{known} was measured with other settings: choose another --out")
        return values
    cache, computed, training = cache_of(row, model, args, out)
    values = draw(model, row, look.first.steps, cache, guidance, items, args.seed, args.batch_size,
                  look.decode, images)
    values["error"] = error_to(out / "images" / f"{look.first.name}.npz", images)
    values |= metrics.evaluate(str(images), look.reference, network=look.network)
    if look.clip:
        values["clip"] = metrics.clip_score(pictures.read(str(images))[1], items, look.clip)
    values |= {"about": about, "training": training, "computed": computed}
    with command.replacing(known) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")
    return values


@dataclasses.dataclass
class Look:
    """What a table's images are looked at with."""

    first: Row  # the uncached one
    decode: object  # x_0 -> uint8
    network: object
    reference: object
    clip: object
    contents: dict  # what tells the weights, what the images show, and the reference from others


def accumulated(model, row, cache, guidance, items, seed):
    """The mean squared error of x_t against the uncached trajectory, after each step: list of T."""
    samplers = [models.make_sampler(model.name, row.sampler, row.steps) for _ in range(2)]
    noise = Noise(seed, range(len(items)))
    x, condition = noise.start(model.shape, model.device), model.condition(items)
    full, cached = (
        walk(model.network, sampler, x, condition, guidance, each, noise)
        for sampler, each in zip(samplers, (None, cache), strict=True)
    )
    return [(a - b).square().mean().item() for a, b in zip(full, cached, strict=True)]


# ------------------------------------------------------------------------------------------------
# The command


def read_flags():
    """-> the flags, with `curs` and `methods` as lists. Raises ValueError."""
    parser = command.Parser(__doc__)
    command.add_model_flags(parser)
    parser.add_argument("--curs", type=command.name, default="25,40,55",
                        help="the CURs to compare at, in percent")
    parser.add_argument("--methods", type=command.name, default=";".join(USUAL),
                        help="the methods to have at each of --curs, like 'random;HarmoniCa' "
                             f"(default: {';'.join(USUAL)}; also {';'.join(EXTRA)})")
    parser.add_argument("--speedups", type=command.name,
                        help="speed-ups by arithmetic to compare at, like 1.5,2 (none)")
    parser.add_argument("--seeds", type=int, default=1,
                        help="routers of each kind, from seed 0 on (1); --seed is the images' own")
    parser.add_argument("--num-samples", type=int, default=2000, help="images a row (2000)")
    parser.add_argument("--batch-size", type=int, default=25, help="images at once (25)")
    parser.add_argument("--reference", type=command.name,
                        help="what the images are compared with (as metrics.py)")
    parser.add_argument("--images", type=command.name,
                        help="a folder of one folder a class, for Learning-to-Cache")
    parser.add_argument("--prompts", type=command.name,
                        help="a file of prompts, one a line, for a text model")
    parser.add_argument("--vae", type=command.place,
                        help="the autoencoder's weights, if not the usual file or folder")
    parser.add_argument("--out", type=command.name, help="folder (default: runs/table-MODEL-T)")
    args = parser.parse_args()
    args.curs, args.methods = read_curs(args.curs), args.methods.split(";")
    args.speedups = read_speedups(args.speedups or "")
    known = [*USUAL, *EXTRA]
    unknown = [method for method in args.methods if method not in known]
    if unknown:
        raise ValueError(f"no method {', '.join(unknown)}: use {';'.join(known)}")
    curs = {f"{100 * cur:g}" for cur in args.curs}  # as in the names of rows
    if len(set(args.methods)) < len(args.methods) or len(curs) < len(args.curs):
        raise ValueError("--methods and --curs name everything once")
    if args.batch_size < 1 or not 1 <= args.seeds <= MOST_SEEDS or not (
        4 <= args.num_samples <= MOST_IMAGES
    ):
        raise ValueError(f"--batch-size must be 1 or more, --seeds 1 to {MOST_SEEDS}, "
                         f"--num-samples 4 or more, {MOST_IMAGES:,} at most")
    return args


def read_curs(text):
    """`25,40,55`, in percent -> a list of shares. Raises ValueError."""
    try:
        curs = [float(part) / 100 for part in text.split(",")]
    except ValueError:
        curs = []
    if not curs or not all(0 < cur < 1 for cur in curs):
        raise ValueError(f"--curs takes percentages like 25,40,55, not {text}")
    return curs


def read_speedups(text):
    """`1.5,2` -> a list of numbers above 1, also an empty one. Raises ValueError."""
    try:
        speedups = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        speedups = [0]
    names = {f"{speedup:g}" for speedup in speedups}  # as in the names of rows
    if not all(1 < speedup < 1000 for speedup in speedups) or len(names) < len(speedups):
        raise ValueError(f"--speedups takes numbers above 1, each once, like 1.5,2, not {text}")
    return speedups


def import_figures():
    """The module that draws. Only it needs matplotlib. Raises ValueError if that is missing."""
    try:
        import experiments.table_figures as table_figures
    except ImportError as error:
        raise ValueError(f"the figures need matplotlib ({error}): install requirements-dev.txt"
                         ) from error
    return table_figures


def load_model(args):
    """-> the model, ready on its device, and what its images show. The network comes last: a text
    encoder is gone again by then. Completes `args` with the model's own settings."""
    model = models.load(args.model, args.weights, "cpu", args.dtype)
    if model.text and "direct" in args.methods:
        raise ValueError(f"direct needs a model that takes labels; {model.name} takes prompts")
    if model.text is None and args.prompts:
        raise ValueError(f"{model.name} takes labels, not prompts: leave --prompts out")
    if model.name in pictures.NAMED:
        args.reference = args.reference or model.name
    if not args.reference:
        raise ValueError(f"name the --reference to compare {model.name}'s images with")
    args.guidance = model.guidance if args.guidance is None else args.guidance
    args.steps = model.steps if args.steps is None else args.steps
    args.sampler = sampler_name(args.sampler or model.sampler)
    models.make_sampler(model.name, args.sampler, args.steps)
    if max(args.curs) > 1 - 1 / args.steps:
        raise ValueError(f"--curs: of T = {args.steps} steps the first computes everything, so a "
                         f"CUR is {100 - 100 / args.steps:.4g} % at most")
    for speedup in args.speedups:  # one that cannot be reached is found now
        asked = budget.make_budget(model, args.steps, speedup)
        asked.check(budget.even(args.steps, asked))
        models.make_sampler(model.name, args.sampler,
                            fewer_steps(args.sampler, args.steps, speedup))
    prompts = shipped.read_prompts(args.prompts) if args.prompts else None
    items = model.items(args.num_samples, prompts)
    device = models.find_device(args.device)
    models.choose_kernels(device)
    model.prepare(list(dict.fromkeys(items)), device)
    return model.to(device), items


def check_outputs(out, rows):
    """Raises OSError, before the work, if one of the files of a table cannot be written."""
    files = [out / name for name in ("table.md", "table.json", "quality.png", "error.png")]
    for row in rows:
        files += [out / "rows" / f"{row.name}.json", out / "images" / f"{row.name}.npz"]
    for file in files:
        command.check_writable(file)


def contents_of(model, items, reference):
    """What tells a model's weights, what the images show, and a reference from others: a dict."""
    path = Path(reference)
    data = path.read_bytes() if path.is_file() else b""
    return {"weights": model.fingerprint(),
            "items": hashlib.sha256(repr(items).encode()).hexdigest(),
            "reference": hashlib.sha256(data).hexdigest()}


def prepare(args, model, items, rows):
    """-> what the table's images are looked at with. Raises ValueError for a reference that cannot
    be compared with."""
    if not pictures.is_named(args.reference) and not Path(args.reference).exists():
        raise FileNotFoundError(f"no --reference at {args.reference}")
    network = features.load(metrics.usual_features(args.reference), device=model.device)
    reference = metrics.statistics_of(args.reference, network)
    numbers = [value for value in vars(reference).values() if torch.is_tensor(value)]
    if not all(value.isfinite().all() for value in numbers):
        raise ValueError(f"the statistics of {args.reference} are not all finite")
    clip = None
    if model.text:
        which = "emoji" if args.model == "emoji" else "ViT-B-32"
        clip = features.load_clip(which, "openai", model.device)
    return Look(rows[0], sample.make_decoder(model, args.vae), network, reference, clip,
                contents_of(model, items, args.reference))


def main():
    args = read_flags()
    table_figures = import_figures()
    model, items = load_model(args)
    out = Path(args.out or f"runs/table-{args.model}-{args.steps}")
    rows = plan(model, args.sampler, args.steps, args.curs, args.seeds, args.methods,
                args.speedups)
    look = prepare(args, model, items, rows)
    with command.locked(out):
        check_outputs(out, rows)
        write_table(model, items, args, out, rows, look, table_figures)


def write_table(model, items, args, out, rows, look, table_figures):
    """Measures the rows that are not there yet, and writes the table and the figures of all."""
    steps, sampler, guidance = args.steps, args.sampler, args.guidance
    start = time.perf_counter()
    values = [measure(row, model, guidance, items, args, out, look) for row in rows]
    table = summary(rows, values)
    words = markdown(table, paper_figures(args.model, sampler))
    title = f"{args.model}, {sampler}, T = {steps}, guidance {guidance:g}"
    errors = {}
    for row in rows:
        if row.target == args.curs[len(args.curs) // 2] and row.seed == 0:  # one CUR shows it
            schedule, order, _ = schedule_of(row, model, args, out)
            name = f"{row.method}, CUR {100 * routers.cur(schedule):.1f} %"
            errors[name] = row.method, accumulated(model, row, Cache(schedule, order), guidance,
                                                   items[:64], args.seed)
    about = {"model": args.model, "sampler": sampler, "steps": steps, "guidance": guidance,
             "images": len(items), "seed": args.seed, "reference": args.reference,
             "metrics by": look.network.name}
    with command.replacing(out / "table.md") as temporary:
        temporary.write_text(words)
    with command.replacing(out / "table.json") as temporary:
        content = {"about": about, "table": table, "errors": errors}
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    table_figures.draw_quality(table, out / "quality.png", f"{title}, {len(items)} images")
    timesteps = models.make_sampler(model.name, sampler, steps).timesteps
    table_figures.draw_error(errors, timesteps, out / "error.png", title)
    print(f"{title}, {len(items)} images a row, seed {args.seed}; "
          f"metrics by {look.network.name}\n\n{words}")
    print(f"{time.perf_counter() - start:.0f} s; wrote table.md, table.json, quality.png and "
          f"error.png in {out}")


if __name__ == "__main__":
    command.run(main)
