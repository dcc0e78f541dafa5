"""The tests of assignment 4. `python -m pytest notebooks/assignments/a4_proxy -m task4_1`

`student` calls the functions of student.py, and those of probes.py, by `student.probe`.
"""

import copy
import functools

import numpy as np
import pytest
import torch
from cases import BRANCHES, HORIZONS, IMAGES, PILOTS, ROWS, SAMPLERS, SEEDS, STEPS, TAU
from comparing import check, is_tensor, refuses, same
from probes import GUIDANCE, case

import proxy
from samplers import DDIM, Noise, make_sampler

POINTS = {"task4_1": 2, "task4_2": 5, "task4_3": 2, "task4_4": 2, "task4_5": 4, "task4_6": 3}
NEEDS = "dit", "cache", "samplers"  # the modules that student.py may import
PIXELS = 64  # C x H x W of an image


def exact(network, sampler, x, condition, scores, noise):
    """The repository's lambda, whole rows masked: (T,)."""
    return proxy.image_error(network, sampler, x, condition, GUIDANCE, scores, TAU, noise)


@functools.cache
def expected_rows(seed, sampler="ddim"):
    """The same for the scores of `case`."""
    network, x, condition, scores, noise = case(seed, IMAGES, STEPS)
    return exact(network, make_sampler(sampler, STEPS), x, condition, scores, noise)


def measure(student, function, seed, last, sampler="ddim", scores=None):
    """Runs the student's function -> its result, and the evaluations of the network. Checks that
    there were no gradients and that the scores are as before."""
    scores = case(seed, IMAGES, STEPS)[3] if scores is None else scores
    found = student.probe("measure", function, seed, IMAGES, sampler, scores, TAU, last)
    same(found["scores"], scores, f"the scores after {function}, which must stay unchanged", 0)
    check(not found["with_gradients"], f"{function} evaluates the network with gradients: "
          "torch.no_grad() saves them")
    return found["found"], found["calls"]


def masked(student, seed, groups, sampler="ddim", scores=None):
    groups = torch.tensor(groups, dtype=torch.bool)
    errors, calls = measure(student, "masked_errors", seed, groups, sampler, scores)
    is_tensor(errors, (STEPS, len(groups), IMAGES), torch.float64, "masked_errors")
    check(not errors[0].any(), "row 0 of masked_errors is 0")
    same(calls, STEPS + len(groups) * STEPS * (STEPS - 1) // 2,
         f"the network's evaluations for T = {STEPS} and {len(groups)} groups", likely={
             "every fork starts at step 0 instead of at its row":
                 STEPS + len(groups) * STEPS * (STEPS - 1),
             "row 0 is forked too, which changes nothing":
                 STEPS + len(groups) * STEPS * (STEPS + 1) // 2})
    return errors


def close(found, expected, what, tolerance=1e-9, likely=None):
    """`same` with a relative tolerance: lambda may be small."""
    size = expected.abs().clamp_min(1e-300)
    likely = {words: wrong / size for words, wrong in (likely or {}).items()}
    is_tensor(found, expected.shape, torch.float64, what)
    same(found / size, expected / size, f"{what} (over the right value)", tolerance, likely)


# ------------------------------------------------------------------------------------------------


@pytest.mark.task4_1
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("by", ["kind", "block"])
def test_each_branch_is_in_the_group_of_its_name(student, branches, by):
    names, groups = student.groups_of(list(branches), by)
    labels = [branch.split()[0 if by == "kind" else 1] for branch in branches]
    right = list(dict.fromkeys(labels))
    same(names, right, f"the groups' names by {by} of {list(branches)}", likely={
        "the groups are sorted, not in the order of their first branch": sorted(right)})
    same(groups, torch.tensor([[label == name for label in labels] for name in right]),
         f"the groups by {by} of {list(branches)}")


@pytest.mark.task4_1
def test_other_groupings_are_refused(student):
    refuses(student.groups_of, list(BRANCHES[0]), "colour", what="by = 'colour'")


# ------------------------------------------------------------------------------------------------


@pytest.mark.task4_2
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_all_branches_as_one_group_give_the_proxy(student, name, seed):
    """The mean over the images is proxy.image_error; each image's entry is that of it alone."""
    errors = masked(student, seed, [[1] * 4], name)
    expected = expected_rows(seed, name)
    close(errors[:, 0].mean(-1), expected, f"lambda of all branches, the mean over images, {name}",
          likely={"the error is a sum over C, H, W, not a mean": PIXELS * expected,
                  "the error is divided by the number of images too": expected / IMAGES})
    network, x, condition, scores, _ = case(seed, IMAGES, STEPS)
    last, alone = IMAGES - 1, (condition[0][[IMAGES - 1, 2 * IMAGES - 1]],)
    one = exact(network, make_sampler(name, STEPS), x[last:], alone, scores,
                Noise(seed, [last], purpose=2))
    close(errors[:, 0, last], one, f"lambda of the last image, against it alone, {name}", 1e-6)


GROUPS = [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]


@functools.cache
def expected_group(seed, group):
    """The scores with which only the group reuses, and their lambda."""
    network, x, condition, scores, noise = case(seed, IMAGES, STEPS)
    scores = scores.masked_fill(torch.tensor(group) == 0, 1.0)
    return scores, exact(network, DDIM(STEPS), x, condition, scores, noise)


@pytest.mark.task4_2
@pytest.mark.parametrize("seed", SEEDS)
def test_a_group_masks_its_own_branches(student, seed):
    """If the other branches never reuse, a group's lambda is that of the whole row."""
    for group in GROUPS[:3]:
        scores, expected = expected_group(seed, tuple(group))
        errors = masked(student, seed, [group], scores=scores)
        close(errors[:, 0].mean(-1), expected, f"lambda of the group {group}, where no other "
              "branch reuses")


@pytest.mark.task4_2
@pytest.mark.parametrize("seed", SEEDS[:1])
def test_a_group_masks_no_other_branches(student, seed):
    """A group that never reuses has lambda 0, whatever the others do, and so has an empty group.
    Several groups at once give the same as each group alone."""
    scores = case(seed, IMAGES, STEPS)[3]
    together = masked(student, seed, GROUPS)
    for g, group in enumerate(GROUPS):
        own = scores.masked_fill(torch.tensor(group) == 1, 1.0)
        never = masked(student, seed, [group], scores=own)
        same(never, torch.zeros_like(never), f"lambda of the group {group}, which never reuses", 0)
        alone = masked(student, seed, [group])
        same(together[:, g], alone[:, 0], f"lambda of the group {group} among others, compared "
             "with the group alone", 0)


# ------------------------------------------------------------------------------------------------


@pytest.mark.task4_3
@pytest.mark.parametrize("values, expected", [pilot[:2] for pilot in PILOTS])
def test_standard_error_by_hand(student, values, expected):
    B, right = len(values), torch.tensor([expected, 10 * expected], dtype=torch.float64)
    pilot = torch.tensor([values, [10 * value for value in values]], dtype=torch.float64)
    same(student.standard_error(pilot), right, f"standard_error of {list(values)} and ten times it",
         1e-12, {"the variance is biased: divide by B - 1": right * ((B - 1) / B) ** 0.5,
                 "this is the deviation of an image, not of the mean": right * B**0.5})


@pytest.mark.task4_3
@pytest.mark.parametrize("seed", SEEDS)
def test_the_standard_error_is_the_deviation_of_means(student, seed):
    """For 20,000 means of 6 images each: the expected squared standard error is their variance."""
    samples = torch.from_numpy(np.random.default_rng(seed).exponential(size=(20000, 6)))
    found = student.standard_error(samples)
    is_tensor(found, (20000,), torch.float64, "standard_error")
    ratio = found.square().mean().item() / samples.mean(-1).var().item()
    check(0.9 < ratio < 1.1, f"the squared standard error of 20,000 samples of 6 is {ratio:.3f} of "
          "the variance of their means: it should be 1")


# ------------------------------------------------------------------------------------------------


@pytest.mark.task4_4
@pytest.mark.parametrize("values, _, relative, expected", PILOTS)
def test_images_needed_by_hand(student, values, _, relative, expected):
    pilot = torch.tensor(values, dtype=torch.float64)
    biased = (pilot.var(correction=0) / (relative * pilot.mean()) ** 2).ceil().item()
    same(student.images_needed(pilot, relative), expected,
         f"images_needed for {list(values)} and a relative error of {relative}", likely={
             "rounded down, not up": expected - 1, "the variance is biased": int(max(1, biased))})


@pytest.mark.task4_4
def test_the_worst_entry_counts_and_row_0_does_not(student):
    pilot = torch.tensor([[0.0, 0.0], [9.0, 11.0], [1.0, 3.0]], dtype=torch.float64)
    # (sqrt(2) / (0.3 x 2))^2 = 5.6
    same(student.images_needed(pilot, 0.3), 6, f"images_needed for the rows {pilot.tolist()}: the "
         "worst row counts, a row of zeros does not")
    same(student.images_needed(pilot[:2], 0.3), 1, "images_needed for a row with little scatter")
    same(student.images_needed(pilot[:1], 0.3), 1, "images_needed if all means are 0")


# ------------------------------------------------------------------------------------------------


def truncated(student, seed, horizon):
    found, calls = measure(student, "truncated_proxy", seed, horizon)
    is_tensor(found, (STEPS,), torch.float64, "truncated_proxy")
    check(found[0] == 0, "row 0 of truncated_proxy is 0")

    def count(horizon):
        return STEPS + sum(min(horizon, STEPS - i) for i in range(1, STEPS))

    same(calls, count(horizon), f"the network's evaluations with a horizon of {horizon}", likely={
        "a fork goes one step too far, off by one": count(horizon + 1),
        "a fork stops one step too early, off by one": count(horizon - 1),
        "forks go to the end": count(STEPS)})
    return found


@pytest.mark.task4_5
@pytest.mark.parametrize("seed", SEEDS)
def test_a_horizon_to_the_end_is_exact(student, seed):
    for horizon in (STEPS - 1, STEPS + 3):
        close(truncated(student, seed, horizon), expected_rows(seed),
              f"truncated_proxy with a horizon of {horizon}, which reaches the end")


@functools.cache
def shorter(seed, horizon):
    """truncated_proxy by another way. A sampler that ends after step `end` - 1, and removes all
    noise there, ends at the x_0 predicted at that step."""
    network, x, condition, scores, noise = case(seed, IMAGES, STEPS)
    rows = [0.0]
    for i in range(1, STEPS):
        end = min(i + horizon, STEPS)
        short = copy.copy(DDIM(STEPS))
        short.timesteps = short.timesteps[:end]
        short.alpha_bar_next = np.append(short.alpha_bar_next[: end - 1], 1.0)
        rows.append(exact(network, short, x, condition, scores[:end], noise)[i].item())
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.task4_5
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("horizon", HORIZONS)
def test_a_truncated_fork_is_a_whole_one_of_a_shorter_sampler(student, horizon, seed):
    found = truncated(student, seed, horizon)
    close(found, shorter(seed, horizon), f"truncated_proxy with a horizon of {horizon}", 1e-6, {
        "a sum over the pixels, not a mean": PIXELS * IMAGES * shorter(seed, horizon)})


# ------------------------------------------------------------------------------------------------


def on_the_line(rows, values, logarithms=True):
    """The values at rows, and between them a straight line in lambda or in log lambda; row 0 is 0.
    """
    ends = [values[i].item() for i in rows]
    line = np.interp(np.arange(STEPS), rows, np.log(ends) if logarithms else ends)
    line = torch.from_numpy(np.exp(line) if logarithms else line)
    line[0] = 0
    return line


@pytest.mark.task4_6
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_measured_rows_are_exact_and_the_others_on_a_line_of_logarithms(student, name, rows):
    found, calls = measure(student, "sparse_proxy", SEEDS[0], list(rows), name)
    expected = expected_rows(SEEDS[0], name)
    same(calls, STEPS + sum(STEPS - i for i in rows),
         f"the network's evaluations for the rows {list(rows)}", likely={
             "all rows are measured": STEPS + STEPS * (STEPS - 1) // 2})
    close(found, on_the_line(rows, expected), f"sparse_proxy with the rows {list(rows)}, {name}",
          likely={"the line is straight in lambda, not in log lambda":
                  on_the_line(rows, expected, logarithms=False)})


@pytest.mark.task4_6
def test_rows_that_leave_out_an_end_are_refused(student):
    for rows in ((2, STEPS - 1), (1, 2), (1, 3, 2, STEPS - 1), (0, 1, STEPS - 1), ()):
        refuses(measure, student, "sparse_proxy", SEEDS[0], list(rows),
                what=f"sparse_proxy with the rows {list(rows)}")
