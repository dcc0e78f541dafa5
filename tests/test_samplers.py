import copy
import math
from itertools import combinations, pairwise, product

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SASolverScheduler,
)

import samplers
from cache import Cache
from samplers import DDIM, DDPM, DPMSolverPlusPlus, Noise, SASolver, denoise, make_sampler
from tests.small import tiny_dit

SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # inside diffusers

# ------------------------------------------------------------------------------------------------
# The noise schedule


def official_timesteps(steps):
    """The official code's loop, ascending: it adds the stride up and rounds the sum."""
    stride, index, taken = 999 / (steps - 1), 0.0, []
    for _ in range(steps):
        taken.append(round(index))
        index += stride
    return taken


def official_alpha_bar(steps):
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)[official_timesteps(steps)]


def respaced_betas(steps):
    """The betas, ascending, of a process that only knows the kept timesteps."""
    alpha_bar = official_alpha_bar(steps)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return 1 - alpha_bar / before


@pytest.mark.parametrize("steps", [2, 10, 14, 15, 20, 39, 50, 100, 250, 1000])
def test_schedule_is_the_official_one(steps):
    timesteps, alpha_bar, alpha_bar_next = samplers.respaced(steps)
    assert timesteps == official_timesteps(steps)[::-1]
    expected = official_alpha_bar(steps).flip(0)
    np.testing.assert_allclose(alpha_bar, expected, rtol=1e-12)
    np.testing.assert_allclose(alpha_bar_next, [*expected[1:], 1], rtol=1e-12)


def test_timesteps_known_by_heart():
    ascending = {steps: samplers.respaced(steps)[0][::-1] for steps in (2, 20, 39, 1000)}
    assert ascending[2] == [0, 999] and ascending[1000] == list(range(1000))
    assert ascending[20] == [0, 53, 105, 158, 210, 263, 315, 368, 421, 473, 526, 578, 631, 684,
                             736, 789, 841, 894, 946, 999]  # fmt: skip
    assert ascending[39][19] == 499  # the exact middle; a product would round 499.5 to 500


def test_every_number_of_steps_gives_that_many_timesteps_from_999_to_0():
    for steps in range(2, 1001):
        timesteps = samplers.respaced(steps)[0]
        assert len(set(timesteps)) == steps and timesteps == sorted(timesteps, reverse=True)
        assert (timesteps[0], timesteps[-1]) == (999, 0)


def test_published_ends_of_the_noise_schedule():
    """Ho et al. 2020: from beta = 1e-4 to 0.02, which leaves 4e-5 of the signal."""
    assert pytest.approx(1 - 1e-4) == samplers.ALPHA_BAR[0]
    assert pytest.approx(4.036e-5, rel=1e-3) == samplers.ALPHA_BAR[-1]
    assert samplers.ALPHA_BAR.dtype == np.float64


def test_the_time_uniform_grid():
    """What the official code asks its network, in float64: (t - 1/N) 1000 for t from 1 to 1/N."""
    for steps in (2, 20, 25, 1000):
        t = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)
        np.testing.assert_allclose(samplers.time_uniform(steps), (t - 1e-3) * 1000, atol=1e-9)
    for name, steps, ends in (
        ("dpm-solver++", 20, [999, 949.05, 899.1, 149.85, 99.9, 49.95]),
        ("sa-solver", 25, [999, 959.04, 919.08, 119.88, 79.92, 39.96]),
    ):
        timesteps = make_sampler(name, steps).timesteps
        assert len(timesteps) == steps
        assert timesteps[:3] + timesteps[-3:] == pytest.approx(ends, abs=1e-9)


LOG_ALPHA_BAR = official_alpha_bar(1000).log()


def log_alpha_bar(grid):
    """The logarithm of alpha_bar at fractional timesteps, on a straight line between whole ones."""
    grid = torch.as_tensor(grid, dtype=torch.float64)
    below, above = grid.floor().long(), grid.ceil().long()
    return LOG_ALPHA_BAR[below] + (grid - below) * (LOG_ALPHA_BAR[above] - LOG_ALPHA_BAR[below])


def test_noise_levels_between_timesteps():
    grid = [999, 949.05, 500.5, 39.96, 0.25, 0]
    alpha, sigma, lambda_ = samplers.noise_levels(grid)
    expected = log_alpha_bar(grid).exp().numpy()
    np.testing.assert_allclose(alpha**2, expected, rtol=1e-12)
    np.testing.assert_allclose(sigma**2, 1 - expected, rtol=1e-11)
    np.testing.assert_allclose(np.exp(2 * lambda_), expected / (1 - expected), rtol=1e-10)


# ------------------------------------------------------------------------------------------------
# The solvers, against diffusers


class Stream:
    """Noise from one generator, as diffusers draws it."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, i, x):
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


def prediction(x, t, channels):
    """Something from -1 to 1 that depends on every number of x, on t and on the channel."""
    phase = torch.arange(channels).view(-1, 1, 1) + t / 300
    return torch.sin(0.7 * x.repeat(1, channels // x.shape[1], 1, 1) + x.mean() + phase)


def other_scheduler(kind, steps, **settings):
    """One of diffusers', for a process of T timesteps. It rounds its betas to float32; the exact
    alpha_bar is put in, so that the comparison can be tight."""
    scheduler = kind(
        num_train_timesteps=steps, trained_betas=respaced_betas(steps).tolist(),
        clip_sample=False, **settings,
    )
    exact = official_alpha_bar(steps)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), exact, rtol=1e-3, atol=0)
    scheduler.alphas_cumprod = exact
    scheduler.set_timesteps(steps)
    return scheduler


def compare(sampler, scheduler, steps, seed, channels, **options):
    """Walks both along a whole trajectory from the same noise, each on its own x."""
    x = other = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).double()
    noise, generator = Stream(seed), torch.Generator().manual_seed(seed)
    timesteps = official_timesteps(steps)
    for i, index in enumerate(scheduler.timesteps.tolist()):
        said = prediction(x, timesteps[index], channels)
        junk = torch.full_like(said, 1e9)  # rows of the null label, which a sampler drops
        x = sampler.step(torch.cat([said, junk]), i, x, noise)
        said = prediction(other, timesteps[index], channels)
        other = scheduler.step(said, index, other, generator=generator, **options).prev_sample
        torch.testing.assert_close(x, other, rtol=1e-9, atol=1e-9)
    assert i == steps - 1 and x.abs().max() > 0.1


@SEEDS
@pytest.mark.parametrize("steps", [2, 20, 39, 250])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(seed, steps, eta):
    scheduler = other_scheduler(DDIMScheduler, steps)
    compare(DDIM(steps, eta), scheduler, steps, seed, channels=3, eta=eta)


@SEEDS
@pytest.mark.parametrize("steps", [2, 20, 39, 250])
def test_ddpm_equals_diffusers(seed, steps):
    scheduler = other_scheduler(DDPMScheduler, steps, variance_type="learned_range")
    compare(DDPM(steps), scheduler, steps, seed, channels=6)


@SEEDS
def test_ddpm_step_is_bayes_rule(seed):
    """q(x' | x, x_0) is proportional to q(x | x') q(x' | x_0): precisions add. The network's -1
    asks for that variance, 1 for beta, 0 for their geometric mean."""
    x0, x = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(seed)).double()
    alpha_bar = official_alpha_bar(20).flip(0).tolist()
    for i, (a, after) in enumerate(zip(alpha_bar[:-1], alpha_bar[1:], strict=True)):
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        alpha, beta = a / after, 1 - a / after
        precision = alpha / beta + 1 / (1 - after)
        mean = (math.sqrt(alpha) / beta * x + math.sqrt(after) / (1 - after) * x0) / precision
        for said, variance in ((-1, 1 / precision), (1, beta), (0, math.sqrt(beta / precision))):
            output = torch.cat([eps, torch.full_like(eps, said)], dim=1)
            expected = mean + math.sqrt(variance) * Stream(seed).step(i, x)
            result = DDPM(20).step(output, i, x, Stream(seed))
            torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------
# The solvers with history, against diffusers. It rounds the timesteps of the official grid, and
# asks SA-Solver's tau for the timestep that a step starts from, where the official code asks for
# the one that it leads to: `tau_func` is made to answer for the latter.


class Draws:
    """All that `Stream` will draw, by the step: diffusers draws at every step, used or not."""

    def __init__(self, seed, shape, steps):
        stream = Stream(seed)
        x = torch.zeros(shape, dtype=torch.float64)
        self.draws, self.used = [stream.step(i, x) for i in range(steps)], []

    def step(self, i, x):
        self.used.append(i)
        return self.draws[i]


def other_solver(kind, steps, grid=None, **settings):
    """One of diffusers', on its own rounded grid or on another. -> scheduler, grid.
    Its noise levels are float32; the exact ones are put in."""
    scheduler = kind(**settings)
    scheduler.set_timesteps(steps)
    grid = [*scheduler.timesteps.tolist(), 0] if grid is None else list(grid)
    log = log_alpha_bar(grid)
    exact = (-torch.expm1(log) / log.exp()).sqrt()
    torch.testing.assert_close(scheduler.sigmas.double(), exact, rtol=0.02, atol=0)
    scheduler.sigmas = exact
    scheduler.timesteps = torch.tensor(grid[:-1], dtype=torch.float64)
    return scheduler, grid


def other_dpm_solver(steps, grid=None):
    return other_solver(
        DPMSolverMultistepScheduler, steps, grid, algorithm_type="dpmsolver++", solver_order=2,
        solver_type="midpoint", final_sigmas_type="sigma_min", lower_order_final=steps < 10,
    )


def other_sa_solver(steps, grid=None, tau=1):
    """With PixArt's tau: 1, or another number, in steps to a time from 0.2 to 0.8."""
    by_start = {}
    scheduler, grid = other_solver(SASolverScheduler, steps, grid, tau_func=by_start.__getitem__)
    for before, after in pairwise(grid):
        by_start[before] = tau if 0.2 <= (after + 1) / 1000 <= 0.8 else 0
    return scheduler, grid


def bounded_prediction(x, t):
    """The noise in x if x_0 is something from -1 to 1 that depends on all of x and t."""
    log = log_alpha_bar(t)
    return (x - (0.5 * log).exp() * prediction(x, t, 3)) / (-torch.expm1(log)).sqrt()


def walks(sampler, scheduler, seed, steps):
    """Both, each with its own timesteps on its own x: -> ours, theirs."""
    x = other = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).double()
    noise = Draws(seed, x.shape, steps)
    generator = torch.Generator().manual_seed(seed)
    keywords = {"generator": generator} if isinstance(scheduler, SASolverScheduler) else {}
    for i, (t, t_other) in enumerate(
        zip(sampler.timesteps, scheduler.timesteps.tolist(), strict=True)
    ):
        said = bounded_prediction(x, t)
        junk = torch.full_like(said, 1e9)  # variance and null label, which these solvers drop
        said = torch.cat([torch.cat([said, junk]), torch.cat([junk, junk])], dim=1)
        x = sampler.step(said, i, x, noise)
        said = bounded_prediction(other, t_other)
        other = scheduler.step(said, t_other, other, **keywords).prev_sample
    assert i == steps - 1 and x.abs().max() > 0.1
    return x, other


@SEEDS
@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("steps", [2, 9, 10, 20])
def test_dpm_solver_equals_diffusers(seed, steps, fractional):
    scheduler, grid = other_dpm_solver(steps, samplers.time_uniform(steps) if fractional else None)
    sampler = DPMSolverPlusPlus(steps, lambda _: np.array(grid))
    x, other = walks(sampler, scheduler, seed, steps)
    torch.testing.assert_close(x, other, rtol=1e-5, atol=1e-5)  # diffusers' x is float32


@SEEDS
@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("steps", [2, 5, 25])
def test_sa_solver_equals_diffusers(seed, steps, fractional):
    scheduler, grid = other_sa_solver(steps, samplers.time_uniform(steps) if fractional else None)
    sampler = SASolver(steps, grid=lambda _: np.array(grid))
    x, other = walks(sampler, scheduler, seed, steps)
    torch.testing.assert_close(x, other, rtol=1e-9, atol=1e-9)


@SEEDS
def test_the_official_grid_is_close_to_the_rounded_one(seed):
    """Without noise. With it, the same z on two grids leaves a difference of some per cent."""
    for steps, sampler, (scheduler, _) in (
        (20, DPMSolverPlusPlus(20), other_dpm_solver(20)),
        (25, SASolver(25, tau=0), other_sa_solver(25, tau=0)),
    ):
        x, other = walks(sampler, scheduler, seed, steps)
        assert 1e-6 < (x - other).norm() / other.norm() < 1e-3


# ------------------------------------------------------------------------------------------------
# The solvers with history, one step at a time


@pytest.mark.parametrize("steps", [2, 9, 10, 20])
def test_dpm_solver_is_of_first_order_at_its_first_step_and_below_10_at_its_last(steps):
    """First order is DDIM's step, and does not depend on what the network said before."""
    x, eps, other = torch.randn(3, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    log = 0.5 * log_alpha_bar(samplers.time_uniform(steps))
    alpha, sigma = log.exp(), (-torch.expm1(2 * log)).sqrt()
    for i in range(steps):
        ddim = alpha[i + 1] * (x - sigma[i] * eps) / alpha[i] + sigma[i + 1] * eps
        for before in (eps, other):
            sampler = DPMSolverPlusPlus(steps)
            for j in range(i):
                sampler.step(before, j, x)
            first_order = i == 0 or (i == steps - 1 and steps < 10)
            assert torch.allclose(sampler.step(eps, i, x), ddim, rtol=1e-9) == first_order


@pytest.mark.parametrize("steps, noisy_steps", [
    (2, [0]), (5, [1, 2, 3]), (20, range(4, 16)), (25, range(5, 20)),
])  # fmt: skip
def test_sa_solver_draws_noise_in_steps_to_t_from_0_2_to_0_8(steps, noisy_steps):
    sampler, x = SASolver(steps), torch.ones(1, 1, 2, 2).double()
    noise, silent = Draws(0, x.shape, steps), Draws(0, x.shape, steps)
    silent.draws = [torch.zeros_like(x)] * steps
    for i in range(steps):
        quiet = copy.copy(sampler).step(x, i, x, silent)
        after = sampler.step(x, i, x, noise)
        assert torch.equal(after, quiet) == (i not in noisy_steps)
    assert noise.used == silent.used == list(noisy_steps) and i not in noisy_steps


@pytest.mark.parametrize("name", ["dpm-solver++", "sa-solver"])
def test_steps_out_of_order_fail(name):
    x, noise = torch.zeros(1, 1, 2, 2), Noise(0, [0])
    sampler = make_sampler(name, 5)
    sampler.step(x, 0, x, noise)
    with pytest.raises(KeyError):
        sampler.step(x, 2, x, noise)


# ------------------------------------------------------------------------------------------------
# The solvers, against the closed form for Gaussian data
#
# If x_0 ~ N(mu, s^2), then x ~ N(sqrt(a) mu, V), V = a s^2 + 1 - a (a is alpha_bar), and the best
# prediction of the noise is sqrt(1 - a) (x - sqrt(a) mu) / V.

MU, S = 0.7, 0.5


def marginal(a, s=S):
    return math.sqrt(a) * MU, math.sqrt(a * s**2 + 1 - a)  # mean and standard deviation


def best_prediction(x, a, s=S):
    mean, deviation = marginal(a, s)
    return math.sqrt(1 - a) * (x - mean) / deviation**2


def ddim_walk(x, steps, eta=0.0, noise=None):
    sampler = DDIM(steps, eta)
    for i, a in enumerate(sampler.alpha_bar):
        x = sampler.step(best_prediction(x, a), i, x, noise)
    return x


@pytest.mark.parametrize("steps", [2, 20, 250])
def test_ddim_on_gaussian_data_is_the_linear_map_of_the_closed_form(steps):
    x = torch.linspace(-4, 4, 9).double().view(1, 1, 3, 3)
    alpha_bar = official_alpha_bar(steps).flip(0).tolist()
    factor = 1.0
    for a, after in zip(alpha_bar, [*alpha_bar[1:], 1.0], strict=True):
        factor *= (math.sqrt(a * after) * S**2 + math.sqrt((1 - a) * (1 - after))) / (
            a * S**2 + 1 - a
        )
    expected = MU + factor * (x - math.sqrt(alpha_bar[0]) * MU)
    torch.testing.assert_close(ddim_walk(x, steps), expected, rtol=1e-10, atol=1e-10)


def test_ddim_on_gaussian_data_approaches_the_exact_flow():
    """The flow keeps a number's quantile: x_T = mean + q deviation -> mu + q s. DDIM solves it to
    first order, so that ten times the steps leave about a tenth of the error."""
    mean, deviation = marginal(samplers.ALPHA_BAR[-1])
    q = torch.linspace(-3, 3, 7).double().view(1, 1, 1, 7)
    error = {
        steps: (ddim_walk(mean + q * deviation, steps) - (MU + q * S)).abs().max().item()
        for steps in (20, 100, 1000)
    }
    assert error[20] > 0.1 and error[1000] < 0.005
    assert 7 < error[100] / error[1000] < 13


def test_ddim_makes_gaussian_data_of_noise():
    """20,480 numbers: the mean within 4 standard errors of mu, the deviation as close to s."""
    noise = Noise(seed=3, numbers=range(20))
    for eta in (0.0, 1.0):
        x = ddim_walk(noise.start((1, 32, 32)).double(), 500, eta, noise)
        assert abs(x.mean() - MU) < 4 * S / math.sqrt(x.numel())
        assert abs(x.std() - S) < 4 * S / math.sqrt(2 * x.numel()) + 0.004  # 500 steps


@SEEDS
def test_ddpm_with_the_exact_mean_and_variance_makes_gaussian_data_in_few_steps(seed):
    """For Gaussian data q(x' | x) is itself Gaussian. With its variance DDPM is exact at any T,
    so mean and deviation must come out at each of only 10 steps."""
    sampler, noise = DDPM(10), Noise(seed, range(20))
    x = noise.start((1, 32, 32)).double()
    for i, (a, after) in enumerate(zip(sampler.alpha_bar, sampler.alpha_bar_next, strict=True)):
        alpha = a / after
        V, V_after = marginal(a)[1] ** 2, marginal(after)[1] ** 2
        beta, beta_tilde = 1 - alpha, (1 - alpha) * (1 - after) / (1 - a)
        v = torch.tensor(0.0)
        if after < 1:  # v such that the network's variance is Var(x' | x)
            exact = V_after - alpha * V_after**2 / V
            v = (math.log(exact) - math.log(beta_tilde)) / (math.log(beta) - math.log(beta_tilde))
            assert 0.01 < v < 0.99
        eps = best_prediction(x, a)
        x = sampler.step(torch.cat([eps, torch.full_like(x, 2 * v - 1)], dim=1), i, x, noise)
        mean, deviation = marginal(after)
        assert abs(x.mean() - mean) < 4 * deviation / math.sqrt(x.numel())
        assert abs(x.std() - deviation) < 4 * deviation / math.sqrt(2 * x.numel())


@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("q", [-1.0, 2.0])
def test_sa_solver_on_gaussian_data_has_the_mean_and_variance_of_the_closed_form(tau, q):
    """20,480 numbers, all from the quantile q. Measured in deviations from the mean, they stand
    still without noise; with it they are an Ornstein-Uhlenbeck process that falls by

        d log rho = -tau^2 sigma^2 / V d lambda,  which is  tau^2 d log(sqrt(V) / alpha),

    so that the result is N(mu + q rho s, (1 - rho^2) s^2) at timestep 0."""
    sampler, noise = SASolver(25, tau), Noise(5, range(20))
    mean, deviation = marginal(sampler.alpha_bar[0])
    x = torch.full((20, 1, 32, 32), mean + q * deviation, dtype=torch.float64)
    for i, a in enumerate(sampler.alpha_bar):
        x = sampler.step(best_prediction(x, a), i, x, noise)

    grid = samplers.time_uniform(25)  # noise from the step to t = 0.76 to that to t = 0.20
    first, last = (log_alpha_bar(grid[i]).exp().item() for i in (5, 20))
    rho = (marginal(last)[1] / math.sqrt(last) / marginal(first)[1] * math.sqrt(first)) ** tau**2
    mean, deviation = marginal(samplers.ALPHA_BAR[0])
    expected = deviation * math.sqrt(1 - rho**2)
    assert abs(x.mean() - (mean + q * rho * deviation)) < 4 * expected / math.sqrt(x.numel())
    assert abs(x.std() - expected) < 4 * expected / math.sqrt(2 * x.numel()) + 0.002  # 25 steps


# ------------------------------------------------------------------------------------------------
# The order of convergence, with the exact score of a mixture of two Gaussians. On a line the flow
# keeps a number's quantile, so its end is known.

WEIGHTS, MEANS = torch.tensor([0.3, 0.7]).double(), torch.tensor([-1.0, 0.8]).double()


def mixture_prediction(x, a):
    """The best prediction of the noise: the two Gaussians', by how likely each is at x."""
    V = a * 0.4**2 + 1 - a
    distance = x[..., None] - math.sqrt(a) * MEANS
    share = torch.softmax(WEIGHTS.log() - distance**2 / (2 * V), dim=-1)
    return math.sqrt(1 - a) * (share * distance).sum(-1) / V


def mixture_quantile(q, a):
    """The x below which is the share q of all x, by bisection."""
    deviation = math.sqrt(a * 0.4**2 + 1 - a)
    low, high = torch.full_like(q, -10), torch.full_like(q, 10)
    for _ in range(60):
        x = (low + high) / 2
        z = (x[..., None] - math.sqrt(a) * MEANS) / deviation
        below = (WEIGHTS * torch.special.ndtr(z)).sum(-1) < q
        low, high = torch.where(below, x, low), torch.where(below, high, x)
    return x


def flow_error(sampler, end):
    """The largest error of nine numbers that the sampler takes down to alpha_bar = `end`."""
    q = torch.linspace(0.02, 0.98, 9).double().view(1, 1, 3, 3)
    x = mixture_quantile(q, samplers.ALPHA_BAR[-1])
    for i, a in enumerate(sampler.alpha_bar):
        x = sampler.step(mixture_prediction(x, a), i, x, None)
    return (x - mixture_quantile(q, end)).abs().max().item()


def uniform_in_lambda(steps):
    """Timesteps from 999 to 0 with equal h."""
    fine = np.linspace(0, 999, 100_000)
    lambda_ = samplers.noise_levels(fine)[2]
    return np.interp(np.linspace(lambda_[-1], lambda_[0], steps + 1), lambda_[::-1], fine[::-1])


@pytest.mark.parametrize("make, order", [
    (DDIM, 1),
    (DPMSolverPlusPlus, 2),
    (lambda steps: DPMSolverPlusPlus(steps, uniform_in_lambda), 2),
    (lambda steps: SASolver(steps, 0, uniform_in_lambda), 2),
], ids=["ddim", "dpm-solver++", "dpm-solver++ in lambda", "sa-solver in lambda"])  # fmt: skip
def test_order_of_convergence(make, order):
    end = 1 - 1e-12 if order == 1 else samplers.ALPHA_BAR[0]
    error = [flow_error(make(steps), end) for steps in (100, 200, 400)]
    for coarse, fine in pairwise(error):
        assert abs(math.log2(coarse / fine) - order) < 0.2
    assert error[-1] < (1e-2 if order == 1 else 1e-3)


def test_sa_solver_without_noise_on_its_own_grid_is_of_second_order_or_better():
    coarse, fine = (flow_error(SASolver(n, 0), samplers.ALPHA_BAR[0]) for n in (100, 400))
    assert fine < coarse / 16


# ------------------------------------------------------------------------------------------------
# Noise


@SEEDS
def test_the_noise_of_an_image_does_not_depend_on_its_batch(seed):
    shape, x = (2, 4, 4), torch.zeros(6, 2, 4, 4)
    whole = Noise(seed, range(6))
    start, labels = whole.start(shape), whole.labels(10)
    steps = [whole.step(i, x) for i in range(3)]
    for images in ([3], [5, 0, 2], [1, 0], range(2, 6)):
        part = Noise(seed, images)
        rows = list(images)
        # Drawn in another order, some of it twice, and some not at all.
        for i in (2, 0, 2):
            assert torch.equal(part.step(i, x[rows]), steps[i][rows])
        assert torch.equal(part.labels(10), labels[rows])
        assert torch.equal(part.start(shape), start[rows])


def test_all_noise_differs():
    """By seed, image, purpose, and between the start and each step: no two draws are related."""
    x, draws = torch.zeros(1, 1, 32, 32), []
    for seed, image, purpose in product((0, 1, 2**63 - 1), (0, 1, 10**6), (0, 1, 2)):
        noise = Noise(seed, [image], purpose)
        draws += [noise.start((1, 32, 32)), noise.step(0, x), noise.step(1, x), noise.step(999, x)]
    draws = torch.cat(draws).flatten(1)
    assert all(not torch.equal(a, b) for a, b in combinations(draws, 2))
    correlation = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlation.abs().max() < 5.5 / math.sqrt(1024)  # 5.5 standard deviations, 5,778 pairs


@SEEDS
def test_noise_is_standard_normal(seed):
    noise = Noise(seed, range(50))
    for draw in (noise.start((4, 16, 16)), noise.step(7, torch.zeros(50, 4, 16, 16))):
        n = draw.numel()
        z = draw.double()
        moments = [z.mean(), (z**2).mean() - 1, (z**3).mean(), (z**4).mean() - 3]
        for moment, variance in zip(moments, (1, 2, 15, 96), strict=True):
            assert abs(moment) < 4.5 * math.sqrt(variance / n)
        assert abs((z.abs() < 1).double().mean() - math.erf(1 / math.sqrt(2))) < 2.5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_takes_the_shape_and_dtype_of_x(dtype):
    noise = Noise(0, [4, 2])
    x = torch.zeros(2, 3, 5, 4, dtype=dtype)
    assert noise.start((3, 5, 4)).dtype == torch.float32
    assert noise.step(1, x).shape == x.shape and noise.step(1, x).dtype == dtype


@SEEDS
def test_labels_are_uniform_and_reproducible(seed):
    labels = Noise(seed, range(2000)).labels(10)
    assert torch.equal(labels, Noise(seed, range(2000)).labels(10))
    counts = torch.bincount(labels, minlength=10)
    assert len(counts) == 10  # from 0 to 9
    # Chi squared of 9 degrees of freedom is above 30 once in 2,000 cases.
    assert ((counts - 200) ** 2 / 200).sum() < 30
    assert not torch.equal(labels, Noise(seed + 1, range(2000)).labels(10))
    assert not torch.equal(labels, Noise(seed, range(2000), purpose=1).labels(10))


# ------------------------------------------------------------------------------------------------
# The sampler as an object


NAMES = pytest.mark.parametrize("name", ["ddim", "ddim:0.5", "ddpm", "dpm-solver++", "sa-solver"])


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_step_keeps_shape_and_dtype_of_x_and_leaves_x_alone(name, dtype):
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    sampler = make_sampler(name, 5)
    for i in range(5):
        after = sampler.step(prediction(x, 3.0, 6).float(), i, x, Noise(0, range(2)))
        assert after.shape == x.shape and after.dtype == dtype and torch.isfinite(after).all()
    assert torch.equal(x, before)


@NAMES
def test_a_copy_is_a_snapshot(name):
    """Walks on from a copy made at any step, while the original goes on along another path."""
    noise = Noise(0, range(2))

    def walk(sampler, x, first, last=12):
        for i in range(first, last):
            x = sampler.step(prediction(x, sampler.timesteps[i], 6), i, x, noise)
        return x

    sampler, start = make_sampler(name, 12), noise.start((3, 4, 4))
    expected = walk(make_sampler(name, 12), start, 0)
    for first in range(1, 12):
        x = walk(sampler, start, 0, first)  # step 0 starts afresh
        twin, other = copy.copy(sampler), -x
        for i in range(first, 12):
            x, other = walk(twin, x, i, i + 1), walk(sampler, other, i, i + 1)
        assert torch.equal(x, expected) and not torch.equal(other, expected)


def test_names():
    kinds = {"ddpm": DDPM, "dpm-solver++": DPMSolverPlusPlus, "sa-solver": SASolver}
    for name, kind in kinds.items():
        sampler = make_sampler(name, 7)
        assert isinstance(sampler, kind) and len(sampler.timesteps) == 7
    for name, eta in (("ddim", 0), ("ddim:0.25", 0.25), ("ddim:1", 1)):
        sampler = make_sampler(name, 7)
        assert isinstance(sampler, DDIM) and len(sampler.timesteps) == 7
        np.testing.assert_array_equal(sampler.sigma, DDIM(7, eta).sigma)
    assert (DDIM(7).sigma == 0).all() and (DDIM(7, 0.25).sigma[:-1] > 0).all()


@pytest.mark.parametrize("name", ["", "DDIM", "dpm", "ddpm:1", "ddim:x", "ddim:2", "ddim:-1",
                                  "ddim:nan", "ddim:0.5:1", "dpm-solver", "sa-solver:1"])
def test_another_name_raises(name):
    with pytest.raises(ValueError, match=f"sampler {name}"):
        make_sampler(name, 10)


@pytest.mark.parametrize("steps", [-1, 0, 1, 1001])
def test_steps_out_of_range_raise(steps):
    for make in (DDIM, DDPM, DPMSolverPlusPlus, SASolver, lambda T: make_sampler("ddim", T)):
        with pytest.raises(ValueError, match=f"2 to 1000, not {steps}"):
            make(steps)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan, math.inf])
def test_eta_out_of_range_raises(eta):
    with pytest.raises(ValueError, match="eta must be from 0 to 1"):
        DDIM(10, eta)


@pytest.mark.parametrize("i", [0, 9])
def test_ddpm_without_a_learned_variance_raises(i):
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="learn_sigma"):
        DDPM(10).step(torch.zeros(4, 3, 4, 4), i, x, Noise(0, range(2)))


@pytest.mark.parametrize("steps", (3, 5, 20))
def test_a_schedule_of_another_number_of_steps_is_refused(steps):
    """A longer one would run, with the wrong rows, and nobody would notice."""
    network = tiny_dit()
    cache = Cache(torch.ones(steps, len(network.branches), dtype=torch.bool))
    x, condition = torch.zeros(1, 2, 8, 8), network.condition([1])
    with pytest.raises(ValueError, match=f"schedule of {steps} steps does not fit a sampler of 4"):
        denoise(network, DDIM(4), x, condition, 1.0, cache)
