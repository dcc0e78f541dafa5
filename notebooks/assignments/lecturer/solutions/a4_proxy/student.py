"""Assignment 4, the proxy: the solution.

Notation: T denoising steps, K branches, G groups of branches, B images, C channels, H and W sides.
`scores` (T, K) are a router's, in (0, 1); `condition` is a tuple for 2 B rows; `noise` is the
stream that stochastic samplers draw from: pass it on.
"""

import copy
import math

import numpy as np
import torch

from cache import SoftCache
from samplers import denoise, guided, predict_x0, split, walk


def groups_of(branches, by):
    if by not in ("kind", "block"):
        raise ValueError(f"by is kind or block, not {by}")
    labels = [branch.split()[by == "block"] for branch in branches]
    names = list(dict.fromkeys(labels))
    return names, torch.tensor([[label == name for label in labels] for name in names])


def forked_ends(network, sampler, x, condition, guidance, scores, tau, groups, rows, noise):
    """x_0, and {(i, g): x_0^(i,g)} for the rows i."""
    sampler, soft = copy.copy(sampler), SoftCache(lambda i: scores[i], tau)
    trunk = walk(network, sampler, x, condition, guidance, soft, noise)
    ends = {}
    for i in range(len(scores)):
        for g, group in enumerate(groups if i in rows else ()):
            without = scores.clone()
            without[i, group] = 1
            ends[i, g] = denoise(
                network, copy.copy(sampler), x, condition, guidance,
                soft.fork(lambda j, without=without: without[j]), noise, first=i,
            )  # fmt: skip
        x = next(trunk)
    return x, ends


@torch.no_grad()
def masked_errors(network, sampler, x, condition, guidance, scores, tau, groups, noise=None):
    T = len(scores)
    x0, ends = forked_ends(
        network, sampler, x, condition, guidance, scores, tau, groups, range(1, T), noise
    )
    errors = torch.zeros(T, len(groups), len(x), dtype=torch.float64)
    for (i, g), end in ends.items():
        errors[i, g] = (end.double() - x0.double()).square().mean(dim=(1, 2, 3))
    return errors


def standard_error(samples):
    return samples.std(dim=-1, correction=1) / math.sqrt(samples.shape[-1])


def images_needed(samples, relative):
    """The standard error of n images is deviation / sqrt(n)."""
    mean, deviation = samples.mean(-1), samples.std(dim=-1, correction=1)
    ratio = (deviation / (relative * mean))[mean > 0]
    return max(1, math.ceil(ratio.max().item() ** 2)) if len(ratio) else 1


@torch.no_grad()
def truncated_proxy(network, sampler, x, condition, guidance, scores, tau, horizon, noise=None):
    T, channels = len(scores), sampler.guidance_channels

    def advance(x, i, soft):
        t, soft = sampler.timesteps[i], soft.start(i)
        output = guided(network, x, t, condition, guidance, soft, channels)
        clean = predict_x0(x, split(output, x)[0], sampler.alpha_bar[i])
        return clean, sampler.step(output, i, x, noise)

    trunk, starts, cleans = SoftCache(lambda i: scores[i], tau), [], []
    for i in range(T):
        masked = scores.clone()
        masked[i] = 1
        starts.append((x, trunk.fork(masked.__getitem__)))
        clean, x = advance(x, i, trunk)
        cleans.append(clean)

    errors = torch.zeros(T, dtype=torch.float64)
    for i in range(1, T):
        end = min(i + horizon, T)
        y, soft = starts[i]
        for j in range(i, end):
            clean, y = advance(y, j, soft)
        errors[i] = (clean.double() - cleans[end - 1].double()).square().mean()
    return errors


@torch.no_grad()
def sparse_proxy(network, sampler, x, condition, guidance, scores, tau, rows, noise=None):
    T, rows = len(scores), list(rows)
    if rows != sorted(set(rows)) or not rows or (rows[0], rows[-1]) != (1, T - 1):
        raise ValueError(f"rows must ascend from 1 to {T - 1}, not {rows}")
    everything = torch.ones(1, scores.shape[1], dtype=torch.bool)
    x0, ends = forked_ends(
        network, sampler, x, condition, guidance, scores, tau, everything, rows, noise
    )
    exact = [(ends[i, 0].double() - x0.double()).square().mean().item() for i in rows]
    errors = np.exp(np.interp(np.arange(T), rows, np.log(exact)))
    errors[rows] = exact
    errors[0] = 0
    return torch.from_numpy(errors)
