"""From noise to pictures: the command.

    python sample.py                                  # digits with the shipped router
    python sample.py --measure                        # and what the cache wins and costs
    python sample.py --compare --out compare.png      # full and cached from the same noise
    python sample.py --schedule fora:2 --labels 0,1,2 --num-samples 30
    python sample.py --model pixart256 --prompt "a red apple" --prompt "a dog"
    python sample.py --model dit256 --labels random --num-samples 50000 --out images
    torchrun --nproc_per_node 4 sample.py --model dit256 --num-samples 50000 --out images

`samplers.denoise` is the loop that does the work.

Notation: B images at once, N in all, C channels of the latent (or of the pixels), T steps,
K branches.
"""

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

import checkpoint
import command
import distributed
import layout
import models
import pictures
import router
import shipped
from cache import Cache
from samplers import Noise, denoise, sampler_name, walk
from text import check as check_prompt

# ------------------------------------------------------------------------------------------------
# What to make


def choose_schedule(model, sampler, steps, guidance, path=None, name=None, tau=None, seed=0,
                    forecast=None):
    """A router file, or a schedule by name, or else the shipped router, at threshold `tau` (None:
    the router's own) -> schedule (T, K), the order of the cache's forecast, and words that say
    where the schedule comes from. `sampler` is its name. Raises ValueError or FileNotFoundError;
    also if a router is to forecast in another order than it was made for."""
    branches = len(model.network.branches)
    if name and tau is not None:
        raise ValueError("--tau is the threshold of a router; a --schedule has none")
    if name:
        words = f"schedule {name}" + (f", forecast of order {forecast}" if forecast else "")
        return router.named(name, steps, branches, seed), forecast or 0, words
    if path is None:
        # The shipped router was trained for the model's own sampler and T, and is for no others.
        if (sampler, steps) != (model.sampler, model.steps) or model.router is None:
            words = f"no router is shipped for {model.name} with {sampler}, T = {steps}: no cache"
            known = known_router(model.name, sampler, steps)
            words += f" (--router {known} is one of the table's)" if known else ""
            return router.none(steps, branches), 0, words
        path = model.router
    file = router.load(path)
    check_router(file, model, sampler, steps)
    if forecast not in (None, file.forecast):
        raise ValueError(f"{path} was made for --forecast {file.forecast}, not {forecast}")
    tau = file.tau if tau is None else tau
    words = f"router {path}, tau {tau:g}"
    words += f", forecast of order {file.forecast}" if file.forecast else ""
    if float(file.about["guidance"]) != guidance:
        words += f", trained at guidance {file.about['guidance']}"
    return file.schedule(tau), file.forecast, words


def check_router(file, model, sampler, steps):
    """Raises ValueError, which says the flags that fit it, if a router is not for these."""
    (T, K), branches, name = file.logits.shape, len(model.network.branches), file.about["model"]
    try:
        file.check(model.name, sampler, steps, branches)
    except ValueError as error:
        own = {"model": model.name if name == checkpoint.UNNAMED else name,
               "sampler": sampler_name(file.about["sampler"]), "steps": T}
        asked = {"model": model.name, "sampler": sampler, "steps": steps}
        flags = [f"--{key} {own[key]}" for key in own if own[key] != asked[key]]
        fits = own["model"] in models.MODELS and (own["model"] != model.name or branches == K)
        raise ValueError(f"{error}: use {' '.join(flags)}" if fits else str(error)) from error


def known_router(name, sampler, steps):
    """A router of checkpoints/table for a model by name, the first of HarmoniCa's; or None."""
    for path in sorted(models.SHIPPED.glob(f"table/{name}-*-{steps}-harmonica-*.safetensors")):
        if sampler_name(router.load(path).about["sampler"]) == sampler:
            return path
    return None


def choose_labels(text, classes, count, seed):
    """`--labels 3,1,4`, repeated to `count` images; `random`, drawn for each image from the seed
    and its number; without it every class in turn: -> a list of `count`.
    Raises ValueError for anything but labels of this model."""
    if text == "random":
        return Noise(seed, range(count)).labels(classes).tolist()
    labels = text.split(",") if text else [str(label) for label in range(classes)]
    if not all(label.strip().isdecimal() and int(label) < classes for label in labels):
        raise ValueError(f"--labels takes numbers from 0 to {classes - 1}, like 3,1,4, or random; "
                         f"not {text}")
    return [int(labels[j % len(labels)]) for j in range(count)]


def choose_items(model, labels=None, prompts=None, count=None, seed=0):
    """What each image shows: a list of labels or of prompts, in turn. `count` is by default 20, or
    one image for each of the `prompts` given. Raises ValueError."""
    if model.text is None:
        if prompts:
            raise ValueError(f"{model.name} takes labels, not prompts: use --labels")
        count = 20 if count is None else count
        return choose_labels(labels, model.network.num_classes, count, seed)
    if labels:
        raise ValueError(f"{model.name} takes prompts, not labels: use --prompt or --prompts")
    if count is None:
        count = len(prompts) if prompts else 20
    return model.items(count, prompts)


def read_prompts(prompt, path):
    """`--prompt`, a list, or `--prompts`, a file -> a list, or None if neither is given.
    Raises ValueError for a prompt of several lines."""
    if prompt and any("\n" in text for text in prompt):
        raise ValueError("a --prompt is one line")
    if prompt:
        return [shipped.one_line(text) for text in prompt]
    return shipped.read_prompts(path) if path else None


# ------------------------------------------------------------------------------------------------
# Where it goes


def choose_out(out, latents, compare):
    """The path to write to (None: the usual one), tried out now rather than after the work. Raises
    ValueError or OSError if it cannot take what the command makes."""
    if distributed.size() > 1 and (out is None or out.suffix or latents or compare):
        raise ValueError("several processes fill a folder with pictures: use --out with a name "
                         "without a dot, without --latents and --compare")
    out = out or Path("latents.npz" if latents else "samples.png")
    if out.suffix not in ("", ".png", ".npz"):
        raise ValueError(f"--out is a .png, a .npz or a folder (a name without a dot), not {out}")
    if latents and (out.suffix != ".npz" or compare):
        raise ValueError("--latents go into a file: use --out NAME.npz, without --compare")
    if compare and out.suffix != ".png":
        raise ValueError(f"--compare draws one picture: use --out NAME.png, not {out}")
    command.check_writable(out if out.suffix else out / "000000.png")
    return out


def folder_notes(settings, items):
    """What is noted in a folder of images: {file name: text}."""
    return {"items.txt": "".join(f"{item}\n" for item in items),
            "settings.json": json.dumps(settings) + "\n"}


def write_notes(folder, settings, items):
    for name, text in folder_notes(settings, items).items():
        with command.replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def missing(folder, settings, items):
    """The numbers of the images that `folder` does not hold yet, a set. Raises ValueError if its
    notes say that those in it were made with other settings, or show something else."""
    notes = folder_notes(settings, items)
    if not (folder / "settings.json").exists():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ValueError(f"{folder} holds files that this command did not write: choose "
                             "another --out")
        return set(range(len(items)))
    try:
        old = {name: command.read_bytes(folder / name).decode() for name in notes}
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no whole items.txt and settings.json ({error}): choose "
                         "another --out") from error
    lines = old["items.txt"], notes["items.txt"]
    same = lines[0].startswith(lines[1]) or lines[1].startswith(lines[0])  # more or fewer images
    if old["settings.json"] != notes["settings.json"] or not same:
        raise ValueError(f"{folder} holds images made with other settings, see {folder}/"
                         "settings.json: choose another --out")
    return {j for j in range(len(items)) if not (folder / f"{j:06d}.png").exists()}


def check_autoencoder(model, vae=None, latents=False):
    """Raises ValueError for a model without one, FileNotFoundError if its file is not there."""
    if not model.autoencoder and (vae or latents):
        raise ValueError(f"{model.name} makes pixels: --vae and --latents are for latents")
    if vae and not layout.find(vae, "vae").exists():
        raise FileNotFoundError(f"no weights at {vae}")


def make_decoder(model, vae=None, latents=False):
    """What turns x_0 (B, C, H, W) into what is written: uint8 (B, H, W, 3), or latents. `vae` is
    the autoencoder's file, if not the usual one."""
    check_autoencoder(model, vae, latents)
    if not model.autoencoder:
        return pictures.to_pixels
    if latents:
        return lambda x: x.cpu().numpy()
    autoencoder = models.load_autoencoder(model, vae)
    # The network denoises scale * latent.
    return lambda x: pictures.to_pixels(autoencoder.decode(x / model.scale))


# ------------------------------------------------------------------------------------------------
# Making it, and what it takes


@dataclasses.dataclass
class Batch:
    """Images made together; and the same without a cache, if they were made too."""

    numbers: list  # of its images
    x: torch.Tensor  # x_0 (B, C, H, W)
    seconds: float
    full: torch.Tensor | None = None
    full_seconds: float = 0.0


def timed_denoise(model, *args, **kwargs):
    """`denoise`, timed and checked: -> x_0 (B, C, H, W) and seconds."""
    command.synchronize(model.device)  # a GPU may still be at work on what came before
    start = time.perf_counter()
    x = denoise(model.network, *args, **kwargs)
    command.synchronize(model.device)
    seconds = time.perf_counter() - start
    if not torch.isfinite(x).all():
        raise ValueError("the images are not finite: the network overflows; try --dtype float32")
    return x, seconds


def generate(model, sampler, guidance, items, seed, batch_size, cache=None, missing=None, twice=0,
             full_sampler=None, words=None):
    """Samples in batches, which several processes share: yields a Batch each. Of the images
    `missing` (a set; None: all) one is enough for its batch to be made, all of it: rounding may
    differ with what else is in a batch. The first `twice` batches are also made without a cache, by
    `full_sampler` (None: the same sampler). The progress bar says `words`."""
    guidance = None if guidance == 1 else guidance  # the null half would change nothing
    numbers = range(len(items))
    batches = [numbers[k : k + batch_size] for k in range(0, len(items), batch_size)]
    if missing is not None:
        batches = [batch for batch in batches if not missing.isdisjoint(batch)]
    mine = distributed.mine(len(batches))
    for n, b in enumerate(command.progress(mine, unit="batch", desc=words)):
        noise = Noise(seed, batches[b])
        x = noise.start(model.shape, model.device)
        condition = model.condition([items[j] for j in noise.numbers])
        if n == 0:  # the first evaluation of a process is slow: one that is not timed
            next(walk(model.network, sampler, x, condition, guidance, noise=noise))
        full, full_seconds = None, 0.0
        if n < twice:
            full, full_seconds = timed_denoise(model, full_sampler or sampler, x, condition,
                                               guidance, noise=noise)
        x, seconds = timed_denoise(model, sampler, x, condition, guidance, cache, noise)
        yield Batch(noise.numbers, x, seconds, full, full_seconds)


@dataclasses.dataclass
class Totals:
    """Seconds and error of the timed images. Those that were also made without the cache have
    `full_seconds` and an error; then no others are timed."""

    images: int = 0
    seconds: float = 0.0
    full_seconds: float = 0.0
    squared_error: float = 0.0  # between the two ways, summed over the images

    def add(self, batch):
        if batch.full is None and self.full_seconds:
            return  # on another batch the cache may win more or less
        self.images += len(batch.x)
        self.seconds += batch.seconds
        self.full_seconds += batch.full_seconds
        if batch.full is not None:
            error = (batch.x - batch.full).cpu().double().square().mean().item()
            self.squared_error += len(batch.x) * error


def counted_flops(model, cache, guidance=None):
    """Arithmetic of one image in FLOP, from what the cache counted, not from its schedule (a cache
    of hidden states knows it itself)."""
    if hasattr(cache, "run"):
        return (1 if guidance == 1 else 2) * cache.flops(model.network)
    trajectories = (cache.computed[0] + cache.reused[0]) / cache.steps
    return model.flops(cache.steps, [n / trajectories for n in cache.reused], guidance)


def report(model, steps, guidance, cache, totals):
    """Prints what sampling took this process, without the autoencoder."""
    if distributed.size() > 1:
        print(f"of one of {distributed.size()} processes:")
    seconds = totals.seconds / totals.images
    gflop = model.flops(steps, guidance=guidance) / 1e9
    if cache is None:
        print(f"seconds per image {seconds:.4f}, GFLOP per image {gflop:.3f}")
        return
    cached_gflop = counted_flops(model, cache, guidance) / 1e9
    full_seconds = totals.full_seconds / totals.images
    both = (f"{full_seconds:10.4f}  {seconds:10.4f}   {full_seconds / seconds:.2f} x faster"
            if full_seconds else f"{'-':>10}  {seconds:10.4f}")
    print(f"                     no cache      cached\n"
          f"seconds per image  {both}\n"
          f"GFLOP per image    {gflop:10.3f}  {cached_gflop:10.3f}   "
          f"{gflop / cached_gflop:.2f} x by arithmetic, "
          f"{100 * (1 - cached_gflop / gflop):.1f} % saved\n"
          f"CUR counted        {0:8.1f} %  {100 * cache.cur:8.1f} %\n"
          f"cache at its peak  {0:7.2f} MB  {cache.peak_bytes / 1e6:7.2f} MB")
    if full_seconds:
        print(f"mean squared error to the uncached {'latent' if model.autoencoder else 'image'}: "
              f"{totals.squared_error / totals.images:.2e} ({totals.images} images)")
    else:
        print("--measure adds the error and the real speed-up: it makes the first batch twice")


def comparison(full, cached, totals, cache):
    """The picture of --compare, from uint8 (N, H, W, 3) without and with the cache."""
    difference = np.abs(full.astype(int) - cached.astype(int))
    seconds, full_seconds = (t / totals.images for t in (totals.seconds, totals.full_seconds))
    titles = [
        f"no cache: {full_seconds:.3f} s per image",
        f"cached, CUR {100 * cache.cur:.1f} %: {seconds:.3f} s per image, "
        f"{full_seconds / seconds:.2f} x as fast",
        "difference, 4 times enlarged",
    ]
    rows = [full, cached, (4 * difference).clip(0, 255).astype(np.uint8)]
    return pictures.stack(titles, [pictures.grid(images) for images in rows])


# ------------------------------------------------------------------------------------------------
# The command


MOST = 10_000_000  # images; more would fill the memory with their labels alone


def read_flags():
    parser = command.Parser(__doc__)
    command.add_model_flags(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--router", type=command.path, help="router file (default: the shipped one)")
    which.add_argument("--schedule", type=command.name,
                       help="none, fora:N, fora-paper:N or random:CUR")
    parser.add_argument("--tau", type=command.finite, help="threshold, if not the router's own")
    command.add_forecast_flag(parser)
    command.add_compile_flag(parser)
    parser.add_argument("--labels", type=command.name,
                        help="like 3,1,4, repeated; random; default: each in turn")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--prompt", action="append", help="a prompt; may be repeated")
    shown.add_argument("--prompts", type=command.path, help="a file of prompts, one a line")
    command.add_captions_flag(parser)
    parser.add_argument("--height", type=int, help="of the pictures, in pixels (as in training)")
    parser.add_argument("--width", type=int, help="of the pictures, in pixels (as in training)")
    parser.add_argument("--num-samples", type=int, help="images (20, or one for each prompt given)")
    parser.add_argument("--batch-size", type=int, default=20, help="images at once (20)")
    parser.add_argument("--measure", action="store_true",
                        help="make the first batch without the cache, too: error and real speed-up")
    parser.add_argument("--compare", action="store_true",
                        help="draw full, cached, difference; measures them all")
    parser.add_argument("--vae", type=command.place,
                        help="the autoencoder's weights, if not the usual file or folder")
    parser.add_argument("--latents", action="store_true", help="write latents, not pictures")
    parser.add_argument("--out", type=command.path,
                        help=".png (grid; default: samples.png), .npz (ADM style) or a folder, "
                             "which is filled image by image: the same command goes on where it "
                             "was interrupted")
    args = parser.parse_args()
    count = 1 if args.num_samples is None else args.num_samples
    if min(args.batch_size, count) < 1 or count > MOST:
        raise ValueError(f"--num-samples must be 1 to {MOST:,}, --batch-size 1 or more")
    return args


def write_all(batches, out, decode, items, settings, model, cache, compare):
    """Writes the images as they come; only a picture of all needs them at the end. Then the first
    process reports."""
    totals, kept, kept_full = Totals(), [], []
    with contextlib.ExitStack() as stack:
        if out.suffix == ".npz":
            append = stack.enter_context(pictures.npz_writer(out, len(items)))
        elif not out.suffix and distributed.rank() == 0:
            stack.enter_context(command.locked(out))
        distributed.wait()  # nobody writes before the folder is this run's
        for n, batch in enumerate(batches):
            totals.add(batch)
            images = decode(batch.x)
            if out.suffix == ".npz":
                append(images)
            elif not out.suffix:
                if n == 0:
                    write_notes(out, settings, items)
                pictures.write(out, images, batch.numbers)
            else:
                kept.append(images)
            if compare:
                kept_full.append(decode(batch.full))
        distributed.wait()
    if distributed.rank() == 0:
        report(model, settings["steps"], settings["guidance"], cache, totals)
    if compare:
        picture = comparison(np.concatenate(kept_full), np.concatenate(kept), totals, cache)
        command.save_image(out, picture)
    elif out.suffix == ".png":
        pictures.write(out, np.concatenate(kept), titles=items if model.text else None)


@dataclasses.dataclass
class Plan:
    """What the flags ask for, in full."""

    out: Path
    sampler: str
    steps: int
    guidance: float
    schedule: torch.Tensor  # bool (T, K)
    order: int  # of the forecast
    source: str  # where the schedule comes from
    items: list  # labels or prompts


def make_plan(args):
    """Checks what needs no network, in this order, before anything is downloaded: the paths, the
    model's name and size, the autoencoder, the sampler and T, the router or schedule, what the
    images show, and whether there is work for every process. -> Plan. Raises ValueError, OSError.
    """
    out = choose_out(args.out, args.latents, args.compare)
    command.check_not_read(out, args.router, args.prompts, args.weights, args.vae)
    model = models.outline(args.model, args.dtype, args.raw_captions)
    model.resize(args.height, args.width)
    check_autoencoder(model, args.vae, args.latents)
    name = sampler_name(args.sampler or model.sampler)
    steps = model.steps if args.steps is None else args.steps
    guidance = model.guidance if args.guidance is None else args.guidance
    models.make_sampler(model.name, name, steps)
    schedule, order, source = choose_schedule(model, name, steps, guidance, args.router,
                                              args.schedule, args.tau, args.seed, args.forecast)
    items = choose_items(model, args.labels, read_prompts(args.prompt, args.prompts),
                         args.num_samples, args.seed)
    for item in items if model.text else ():
        check_prompt(item)
    distributed.check_enough(math.ceil(len(items) / args.batch_size),
                             "batches of images: use a smaller --batch-size")
    return Plan(out, name, steps, guidance, schedule, order, source, items)


def settings_of(args, plan, model):
    """All that images depend on beside what they show and their number: a dict, noted in a
    folder of images."""
    settings = {
        "model": args.model, "weights": args.weights, "sampler": plan.sampler,
        "steps": plan.steps, "guidance": plan.guidance,
        "schedule": plan.schedule.int().tolist(), "seed": args.seed,
        "dtype": models.dtype_name(args.dtype), "pixels": model.pixels, "vae": args.vae,
        "contents": model.fingerprint(),  # a file may be replaced under the same name
    }
    if plan.order:
        settings["forecast"] = plan.order
    if args.compile:
        settings["compile"] = True
    if model.text == "t5":
        settings["clean_captions"] = model.clean
    return settings


def main():
    args = read_flags()
    device = distributed.join(models.find_device(args.device))
    plan = make_plan(args)
    with distributed.first_process_first():  # on the CPU: the text encoder needs the device first
        model = models.load(args.model, args.weights, "cpu", args.dtype, args.raw_captions)
    model.resize(args.height, args.width)
    models.choose_kernels(device)
    settings, out, items = settings_of(args, plan, model), plan.out, plan.items
    needed = None if out.suffix else missing(out, settings, items)
    if needed == set():
        print(f"{out} holds all {len(items)} images")
        return
    with distributed.first_process_first():
        model.prepare(items, device)  # the text encoder is gone again before the network comes
    model.to(device)
    if args.compile:
        models.compile_branches(model.network)
    with distributed.first_process_first():
        decode = make_decoder(model, args.vae, args.latents)
    print(f"{model.name}, {plan.sampler}, T = {plan.steps}, guidance {plan.guidance:g}, seed "
          f"{args.seed}, {model.device}\n"
          f"{plan.source}, CUR {100 * router.cur(plan.schedule):.1f} %")

    # One batch made twice is enough for time and error.
    twice = math.inf if args.compare else 1 if args.measure else 0
    cache = None if plan.schedule.all() and not twice else Cache(plan.schedule, plan.order)
    sampler = models.make_sampler(model.name, plan.sampler, plan.steps)
    batches = generate(model, sampler, plan.guidance, items, args.seed, args.batch_size, cache,
                       needed, twice if distributed.rank() == 0 else 0)
    write_all(batches, out, decode, items, settings, model, cache, args.compare)
    print(f"wrote {out}")


if __name__ == "__main__":
    command.run(main, several=True)
