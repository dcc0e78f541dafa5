"""From noise to pictures: guidance, the denoising loop, and the command.

    python sample.py                                  # digits with the shipped router
    python sample.py --compare --out compare.png      # full and cached from the same noise
    python sample.py --schedule fora:2 --labels 0,1,2 --num-samples 30
    python sample.py --model pixart256 --prompt "a red apple" --prompt "a dog"
    python sample.py --model dit256 --labels random --num-samples 50000 --out images

Letters: B images, C channels of the latent (or of the pixels), T steps, K branches.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import command
import models
import pictures
import router
import shipped
from cache import Cache
from samplers import DDIM, DDPM, DPMSolverPlusPlus, Noise, SASolver, make_sampler

__all__ = ["DDIM", "DDPM", "DPMSolverPlusPlus", "Noise", "SASolver", "denoise", "guided",
           "make_sampler", "walk"]

# ------------------------------------------------------------------------------------------------
# The denoising loop


def guided(network, x, t, condition, scale, cache=None, channels=math.inf):
    """Classifier-free guidance: one batch of [condition, null], eps = null + scale (cond - null)
    on the leading channels, the network's `guidance_channels` or, if those are fewer, `channels`
    (the sampler's); the others stay as they are.

    x (B, C, H, W), t a number, condition a tuple for 2 B rows -> (2 B, C_out, H, W).
    """
    x = torch.cat([x, x])
    t = torch.full((len(x),), t, device=x.device)
    output = network(x, t, *condition, cache=cache)
    channels = min(network.guidance_channels, channels)
    cond, null = output[:, :channels].chunk(2)
    eps = null + scale * (cond - null)
    return torch.cat([torch.cat([eps, eps]), output[:, channels:]], dim=1)


@torch.no_grad()
def walk(network, sampler, x, condition, guidance, cache=None, noise=None, first=0):
    """The denoising loop, as a generator: yields x (B, C, H, W) after each step from `first` on.
    A sampler with history goes on from step `first` as a copy.copy of itself, made there."""
    for i in range(first, len(sampler.timesteps)):
        if cache is not None:
            cache.start(i)
        prediction = guided(network, x, sampler.timesteps[i], condition, guidance, cache,
                            sampler.guidance_channels)
        x = sampler.step(prediction, i, x, noise)
        yield x


def denoise(network, sampler, x, condition, guidance, cache=None, noise=None, first=0):
    """The denoising loop, to its end: x (B, C, H, W) before step `first` -> x_0."""
    for after in walk(network, sampler, x, condition, guidance, cache, noise, first):
        x = after
    return x


# ------------------------------------------------------------------------------------------------
# The command


def choose_schedule(args, model, sampler, steps, guidance):
    """The flags -> schedule (T, K) and the words that say where it comes from."""
    branches = len(model.network.branches)
    if args.schedule and args.tau is not None:
        raise ValueError("--tau is the threshold of a router; a --schedule has none")
    if args.schedule:
        return router.named(args.schedule, steps, branches, args.seed), f"schedule {args.schedule}"
    path = args.router
    if path is None:
        if (sampler, steps) != (model.sampler, model.steps) or model.router is None:
            words = f"no router is shipped for {model.name} with {sampler}, T = {steps}: no cache"
            return router.none(steps, branches), words
        path = model.router
    file = router.load(path)
    file.check(model.name, sampler, steps, branches)
    tau = file.tau if args.tau is None else args.tau
    words = f"router {path}, tau {tau:g}"
    if float(file.about["guidance"]) != guidance:
        words += f", trained at guidance {file.about['guidance']}"
    return file.schedule(tau), words


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


def choose_items(args, model):
    """What each image is to show, by the flags: a list of labels or of prompts. Prompts are taken
    in turn, each once if no number of images is given. Raises ValueError."""
    if model.text is None:
        if args.prompt or args.prompts:
            raise ValueError(f"{model.name} is told a class, not a prompt: use --labels")
        count = 20 if args.num_samples is None else args.num_samples
        return choose_labels(args.labels, model.network.num_classes, count, args.seed)
    if args.labels:
        raise ValueError(f"{model.name} is told a prompt, not a class: use --prompt or --prompts")
    if args.prompt and any("\n" in prompt for prompt in args.prompt):
        raise ValueError("a --prompt is one line")
    given = args.prompt or (shipped.read_prompts(args.prompts) if args.prompts else None)
    prompts, count = given or model.prompts(), args.num_samples
    if count is None:
        count = len(given) if given else 20
    return [prompts[j % len(prompts)] for j in range(count)]


def choose_out(args):
    """The path to write to, tried out now rather than after the work. Raises ValueError or OSError
    if it cannot take what the command makes."""
    out = args.out or Path("latents.npz" if args.latents else "samples.png")
    if out.suffix not in ("", ".png", ".npz"):
        raise ValueError(f"--out is a .png, a .npz or a folder (a name without a dot), not {out}")
    if args.latents and (out.suffix != ".npz" or args.compare):
        raise ValueError("--latents go into a file: use --out NAME.npz, without --compare")
    if args.compare and out.suffix != ".png":
        raise ValueError(f"--compare draws one picture: use --out NAME.png, not {out}")
    command.check_writable(out if out.suffix else out / "000000.png")
    return out


def folder_notes(settings, items):
    """What is noted in a folder of images: {file name: text}."""
    return {"items.txt": "".join(f"{item}\n" for item in items),
            "settings.json": json.dumps(settings) + "\n"}


def continue_folder(folder, settings, items):
    """How many of the images 0, 1, ... `folder` holds already. Raises ValueError if its notes say
    that they were made with other settings, or show something else."""
    notes = folder_notes(settings, items)
    if not (folder / "settings.json").exists():
        return 0
    old = {name: (folder / name).read_text(encoding="utf-8") for name in notes}
    lines = old["items.txt"], notes["items.txt"]
    same = lines[0].startswith(lines[1]) or lines[1].startswith(lines[0])  # more or fewer images
    if old["settings.json"] != notes["settings.json"] or not same:
        raise ValueError(f"{folder} holds images made with other settings, see {folder}/"
                         "settings.json: choose another --out")
    missing = (j for j in range(len(items)) if not (folder / f"{j:06d}.png").exists())
    return next(missing, len(items))


def make_decoder(model, args):
    """What turns x_0 (B, C, H, W) into what is written: uint8 (B, H, W, 3), or latents."""
    if not model.autoencoder:
        if args.vae or args.latents:
            raise ValueError(f"{model.name} makes pixels: --vae and --latents are for latents")
        return pictures.to_pixels
    if args.latents:
        return lambda x: x.cpu().numpy()
    autoencoder = models.load_autoencoder(model, args.vae)
    return lambda x: pictures.to_pixels(autoencoder.decode(x / model.scale))


@dataclasses.dataclass
class Totals:
    """What sampling took for the images that were timed: with a cache and without one, the same
    images both ways; or, if no cache is used, without."""

    images: int = 0
    seconds: float = 0.0
    full_seconds: float = 0.0
    squared_error: float = 0.0  # between the two ways, summed over the images


def timed_denoise(model, *args, **kwargs):
    """`denoise`, timed and checked: -> x_0 (B, C, H, W) and seconds."""
    command.synchronize(model.device)
    start = time.perf_counter()
    x = denoise(model.network, *args, **kwargs)
    command.synchronize(model.device)
    seconds = time.perf_counter() - start
    if not torch.isfinite(x).all():
        raise ValueError("the images are not finite: the network overflows; try --dtype float32")
    return x, seconds


def generate(model, sampler, guidance, items, seed, batch_size, cache, compare, totals, first=0):
    """Samples in batches, from image number `first` on: yields the number of a batch's first image,
    its x_0 (B, C, H, W), and the same images made without a cache.

    The latter are made for the first batch, which is enough for time and error, or for all if
    `compare`; else they are None. `cache` is None for sampling without one. Fills in `totals`.
    """
    starts = range(first, len(items), batch_size)
    for start in tqdm(starts, unit="batch", disable=None):
        images = range(start, min(start + batch_size, len(items)))
        noise = Noise(seed, images)
        x = noise.start(model.shape, model.device)
        condition = model.condition(items[start : images.stop])
        if start == first:  # one evaluation that is not timed, to warm up
            next(walk(model.network, sampler, x, condition, guidance, noise=noise))
        full = None
        both = cache is not None and (compare or start == first)
        if both:
            full, full_seconds = timed_denoise(model, sampler, x, condition, guidance, noise=noise)
        x, seconds = timed_denoise(model, sampler, x, condition, guidance, cache, noise)
        if both or cache is None:
            totals.images += len(images)
            totals.seconds += seconds
        if both:
            totals.full_seconds += full_seconds
            totals.squared_error += len(images) * (x - full).double().square().mean().item()
        yield start, x, full


def report(model, steps, cache, totals):
    """Prints what sampling took, without the autoencoder."""
    seconds = totals.seconds / totals.images
    branch_flops, other_flops = model.network.flops(*(model.size or ()))
    gflop = 2 * steps * (sum(branch_flops) + other_flops) / 1e9  # with and without the label
    if cache is None:
        print(f"seconds per image {seconds:.4f}, GFLOP per image {gflop:.3f}")
        return
    # Counted: what each branch was really spared, in one average trajectory.
    walks = (cache.computed[0] + cache.reused[0]) / steps
    spared = sum(n * f for n, f in zip(cache.reused, branch_flops, strict=True)) / walks
    share = spared / (steps * (sum(branch_flops) + other_flops))
    full_seconds = totals.full_seconds / totals.images
    print(f"                     no cache      cached\n"
          f"seconds per image  {full_seconds:10.4f}  {seconds:10.4f}   "
          f"{full_seconds / seconds:.2f} x faster\n"
          f"GFLOP per image    {gflop:10.3f}  {gflop * (1 - share):10.3f}   "
          f"{1 / (1 - share):.2f} x by arithmetic, {100 * share:.1f} % saved\n"
          f"CUR counted        {0:8.1f} %  {100 * cache.cur:8.1f} %\n"
          f"cache at its peak  {0:7.2f} MB  {cache.peak_bytes / 1e6:7.2f} MB   "
          f"of {cache.full_bytes / 1e6:.2f} MB that all branches of a batch take\n"
          f"mean squared error to the uncached {'latent' if model.autoencoder else 'image'}: "
          f"{totals.squared_error / totals.images:.2e} ({totals.images} images)")


def comparison(full, cached, totals, cache):
    """The picture of --compare, from uint8 (N, H, W, 3) without and with the cache."""
    difference = np.abs(full.astype(int) - cached.astype(int))
    titles = [
        f"no cache: {totals.full_seconds / totals.images:.3f} s per image",
        f"cached, CUR {100 * cache.cur:.1f} %: {totals.seconds / totals.images:.3f} s per image",
        "difference, 4 times enlarged",
    ]
    rows = [full, cached, (4 * difference).clip(0, 255).astype(np.uint8)]
    return pictures.stack(titles, [pictures.grid(images) for images in rows])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_model_flags(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--router", type=Path, help="router file (default: the shipped one)")
    which.add_argument("--schedule", help="none, fora:N, fora-paper:N or random:CUR")
    parser.add_argument("--tau", type=float, help="threshold, if not the router's own")
    parser.add_argument("--labels", help="like 3,1,4, repeated; random; default: each in turn")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--prompt", action="append", help="a prompt; may be repeated")
    shown.add_argument("--prompts", type=Path, help="a file of prompts, one a line")
    parser.add_argument("--height", type=int, help="of the pictures, in pixels (as in training)")
    parser.add_argument("--width", type=int, help="of the pictures, in pixels (as in training)")
    parser.add_argument("--num-samples", type=int, help="images (20, or one for each prompt given)")
    parser.add_argument("--batch-size", type=int, default=20, help="images at once (20)")
    parser.add_argument("--compare", action="store_true", help="draw full, cached, difference")
    parser.add_argument("--vae", help="the autoencoder's weights, if not the usual file")
    parser.add_argument("--latents", action="store_true", help="write latents, not pictures")
    parser.add_argument("--out", type=Path,
                        help=".png (grid), .npz (ADM style) or a folder, which is filled image by "
                             "image: the same command goes on where it was interrupted")
    args = parser.parse_args()
    if min(args.batch_size, 1 if args.num_samples is None else args.num_samples) < 1:
        raise ValueError("--num-samples and --batch-size must be 1 or more")

    out = choose_out(args)
    device = models.find_device(args.device)
    if args.sampler and args.steps:
        make_sampler(args.sampler, args.steps)  # complains before a download
    model = models.load(args.model, args.weights, "cpu", args.dtype)
    model.resize(args.height, args.width)
    steps = model.steps if args.steps is None else args.steps
    guidance = model.guidance if args.guidance is None else args.guidance
    sampler_name = args.sampler or model.sampler
    sampler = make_sampler(sampler_name, steps)
    schedule, source = choose_schedule(args, model, sampler_name, steps, guidance)
    items = choose_items(args, model)
    settings = {
        "model": args.model, "weights": args.weights, "sampler": sampler_name, "steps": steps,
        "guidance": guidance, "schedule": schedule.int().tolist(), "seed": args.seed,
        "dtype": args.dtype, "pixels": model.pixels, "vae": args.vae,
    }
    first = 0 if out.suffix else continue_folder(out, settings, items)
    if first == len(items):
        print(f"{out} holds all {first} images")
        return
    model.prepare(items, device)  # the text encoder is gone again before the network comes
    model.to(device)
    decode = make_decoder(model, args)
    print(f"{model.name}, {sampler_name}, T = {steps}, guidance {guidance:g}, seed {args.seed}, "
          f"{model.device}\n{source}, CUR {100 * router.cur(schedule):.1f} %")

    cache = None if schedule.all() and not args.compare else Cache(schedule)
    totals, kept, kept_full = Totals(), [], []
    batches = generate(model, sampler, guidance, items, args.seed, args.batch_size, cache,
                       args.compare, totals, first)
    for start, x, full in batches:
        images = decode(x)
        if out.suffix:
            kept.append(images)
        else:
            if start == first:
                for name, text in folder_notes(settings, items).items():
                    with command.replacing(out / name) as temporary:
                        temporary.write_text(text, encoding="utf-8")
            pictures.write(out, images, start)
        if args.compare:
            kept_full.append(decode(full))
    report(model, steps, cache, totals)
    if args.compare:
        picture = comparison(np.concatenate(kept_full), np.concatenate(kept), totals, cache)
        command.save_image(out, picture)
    elif out.suffix:
        pictures.write(out, np.concatenate(kept), titles=items if model.text else None)
    print(f"wrote {out}")


if __name__ == "__main__":
    command.run(main)
