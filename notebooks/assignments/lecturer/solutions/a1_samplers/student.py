"""Assignment 1, samplers: the solution.

Notation: B images, C channels, H and W sides; `a` is alpha_bar, the share of signal in x:
x = sqrt(a) x_0 + sqrt(1 - a) eps. `a_after` is alpha_bar after the step; 1 means no noise at all.
Keep the dtype of the inputs, and do not change them in place.
"""

import math

import torch


def v_step(x, v, a, a_after):
    """A deterministic DDIM step for a network that predicts v = sqrt(a) eps - sqrt(1 - a) x_0.

    x (B, C, H, W) at level a; v (B, C, H, W), the prediction there; a, a_after floats in (0, 1]
    -> x at level a_after (B, C, H, W).
    """
    # (sqrt(a), sqrt(1 - a)) is a point of the unit circle, and (x, v) is (x_0, eps) rotated by its
    # angle: a step rotates back by the difference of two angles.
    turn = math.acos(math.sqrt(a)) - math.acos(math.sqrt(a_after))
    return math.cos(turn) * x - math.sin(turn) * v


def stochastic_step(x, v, a, a_after, eta, z):
    """The same with noise: equation 12 of the DDIM paper, with sigma as in its equation 16.
    eta = 0 is task1_1, eta = 1 has the noise of DDPM.

    z (B, C, H, W) is the fresh noise from N(0, I), eta a float in [0, 1]; the others as in v_step
    -> x at level a_after (B, C, H, W).
    """
    x0 = math.sqrt(a) * x - math.sqrt(1 - a) * v
    eps = math.sqrt(1 - a) * x + math.sqrt(a) * v
    sigma = eta * math.sqrt((1 - a_after) / (1 - a) * (1 - a / a_after))
    return math.sqrt(a_after) * x0 + math.sqrt(1 - a_after - sigma**2) * eps + sigma * z


def heun_step(predict_eps, x, a, a_after):
    """A step of Heun's method on the flow of the paper's equation 14. If a_after = 1 the network
    cannot be evaluated at the end of the step: use Euler's method, with one evaluation.

    predict_eps(x, a) -> eps (B, C, H, W), the network at any level a < 1; x (B, C, H, W)
    -> x at level a_after (B, C, H, W).
    """
    # In y = x / sqrt(a) and s = sqrt(1 - a) / sqrt(a) the flow is dy / ds = eps.
    h = math.sqrt((1 - a_after) / a_after) - math.sqrt((1 - a) / a)
    slope, y = predict_eps(x, a), x / math.sqrt(a)
    if a_after < 1:
        slope_after = predict_eps(math.sqrt(a_after) * (y + h * slope), a_after)
        slope = (slope + slope_after) / 2
    return math.sqrt(a_after) * (y + h * slope)


def gaussian_eps(x, a, mean, deviation):
    """The best prediction of eps, E[eps | x], if every number of x_0 is from N(mean, deviation^2).

    x (B, C, H, W) at level a < 1; mean and deviation floats -> eps (B, C, H, W).
    """
    # x and eps are jointly Gaussian: Cov(eps, x) = sqrt(1 - a), Var(x) = a deviation^2 + 1 - a.
    return math.sqrt(1 - a) * (x - math.sqrt(a) * mean) / (a * deviation**2 + 1 - a)


def gaussian_flow(x, a, a_after, mean, deviation):
    """The exact flow from level a to level a_after, on the same data. It may also go backwards, to
    more noise.

    x (B, C, H, W) -> x at level a_after (B, C, H, W).
    """
    # The flow keeps the quantile of a number: its distance from the mean, in deviations.
    scale_before = math.sqrt(a * deviation**2 + 1 - a)
    scale_after = math.sqrt(a_after * deviation**2 + 1 - a_after)
    quantile = (x - math.sqrt(a) * mean) / scale_before
    return math.sqrt(a_after) * mean + scale_after * quantile


def measured_order(step, exact, x, a, a_end, counts):
    """The order of a solver, measured: minus the slope of the least-squares line through the points
    (log n, log error), for the numbers of steps n in `counts`.

    step(x, a, a_after) -> x, one step of the solver; exact(x, a, a_end) -> x, the known solution;
    x (B, C, H, W) at level a. The n steps are equal in lambda = log sqrt(a / (1 - a)), from a to
    a_end < 1. An error is the largest absolute difference at the end. -> float.
    """
    goal, errors = exact(x, a, a_end), []
    ends = [0.5 * math.log(level / (1 - level)) for level in (a, a_end)]
    for n in counts:
        grid = torch.linspace(*ends, n + 1, dtype=torch.float64)
        levels = torch.sigmoid(2 * grid).tolist()
        y = x
        for level, after in zip(levels[:-1], levels[1:], strict=True):
            y = step(y, level, after)
        errors.append((y - goal).abs().max().item())
    log_n = torch.tensor(counts, dtype=torch.float64).log()
    log_error = torch.tensor(errors, dtype=torch.float64).log()
    from_mean = log_n - log_n.mean()
    return -((from_mean * log_error).sum() / from_mean.square().sum()).item()
