"""Assignment 5 with a mistake: the climb continues from every try, better or not.

Notation: T denoising steps, K branches, B images, C channels, H and W sides. A schedule is a bool
tensor (T, K), True: compute; its row 0 is all True.
"""

import math
import time

import torch

import router
from cache import Cache
from samplers import Noise, denoise, make_sampler


def error_of(model, schedule, x, condition, full):
    walker = make_sampler(model.sampler, model.steps)
    images = denoise(model.network, walker, x, condition, model.guidance, Cache(schedule))
    return torch.mean((images.double() - full.double()) ** 2).item()


def half_schedule(steps, branches):
    schedule = router.fora_paper(steps, branches, 2)
    missing = math.ceil(steps * branches / 2) - (~schedule).sum().item()
    schedule[-1, : max(0, missing)] = False
    return schedule


def neighbour(schedule, generator):
    near = schedule.clone()
    for value in (True, False):
        cells = (schedule[1:] == value).nonzero()
        row, branch = cells[torch.randint(len(cells), (1,), generator=generator).item()].tolist()
        near[1 + row, branch] = not value
    return near


def search(model, schedule, x, condition, seconds):
    """Goes on to a neighbour. It makes several swaps at once at first, later fewer, and stops while
    there is still time for one more try."""
    start = last = time.process_time()
    dice = torch.Generator().manual_seed(17)
    walker = make_sampler(model.sampler, model.steps)
    full = denoise(model.network, walker, x, condition, model.guidance)
    best, lowest, longest, swaps = schedule, math.inf, time.process_time() - start, 0
    while time.process_time() + 1.5 * longest < start + seconds:
        tried = best
        for _ in range(swaps):
            tried = neighbour(tried, dice)
        found = error_of(model, tried, x, condition, full)
        best, lowest = tried, min(found, lowest)
        left = 1 - (time.process_time() - start) / seconds
        swaps = 1 + int(schedule.numel() / 60 * left * torch.rand(1, generator=dice).item())
        longest, last = max(longest, time.process_time() - last), time.process_time()
    return best


def make_schedule(model, seconds):
    """Starts from alternation, where no reused output is older than a step. With more time it
    judges on more images, and overfits them all the same: with 30 s its error on 60 others was
    0.0021, alternation's 0.0014, with the same FID (3.59, 3.58). There is room to win."""
    start = time.process_time()
    count = 2 if seconds < 10 else 8
    noise = Noise(7, range(count), purpose=1)
    begin = noise.start(model.shape, model.device)
    labels = noise.labels(model.network.num_classes)
    schedule = half_schedule(model.steps, len(model.network.branches))
    spent = time.process_time() - start
    return search(model, schedule, begin, model.condition(labels), 0.9 * seconds - spent)
