"""The image error proxy against whole trajectories, walked one by one as the paper defines them."""

import copy

import numpy as np
import pytest
import torch

import proxy
from cache import Cache, SoftCache
from samplers import DDIM, Noise, denoise, guided, make_sampler, split
from tests.small import tiny_dit

SEEDS = (0, 1, 2)
VARIANTS = ("leave-one-out", "cumulative")
T, B, SCALE, TAU = 5, 2, 1.5, 0.5


class AdamsBashforth(DDIM):
    """DDIM's step with a noise extrapolated from this prediction and the last one."""

    history = None

    def step(self, prediction, i, x, noise=None):
        eps, _ = split(prediction, x)
        last = eps if i == 0 else self.history
        self.history = eps
        return super().step(1.5 * eps - 0.5 * last, i, x, noise)


SAMPLERS = {
    "ddim": lambda: make_sampler("ddim", T),
    "ddim:0.7": lambda: make_sampler("ddim:0.7", T),
    "ddpm": lambda: make_sampler("ddpm", T),
    "dpm-solver++": lambda: make_sampler("dpm-solver++", T),
    "sa-solver": lambda: make_sampler("sa-solver", T),
    "history": lambda: AdamsBashforth(T),
}


def case(seed, **changes):
    """A network, and the arguments x, condition, scores and noise of a measurement."""
    network = tiny_dit(seed, **changes)
    noise = Noise(seed, range(10, 10 + B), purpose=2)
    x = noise.start((network.in_channels, network.input_size, network.input_size))
    condition = network.condition(noise.labels(network.num_classes))
    scores = torch.rand(T, len(network.branches), generator=torch.Generator().manual_seed(seed))
    return network, x, condition, scores, noise


def measure(network, sampler, x, condition, scores, noise, variant="leave-one-out"):
    return proxy.image_error(network, sampler, x, condition, SCALE, scores, TAU, noise, variant)


def trajectory(network, sampler, x, condition, scores, noise, halves=1):
    """x_T to x_0 with the soft cache, every score as given: all of it in one place. With 2 `halves`
    the whole guided batch goes along, as in the official code's forward_with_cfg."""
    kept = {}
    for i, t in enumerate(sampler.timesteps):

        def mixed(k, branch, i=i):
            r, new = scores[i, k], branch()
            output = new if i == 0 else r * new + (1 - r) * kept[k]
            if i == 0 or r > TAU:
                kept[k] = output
            return output

        half = x[:B]
        both = network(torch.cat([half, half]), torch.full((2 * B,), t), *condition, cache=mixed)
        C = min(network.guidance_channels, sampler.guidance_channels)
        cond, null = both[:B, :C], both[B:, :C]
        eps = null + SCALE * (cond - null)
        guided = torch.cat([torch.cat([eps, eps]), both[:, C:]], dim=1)
        x = sampler.step(guided[: halves * B], i, x, noise)
    return x


def naive(network, make, x, condition, scores, noise, variant, halves=None):
    """lambda from T whole trajectories. M(i) makes the scores it masks exactly 1."""
    halves = halves or (2 if variant == "cumulative" else 1)
    noise = Noise(noise.seed, halves * noise.numbers, noise.purpose)

    def x0(masked_rows):
        masked = scores.clone()
        masked[masked_rows] = 1
        start = torch.cat([x] * halves)
        return trajectory(network, make(), start, condition, masked, noise, halves)

    lambda_ = [0.0]
    for i in range(1, T):
        if variant == "leave-one-out":
            pair = x0([]), x0([i])
        else:  # W(i) has the rows up to i as they are
            pair = x0(list(range(i + 1, T))), x0(list(range(i, T)))
        difference = pair[0].double() - pair[1].double()
        lambda_.append((difference**2).mean().item())
    return lambda_


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_forked_is_bitwise_what_whole_trajectories_give(sampler, variant, seed):
    network, x, condition, scores, noise = case(seed)
    make = SAMPLERS[sampler]
    lambda_ = measure(network, make(), x, condition, scores, noise, variant)
    assert lambda_.shape == (T,) and lambda_.dtype == torch.float64
    assert lambda_[0] == 0 and (lambda_[1:] > 0).all()
    assert lambda_.tolist() == naive(network, make, x, condition, scores, noise, variant)


def test_cumulative_counts_the_null_halfs_unguided_channel_as_the_official_code_does():
    network, x, condition, scores, noise = case(0, in_channels=4)
    lambda_ = measure(network, DDIM(T), x, condition, scores, noise, "cumulative").tolist()
    both, image = (naive(network, SAMPLERS["ddim"], x, condition, scores, noise, "cumulative", n)
                   for n in (2, 1))
    assert lambda_ == both
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(both[1:], image[1:], strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("steps", (2, 3, 7))
def test_evaluations_are_counted(variant, steps):
    network, x, condition, _, noise = case(0)
    scores, calls = torch.full((steps, 6), 0.4), []

    def count(*_):
        calls.append(torch.is_grad_enabled())

    network.requires_grad_(True).register_forward_hook(count)
    scores.requires_grad_(True)
    lambda_ = measure(network, DDIM(steps), x, condition, scores, noise, variant)
    assert len(calls) == steps + steps * (steps - 1) // 2
    assert not any(calls) and not lambda_.requires_grad and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_of_ones_has_no_error_at_all(variant, seed):
    network, x, condition, scores, noise = case(seed)
    scores[[1, 3]] = 1
    lambda_ = measure(network, DDIM(T), x, condition, scores, noise, variant)
    assert [value == 0 for value in lambda_.tolist()] == [True, True, False, True, False]


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_outside_is_touched(variant):
    network, x, condition, scores, noise = case(0)
    sampler = AdamsBashforth(T)
    sampler.history = "the caller's"
    attributes = copy.copy(vars(sampler))
    given = [x, scores, *condition]
    before = [tensor.clone() for tensor in given]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    measure(network, sampler, x, condition, scores, noise, variant)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])
    assert np.random.get_state()[2:] == numpy_state[2:]
    assert all(vars(sampler)[key] is value for key, value in attributes.items())
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_an_unknown_variant_is_refused():
    network, x, condition, scores, noise = case(0)
    with pytest.raises(ValueError, match="unknown proxy everything"):
        measure(network, DDIM(T), x, condition, scores, noise, "everything")


# ------------------------------------------------------------------------------------------------
# The sensitivity


def one_step_errors(network, sampler, x, condition, scores, noise):
    """MSE(i) by its definition: at the student's own x, its prediction beside one without a
    cache."""
    cache, errors, sampler = SoftCache(scores.__getitem__, TAU), [], copy.copy(sampler)
    for i, t in enumerate(sampler.timesteps):
        student, teacher = (
            guided(network, x, t, condition, SCALE, each, sampler.guidance_channels)
            for each in (cache.start(i), None)
        )
        errors.append((student.double() - teacher.double()).square().mean().item())
        x = sampler.step(student, i, x, noise)
    return errors


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_steps_errors_are_those_of_student_against_teacher(sampler, variant):
    network, x, condition, scores, noise = case(0)
    with torch.no_grad():
        expected = one_step_errors(network, SAMPLERS[sampler](), x, condition, scores, noise)
    _, mse = proxy.measure(network, SAMPLERS[sampler](), x, condition, SCALE, scores, TAU, noise,
                           variant)
    assert expected[0] == mse[0] == 0
    assert mse[1:].tolist() == pytest.approx(expected[1:], rel=1e-6)


def test_the_sensitivity_of_a_step_that_only_adds_its_error_is_a_constant():
    """Where the image is the sum of what the steps predict, a step's squared error is the image's:
    lambda / MSE is 1 over all steps, however large the errors. And 0 / 0 counts as 0."""
    mse = torch.tensor([0.0, 1e-6, 3.0, 0.0], dtype=torch.float64)
    assert proxy.sensitivity(mse, mse).tolist() == [0, 1, 1, 0]
    assert proxy.sensitivity(2 * mse, mse).tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize("order", (1, 2))
def test_the_proxy_forecasts_as_sampling_does(order):
    """Scores of 0 and 1 make the soft cache a hard one: lambda(i) is then the error of the image
    beside that of the schedule with row i computed."""
    network, x, condition, _, noise = case(0)
    generator = torch.Generator().manual_seed(1)
    schedule = torch.rand(T, len(network.branches), generator=generator) < 0.5
    schedule[0] = True

    def x0(schedule):
        return denoise(network, SAMPLERS["ddim"](), x, condition, SCALE, Cache(schedule, order))

    lambda_, _ = proxy.measure(network, SAMPLERS["ddim"](), x, condition, SCALE, schedule.float(),
                               TAU, noise, order=order)
    for i in range(1, T):
        masked = schedule.clone()
        masked[i] = True
        expected = (x0(schedule) - x0(masked)).double().square().mean().item()
        assert lambda_[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-12)
