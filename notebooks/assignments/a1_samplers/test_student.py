"""The tests of assignment 1. `python -m pytest notebooks/assignments/a1_samplers -m task1_1`"""

import math
from itertools import pairwise

import pytest
import student
import torch
from cases import COUNTS, DATA, ENDS, ETAS, LEVELS, ORDERS, SEEDS, SHAPES, STEPS

import samplers

POINTS = {"task1_1": 3, "task1_2": 4, "task1_3": 4, "task1_4": 3, "task1_5": 4}


def draw(seed, shape, count):
    """`count` tensors from N(0, 1), float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64).unbind()


def at_level(x0, eps, a):
    """-> x and v at level a."""
    root, rest = math.sqrt(a), math.sqrt(1 - a)
    return root * x0 + rest * eps, root * eps - rest * x0


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------


@pytest.mark.task1_1
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("a, a_after", LEVELS)
def test_a_v_step_keeps_x0_and_eps(seed, shape, a, a_after):
    x0, eps = draw(seed, shape, 2)
    x, v = at_level(x0, eps, a)
    before = x.clone(), v.clone()
    close(student.v_step(x, v, a, a_after), at_level(x0, eps, a_after)[0])
    assert torch.equal(x, before[0]) and torch.equal(v, before[1]), "x or v was changed in place"


@pytest.mark.task1_1
@pytest.mark.parametrize("steps", STEPS)
def test_v_steps_follow_ddim(steps):
    """All T steps, against samplers.DDIM with the same predictions."""
    x, *predictions = draw(steps, SHAPES[0], steps + 1)
    sampler, expected = samplers.DDIM(steps), x
    for i, v in enumerate(predictions):
        a, a_after = sampler.alpha_bar[i], sampler.alpha_bar_next[i]
        eps = math.sqrt(1 - a) * expected + math.sqrt(a) * v
        expected, x = sampler.step(eps, i, expected), student.v_step(x, v, a, a_after)
        close(x, expected, 1e-8)


@pytest.mark.task1_1
def test_a_v_step_keeps_the_dtype():
    x, v = (tensor.float() for tensor in draw(0, SHAPES[0], 2))
    assert student.v_step(x, v, *LEVELS[0]).dtype == torch.float32


# ------------------------------------------------------------------------------------------------


def parts(a, a_after, eta):
    """The coefficients of x_0, eps and z in x after a stochastic step."""
    found = []
    for x0, eps, z in torch.eye(3, dtype=torch.float64):
        x, v = at_level(x0.view(1, 1, 1, 1), eps.view(1, 1, 1, 1), a)
        found.append(student.stochastic_step(x, v, a, a_after, eta, z.view(1, 1, 1, 1)).item())
    return found


@pytest.mark.task1_2
@pytest.mark.parametrize("a, a_after", LEVELS)
@pytest.mark.parametrize("eta", (0.0, *ETAS, 1.0))
def test_signal_and_variance_are_those_of_the_level_after(a, a_after, eta):
    """For every eta, the coefficient of x_0 is sqrt(a') and the variance of the rest is 1 - a'."""
    of_x0, of_eps, of_z = parts(a, a_after, eta)
    assert of_x0 == pytest.approx(math.sqrt(a_after), abs=1e-10)
    assert of_eps**2 + of_z**2 == pytest.approx(1 - a_after, abs=1e-10)
    assert of_eps >= -1e-12 and (of_z > 1e-6) == (eta > 0 and a_after < 1)


@pytest.mark.task1_2
@pytest.mark.parametrize("steps", STEPS)
def test_eta_1_is_ddpm(steps):
    """The mean and the smaller variance of DDPM, from samplers.DDPM."""
    ddpm = samplers.DDPM(steps)
    x0, eps, z = draw(steps, SHAPES[0], 3)
    for i in range(steps - 1):
        a, a_after = ddpm.alpha_bar[i], ddpm.alpha_bar_next[i]
        x, v = at_level(x0, eps, a)
        silent, noisy = (
            student.stochastic_step(x, v, a, a_after, 1.0, noise) for noise in (0 * z, z)
        )
        close(silent, ddpm.posterior_mean(x0, x, i), 1e-9)
        close(noisy - silent, math.exp(ddpm.log_beta_tilde[i] / 2) * z, 1e-9)


@pytest.mark.task1_2
@pytest.mark.parametrize("a, a_after", LEVELS)
@pytest.mark.parametrize("eta", ETAS)
def test_the_noise_is_proportional_to_eta(a, a_after, eta):
    assert parts(a, a_after, eta)[2] == pytest.approx(eta * parts(a, a_after, 1.0)[2], abs=1e-12)


# ------------------------------------------------------------------------------------------------
# For task 3 the network is a function of y = x / sqrt(a) and s = sqrt(1 - a) / sqrt(a), in which
# the flow is dy / ds = eps.


def to_s(a):
    return math.sqrt((1 - a) / a)


def heun(function, y, a, a_after):
    """A step of the student's for eps = function(y, s) -> y after it, and the levels of the
    evaluations."""
    levels = []

    def predict_eps(x, level):
        levels.append(level)
        return function(x / math.sqrt(level), to_s(level))

    x = student.heun_step(predict_eps, math.sqrt(a) * y, a, a_after)
    return x / math.sqrt(a_after), levels


INNER = [levels for levels in LEVELS if levels[1] < 1]


@pytest.mark.task1_3
@pytest.mark.parametrize("a, a_after", INNER)
@pytest.mark.parametrize("shape", SHAPES)
def test_heun_is_exact_to_second_order(shape, a, a_after):
    """eps = s: exact. eps = s^2: the trapezoidal error h^3 / 6. eps = y: exp(h) up to h^2."""
    (y,) = draw(0, shape, 1)
    s, h = to_s(a), to_s(a_after) - to_s(a)
    after, levels = heun(lambda y, s: torch.full_like(y, s), y, a, a_after)
    close(after, y + s * h + h**2 / 2, 1e-9)
    assert levels == [a, a_after], "two evaluations, at the two ends of the step"
    after, _ = heun(lambda y, s: torch.full_like(y, s**2), y, a, a_after)
    close(after, y + (to_s(a_after) ** 3 - s**3) / 3 + h**3 / 6, 1e-9)
    after, _ = heun(lambda y, s: y, y, a, a_after)
    close(after, y * (1 + h + h**2 / 2), 1e-9)


@pytest.mark.task1_3
@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_step_is_eulers_with_one_evaluation(seed):
    y, eps = draw(seed, SHAPES[0], 2)
    after, levels = heun(lambda y, s: eps, y, 0.9, 1.0)
    close(after, y - to_s(0.9) * eps)
    assert levels == [0.9]


@pytest.mark.task1_3
@pytest.mark.parametrize("a, a_end", ENDS)
def test_twice_the_steps_leave_a_quarter_of_the_error(a, a_end):
    """dy / ds = -y cos(s) has the solution y exp(sin(s_0) - sin(s)); from s = 3 to s(a_end)."""
    start, end = 1 / (1 + 3**2), to_s(a_end)
    y0 = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for n in (100, 200):
        levels = [1 / (1 + s**2) for s in torch.linspace(3, end, n + 1).double().tolist()]
        y = y0
        for level, after in pairwise(levels):
            y, _ = heun(lambda y, s: -y * math.cos(s), y, level, after)
        errors.append(abs(y.item() - math.exp(math.sin(to_s(start)) - math.sin(end))))
    assert 3.5 < errors[0] / errors[1] < 4.5


# ------------------------------------------------------------------------------------------------


def gaussian_x(seed, a, mean, deviation):
    """Random data of this kind, at level a."""
    number, eps = draw(seed, SHAPES[0], 2)
    return at_level(mean + deviation * number, eps, a)[0]


def expected_eps(x, a, mean, deviation):
    """E[eps | x] by Bayes' rule and a sum over 20,001 values of x_0."""
    x0 = torch.linspace(mean - 10 * deviation, mean + 10 * deviation, 20001, dtype=torch.float64)
    eps = (x[..., None] - math.sqrt(a) * x0) / math.sqrt(1 - a)
    weights = torch.softmax(-((x0 - mean) ** 2) / (2 * deviation**2) - eps**2 / 2, dim=-1)
    return (weights * eps).sum(-1)


@pytest.mark.task1_4
@pytest.mark.parametrize("mean, deviation", DATA)
@pytest.mark.parametrize("a", (0.01, 0.5, 0.99))
def test_gaussian_eps_is_the_expected_eps(mean, deviation, a):
    x = gaussian_x(4, a, mean, deviation)
    close(student.gaussian_eps(x, a, mean, deviation), expected_eps(x, a, mean, deviation), 1e-8)


@pytest.mark.task1_4
@pytest.mark.parametrize("mean, deviation", DATA)
@pytest.mark.parametrize("a", (0.01, 0.5, 0.99))
def test_gaussian_flow_solves_the_flow(mean, deviation, a):
    """Its derivative dy / ds is the expected eps, and stopping halfway changes nothing."""
    x = gaussian_x(5, a, mean, deviation)
    ends = [1 / (1 + (to_s(a) + change) ** 2) for change in (-1e-4, 1e-4)]
    before, after = (
        student.gaussian_flow(x, a, end, mean, deviation) / math.sqrt(end) for end in ends
    )
    close((after - before) / 2e-4, expected_eps(x, a, mean, deviation), 1e-5)
    close(student.gaussian_flow(x, a, a, mean, deviation), x)
    halfway = student.gaussian_flow(x, a, 0.7, mean, deviation)
    whole = student.gaussian_flow(x, a, 1.0, mean, deviation)
    close(student.gaussian_flow(halfway, 0.7, 1.0, mean, deviation), whole)


# ------------------------------------------------------------------------------------------------
# For task 5 the exact flow adds lambda's growth to x, and the solver's error is chosen by hand.


def to_lambda(a):
    return math.log(a / (1 - a)) / 2


def shift(x, a, a_end):
    return x + to_lambda(a_end) - to_lambda(a)


@pytest.mark.task1_5
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("a, a_end", ENDS)
def test_measured_order_is_the_order(order, a, a_end):
    """A step has the error h^(order + 1), so n steps have n h^(order + 1): exactly this order."""
    (x,) = draw(6, SHAPES[0], 1)

    def step(x, a, a_after):
        h = to_lambda(a_after) - to_lambda(a)
        return shift(x, a, a_after) + 0.01 * h ** (order + 1)

    measured = student.measured_order(step, shift, x, a, a_end, COUNTS)
    assert measured == pytest.approx(order, abs=1e-4)


@pytest.mark.task1_5
@pytest.mark.parametrize("a, a_end", ENDS)
def test_the_line_is_the_least_squares_one(a, a_end):
    """Chosen errors, against numpy's fit. The largest difference counts, not the mean."""
    import numpy as np

    errors = dict(zip(COUNTS, (0.3, 0.02, 0.009), strict=True))
    x = torch.zeros(SHAPES[0], dtype=torch.float64)

    def off(n):
        wrong = torch.zeros_like(x)
        wrong.view(-1)[1] = -errors[n]
        return wrong / n

    levels = []

    def step(x, a, a_after):
        levels.append((a, a_after))
        n = round((to_lambda(a_end) - START) / (to_lambda(a_after) - to_lambda(a)))
        return shift(x, a, a_after) + off(n)

    START = to_lambda(a)
    measured = student.measured_order(step, shift, x, a, a_end, COUNTS)
    slope = np.polyfit(np.log(COUNTS), np.log(list(errors.values())), 1)[0]
    assert measured == pytest.approx(-slope, rel=1e-6)
    assert len(levels) == sum(COUNTS), "n steps for each n in counts"


@pytest.mark.task1_5
@pytest.mark.parametrize("a, a_end", ENDS)
def test_the_steps_are_equal_in_lambda(a, a_end):
    trajectories = []

    def step(x, a_now, a_after):
        if a_now == pytest.approx(a, rel=1e-6):
            trajectories.append([to_lambda(a_now)])
        trajectories[-1].append(to_lambda(a_after))
        return x + 1

    x = torch.zeros(SHAPES[0], dtype=torch.float64)
    student.measured_order(step, shift, x, a, a_end, COUNTS)
    assert len(trajectories) == len(COUNTS)
    for lambdas, n in zip(trajectories, COUNTS, strict=True):
        expected = torch.linspace(to_lambda(a), to_lambda(a_end), n + 1, dtype=torch.float64)
        close(torch.tensor(lambdas, dtype=torch.float64), expected, 1e-6)
