"""How the tests of assignment 1 call your functions where plain numbers are not enough. It runs in
the same process as student.py, which each function gets first."""

import math

import torch


def to_s(a):
    return math.sqrt((1 - a) / a)


def to_lambda(a):
    return math.log(a / (1 - a)) / 2


def heun_path(student, kind, y, levels, eps=None):
    """Heun steps through the levels, for eps = a function of y = x / sqrt(a) and s.
    -> y after them, and the levels of all evaluations."""
    functions = {"s": lambda y, s: torch.full_like(y, s),
                 "s^2": lambda y, s: torch.full_like(y, s**2), "y": lambda y, s: y,
                 "-y cos s": lambda y, s: -y * math.cos(s), "eps": lambda y, s: eps}
    evaluated = []

    def predict_eps(x, level):
        evaluated.append(level)
        return functions[kind](x / math.sqrt(level), to_s(level))

    for a, a_after in zip(levels[:-1], levels[1:], strict=True):
        x = student.heun_step(predict_eps, math.sqrt(a) * y, a, a_after)
        y = x / math.sqrt(a_after)
    return [y, evaluated]


def measure(student, a, a_end, counts, errors, shape):
    """measured_order for a flow that adds lambda's growth to x, and a solver with chosen errors:
    errors[j] in one number after counts[j] steps. -> the order, and [a, a_after] of every step."""
    steps = []

    def exact(x, a, a_end):
        return x + to_lambda(a_end) - to_lambda(a)

    def step(x, a_now, a_after):
        steps.append([a_now, a_after])
        n = (to_lambda(a_end) - to_lambda(a)) / (to_lambda(a_after) - to_lambda(a_now))
        j = min(range(len(counts)), key=lambda j: abs(counts[j] - n))
        off = torch.zeros_like(x)
        off.view(-1)[1] = -errors[j] / counts[j]
        return exact(x, a_now, a_after) + off

    x = torch.zeros(shape, dtype=torch.float64)
    return [student.measured_order(step, exact, x, a, a_end, counts), steps]
