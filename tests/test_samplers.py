import copy
import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

import samplers
from samplers import DDIM, DDPM, Noise, make_sampler

SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])

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
    noise = Noise(seed=3, images=range(20))
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


@pytest.mark.parametrize("name", ["ddim", "ddim:0.5", "ddpm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_step_keeps_shape_and_dtype_of_x_and_leaves_x_alone(name, dtype):
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    sampler = make_sampler(name, 5)
    for i in range(5):
        after = sampler.step(prediction(x, 3.0, 6).float(), i, x, Noise(0, range(2)))
        assert after.shape == x.shape and after.dtype == dtype and torch.isfinite(after).all()
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["ddim", "ddim:0.5", "ddpm"])
def test_a_copy_is_a_snapshot(name):
    """Walks on from a copy made at step 4, after the original went on along another path."""
    noise = Noise(0, range(2))

    def walk(sampler, x, first, last=12):
        for i in range(first, last):
            x = sampler.step(prediction(x, sampler.timesteps[i], 6), i, x, noise)
        return x

    sampler, start = make_sampler(name, 12), noise.start((3, 4, 4))
    expected = walk(make_sampler(name, 12), start, 0)
    x = walk(sampler, start, 0, 4)
    twin = copy.copy(sampler)
    walk(sampler, -x, 4)
    assert torch.equal(walk(twin, x, 4), expected)
    assert torch.equal(walk(sampler, start, 0), expected)  # step 0 starts afresh


def test_names():
    assert isinstance(make_sampler("ddpm", 7), DDPM)
    for name, eta in (("ddim", 0), ("ddim:0.25", 0.25), ("ddim:1", 1)):
        sampler = make_sampler(name, 7)
        assert isinstance(sampler, DDIM) and len(sampler.timesteps) == 7
        np.testing.assert_array_equal(sampler.sigma, DDIM(7, eta).sigma)
    assert (DDIM(7).sigma == 0).all() and (DDIM(7, 0.25).sigma[:-1] > 0).all()


@pytest.mark.parametrize("name", ["", "DDIM", "dpm", "ddpm:1", "ddim:x", "ddim:2", "ddim:-1",
                                  "ddim:nan", "ddim:0.5:1"])  # fmt: skip
def test_another_name_raises(name):
    with pytest.raises(ValueError, match=f"sampler {name}"):
        make_sampler(name, 10)


@pytest.mark.parametrize("steps", [-1, 0, 1, 1001])
def test_steps_out_of_range_raise(steps):
    for make in (DDIM, DDPM, lambda steps: make_sampler("ddim", steps)):
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
