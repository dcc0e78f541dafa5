"""The image error proxy: lambda(i), how much the reuse at step i changes the final image
(HarmoniCa, https://arxiv.org/abs/2410.01723, section 3.3).

    lambda(i) = mean (x_0 - x_0^(i))^2

x_0 is generated with the router as it stands. x_0^(i) is generated with row i of the scores
multiplied by the mask M(i), which makes them exactly 1: no reuse at step i. All passes run without
gradients, from the same noise, with the training-time soft cache. This is the paper's leave-one-out
proxy. The official code measures another one, here `cumulative`: W(i) is generated with the rows up
to i as they stand and all later rows at 1, and lambda(i) = mean (W(i) - W(i - 1))^2. That mean is
over both halves of the guided batch, so also over the fourth channel of DiT's null half, which is
not guided and which the network never sees. The published betas belong to this lambda.

Masking row i (or all rows from i on) changes nothing before step i. So each masked run is forked
off the unmasked run at step i: T + T (T - 1) / 2 evaluations instead of T * T, with bitwise the
same result.

The sensitivity is ours: lambda(i) / MSE(i), the image error that a unit of step i's error makes.
The paper's loss, lambda(i) MSE(i), counts an error twice, at the step and in the image. It makes
early rows nearly free, because their MSE is small, although the image magnifies such errors. MSE(i)
comes from the same passes: the first prediction of a fork is the teacher's.

Notation: B images, T denoising steps, K branches.
"""

import copy

import torch

from cache import SoftCache
from samplers import Noise, denoise, guided


@torch.no_grad()
def measure(network, sampler, x, condition, guidance, scores, tau, noise=None,
            variant="leave-one-out", order=0):
    """Measures the proxy: -> lambda and MSE, together (2, T) float64 on the CPU. Their first
    entries are 0, as row 0 never reuses.

    x (B, C, H, W) is x_T, `condition` the tuple for 2 B rows, `scores` (T, K) in (0, 1), `noise`
    the stream that stochastic samplers draw from, `order` that of the cache's forecast. Raises
    ValueError for another variant.
    """
    if variant not in ("leave-one-out", "cumulative"):
        raise ValueError(f"unknown proxy {variant}: use leave-one-out or cumulative")
    T = len(sampler.timesteps)
    if variant == "cumulative":  # both halves, with the same noise
        x = torch.cat([x, x])
        noise = noise and Noise(noise.seed, 2 * noise.numbers, noise.purpose)
    sampler = copy.copy(sampler)  # so that the caller's keeps its own history
    cache = SoftCache(scores.__getitem__, tau, order)

    def predict(i, cache):
        return guided(network, x, sampler.timesteps[i], condition, guidance, cache.start(i),
                      sampler.guidance_channels)

    forks = []  # forks[i - 1]: the x_0 reached when row i is masked (cumulative: rows i and later)
    errors = []
    for i in range(T):
        if i > 0:
            masked = scores.clone()
            last = i if variant == "leave-one-out" else T - 1
            masked[i : last + 1] = 1  # r * M(i), without its rounding
            fork = cache.fork(masked.__getitem__)
            twin = copy.copy(sampler)  # with the solver's history so far
            teacher = predict(i, fork)
            after = twin.step(teacher, i, x, noise)
            forks.append(denoise(network, twin, after, condition, guidance, fork, noise, i + 1))
        student = predict(i, cache)
        errors.append(squared_error(student, teacher) if i > 0 else 0.0)
        x = sampler.step(student, i, x, noise)

    compared = [x] * (T - 1) if variant == "leave-one-out" else [*forks[1:], x]
    lambda_ = [0.0, *(squared_error(a, b) for a, b in zip(forks, compared, strict=True))]
    return torch.tensor([lambda_, errors], dtype=torch.float64)


def squared_error(a, b):
    """The mean squared error of two tensors, in float64 on the CPU (Apple's GPUs have none)."""
    return (a.cpu().double() - b.cpu().double()).square().mean().item()


def image_error(*args, **kwargs):
    """`measure`, of which only lambda: (T,)."""
    return measure(*args, **kwargs)[0]


def sensitivity(lambda_, mse):
    """lambda(i) / MSE(i), each (T,) -> (T,). It is 0 where the student makes no error."""
    return torch.where(mse > 0, lambda_ / mse, 0.0)
