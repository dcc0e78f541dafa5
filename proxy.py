"""The image error proxy: lambda(i), how much the reuse at step i changes the final image
(HarmoniCa, https://arxiv.org/abs/2410.01723, section 3.3).

    lambda(i) = mean (x_0 - x_0^(i))^2

x_0 is generated with the router as it stands. x_0^(i) is generated with row i of the scores
multiplied by the mask M(i), which makes them exactly 1: no reuse at step i. All passes run without
gradients, from the same noise, with the training-time soft cache. This is the paper's leave-one-out
proxy. The official code measures another one, here `cumulative`: W(i) is generated with the rows up
to i as they stand and all later rows at 1, and lambda(i) = mean (W(i) - W(i - 1))^2.

Masking row i (or all rows from i on) changes nothing before step i. So each masked run is forked
off the unmasked run at step i: T + T (T - 1) / 2 evaluations instead of T * T, with bitwise the
same result.

Notation: B images, T denoising steps, K branches.
"""

import copy

import torch

from cache import SoftCache
from samplers import denoise, walk


@torch.no_grad()
def image_error(network, sampler, x, condition, guidance, scores, tau, noise=None,
                variant="leave-one-out"):
    """Measures the proxy: -> lambda (T,) float64 on the CPU. Entry 0 is 0, as row 0 never reuses.

    x (B, C, H, W) is x_T, `condition` the tuple for 2 B rows, `scores` (T, K) in (0, 1), `noise`
    the stream that stochastic samplers draw from. Raises ValueError for another variant.
    """
    if variant not in ("leave-one-out", "cumulative"):
        raise ValueError(f"unknown proxy {variant}: use leave-one-out or cumulative")
    T = len(sampler.timesteps)
    sampler = copy.copy(sampler)  # so that the caller's keeps its own history
    cache = SoftCache(scores.__getitem__, tau)
    unmasked = walk(network, sampler, x, condition, guidance, cache, noise)
    forks = []  # forks[i - 1]: the x_0 reached when row i is masked (cumulative: rows i and later)
    for i in range(T):
        if i > 0:
            masked = scores.clone()
            last = i if variant == "leave-one-out" else T - 1
            masked[i : last + 1] = 1  # r * M(i), without its rounding
            fork = cache.fork(masked.__getitem__)
            twin = copy.copy(sampler)  # with the solver's history so far
            forks.append(denoise(network, twin, x, condition, guidance, fork, noise, first=i))
        x = next(unmasked)

    compared = [x] * (T - 1) if variant == "leave-one-out" else [*forks[1:], x]
    errors = [  # in float64 on the CPU, because Apple's GPUs have none
        (a.cpu().double() - b.cpu().double()).square().mean()
        for a, b in zip(forks, compared, strict=True)
    ]
    return torch.stack([torch.zeros_like(errors[0]), *errors])
