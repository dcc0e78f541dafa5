import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import dpm_solver
import models
import proxy
from samplers import Noise, denoise, guided
from tests.small import tiny_uvit
from tests.test_samplers import mixture_prediction, mixture_quantile

NAMES = pytest.mark.parametrize("name", ["dpm-solver-2s", "dpm-solver-3s"])


# ------------------------------------------------------------------------------------------------
# Against the solver written out, number by number


BETA = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
LOG_ALPHA = [0.5 * math.log(np.prod(1 - BETA[:n])) for n in range(1, 1001)]


def log_alpha(n):
    """At label n, between the whole ones on a line."""
    return np.interp(n, range(1, 1001), LOG_ALPHA)


def alpha(n):
    return math.exp(log_alpha(n))


def sigma(n):
    return math.sqrt(1 - alpha(n) ** 2)


def lambda_(n):
    return log_alpha(n) - math.log(sigma(n))


def middle(s, t):
    """The label in the middle of s and t in lambda, by bisection."""
    low, high, goal = t, s, (lambda_(s) + lambda_(t)) / 2
    for _ in range(60):
        n = (low + high) / 2
        low, high = (n, high) if lambda_(n) > goal else (low, n)
    return n


class Written:
    """The whole solver with a prediction of the noise eps(x, n). It notes the labels it sees."""

    def __init__(self, eps):
        self.eps, self.seen = eps, []

    def data(self, x, n):
        self.seen.append(n)
        return (x - sigma(n) * self.eps(x, n)) / alpha(n)

    def lead(self, x, first, s, u):
        h = lambda_(u) - lambda_(s)
        return sigma(u) / sigma(s) * x - alpha(u) * math.expm1(-h) * first

    def second(self, x, s, inner, t):
        h = lambda_(t) - lambda_(s)
        r = (lambda_(inner) - lambda_(s)) / h
        first = self.data(x, s)
        change = self.data(self.lead(x, first, s, inner), inner) - first
        return self.lead(x, first, s, t) - alpha(t) * math.expm1(-h) / (2 * r) * change

    def third(self, x, s, s1, s2, t):
        h = lambda_(t) - lambda_(s)
        r1, r2 = ((lambda_(n) - lambda_(s)) / h for n in (s1, s2))

        def psi(r):
            return math.expm1(-r * h) / (r * h) + 1

        first = self.data(x, s)
        change = self.data(self.lead(x, first, s, s1), s1) - first
        inner = self.lead(x, first, s, s2) + r2 / r1 * alpha(s2) * psi(r2) * change
        change = self.data(inner, s2) - first
        return self.lead(x, first, s, t) + alpha(t) * psi(1) / r2 * change

    def run(self, name, x, steps):
        if name == "dpm-solver-2s":
            grid = np.linspace(1000, 1, steps // 2 + 1)
            for s, t in pairwise(grid):
                x = self.second(x, s, middle(s, t), t)
            return x
        grid, at = np.linspace(1000, 1, steps + 1), 0
        orders = {0: [3] * (steps // 3 - 1) + [2, 1], 1: [3] * (steps // 3) + [1],
                  2: [3] * (steps // 3) + [2]}[steps % 3]
        for order in orders:
            n = grid[at : at + order + 1]
            if order == 1:
                x = self.lead(x, self.data(x, n[0]), *n)
            else:
                x = self.second(x, *n) if order == 2 else self.third(x, *n)
            at += order
        return x


@NAMES
@pytest.mark.parametrize("steps", [2, 6, 8, 10, 20])
def test_equals_the_solver_written_out(name, steps):
    written = Written(lambda x, n: torch.sin(x * (1 + n / 300)) + 0.1 * x)
    x = Noise(0, [0]).start((1, 3, 3)).double()
    expected = written.run(name, x, steps)
    sampler = models.make_sampler("uvit256", name, steps)
    for i, n in enumerate(sampler.timesteps):
        x = sampler.step(written.eps(x, n), i, x)
    assert (x - expected).abs().max() < 1e-12 * expected.abs().max()
    assert sampler.timesteps == pytest.approx(written.seen[:steps], abs=1e-6)


def test_timesteps_known_by_heart():
    """As the official code has them, which rounds to float32."""
    second = dpm_solver.SAMPLERS["dpm-solver-2s"](20).timesteps
    assert second[:4] == pytest.approx([1000, 951.842, 900.1, 851.928], abs=5e-4)
    assert second[-2:] == pytest.approx([100.9, 11.399], abs=5e-4)
    third = dpm_solver.SAMPLERS["dpm-solver-3s"](20)
    assert third.timesteps == pytest.approx([1000 - 49.95 * i for i in range(20)])
    assert dpm_solver.third_order_grid(20)[1] == [3, 3, 3, 3, 3, 3, 2]


# ------------------------------------------------------------------------------------------------
# The order of convergence, with the exact score of a mixture of two Gaussians


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence(order):
    """On a grid that is even in lambda. (On the official one the last step is so long that the
    order shows only from hundreds of evaluations on.)"""
    q = torch.linspace(0.02, 0.98, 9).double().view(1, 1, 3, 3)
    start, end = dpm_solver.ALPHA_BAR[-1], dpm_solver.ALPHA_BAR[0]
    noisiest, cleanest = dpm_solver.levels([1000, 1])[2]
    errors = []
    for steps in (10, 20, 40):
        grid = dpm_solver.timestep_at(np.linspace(noisiest, cleanest, order * steps + 1))
        sampler, x = dpm_solver.DPMSolver(grid, [order] * steps), mixture_quantile(q, start)
        for i, a in enumerate(sampler.alpha_bar):
            x = sampler.step(mixture_prediction(x, a), i, x)
        errors.append((x - mixture_quantile(q, end)).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert abs(math.log2(coarse / fine) - order) < 0.3
    assert errors[-1] < 0.1**order


# ------------------------------------------------------------------------------------------------
# Stages are rows like any other


@NAMES
def test_a_copy_is_a_snapshot_also_inside_a_step(name):
    sampler = dpm_solver.SAMPLERS[name](8)
    noise = Noise(0, range(9))
    x, predictions = noise.start((1, 4, 4)), [noise.step(i, torch.zeros(9, 1, 4, 4))
                                              for i in range(8)]
    twins = []
    for i, prediction in enumerate(predictions):
        twins.append((copy.copy(sampler), x))
        x = sampler.step(prediction, i, x)
    for first, (twin, y) in enumerate(twins):
        for i in range(first, 8):
            y = twin.step(predictions[i], i, y)
        assert torch.equal(x, y), first


@NAMES
def test_a_walk_out_of_order_fails(name):
    sampler = dpm_solver.SAMPLERS[name](8)
    with pytest.raises((KeyError, AttributeError)):
        sampler.step(torch.zeros(1, 1, 2, 2), 1, torch.zeros(1, 1, 2, 2))


@NAMES
@torch.no_grad()
def test_the_proxys_forks_equal_whole_trajectories(name):
    """Bitwise: every masked trajectory from the start, with a cache of its own."""
    network = tiny_uvit()
    scores = torch.rand(4, 10, generator=torch.Generator().manual_seed(0))
    x, condition = Noise(1, range(2)).start((2, 8, 8)), network.condition([0, 3])

    def image(scores):
        return denoise(network, dpm_solver.SAMPLERS[name](4), x, condition, 1.4,
                       proxy.SoftCache(scores.__getitem__, 0.5))

    expected = [0.0]
    for i in range(1, 4):
        masked = scores.clone()
        masked[i] = 1
        expected.append(proxy.squared_error(image(masked), image(scores)))
    measured = proxy.image_error(network, dpm_solver.SAMPLERS[name](4), x, condition, 1.4, scores,
                                 0.5)
    assert measured.tolist() == expected and min(expected[1:]) > 0


# ------------------------------------------------------------------------------------------------
# Which model it is for


@pytest.mark.parametrize("model, sampler", [
    ("uvit256", "ddim"), ("uvit512", "dpm-solver++"), ("dit256", "dpm-solver-2s"),
    ("digits", "dpm-solver-3s"),
])
def test_samplers_of_another_noise_schedule_are_refused(model, sampler):
    with pytest.raises(ValueError, match=f"{model} cannot be sampled with {sampler}"):
        models.make_sampler(model, sampler, 20)


@pytest.mark.parametrize("name, steps, words", [
    ("dpm-solver-2s", 7, "T must be even, not 7"), ("dpm-solver-2s", 1, "from 2 to 1000"),
    ("dpm-solver-3s", 1001, "from 2 to 1000"),
])
def test_steps_that_it_cannot_make_are_refused(name, steps, words):
    with pytest.raises(ValueError, match=words):
        models.make_sampler("uvit256", name, steps)


@torch.no_grad()
def test_all_channels_are_guided_and_the_null_half_is_unguided_noise():
    """cond + s (cond - null), s the official scale, which is ours less 1."""
    network = tiny_uvit()
    x, condition = Noise(1, range(2)).start((2, 8, 8)), network.condition([0, 3])
    t = torch.full((2,), 500.0)
    cond, null = network(x, t, condition[0][:2]), network(x, t, condition[0][2:])
    expected = cond + 0.4 * (cond - null)
    guidance = dpm_solver.DPMSolver.guidance_channels
    assert torch.allclose(guided(network, x, 500.0, condition, 1.4, channels=guidance)[:2],
                          expected, atol=1e-5)
