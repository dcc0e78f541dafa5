"""DPM-Solver, single step, on the noise schedule of Stable Diffusion: the sampler of U-ViT (Lu et
al. 2022, https://arxiv.org/abs/2206.00927 and https://arxiv.org/abs/2211.01095).

A step of order 2 or 3 evaluates the network at its start and at one or two times inside. Each
evaluation is a row of the schedule like any other: T rows are T evaluations, and the walk, the
cache and the proxy need to know nothing of stages.

    dpm-solver-2s   order 2, the inner time in the middle of the step in lambda: Learning-to-Cache's
    dpm-solver-3s   order 3 ("fast"), inner times on the grid: the published 2.29 of U-ViT-H/2

Notation as in samplers.py: alpha, sigma, lambda = log(alpha / sigma). Here timesteps are the labels
1 to 1000 that U-ViT was trained with, whole or fractional, 1000 the noisiest.
"""

import math
from functools import partial

import numpy as np

from samplers import check_steps, noise_levels, predict_x0, split

# ------------------------------------------------------------------------------------------------
# Its noise schedule

BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # Stable Diffusion's, linear in the root
ALPHA_BAR = np.cumprod(1 - BETAS)  # (1000,): entry n - 1 is that of timestep n
levels = partial(noise_levels, alpha_bar=ALPHA_BAR, first=1)


def timestep_at(lambda_):
    """The inverse of lambda: the fractional timesteps that have these values."""
    log_alpha = -0.5 * np.logaddexp(0, -2 * lambda_)
    table = 0.5 * np.log(ALPHA_BAR)
    return np.interp(-log_alpha, -table, 1 + np.arange(len(table)))  # it wants growing numbers


# ------------------------------------------------------------------------------------------------
# Where the network is evaluated


def third_order_grid(steps):
    """From 1000 to 1 evenly: -> the T timesteps and the end (T + 1,), and how many evaluations each
    step makes, a list: 3, as long as more than 4 are left, then 2, 2 1 or 3 1."""
    check_steps(steps)
    threes = (steps - 2) // 3
    rest = {2: [2], 3: [2, 1], 4: [3, 1]}[steps - 3 * threes]
    return np.linspace(1000, 1, steps + 1), [3] * threes + rest


def second_order_grid(steps):
    """T / 2 steps from 1000 to 1 evenly, each with the time in its middle in lambda: -> as above.
    Raises ValueError for an odd T."""
    check_steps(steps)
    if steps % 2:
        raise ValueError(f"dpm-solver-2s evaluates twice a step: T must be even, not {steps}")
    grid = np.linspace(1000, 1, steps // 2 + 1).repeat(2)[:-1]
    lambda_ = levels(grid)[2]
    grid[1::2] = timestep_at((lambda_[:-1:2] + lambda_[2::2]) / 2)
    return grid, [2] * (steps // 2)


# ------------------------------------------------------------------------------------------------
# The solver


class DPMSolver:
    """Predictions of x_0, no noise, and as many evaluations in a step as its order.

    From x_s, with x_0 on the line through its value D_s at the start and D_i at stage i, which lies
    d further in lambda, the integral that samplers.DPMSolverPlusPlus has is exact:

        x' = sigma' / sigma_s x_s + alpha' (1 - exp(-h)) D_s + alpha' w (D_i - D_s) / d

    with w = h - (1 - exp(-h)). A step of order 2 lets the x_0 of its middle stand for all instead:
    w = h / 2 (1 - exp(-h)). The same formula, with h up to the time of the next stage only, gives
    the x that this stage sees. The first stage knows D_s alone, so order 1 is DDIM.

    `grid` gives the timesteps with the end (T + 1,), and the evaluations of each step.
    """

    guidance_channels = math.inf  # all

    def __init__(self, grid, orders):
        self.timesteps = grid[:-1].tolist()
        alpha, sigma, lambda_ = levels(grid)
        order = np.repeat(orders, orders)  # of the step that an evaluation belongs to: (T,)
        self.start = np.repeat(np.cumsum(orders) - orders, orders)  # the first evaluation of it
        h, d = lambda_[1:] - lambda_[self.start], lambda_[:-1] - lambda_[self.start]
        w = np.where(order == 3, h + np.expm1(-h), -np.expm1(-h) * h / 2)
        self.alpha_bar = alpha[:-1] ** 2
        self.from_x = sigma[1:] / sigma[self.start]
        self.from_x0 = -alpha[1:] * np.expm1(-h)
        self.from_change = np.divide(alpha[1:] * w, d, out=np.zeros_like(d), where=d > 0)

    def step(self, prediction, i, x, noise=None):
        """One evaluation: x (B, C, H, W) at timesteps[i] -> the x of the next."""
        eps, _ = split(prediction, x)
        x0 = predict_x0(x, eps, self.alpha_bar[i])
        x_start, x0_start = (x, x0) if self.start[i] == i else self.history[i - 1]
        self.history = {i: (x_start, x0_start)}  # keyed by its row, so a walk out of order fails
        after = self.from_x[i] * x_start + self.from_x0[i] * x0_start
        return after + self.from_change[i] * (x0 - x0_start)


SAMPLERS = {
    "dpm-solver-2s": lambda steps: DPMSolver(*second_order_grid(steps)),
    "dpm-solver-3s": lambda steps: DPMSolver(*third_order_grid(steps)),
}
