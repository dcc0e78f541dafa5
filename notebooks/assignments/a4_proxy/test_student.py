"""The tests of assignment 4. `python -m pytest notebooks/assignments/a4_proxy -m task4_1`"""

import copy

import numpy as np
import pytest
import student
import torch
from cases import BRANCHES, HORIZONS, IMAGES, PILOTS, ROWS, SAMPLERS, SEEDS, STEPS, TAU

import dit
import proxy
from samplers import DDIM, Noise, make_sampler

POINTS = {"task4_1": 2, "task4_2": 5, "task4_3": 2, "task4_4": 2, "task4_5": 4, "task4_6": 3}
GUIDANCE = 1.5


def case(seed, images=IMAGES):
    """A small network in float64, and the inputs of a proxy measurement."""
    network = dit.DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=2,
                      num_heads=2, num_classes=5)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    network = network.double().eval().requires_grad_(False)
    noise = Noise(seed, range(images), purpose=2)
    x = noise.start((1, 8, 8)).double()
    condition = network.condition(noise.labels(5))
    scores = torch.rand(STEPS, 4, generator=generator)
    return network, x, condition, scores, noise


def counted(network):
    """-> a list that gets one entry per evaluation: whether gradients were enabled."""
    calls = []
    network.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


def exact(network, sampler, x, condition, scores, noise):
    """The repository's lambda, whole rows masked: (T,)."""
    return proxy.image_error(network, sampler, x, condition, GUIDANCE, scores, TAU, noise)


def masked(network, sampler, x, condition, scores, noise, groups):
    groups = torch.tensor(groups, dtype=torch.bool)
    errors = student.masked_errors(
        network, sampler, x, condition, GUIDANCE, scores, TAU, groups, noise
    )
    assert errors.shape == (len(sampler.timesteps), len(groups), len(x))
    assert errors.dtype == torch.float64 and not errors[0].any()
    return errors


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)


# ------------------------------------------------------------------------------------------------


@pytest.mark.task4_1
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("by", ["kind", "block"])
def test_each_branch_is_in_the_group_of_its_name(branches, by):
    names, groups = student.groups_of(list(branches), by)
    assert groups.dtype == torch.bool and groups.shape == (len(names), len(branches))
    for k, branch in enumerate(branches):
        (g,) = groups[:, k].nonzero().flatten().tolist()
        assert names[g] == branch.split()[0 if by == "kind" else 1]
    first = [int(group.nonzero()[0]) for group in groups]
    assert first == sorted(first), "groups in the order of their first branch"


@pytest.mark.task4_1
def test_other_groupings_are_refused():
    with pytest.raises(ValueError):
        student.groups_of(BRANCHES[0], "colour")


# ------------------------------------------------------------------------------------------------


@pytest.mark.task4_2
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_all_branches_as_one_group_give_the_proxy(name, seed):
    """The mean over the images is proxy.image_error; each image's entry is that of it alone."""
    network, x, condition, scores, noise = case(seed)
    before = scores.clone()
    errors = masked(network, make_sampler(name, STEPS), x, condition, scores, noise, [[1] * 4])
    expected = exact(network, make_sampler(name, STEPS), x, condition, scores, noise)
    close(errors[:, 0].mean(-1), expected)
    assert torch.equal(scores, before), "the scores were changed"
    last, alone = IMAGES - 1, (condition[0][[IMAGES - 1, 2 * IMAGES - 1]],)
    one = exact(network, make_sampler(name, STEPS), x[last:], alone, scores,
                Noise(seed, [last], purpose=2))
    close(errors[:, 0, last], one, 1e-6)


GROUPS = [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]


@pytest.mark.task4_2
@pytest.mark.parametrize("seed", SEEDS)
def test_a_group_masks_its_own_branches(seed):
    """If the other branches never reuse, a group's lambda is that of the whole row."""
    network, x, condition, scores, noise = case(seed)
    for group in GROUPS[:3]:
        outside = torch.tensor(group) == 0
        others = scores.masked_fill(outside, 1.0)
        errors = masked(network, DDIM(STEPS), x, condition, others, noise, [group])
        expected = exact(network, DDIM(STEPS), x, condition, others, noise)
        assert (expected[1:] > 0).all()
        close(errors[:, 0].mean(-1), expected)


@pytest.mark.task4_2
@pytest.mark.parametrize("seed", SEEDS[:1])
def test_a_group_masks_no_other_branches(seed):
    """A group that never reuses has lambda 0, whatever the others do, and so has an empty group.
    Several groups at once give the same as each group alone."""
    network, x, condition, scores, noise = case(seed)
    for group in GROUPS:
        inside = torch.tensor(group) == 1
        own = scores.masked_fill(inside, 1.0)
        assert not masked(network, DDIM(STEPS), x, condition, own, noise, [group]).any()
    together = masked(network, DDIM(STEPS), x, condition, scores, noise, GROUPS)
    for g, group in enumerate(GROUPS):
        alone = masked(network, DDIM(STEPS), x, condition, scores, noise, [group])
        assert torch.equal(together[:, g], alone[:, 0])


@pytest.mark.task4_2
def test_forks_save_evaluations():
    network, x, condition, scores, noise = case(SEEDS[0])
    calls = counted(network.requires_grad_(True))
    masked(network, DDIM(STEPS), x, condition, scores, noise, GROUPS[:2])
    assert len(calls) == STEPS + 2 * STEPS * (STEPS - 1) // 2 and not any(calls)


# ------------------------------------------------------------------------------------------------


@pytest.mark.task4_3
@pytest.mark.parametrize("values, expected", [pilot[:2] for pilot in PILOTS])
def test_standard_error_by_hand(values, expected):
    pilot = torch.tensor([values, [10 * value for value in values]], dtype=torch.float64)
    found = student.standard_error(pilot)
    close(found, torch.tensor([expected, 10 * expected], dtype=torch.float64), 1e-12)


@pytest.mark.task4_3
@pytest.mark.parametrize("seed", SEEDS)
def test_the_standard_error_is_the_deviation_of_means(seed):
    """For 20,000 means of 6 images each: the expected squared standard error is their variance."""
    samples = torch.from_numpy(np.random.default_rng(seed).exponential(size=(20000, 6)))
    scatter = samples.mean(-1).var().item()
    assert student.standard_error(samples).square().mean().item() == pytest.approx(scatter, rel=0.1)


# ------------------------------------------------------------------------------------------------


@pytest.mark.task4_4
@pytest.mark.parametrize("values, _, relative, expected", PILOTS)
def test_images_needed_by_hand(values, _, relative, expected):
    found = student.images_needed(torch.tensor(values, dtype=torch.float64), relative)
    assert isinstance(found, int) and found == expected


@pytest.mark.task4_4
def test_the_worst_entry_counts_and_row_0_does_not():
    pilot = torch.tensor([[0.0, 0.0], [9.0, 11.0], [1.0, 3.0]], dtype=torch.float64)
    assert student.images_needed(pilot, 0.3) == 6  # (sqrt(2) / (0.3 x 2))^2 = 5.6
    assert student.images_needed(pilot[:2], 0.3) == 1
    assert student.images_needed(pilot[:1], 0.3) == 1


# ------------------------------------------------------------------------------------------------


def truncated(network, x, condition, scores, noise, horizon):
    found = student.truncated_proxy(
        network, DDIM(STEPS), x, condition, GUIDANCE, scores, TAU, horizon, noise
    )
    assert found.shape == (STEPS,) and found.dtype == torch.float64 and found[0] == 0
    return found


@pytest.mark.task4_5
@pytest.mark.parametrize("seed", SEEDS)
def test_a_horizon_to_the_end_is_exact(seed):
    network, x, condition, scores, noise = case(seed)
    expected = exact(network, DDIM(STEPS), x, condition, scores, noise)
    for horizon in (STEPS - 1, STEPS + 3):
        close(truncated(network, x, condition, scores, noise, horizon), expected)


@pytest.mark.task4_5
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("horizon", HORIZONS)
def test_a_truncated_fork_is_a_whole_one_of_a_shorter_sampler(horizon, seed):
    """A sampler that ends after step `end` - 1, and removes all noise there, ends at the x_0
    predicted at that step."""
    network, x, condition, scores, noise = case(seed)
    found = truncated(network, x, condition, scores, noise, horizon)
    for i in range(1, STEPS):
        end = min(i + horizon, STEPS)
        short = copy.copy(DDIM(STEPS))
        short.timesteps = short.timesteps[:end]
        short.alpha_bar_next = np.append(short.alpha_bar_next[: end - 1], 1.0)
        expected = exact(network, short, x, condition, scores[:end], noise)[i]
        close(found[i], expected, 1e-6)


@pytest.mark.task4_5
@pytest.mark.parametrize("horizon", HORIZONS)
def test_a_truncated_fork_saves_evaluations(horizon):
    network, x, condition, scores, noise = case(SEEDS[0])
    calls = counted(network.requires_grad_(True))
    truncated(network, x, condition, scores, noise, horizon)
    assert len(calls) == STEPS + sum(min(horizon, STEPS - i) for i in range(1, STEPS))
    assert not any(calls)


# ------------------------------------------------------------------------------------------------


def sparse(network, sampler, x, condition, scores, noise, rows):
    return student.sparse_proxy(
        network, sampler, x, condition, GUIDANCE, scores, TAU, list(rows), noise
    )


@pytest.mark.task4_6
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_measured_rows_are_exact_and_the_others_on_a_line_of_logarithms(name, rows):
    network, x, condition, scores, noise = case(SEEDS[0])
    calls = counted(network)
    found = sparse(network, make_sampler(name, STEPS), x, condition, scores, noise, rows)
    assert len(calls) == STEPS + sum(STEPS - i for i in rows)
    expected = exact(network, make_sampler(name, STEPS), x, condition, scores, noise)
    assert found.shape == (STEPS,) and found.dtype == torch.float64 and found[0] == 0
    for before, after in zip(rows[:-1], rows[1:], strict=True):
        for i in range(before, after + 1):
            share = (i - before) / (after - before)  # weights of a geometric mean
            close(found[i], expected[before] ** (1 - share) * expected[after] ** share)


@pytest.mark.task4_6
def test_rows_that_leave_out_an_end_are_refused():
    arguments = case(SEEDS[0])
    network, x, condition, scores, noise = arguments
    for rows in ((2, STEPS - 1), (1, 2), (1, 3, 2, STEPS - 1), (0, 1, STEPS - 1), ()):
        with pytest.raises(ValueError):
            sparse(network, DDIM(STEPS), x, condition, scores, noise, rows)
