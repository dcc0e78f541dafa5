"""The tests of assignment 5. `python -m pytest notebooks/assignments/a5_competition -m task5_1`

`student` calls the functions of student.py, and those of probes.py, by `student.probe`.
"""

import functools
import math

import pytest
import torch
from cases import DEPTHS, DIGITS_SECONDS, DIGITS_SEED, IMAGES, SECONDS, SEEDS, SHAPES
from comparing import check, is_tensor, same
from probes import Images, small_model

import models
import router
from cache import Cache

POINTS = {"task5_1": 2, "task5_2": 2, "task5_3": 2, "task5_4": 4, "task5_5": 4}
NEEDS = "everything"  # the modules that student.py may import
GRACE = 0.3  # seconds


@functools.cache
def judge(seed, steps, depth):
    return Images(small_model(seed, steps, depth), seed, IMAGES)


def error(images, schedule):
    return (images.made(Cache(schedule)) - images.full).square().mean().item()


def check_schedule(schedule, steps, branches, least):
    """A schedule with at least that many reuses, none of them in row 0."""
    is_tensor(schedule, (steps, branches), torch.bool, "the schedule")
    check(schedule[0].all(), "row 0 of a schedule computes everything: nothing is kept yet")
    reuses = int((~schedule).sum())
    check(reuses >= least, f"the schedule reuses {reuses} of {steps * branches} cells: at least "
          f"{math.ceil(least)} are asked for")


def in_time(taken, seconds):
    check(taken < seconds, f"it took {taken:.2f} s of processor time, {seconds:.2f} are allowed")


# ------------------------------------------------------------------------------------------------


@pytest.mark.task5_1
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("steps, depth", DEPTHS)
def test_error_of(student, seed, steps, depth):
    """Without reuse the error is 0, and 0.25 to images that are all 0.5 away. A schedule's error is
    that of its samples, and 0 to its own images."""
    images, K = judge(seed, steps, depth), 2 * depth
    none, schedule = router.none(steps, K), router.random(steps, K, 0.4, seed)

    def of(schedule, full):
        return student.probe("error_of", seed, steps, depth, IMAGES, schedule, full)

    same(of(none, images.full), 0.0, "error_of a schedule without reuse", 0)
    count = images.full.numel()
    same(of(none, images.full + 0.5), 0.25, "error_of for images that are 0.5 away everywhere",
         1e-5, {"a sum over all pixels, not a mean": 0.25 * count, "not squared": 0.5,
                "the root of the mean": 0.5, "the sum over an image": 0.25 * count / IMAGES})
    right = error(images, schedule)
    same(of(schedule, images.full) / right, 1.0, "error_of a random schedule, over the right value",
         1e-5)
    same(of(schedule, images.made(Cache(schedule))), 0.0,
         "error_of a schedule, compared with its own images", 0)


# ------------------------------------------------------------------------------------------------


@pytest.mark.task5_2
@pytest.mark.parametrize("steps, branches", (*SHAPES, (2, 1), (3, 1)))
def test_half_schedule_reuses_exactly_half(student, steps, branches):
    schedule = student.half_schedule(steps, branches)
    least = math.ceil(steps * branches / 2)
    check_schedule(schedule, steps, branches, 0)
    same(int((~schedule).sum()), least, f"the reuses for T = {steps} and K = {branches}, half of "
         "all cells, rounded up", likely={
             "T is odd: the last row has to reuse a part": steps // 2 * branches})
    every_other = (torch.arange(steps - 1) % 2 == 0)[:, None].repeat(1, branches)
    same(schedule[:-1], every_other, f"the rows but the last of the {steps}")
    check((schedule[-1].int().diff() >= 0).all(), "the last row reuses from branch 0 on")


# ------------------------------------------------------------------------------------------------


@pytest.mark.task5_3
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("steps, branches", SHAPES)
def test_a_neighbour_swaps_two_cells(student, seed, steps, branches):
    schedule = router.random(steps, branches, 0.4, seed)
    found, after = student.probe("neighbours", schedule, seed, 300)
    same(after, schedule, "the schedule given to neighbour, which must stay unchanged", 0)
    changes = torch.zeros(steps, branches, dtype=torch.long)
    for near in found:
        check_schedule(near, steps, branches, 0)
        same(int((near != schedule).sum()), 2, "the cells in which a neighbour differs")
        same(int((~near).sum()), int((~schedule).sum()), "the reuses of a neighbour")
        changes += near != schedule
    if steps * branches < 40:
        check((changes[1:] > 0).all(), "of 300 neighbours none changes the cell "
              f"{(changes[1:] == 0).nonzero()[:1].tolist()} below row 0: draw among all cells")


@pytest.mark.task5_3
def test_the_generator_decides_the_neighbour(student):
    schedule = router.random(*SHAPES[0], 0.4)
    first, second, other = (student.probe("neighbours", schedule, seed, 1)[0][0]
                            for seed in (1, 1, 2))
    same(second, first, "a neighbour drawn again with the same generator's seed", 0)
    check(not torch.equal(first, other), "two generators give the same neighbour: draw from the "
          "generator that is given")


# ------------------------------------------------------------------------------------------------


@pytest.mark.task5_4
@pytest.mark.parametrize("steps, depth", DEPTHS)
def test_the_search_finds_better_schedules_in_time(student, steps, depth):
    """With random weights no schedule is known to be good: it must be searched for."""
    images, K = judge(SEEDS[0], steps, depth), 2 * depth
    first = router.random(steps, K, 0.5, SEEDS[0])
    found, taken, after = student.probe(
        "search", SEEDS[0], steps, depth, IMAGES, first, SECONDS)
    in_time(taken, SECONDS + GRACE)
    check_schedule(found, steps, K, 0)
    same(int((~found).sum()), int((~first).sum()), "the reuses of the schedule that search found")
    same(after, first, "the schedule given to search, which must stay unchanged", 0)
    share = error(images, found) / error(images, first)
    check(share < 0.7, f"the schedule found has {share:.2f} of the error of the random one it "
          "started from: below 0.7 is asked for. Likely mistake: a worse try is kept")


@functools.cache
def best_of_many():
    steps, depth = DEPTHS[0]
    images = judge(SEEDS[1], steps, depth)
    tries = [router.random(steps, 2 * depth, 0.5, seed) for seed in range(40)]
    return min(tries, key=functools.partial(error, images))


@pytest.mark.task5_4
def test_the_search_never_makes_it_worse(student):
    """Even if it starts from the best of many."""
    steps, depth = DEPTHS[0]
    images, best = judge(SEEDS[1], steps, depth), best_of_many()
    found, *_ = student.probe("search", SEEDS[1], steps, depth, IMAGES, best, SECONDS / 4)
    check_schedule(found, steps, 2 * depth, 0)
    share = error(images, found) / error(images, best)
    check(share <= 1 + 1e-6, f"from a good start, search ends with {share:.2f} times the error: "
          "never worse is asked for. Likely mistake: the last try is returned, not the best")


# ------------------------------------------------------------------------------------------------


@pytest.mark.task5_5
@pytest.mark.parametrize("steps, depth", DEPTHS)
def test_schedules_for_any_model(student, steps, depth):
    schedule, taken = student.probe("make_schedule", SEEDS[0], steps, depth, SECONDS / 4)
    in_time(taken, SECONDS / 4 + GRACE)
    check_schedule(schedule, steps, 2 * depth, steps * depth)


@functools.cache
def digits():
    """Images of digits, and the error of random reuse."""
    images = Images(models.load("digits", device="cpu"), DIGITS_SEED, 4)
    return images, error(images, router.named("random:0.5", 20, 16, DIGITS_SEED))


@pytest.mark.task5_5
def test_digits_at_half_the_work(student):
    """In time, and with less than half of the error of random reuse, on other images."""
    schedule, taken = student.probe("make_schedule", None, 20, 8, DIGITS_SECONDS)
    in_time(taken, 1.2 * DIGITS_SECONDS + GRACE)
    check_schedule(schedule, 20, 16, 160)
    images, drawn = digits()
    share = error(images, schedule) / drawn
    check(share < 0.5, f"on digits the schedule has {share:.2f} of the error of random reuse: less "
          "than half is asked for")
