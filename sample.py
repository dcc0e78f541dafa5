"""From noise to pictures: guidance, the denoising loop, and the command.

    python sample.py                                  # digits with the shipped router
    python sample.py --compare --out compare.png      # full and cached from the same noise
    python sample.py --schedule fora:2 --labels 0,1,2 --num-samples 30

Letters: B images, C channels of the latent (of the pixels, for digits), T steps, K branches.
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import command
import models
import router
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
# Pictures


def to_pixels(x):
    """Images (B, C, H, W) in [-1, 1], grey or RGB -> uint8 (B, H, W, 3)."""
    pixels = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def grid(images, columns=10):
    """uint8 (N, H, W, 3) -> one picture, row by row; small images are enlarged."""
    N, H, W, _ = images.shape
    scale, columns = max(1, round(84 / H)), min(N, columns)
    rows = -(-N // columns)
    canvas = np.full((rows * columns, H + 1, W + 1, 3), 255, np.uint8)
    canvas[:N, :H, :W] = images
    canvas = canvas.reshape(rows, columns, H + 1, W + 1, 3).swapaxes(1, 2)
    picture = Image.fromarray(canvas.reshape(rows * (H + 1), columns * (W + 1), 3))
    return picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)


def stack(titles, pictures):
    """Pictures below one another, each under its title."""
    bar = 30
    height = sum(picture.height + bar for picture in pictures)
    canvas = Image.new("RGB", (max(picture.width for picture in pictures), height), "white")
    y = 0
    for title, picture in zip(titles, pictures, strict=True):
        ImageDraw.Draw(canvas).text((4, y + 6), title, "black", ImageFont.load_default(16))
        canvas.paste(picture, (0, y + bar))
        y += bar + picture.height
    return canvas


def write(out, images, first=0):
    """uint8 (N, H, W, 3) -> a PNG grid, an ADM-style npz (`arr_0`), or, if `out` has no suffix, a
    folder of PNGs numbered from `first`. Latents (N, C, H, W) go into an npz, as `latents`."""
    if out.suffix == ".png":
        command.save_image(out, grid(images))
    elif out.suffix == ".npz":
        with command.replacing(out) as temporary:
            np.savez(temporary, **{"arr_0" if images.dtype == np.uint8 else "latents": images})
    else:
        for j, image in enumerate(images):
            command.save_image(out / f"{first + j:06d}.png", Image.fromarray(image))


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


def choose_labels(text, classes, count):
    """`--labels 3,1,4`, repeated to `count` images; without it every class in turn: -> (count,).
    Raises ValueError for anything but labels of this model."""
    labels = text.split(",") if text else [str(label) for label in range(classes)]
    if not all(label.strip().isdecimal() and int(label) < classes for label in labels):
        raise ValueError(f"--labels takes numbers from 0 to {classes - 1}, like 3,1,4; not {text}")
    return torch.tensor([int(labels[j % len(labels)]) for j in range(count)])


def choose_out(args, model):
    """The path to write to, tried out now rather than after the work. Raises ValueError or OSError
    if it cannot take what the command makes."""
    out = args.out or Path("latents.npz" if model.latent else "samples.png")
    if out.suffix not in ("", ".png", ".npz"):
        raise ValueError(f"--out is a .png, a .npz or a folder (a name without a dot), not {out}")
    if model.latent and (out.suffix != ".npz" or args.compare):
        raise ValueError(
            f"{model.name} makes latents, and this version has no autoencoder to turn them into "
            "pictures: use --out NAME.npz, without --compare"
        )
    if args.compare and out.suffix != ".png":
        raise ValueError(f"--compare draws one picture: use --out NAME.png, not {out}")
    command.check_writable(out if out.suffix else out / "000000.png")
    return out


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


def generate(model, sampler, guidance, labels, seed, batch_size, cache, compare, totals):
    """Samples in batches: yields the number of the batch's first image, its x_0 (B, C, H, W), and
    the same images made without a cache.

    The latter are made for the first batch, which is enough for time and error, or for all if
    `compare`; else they are None. `cache` is None for sampling without one. Fills in `totals`.
    """
    for first in tqdm(range(0, len(labels), batch_size), unit="batch", disable=None):
        images = range(first, min(first + batch_size, len(labels)))
        noise = Noise(seed, images)
        x = noise.start(model.shape, model.device)
        condition = model.network.condition(labels[first : images.stop])
        if first == 0:  # one evaluation that is not timed, to warm up
            next(walk(model.network, sampler, x, condition, guidance, noise=noise))
        full = None
        both = cache is not None and (compare or first == 0)
        if both:
            full, full_seconds = timed_denoise(model, sampler, x, condition, guidance, noise=noise)
        x, seconds = timed_denoise(model, sampler, x, condition, guidance, cache, noise)
        if both or cache is None:
            totals.images += len(images)
            totals.seconds += seconds
        if both:
            totals.full_seconds += full_seconds
            totals.squared_error += len(images) * (x - full).double().square().mean().item()
        yield first, x, full


def report(network, steps, cache, totals):
    """Prints what sampling took."""
    seconds = totals.seconds / totals.images
    branch_flops, other_flops = network.flops()
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
          f"mean squared error to the uncached image: "
          f"{totals.squared_error / totals.images:.2e} ({totals.images} images)")


def comparison(full, cached, totals, cache):
    """The picture of --compare, from uint8 (N, H, W, 3) without and with the cache."""
    difference = np.abs(full.astype(int) - cached.astype(int))
    titles = [
        f"no cache: {totals.full_seconds / totals.images:.3f} s per image",
        f"cached, CUR {100 * cache.cur:.1f} %: {totals.seconds / totals.images:.3f} s per image",
        "difference, 4 times enlarged",
    ]
    pictures = [full, cached, (4 * difference).clip(0, 255).astype(np.uint8)]
    return stack(titles, [grid(images) for images in pictures])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_model_flags(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--router", type=Path, help="router file (default: the shipped one)")
    which.add_argument("--schedule", help="none, fora:N, fora-paper:N or random:CUR")
    parser.add_argument("--tau", type=float, help="threshold, if not the router's own")
    parser.add_argument("--labels", help="like 3,1,4, repeated; default: every class in turn")
    parser.add_argument("--num-samples", type=int, default=20, help="images (20)")
    parser.add_argument("--batch-size", type=int, default=20, help="images at once (20)")
    parser.add_argument("--compare", action="store_true", help="draw full, cached, difference")
    parser.add_argument("--out", type=Path, help=".png (grid), .npz (ADM style) or a folder")
    args = parser.parse_args()
    if args.num_samples < 1 or args.batch_size < 1:
        raise ValueError("--num-samples and --batch-size must be 1 or more")

    model = models.load(args.model, args.weights, args.device, args.dtype)
    steps = model.steps if args.steps is None else args.steps
    guidance = model.guidance if args.guidance is None else args.guidance
    sampler_name = args.sampler or model.sampler
    sampler = make_sampler(sampler_name, steps)
    schedule, source = choose_schedule(args, model, sampler_name, steps, guidance)
    labels = choose_labels(args.labels, model.network.num_classes, args.num_samples)
    out = choose_out(args, model)
    print(f"{model.name}, {sampler_name}, T = {steps}, guidance {guidance:g}, seed {args.seed}, "
          f"{model.device}\n{source}, CUR {100 * router.cur(schedule):.1f} %")

    cache = None if schedule.all() and not args.compare else Cache(schedule)
    totals, kept, kept_full = Totals(), [], []
    batches = generate(model, sampler, guidance, labels, args.seed, args.batch_size, cache,
                       args.compare, totals)
    for first, x, full in batches:
        images = x.cpu().numpy() if model.latent else to_pixels(x)
        if out.suffix:
            kept.append(images)
        else:
            write(out, images, first)
        if args.compare:
            kept_full.append(to_pixels(full))
    report(model.network, steps, cache, totals)
    if args.compare:
        picture = comparison(np.concatenate(kept_full), np.concatenate(kept), totals, cache)
        command.save_image(out, picture)
    elif out.suffix:
        write(out, np.concatenate(kept))
    print(f"wrote {out}")


if __name__ == "__main__":
    command.run(main)
