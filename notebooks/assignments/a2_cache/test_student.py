"""The tests of assignment 2. `python -m pytest notebooks/assignments/a2_cache -m task2_1`

`student` calls the functions of student.py, and those of probes.py, by `student.probe`.
"""

import functools
import math

import pytest
import torch
from cases import (
    BRANCHES,
    CHANGES,
    SCRIPTS,
    SEEDS,
    SHAPES,
    SIZES,
    STEPS,
    THRESHOLDS,
    TOKENS,
)
from comparing import check, is_tensor, same
from probes import CountingMlp, draw, small_network, trajectory
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dit
from cache import Cache

POINTS = {"task2_1": 2, "task2_2": 5, "task2_3": 5, "task2_4": 3, "task2_5": 3}
NEEDS = ("dit",)  # the modules that student.py may import


def random_schedule(seed, share=0.5):
    """(T, K), True: compute; about this share of the cells, and all of row 0."""
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.rand(STEPS, BRANCHES, generator=generator) < share
    schedule[0] = True
    return schedule


# ------------------------------------------------------------------------------------------------


@pytest.mark.task2_1
@pytest.mark.parametrize("old, new, expected", CHANGES)
def test_relative_change_by_hand(student, old, new, expected):
    change = student.relative_change(torch.tensor(new), torch.tensor(old))
    old, new = torch.tensor(old), torch.tensor(new)
    each = ((new - old).abs() / old.abs()).mean().item()
    same(change, float(expected), f"relative_change of {old.tolist()} to {new.tolist()}", 1e-6, {
        "a mean of ratios, not a ratio of means": each,
        "relative to the new output, not the old one":
            ((new - old).abs().mean() / new.abs().mean()).item()})


@pytest.mark.task2_1
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_relative_change_is_relative(student, seed, shape):
    old, new = draw(seed, shape, 2)
    same(student.relative_change(1.3 * old, old), 0.3, "relative_change of x to 1.3 x", 1e-5)
    right = ((new - old).abs().mean() / old.abs().mean()).item()
    for factor in (1, 8):
        same(student.relative_change(factor * new, factor * old), right,
             f"relative_change of random tensors, times {factor}", 1e-5)


@pytest.mark.task2_1
def test_relative_change_of_nothing(student):
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    same(student.relative_change(zero, zero), 0.0, "relative_change of zeros to zeros")
    same(student.relative_change(one, zero), math.inf, "relative_change of zeros to ones")


# ------------------------------------------------------------------------------------------------


def with_the_step_before(script, threshold):
    """The refreshes of a cache that compares with the previous step: a known mistake."""
    pairs = zip(script[1:], script[:-1], strict=True)
    return [True] + [abs(new - old) / abs(old) > threshold for new, old in pairs]


@pytest.mark.task2_2
@pytest.mark.parametrize("script, threshold, refreshed", SCRIPTS)
def test_the_steps_that_refresh(student, script, threshold, refreshed):
    """Computed by hand. Two trajectories, to check that the second one begins empty."""
    refreshed = [bool(fresh) for fresh in refreshed]
    found = student.probe("play", BRANCHES, threshold, list(script), 2)
    for number, run in enumerate(found, 1):
        where = f"in trajectory {number}, in which branch 0 gives {list(script)}"
        same(run["refreshed"], refreshed, f"the steps that refresh with threshold {threshold} "
             f"{where}", likely={"branch 0 is compared with the previous step, so a slow drift is "
                                 "never seen; compare with the last refresh":
                                 with_the_step_before(script, threshold)})
        last = 0
        for i, fresh in enumerate(refreshed):
            last = i if fresh else last
            same(run["ran"][i], [1] + [int(fresh)] * (BRANCHES - 1),
                 f"how often each branch is computed at step {i} {where}")
            right = [script[i]] + [100.0 * last + k for k in range(1, BRANCHES)]
            same(run["given"][i], right, f"the outputs of the branches at step {i} {where}", 1e-6)
        others, T = number * sum(refreshed), number * len(script)
        same(run["computed"], [T] + [others] * (BRANCHES - 1), f"`computed` {where}")
        same(run["reused"], [0] + [T - others] * (BRANCHES - 1), f"`reused` {where}")


@functools.cache
def right_trajectory(seed, refreshed):
    schedule = torch.tensor(refreshed)[:, None].repeat(1, BRANCHES)
    schedule[:, 0] = True
    cache = None if schedule.all() else Cache(schedule)
    return trajectory(small_network(seed), cache, seed, STEPS), schedule.sum(0).tolist()


@pytest.mark.task2_2
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_on_a_network_it_is_the_cache_of_its_own_schedule(student, seed, threshold):
    """Bitwise equal to cache.Cache with the steps that refreshed."""
    outputs, refreshed, computed = student.probe(
        "on_a_network", seed, STEPS, BRANCHES, threshold)
    same(len(refreshed), STEPS, "the length of `refreshed` after a trajectory")
    expected, counts = right_trajectory(seed, (True, *refreshed[1:]))
    same(outputs, expected, "the outputs of a network with this cache, compared with cache.Cache "
         "at the same refreshes", 0)
    same(computed, counts, "`computed` on a network")


@pytest.mark.task2_2
def test_thresholds_at_the_ends(student):
    outputs, *_ = student.probe("on_a_network", 0, STEPS, BRANCHES, 0.0)
    expected, _ = right_trajectory(0, (True,) * STEPS)
    same(outputs, expected, "the outputs of a network with threshold 0, compared with no cache", 0)
    *_, computed = student.probe("on_a_network", 0, STEPS, BRANCHES, math.inf)
    same(computed, [STEPS] + [1] * (BRANCHES - 1), "`computed` with an infinite threshold")


@pytest.mark.task2_2
@pytest.mark.parametrize("threshold", (0.0, *THRESHOLDS, math.inf))
def test_one_output_of_each_branch_at_most(student, threshold):
    """The outputs that are still in memory after a step, counted by weak references."""
    counts, left = student.probe("alive", STEPS, BRANCHES, threshold)
    for i, count in enumerate(counts):
        check(count <= BRANCHES, f"{count} outputs are kept after step {i}: at most one of each of "
              f"the {BRANCHES} branches")
    check(left == 0, f"{left} outputs are kept when a new trajectory begins: it begins empty")


# ------------------------------------------------------------------------------------------------


def moved(seed, shape):
    """seen, kept, new, and for each row its tokens in order of their change, the largest first."""
    B, N, D = shape
    seen, kept, direction = draw(seed, shape, 3)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(N, generator=generator) for _ in range(B)])
    distance = torch.empty(B, N).scatter_(1, order, torch.arange(N, 0, -1.0).expand(B, N))
    return seen, kept, seen + distance[..., None] * direction / direction.norm(
        dim=-1, keepdim=True
    ), order


def step_of_tokens(student, seed, new, seen, kept, tokens):
    """A step of token_wise -> seen and kept after it, with the right shapes."""
    seen_after, kept_after, given, inputs = student.probe(
        "token_wise", seed, new, seen, kept, tokens)
    B, N, D = new.shape
    same(given, [[B, tokens, D]], f"the shapes that the mlp is run on, for {tokens} of {N} tokens")
    is_tensor(seen_after, new.shape, torch.float32, "seen after the step")
    is_tensor(kept_after, new.shape, torch.float32, "kept after the step")
    for name, before, after in zip(("new", "seen", "kept"), (new, seen, kept), inputs, strict=True):
        same(after, before, f"{name}, which must stay unchanged", 0)
    return seen_after, kept_after


@pytest.mark.task2_3
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_tokens_that_changed_most_are_computed(student, seed, shape):
    B, N, D = shape
    seen, kept, new, order = moved(seed, shape)
    for tokens in (1, N // 2, N):
        seen_after, kept_after = step_of_tokens(student, seed, new, seen, kept, tokens)
        fresh = torch.zeros(B, N, dtype=torch.bool).scatter_(1, order[:, :tokens], True)[..., None]
        where = f"after a step that computes {tokens} of {N} tokens (B, N, D)"
        same(kept_after, torch.where(fresh, CountingMlp(seed, D)(new), kept), f"kept {where}", 1e-4)
        same(seen_after, torch.where(fresh, new, seen), f"seen {where}", 0, {
            "tokens that were not computed are marked as seen: only those that the mlp was run on "
            "are": new, "the tokens that were computed are not marked as seen": seen})
        same(torch.where(fresh, kept, kept_after), kept, f"kept of tokens not computed {where}", 0)


@pytest.mark.task2_3
@pytest.mark.parametrize("seed", SEEDS)
def test_a_slow_token_has_its_turn(student, seed):
    """At every step token 0 changes by 1 and one other token, a new one each time, by 1.5. After
    two steps token 0 has changed by 2 since it was last computed, more than any other."""
    N, D = 9, 8
    seen, kept = draw(seed, (1, N, D), 2)
    axis, new, turns = torch.eye(D)[0], seen.clone(), []
    for i in range(1, N):
        new = new.clone()
        new[0, 0] += axis
        new[0, i] += 1.5 * axis
        after, kept = step_of_tokens(student, seed, new, seen, kept, 1)
        turns += torch.nonzero((after != seen).any(-1)[0]).flatten().tolist()
        seen = after
    check(turns[:2] == [1, 0] and turns.count(0) >= 3,
          f"token 0 changes slowly and must have its turn at the second step: the tokens computed "
          f"are {turns}. The change counts since the token itself was last computed")


# ------------------------------------------------------------------------------------------------


def peak_between_steps(schedule, sizes):
    """The most that is held at the end of a step: a known mistake."""
    held = [[i + 1 < STEPS and not schedule[i + 1, k] for k in range(BRANCHES)]
            for i in range(STEPS)]
    return max(sum(size for size, kept in zip(sizes, row, strict=True) if kept) for row in held)


@pytest.mark.task2_4
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("share", (0.2, 0.5, 0.8))
@pytest.mark.parametrize("seed", SEEDS)
def test_peak_bytes_is_what_the_cache_measures(student, seed, share, sizes):
    schedule = random_schedule(seed, share)
    cache = Cache(schedule)
    for i in range(STEPS):
        cache.start(i)
        for k, size in enumerate(sizes):
            cache(k, lambda size=size: torch.zeros(size, dtype=torch.uint8))
    same(student.peak_bytes(schedule, list(sizes)), cache.peak_bytes,
         f"peak_bytes of the random schedule {seed}, entries of {list(sizes)} bytes", likely={
             "only what is held between steps counts, but the peak may lie within a step":
                 peak_between_steps(schedule, sizes),
             "all entries are counted as held": sum(sizes)})


@pytest.mark.task2_4
def test_only_what_will_be_read_is_held(student):
    schedule = torch.ones(STEPS, BRANCHES, dtype=torch.bool)
    same(student.peak_bytes(schedule, list(SIZES[0])), 0, "peak_bytes without any reuse")
    schedule[1:] = False
    same(student.peak_bytes(schedule, list(SIZES[0])), sum(SIZES[0]),
         "peak_bytes where every step reuses everything")


# ------------------------------------------------------------------------------------------------


class TokensOnly:
    """Computes by a schedule, but from step 1 on runs an MLP on `tokens` tokens of zeros."""

    def __init__(self, network, schedule, tokens):
        self.network, self.cache, self.tokens = network, Cache(schedule), tokens

    def start(self, i):
        self.cache.start(i)
        self.first = i == 0
        return self

    def __call__(self, k, branch):
        def fewer():
            width = self.network.pos_embed.shape[-1]
            self.network.blocks[k // 2].mlp(torch.zeros(1, self.tokens, width))
            return torch.zeros(1, 16, width)

        return self.cache(k, branch if self.first or k % 2 == 0 else fewer)


@functools.cache
def counted(tokens):
    """torch's own count on the running network, and how often each branch was computed."""
    network, schedule = small_network(0), random_schedule(SEEDS[0] + tokens)
    cache = TokensOnly(network, schedule, tokens)
    x, t, y = torch.zeros(1, 1, 8, 8), torch.tensor([500.0]), torch.tensor([2])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for i in range(STEPS):
            network(x, t, y, cache=cache.start(i))
    return counter.get_total_flops(), schedule.sum(0).tolist()


@pytest.mark.task2_5
@pytest.mark.parametrize("tokens", TOKENS)
def test_arithmetic_equals_the_count(student, tokens):
    """Compared with torch's own counter on the running network."""
    (flops, computed), network = counted(tokens), small_network(0)
    branches, rest = network.flops()
    every = STEPS * rest + sum(times * flop for times, flop in zip(computed, branches, strict=True))
    found = student.probe("arithmetic", "small", computed, STEPS, tokens)
    same(found, flops, f"arithmetic with {tokens} tokens, compared with torch's count", likely={
        "the MLP costs all tokens each time": every,
        "what no cache can save is counted once, not at every step": flops - (STEPS - 1) * rest})


@pytest.mark.task2_5
def test_arithmetic_of_the_digits_model(student):
    """Everything computed: T times the whole network."""
    with torch.device("meta"):
        network = dit.DiT(**dit.SIZES["digits"])
    branches, rest = network.flops()
    total = student.probe("arithmetic", "digits", [20] * 16, 20, 49)
    same(total, 20 * (sum(branches) + rest), "arithmetic of digits, everything computed")
