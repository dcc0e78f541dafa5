"""Assignment 5, the competition: what you hand in. See README.md in this folder.

Notation: T denoising steps, K branches, B images, C channels, H and W sides. A schedule is a bool
tensor (T, K), True: compute; its row 0 is all True.
"""

import time  # noqa: F401 (time.process_time is the clock that counts)

import torch  # noqa: F401

import router  # noqa: F401
from cache import Cache  # noqa: F401
from samplers import Noise, denoise, make_sampler  # noqa: F401


def error_of(model, schedule, x, condition, full):
    """The mean squared error of a schedule: its images compared with those made without a cache.

    model a models.Model; x (B, C, H, W) is x_T, condition a tuple for 2 B rows, full (B, C, H, W)
    is x_0 made from them without a cache -> float.
    """
    raise NotImplementedError("task5_1: error_of")


def half_schedule(steps, branches):
    """From row 0 on, every other step computes everything and the steps between compute nothing. If
    fewer than half of all cells reuse then, the last row reuses as many more as are needed, from
    branch 0 on.

    -> schedule (T, K) with exactly ceil(T K / 2) reuses, for every T >= 2 and K >= 1.
    """
    raise NotImplementedError("task5_2: half_schedule")


def neighbour(schedule, generator):
    """A neighbour of this schedule: one reused cell computes instead, and one computed cell below
    row 0 reuses instead, both drawn uniformly. The number of reuses stays the same.

    schedule (T, K) with at least one cell of each kind below row 0, which stays unchanged;
    generator a torch.Generator -> schedule (T, K).
    """
    raise NotImplementedError("task5_3: neighbour")


def search(model, schedule, x, condition, seconds):
    """A better schedule with as many reuses, found in `seconds` of processor time by trying
    schedules on the images x. On these it is never worse than the schedule it starts from.

    schedule (T, K); x and condition as in error_of; seconds a float -> schedule (T, K).
    """
    raise NotImplementedError("task5_4: search")


def make_schedule(model, seconds):
    """Your entry: the schedule with the best images that you can find in `seconds` of processor
    time, for any models.Model that takes labels. It reuses half of all cells or more.

    T is model.steps, K is len(model.network.branches) -> schedule (T, K).
    """
    raise NotImplementedError("task5_5: make_schedule")
