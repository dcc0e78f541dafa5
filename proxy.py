"""The image error proxy: lambda(i), how much the reuse at step i changes the final image
(HarmoniCa, https://arxiv.org/abs/2410.01723, section 3.3).

    lambda(i) = mean (x_0 - x_0^(i))^2

x_0 is generated with the router as it stands, x_0^(i) with row i of its scores multiplied by the
mask M(i), which makes them exactly 1: no reuse at step i. All passes run without gradients, from
the same noise, with the training-time soft cache. That is the paper's leave-one-out proxy. The
official code measures another one, here `cumulative`: W(i) is generated with the rows up to i as
they stand and all later ones at 1, and lambda(i) = mean (W(i) - W(i - 1))^2.

A walk that is masked from row i on equals the unmasked walk before step i. So each fork starts
from the state which the unmasked walk has there: T + T (T - 1) / 2 evaluations in place of T * T,
the same to the last bit.

Letters: B images, T denoising steps, K branches.
"""

import copy
import math

import torch
from PIL import Image, ImageDraw, ImageFont

from cache import SoftCache
from sample import denoise, walk

BLUE = (40, 90, 160)


@torch.no_grad()
def image_error(network, sampler, x, condition, guidance, scores, tau, noise=None,
                variant="leave-one-out"):
    """The proxy, measured: -> lambda (T,) float64 on the CPU, entry 0 (never reused) being 0.

    x (B, C, H, W) is x_T, `condition` the tuple for 2 B rows, `scores` (T, K) in (0, 1), `noise`
    the stream that stochastic samplers draw from. Raises ValueError for another variant.
    """
    if variant not in ("leave-one-out", "cumulative"):
        raise ValueError(f"unknown proxy {variant}: use leave-one-out or cumulative")
    T = len(sampler.timesteps)
    sampler = copy.copy(sampler)  # a solver's history is its own attribute: leave the caller's
    cache = SoftCache(scores.__getitem__, tau)
    unmasked = walk(network, sampler, x, condition, guidance, cache, noise)
    forks = []  # forks[i - 1]: the x_0 reached when masked at row i (cumulative: from row i on)
    for i in range(T):
        if i > 0:
            masked = scores.clone()
            masked[i : (i + 1 if variant == "leave-one-out" else T)] = 1
            fork = cache.fork(masked.__getitem__)
            twin = copy.copy(sampler)  # with its history so far, if it has one
            forks.append(denoise(network, twin, x, condition, guidance, fork, noise, first=i))
        x = next(unmasked)

    compared = [x] * (T - 1) if variant == "leave-one-out" else [*forks[1:], x]
    errors = [
        (a.double() - b.double()).square().mean() for a, b in zip(forks, compared, strict=True)
    ]
    return torch.stack([torch.zeros_like(errors[0]), *errors]).cpu()


def curve(values, timesteps):
    """Draws lambda(i) over the executed steps, on a logarithmic axis: values (T,), the zeros being
    left out -> a Pillow image."""
    width, height, left, right, top, bottom = 760, 400, 84, 24, 44, 56
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    draw.text((left, 12), "image error proxy: lambda at each executed step", "black", font)
    points = [(i, math.log10(value)) for i, value in enumerate(values) if value > 0]
    if not points:
        draw.text((left, height // 2), "lambda is 0 everywhere: no reuse", "black", font)
        return image
    low = math.floor(min(y for _, y in points))
    high = max(low + 1, math.ceil(max(y for _, y in points)))
    T = len(values)

    def place(i, y):
        return (
            left + (width - left - right) * i / (T - 1),
            top + (height - top - bottom) * (high - y) / (high - low),
        )

    for decade in range(low, high + 1):
        draw.line([place(0, decade), place(T - 1, decade)], "lightgray")
        x, y = place(0, decade)
        draw.text((x - 8, y), f"1e{decade}", "black", font, anchor="rm")
    for i in range(0, T, max(1, -(-T // 12))):
        x, y = place(i, low)
        draw.line([(x, y), (x, y + 4)], "black")
        draw.text((x, y + 6), str(timesteps[i]), "black", font, anchor="mt")
    draw.text((left, height - 24), "timestep, in executed order", "black", font)
    draw.line([place(*point) for point in points], BLUE, width=2)
    for point in points:
        x, y = place(*point)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), BLUE)
    return image
