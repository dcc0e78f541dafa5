"""Assignment 1, samplers: what you hand in. See README.md in this folder.

Notation: B images, C channels, H and W sides; `a` is alpha_bar, the share of signal in x:
x = sqrt(a) x_0 + sqrt(1 - a) eps. `a_after` is alpha_bar after the step; 1 means no noise at all.
Keep the dtype of the inputs, and do not change them in place.
"""

import math  # noqa: F401 (you may want it)

import torch  # noqa: F401


def v_step(x, v, a, a_after):
    """A deterministic DDIM step for a network that predicts v = sqrt(a) eps - sqrt(1 - a) x_0.

    x (B, C, H, W) at level a; v (B, C, H, W), the prediction there; a, a_after floats in (0, 1]
    -> x at level a_after (B, C, H, W).
    """
    raise NotImplementedError("task1_1: v_step")


def stochastic_step(x, v, a, a_after, eta, z):
    """The same with noise: equation 12 of the DDIM paper, with sigma as in its equation 16.
    eta = 0 is task1_1, eta = 1 has the noise of DDPM.

    z (B, C, H, W) is the fresh noise from N(0, I), eta a float in [0, 1]; the others as in v_step
    -> x at level a_after (B, C, H, W).
    """
    raise NotImplementedError("task1_2: stochastic_step")


def heun_step(predict_eps, x, a, a_after):
    """A step of Heun's method on the flow of the paper's equation 14. If a_after = 1 the network
    cannot be evaluated at the end of the step: use Euler's method, with one evaluation.

    predict_eps(x, a) -> eps (B, C, H, W), the network at any level a < 1; x (B, C, H, W)
    -> x at level a_after (B, C, H, W).
    """
    raise NotImplementedError("task1_3: heun_step")


def gaussian_eps(x, a, mean, deviation):
    """The best prediction of eps, E[eps | x], if every number of x_0 is from N(mean, deviation^2).

    x (B, C, H, W) at level a < 1; mean and deviation floats -> eps (B, C, H, W).
    """
    raise NotImplementedError("task1_4: gaussian_eps")


def gaussian_flow(x, a, a_after, mean, deviation):
    """The exact flow from level a to level a_after, on the same data. It may also go backwards, to
    more noise.

    x (B, C, H, W) -> x at level a_after (B, C, H, W).
    """
    raise NotImplementedError("task1_4: gaussian_flow")


def measured_order(step, exact, x, a, a_end, counts):
    """The order of a solver, measured: minus the slope of the least-squares line through the points
    (log n, log error), for the numbers of steps n in `counts`.

    step(x, a, a_after) -> x, one step of the solver; exact(x, a, a_end) -> x, the known solution;
    x (B, C, H, W) at level a. The n steps are equal in lambda = log sqrt(a / (1 - a)), from a to
    a_end < 1. An error is the largest absolute difference at the end. -> float.
    """
    raise NotImplementedError("task1_5: measured_order")
