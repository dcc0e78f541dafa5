"""The tests of assignment 1. `python -m pytest notebooks/assignments/a1_samplers -m task1_1`

`student` calls the functions of student.py, and those of probes.py, by `student.probe`.
"""

import math

import numpy as np
import pytest
import torch
from cases import COUNTS, DATA, ENDS, ETAS, LEVELS, ORDERS, SEEDS, SHAPES, STEPS
from comparing import check, is_tensor, same

import samplers

POINTS = {"task1_1": 3, "task1_2": 4, "task1_3": 4, "task1_4": 3, "task1_5": 4}
NEEDS = ("samplers",)  # the modules that student.py may import


def draw(seed, shape, count):
    """`count` tensors from N(0, 1), float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64).unbind()


def at_level(x0, eps, a):
    """-> x and v at level a."""
    root, rest = math.sqrt(a), math.sqrt(1 - a)
    return root * x0 + rest * eps, root * eps - rest * x0


# ------------------------------------------------------------------------------------------------


@pytest.mark.task1_1
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("a, a_after", LEVELS)
def test_a_v_step_keeps_x0_and_eps(student, seed, shape, a, a_after):
    x0, eps = draw(seed, shape, 2)
    x, v = at_level(x0, eps, a)
    root, rest = math.sqrt(a_after), math.sqrt(1 - a_after)
    same(student.v_step(x, v, a, a_after), at_level(x0, eps, a_after)[0],
         f"v_step from a = {a} to {a_after}", likely={
             "v is taken for eps": root * (x - math.sqrt(1 - a) * v) / math.sqrt(a) + rest * v,
             "the sign of v in x_0": root * (2 * math.sqrt(a) * x - x0) + rest * eps,
             "the step does not leave level a": x})


@pytest.mark.task1_1
@pytest.mark.parametrize("steps", STEPS)
def test_v_steps_follow_ddim(student, steps):
    """All T steps, against samplers.DDIM with the same predictions."""
    x, *predictions = draw(steps, SHAPES[0], steps + 1)
    sampler, expected = samplers.DDIM(steps), x
    for i, v in enumerate(predictions):
        a, a_after = sampler.alpha_bar[i], sampler.alpha_bar_next[i]
        eps = math.sqrt(1 - a) * expected + math.sqrt(a) * v
        expected, x = sampler.step(eps, i, expected), student.v_step(x, v, a, a_after)
        same(x, expected, f"x after step {i} of {steps}, compared with samplers.DDIM", 1e-8)


@pytest.mark.task1_1
def test_a_v_step_keeps_the_dtype(student):
    x, v = (tensor.float() for tensor in draw(0, SHAPES[0], 2))
    is_tensor(student.v_step(x, v, *LEVELS[0]), SHAPES[0], torch.float32, "v_step in float32")


# ------------------------------------------------------------------------------------------------


def parts(student, a, a_after, eta):
    """The coefficients of x_0, eps and z in x after a stochastic step."""
    found = []
    for x0, eps, z in torch.eye(3, dtype=torch.float64):
        x, v = at_level(x0.view(1, 1, 1, 1), eps.view(1, 1, 1, 1), a)
        x = student.stochastic_step(x, v, a, a_after, eta, z.view(1, 1, 1, 1))
        is_tensor(x, (1, 1, 1, 1), torch.float64, "stochastic_step")
        found.append(x.item())
    return found


@pytest.mark.task1_2
@pytest.mark.parametrize("a, a_after", LEVELS)
@pytest.mark.parametrize("eta", (0.0, *ETAS, 1.0))
def test_signal_and_variance_are_those_of_the_level_after(student, a, a_after, eta):
    """For every eta, the coefficient of x_0 is sqrt(a') and the variance of the rest is 1 - a'."""
    of_x0, of_eps, of_z = parts(student, a, a_after, eta)
    where = f"with eta = {eta}, from a = {a} to {a_after}"
    same(of_x0, math.sqrt(a_after), f"the coefficient of x_0 after stochastic_step {where}")
    same(of_eps**2 + of_z**2, 1 - a_after, f"the variance of the noise {where}", likely={
        "the fresh noise is added to all of the old noise, instead of replacing a part of it":
            1 - a_after + of_z**2,
        "the old noise is reduced, but no fresh noise comes in": 1 - a_after - of_z**2})
    check(of_eps >= -1e-12, f"the coefficient of eps is {of_eps:.6g} {where}: not negative")
    check((of_z > 1e-6) == (eta > 0 and a_after < 1),
          f"the coefficient of z is {of_z:.6g} {where}: it is 0 if eta is 0 or a_after is 1 only")


@pytest.mark.task1_2
@pytest.mark.parametrize("steps", STEPS)
def test_eta_1_is_ddpm(student, steps):
    """The mean and the smaller variance of DDPM, from samplers.DDPM."""
    ddpm = samplers.DDPM(steps)
    x0, eps, z = draw(steps, SHAPES[0], 3)
    for i in range(steps - 1):
        a, a_after = ddpm.alpha_bar[i], ddpm.alpha_bar_next[i]
        x, v = at_level(x0, eps, a)
        silent, noisy = (
            student.stochastic_step(x, v, a, a_after, 1.0, noise) for noise in (0 * z, z)
        )
        where = f"of step {i} of {steps} with eta = 1, compared with samplers.DDPM"
        same(silent, ddpm.posterior_mean(x0, x, i), f"the mean {where}", 1e-9)
        noise = math.exp(ddpm.log_beta_tilde[i] / 2) * z
        same(noisy - silent, noise, f"the noise {where}", 1e-9)


@pytest.mark.task1_2
@pytest.mark.parametrize("a, a_after", LEVELS)
@pytest.mark.parametrize("eta", ETAS)
def test_the_noise_is_proportional_to_eta(student, a, a_after, eta):
    whole = parts(student, a, a_after, 1.0)[2]
    same(parts(student, a, a_after, eta)[2], eta * whole,
         f"the coefficient of z with eta = {eta}, which is eta times that with eta = 1", 1e-12,
         {"sigma grows with eta^2": eta**2 * whole})


# ------------------------------------------------------------------------------------------------
# For task 3 the network is a function of y = x / sqrt(a) and s = sqrt(1 - a) / sqrt(a), in which
# the flow is dy / ds = eps.


def to_s(a):
    return math.sqrt((1 - a) / a)


def heun(student, kind, y, a, a_after):
    """A step of the student's for eps = the function `kind` -> y after it."""
    y, levels = student.probe("heun_path", kind, y, [a, a_after])
    same(levels, [a, a_after], "the levels at which heun_step evaluates the network", likely={
        "the second slope is computed at the level before the step, off by one": [a, a],
        "there is no second slope: this is Euler's method": [a],
        "the two levels are swapped": [a_after, a]})
    return y


INNER = [levels for levels in LEVELS if levels[1] < 1]


@pytest.mark.task1_3
@pytest.mark.parametrize("a, a_after", INNER)
@pytest.mark.parametrize("shape", SHAPES)
def test_heun_is_exact_to_second_order(student, shape, a, a_after):
    """eps = s: exact. eps = s^2: the trapezoidal error h^3 / 6. eps = y: exp(h) up to h^2."""
    (y,) = draw(0, shape, 1)
    s, h = to_s(a), to_s(a_after) - to_s(a)
    where = f"y after a step from a = {a} to {a_after}, where eps is"
    same(heun(student, "s", y, a, a_after), y + s * h + h**2 / 2, f"{where} s", 1e-9,
         {"the slope at the start only": y + s * h, "the slope at the end only": y + (s + h) * h})
    expected = y + (to_s(a_after) ** 3 - s**3) / 3 + h**3 / 6
    same(heun(student, "s^2", y, a, a_after), expected, f"{where} s^2", 1e-9)
    same(heun(student, "y", y, a, a_after), y * (1 + h + h**2 / 2), f"{where} y", 1e-9,
         {"the second slope is computed at y before the step": y * (1 + h)})


@pytest.mark.task1_3
@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_step_is_eulers_with_one_evaluation(student, seed):
    y, eps = draw(seed, SHAPES[0], 2)
    after, levels = student.probe("heun_path", "eps", y, [0.9, 1.0], eps)
    same(levels, [0.9], "the levels at which the last step, to a_after = 1, evaluates the network")
    same(after, y - to_s(0.9) * eps, "y after the last step")


@pytest.mark.task1_3
@pytest.mark.parametrize("a, a_end", ENDS)
def test_twice_the_steps_leave_a_quarter_of_the_error(student, a, a_end):
    """dy / ds = -y cos(s) has the solution y exp(sin(s_0) - sin(s)); from s = 3 to s(a_end)."""
    start, end = 1 / (1 + 3**2), to_s(a_end)
    y0 = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for n in (100, 200):
        levels = [1 / (1 + s**2) for s in torch.linspace(3, end, n + 1).double().tolist()]
        y, _ = student.probe("heun_path", "-y cos s", y0, levels)
        is_tensor(y, y0.shape, torch.float64, f"y after {n} steps")
        errors.append(abs(y.item() - math.exp(math.sin(to_s(start)) - math.sin(end))))
    check(3.5 * errors[1] < errors[0] < 4.5 * errors[1],
          f"100 steps have an error of {errors[0]:.3g} and 200 one of {errors[1]:.3g}: a method of "
          "order 2 leaves a quarter")


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
def test_gaussian_eps_is_the_expected_eps(student, mean, deviation, a):
    x = gaussian_x(4, a, mean, deviation)
    same(student.gaussian_eps(x, a, mean, deviation), expected_eps(x, a, mean, deviation),
         f"gaussian_eps at a = {a} for data from N({mean}, {deviation}^2)", 1e-8)


@pytest.mark.task1_4
@pytest.mark.parametrize("mean, deviation", DATA)
@pytest.mark.parametrize("a", (0.01, 0.5, 0.99))
def test_gaussian_flow_solves_the_flow(student, mean, deviation, a):
    """Its derivative dy / ds is the expected eps, and stopping halfway changes nothing."""
    x = gaussian_x(5, a, mean, deviation)
    ends = [1 / (1 + (to_s(a) + change) ** 2) for change in (-1e-4, 1e-4)]
    before, after = (
        student.gaussian_flow(x, a, end, mean, deviation) / math.sqrt(end) for end in ends
    )
    where = f"at a = {a} for data from N({mean}, {deviation}^2)"
    same((after - before) / 2e-4, expected_eps(x, a, mean, deviation),
         f"the derivative dy / ds of gaussian_flow, which is the expected eps, {where}", 1e-5)
    stays = student.gaussian_flow(x, a, a, mean, deviation)
    same(stays, x, f"gaussian_flow to the same level {where}")
    halfway = student.gaussian_flow(x, a, 0.7, mean, deviation)
    whole = student.gaussian_flow(x, a, 1.0, mean, deviation)
    same(student.gaussian_flow(halfway, 0.7, 1.0, mean, deviation), whole,
         f"gaussian_flow that stops at 0.7 on the way to 1, {where}")


# ------------------------------------------------------------------------------------------------
# For task 5 the exact flow adds lambda's growth to x, and the solver's errors are chosen by hand.


def to_lambda(a):
    return math.log(a / (1 - a)) / 2


def measure(student, a, a_end, errors):
    """The order that the student measures, and lambda before and after each of the solver's steps,
    a list for each number of steps."""
    order, steps = student.probe("measure", a, a_end, COUNTS, errors, SHAPES[0])
    short = sum(COUNTS) - len(COUNTS)
    same(len(steps), sum(COUNTS), f"the number of steps for counts = {list(COUNTS)}", likely={
        "a grid of n levels makes n - 1 steps: n steps need n + 1 levels": short})
    steps = [[to_lambda(level) for level in pair] for pair in steps]
    return order, [[steps.pop(0) for _ in range(n)] for n in COUNTS]


@pytest.mark.task1_5
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("a, a_end", ENDS)
def test_measured_order_is_the_order(student, order, a, a_end):
    measured, _ = measure(student, a, a_end, [0.1 * n**-order for n in COUNTS])
    same(measured, float(order), "the order measured of a solver of known order", 1e-6, {
        "the sign: the order is minus the slope": -float(order)})


@pytest.mark.task1_5
@pytest.mark.parametrize("a, a_end", ENDS)
def test_the_line_is_the_least_squares_one(student, a, a_end):
    """Chosen errors, against numpy's fit. The largest difference counts, not the mean."""
    errors = np.array([0.3, 0.02, 0.009])
    measured, _ = measure(student, a, a_end, errors.tolist())
    n = np.array(COUNTS, dtype=float)
    ends = -math.log(errors[-1] / errors[0]) / math.log(n[-1] / n[0])
    same(measured, float(-np.polyfit(np.log(n), np.log(errors), 1)[0]), "the order of errors that "
         "do not lie on a line", 1e-6, {"the line through the first and the last point": ends})


@pytest.mark.task1_5
@pytest.mark.parametrize("a, a_end", ENDS)
def test_the_steps_are_equal_in_lambda(student, a, a_end):
    _, runs = measure(student, a, a_end, [0.3, 0.02, 0.009])
    for pairs, n in zip(runs, COUNTS, strict=True):
        found = torch.tensor([pair[0] for pair in pairs] + [pairs[-1][1]], dtype=torch.float64)
        expected = torch.linspace(to_lambda(a), to_lambda(a_end), n + 1, dtype=torch.float64)
        levels = 1 / (1 + np.exp(-2 * expected.numpy()))
        equal_in_a = torch.from_numpy(np.linspace(levels[0], levels[-1], n + 1))
        same(found, expected, f"lambda at the ends of {n} steps", 1e-6, {
            "the steps are equal in a": torch.logit(equal_in_a) / 2})
