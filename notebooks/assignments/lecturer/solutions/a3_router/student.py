"""Assignment 3, routers: the solution.

Notation: T denoising steps, K branches, B images, N tokens, D width; `z` a logit, `p` = sigmoid(z)
its score, `r` the gate that mixes a branch's new and kept output.
"""

from functools import partial

import torch

from cache import SoftCache
from samplers import guided


def gumbel_sigmoid(logits, u, temperature):
    """The difference of two Gumbel draws is logistic: log u - log(1 - u)."""
    return torch.sigmoid((logits + torch.logit(u)) / temperature)


def straight_through(logits, tau):
    """The bracket is exactly 0, so the sum is exactly 0 or 1; the bracket adds only a gradient."""
    p = torch.sigmoid(logits)
    hard = (p > tau).to(p.dtype)
    return hard + (p - p.detach())


def row_gradient(logits, u, temperature, new, kept, upstream, costs, beta):
    """dE/dz = <dE/dm, new - kept> r (1 - r) / temperature: m has many elements, but r is one
    number, so its derivative is summed over all of them."""
    r = torch.sigmoid((logits + torch.logit(u)) / temperature)
    p = torch.sigmoid(logits)
    inner = [(g * (n - c)).sum() for g, n, c in zip(upstream, new, kept, strict=True)]
    through_the_mix = torch.stack(inner) * r * (1 - r) / temperature
    return through_the_mix + beta * costs * p * (1 - p)


def sdt_trajectory(
    network, sampler, x, condition, guidance, rows, relax, optimizer, costs, tau, beta, lambda_
):
    always = torch.ones_like(costs)
    cache = SoftCache(lambda i: relax(i, rows[i - 1]) if i > 0 else always, tau)
    losses = [0.0]
    for i, t in enumerate(sampler.timesteps):
        ask = partial(guided, network, x, t, condition, guidance)
        with torch.set_grad_enabled(i > 0):
            student = ask(cache.start(i), channels=sampler.guidance_channels)
        if i > 0:
            with torch.no_grad():
                teacher = ask(channels=sampler.guidance_channels)
            usage = (costs * torch.sigmoid(rows[i - 1])).sum()
            loss = lambda_[i] * (student - teacher).square().mean() + beta * usage
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        x = sampler.step(student.detach(), i, x)
    return losses, x


def budgeted_schedule(scores, cur):
    T, K = scores.shape
    reuses = round(cur * T * K)
    if not 0 <= reuses <= (T - 1) * K:
        raise ValueError(f"a CUR of {cur} is not from 0 to {(T - 1) / T:.3f}")
    cheapest_first = scores[1:].flatten().argsort()
    schedule = torch.ones(T, K, dtype=torch.bool)
    schedule[1:].view(-1)[cheapest_first[:reuses]] = False
    return schedule


def budgeted_scores(logits, budget):
    """Bisection finds the root b without a graph; one Newton step then adds the graph. The step is
    0 at the root, and its derivative the implicit function's: db/dz_j = -s_j / sum_k s_k."""
    if not 0 < budget < len(logits):
        raise ValueError(f"a budget of {budget} is not between 0 and {len(logits)}")
    z = logits.detach()
    low, high = -z.max() - 40, -z.min() + 40
    for _ in range(100):
        middle = (low + high) / 2
        if torch.sigmoid(z + middle).sum() < budget:
            low = middle
        else:
            high = middle
    p = torch.sigmoid(logits + high)
    slope = (p * (1 - p)).sum().detach()
    shift = high - (p.sum() - budget) / slope
    return torch.sigmoid(logits + shift)
