"""The tests of assignment 5. `python -m pytest notebooks/assignments/a5_competition -m task5_1`"""

import math
import time

import pytest
import student
import torch
from cases import DEPTHS, DIGITS_SECONDS, DIGITS_SEED, IMAGES, SECONDS, SEEDS, SHAPES

import dit
import models
import router
from cache import Cache
from samplers import Noise, denoise, make_sampler

POINTS = {"task5_1": 2, "task5_2": 2, "task5_3": 2, "task5_4": 4, "task5_5": 4}
GRACE = 0.3  # seconds


def small_model(seed, steps, depth):
    """A DiT of 16 tokens and 2 x depth branches, with no gate at zero."""
    network = dit.DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=depth,
                      num_heads=2, num_classes=5)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return models.Model("small", network.eval().requires_grad_(False), "ddim", steps, 1.5)


class Images:
    """The images that a schedule is judged by: their noise, and the images without a cache."""

    def __init__(self, model, seed, count=IMAGES):
        noise = Noise(seed, range(count))
        self.model, self.x = model, noise.start(model.shape)
        self.condition = model.condition(noise.labels(model.network.num_classes))
        self.full = self.made()

    def made(self, cache=None):
        model = self.model
        return denoise(model.network, make_sampler(model.sampler, model.steps), self.x,
                       self.condition, model.guidance, cache)

    def error(self, schedule):
        return (self.made(Cache(schedule)) - self.full).square().mean().item()


def check(schedule, steps, branches, least):
    """Asserts a schedule with at least that many reuses, none of them in row 0."""
    assert schedule.dtype == torch.bool and schedule.shape == (steps, branches)
    assert schedule[0].all(), "row 0 computes everything"
    assert (~schedule).sum() >= least


# ------------------------------------------------------------------------------------------------


@pytest.mark.task5_1
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("steps, depth", DEPTHS)
def test_error_of(seed, steps, depth):
    """Without reuse the error is 0, and 0.25 to images that are all 0.5 away. A schedule's error is
    that of its samples, and 0 to its own images."""
    images = Images(small_model(seed, steps, depth), seed)
    model, x, condition, full = images.model, images.x, images.condition, images.full
    K = len(model.network.branches)
    none, schedule = router.none(steps, K), router.random(steps, K, 0.4, seed)
    assert student.error_of(model, none, x, condition, full) == 0
    off = student.error_of(model, none, x, condition, full + 0.5)
    assert isinstance(off, float) and off == pytest.approx(0.25, rel=1e-5)
    error = student.error_of(model, schedule, x, condition, full)
    assert error == pytest.approx(images.error(schedule), rel=1e-5)
    own = images.made(Cache(schedule))
    assert student.error_of(model, schedule, x, condition, own) == 0


# ------------------------------------------------------------------------------------------------


@pytest.mark.task5_2
@pytest.mark.parametrize("steps, branches", (*SHAPES, (2, 1), (3, 1)))
def test_half_schedule_reuses_exactly_half(steps, branches):
    schedule = student.half_schedule(steps, branches)
    least = math.ceil(steps * branches / 2)
    check(schedule, steps, branches, least)
    assert (~schedule).sum() == least
    assert (schedule[:-1] == (torch.arange(steps - 1) % 2 == 0)[:, None]).all()
    assert (schedule[-1].int().diff() >= 0).all(), "the last row reuses from branch 0 on"


# ------------------------------------------------------------------------------------------------


@pytest.mark.task5_3
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("steps, branches", SHAPES)
def test_a_neighbour_swaps_two_cells(seed, steps, branches):
    schedule = router.random(steps, branches, 0.4, seed)
    before, generator = schedule.clone(), torch.Generator().manual_seed(seed)
    changes = torch.zeros(steps, branches, dtype=torch.long)
    for _ in range(300):
        near = student.neighbour(schedule, generator)
        assert torch.equal(schedule, before), "the input schedule was changed"
        assert (near != schedule).sum() == 2 and (~near).sum() == (~schedule).sum()
        assert near[0].all(), "row 0 computes everything"
        changes += near != schedule
    if steps * branches < 40:
        assert (changes[1:] > 0).all(), "every cell below row 0 must change at some time"


@pytest.mark.task5_3
def test_the_generator_decides_the_neighbour():
    schedule = router.random(*SHAPES[0], 0.4)
    first, second, other = (
        student.neighbour(schedule, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


# ------------------------------------------------------------------------------------------------


@pytest.mark.task5_4
@pytest.mark.parametrize("steps, depth", DEPTHS)
def test_the_search_finds_better_schedules_in_time(steps, depth):
    """With random weights no schedule is known to be good: it must be searched for."""
    images = Images(small_model(SEEDS[0], steps, depth), SEEDS[0])
    K = len(images.model.network.branches)
    first = router.random(steps, K, 0.5, SEEDS[0])
    before, start = first.clone(), time.process_time()
    found = student.search(images.model, first, images.x, images.condition, SECONDS)
    assert time.process_time() - start < SECONDS + GRACE
    check(found, steps, K, 0)
    assert (~found).sum() == (~first).sum() and torch.equal(first, before)
    assert images.error(found) < 0.7 * images.error(first)


@pytest.mark.task5_4
def test_the_search_never_makes_it_worse():
    """Even if it starts from the best of many."""
    steps, depth = DEPTHS[0]
    images = Images(small_model(SEEDS[1], steps, depth), SEEDS[1])
    tries = [router.random(steps, 2 * depth, 0.5, seed) for seed in range(40)]
    best = min(tries, key=images.error)
    found = student.search(images.model, best, images.x, images.condition, SECONDS / 4)
    assert images.error(found) <= (1 + 1e-6) * images.error(best)


# ------------------------------------------------------------------------------------------------


@pytest.mark.task5_5
@pytest.mark.parametrize("steps, depth", DEPTHS)
def test_schedules_for_any_model(steps, depth):
    model, K = small_model(SEEDS[0], steps, depth), 2 * depth
    start = time.process_time()
    schedule = student.make_schedule(model, SECONDS / 4)
    assert time.process_time() - start < SECONDS / 4 + GRACE
    check(schedule, steps, K, steps * K / 2)


@pytest.mark.task5_5
def test_digits_at_half_the_work():
    """In time, and with less than half of the error of random reuse, on other images."""
    model = models.load("digits", device="cpu")
    start = time.process_time()
    schedule = student.make_schedule(model, DIGITS_SECONDS)
    assert time.process_time() - start < 1.2 * DIGITS_SECONDS + GRACE
    check(schedule, 20, 16, 160)
    images = Images(model, DIGITS_SEED, 4)
    drawn = images.error(router.named("random:0.5", 20, 16, DIGITS_SEED))
    assert images.error(schedule) < 0.5 * drawn
