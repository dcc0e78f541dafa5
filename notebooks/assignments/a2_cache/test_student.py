"""The tests of assignment 2. `python -m pytest notebooks/assignments/a2_cache -m task2_1`"""

import math
import weakref

import pytest
import student
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dit
from cache import Cache

POINTS = {"task2_1": 2, "task2_2": 5, "task2_3": 5, "task2_4": 3, "task2_5": 3}


def draw(seed, shape, count):
    """`count` tensors from N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator).unbind()


def small_network(seed):
    """A DiT of 16 tokens and 6 branches, no gate of which is zero."""
    network = dit.DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=3,
                      num_heads=2, num_classes=5)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return network.eval().requires_grad_(False)


def random_schedule(seed, share=0.5):
    """(T, K), True: compute; about this share of the cells, and all of row 0."""
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.rand(STEPS, BRANCHES, generator=generator) < share
    schedule[0] = True
    return schedule


# ------------------------------------------------------------------------------------------------


@pytest.mark.task2_1
@pytest.mark.parametrize("old, new, expected", CHANGES)
def test_relative_change_by_hand(old, new, expected):
    change = student.relative_change(torch.tensor(new), torch.tensor(old))
    assert isinstance(change, float) and change == pytest.approx(expected, rel=1e-6)


@pytest.mark.task2_1
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_relative_change_is_relative(seed, shape):
    old, new = draw(seed, shape, 2)
    assert student.relative_change(1.3 * old, old) == pytest.approx(0.3, rel=1e-5)
    assert student.relative_change(8 * new, 8 * old) == pytest.approx(
        student.relative_change(new, old), rel=1e-5
    )


@pytest.mark.task2_1
def test_relative_change_of_nothing():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert student.relative_change(zero, zero) == 0
    assert student.relative_change(one, zero) == math.inf


# ------------------------------------------------------------------------------------------------


def play(cache, script):
    """A trajectory in which branch 0 outputs the script's numbers -> the outputs that the cache
    returned, [i][k], and how often each branch was computed, [i][k]."""
    given, ran = [], []
    for i, value in enumerate(script):
        row, calls = cache.start(i), [0] * BRANCHES

        def branch(k, value=value, i=i, calls=calls):
            calls[k] += 1
            return torch.full((2, 3), value if k == 0 else 100.0 * i + k)

        given.append([row(k, lambda k=k, branch=branch: branch(k)) for k in range(BRANCHES)])
        ran.append(calls)
    return given, ran


@pytest.mark.task2_2
@pytest.mark.parametrize("script, threshold, refreshed", SCRIPTS)
def test_the_steps_that_refresh(script, threshold, refreshed):
    """Computed by hand. Two trajectories, to check that the second one begins empty."""
    cache = student.SimilarityCache(BRANCHES, threshold)
    for trajectories in (1, 2):
        given, ran = play(cache, script)
        assert [bool(step) for step in cache.refreshed] == [bool(step) for step in refreshed]
        last = 0
        for i, fresh in enumerate(refreshed):
            last = i if fresh else last
            assert ran[i] == [1] + [fresh] * (BRANCHES - 1)
            assert given[i][0][0, 0] == pytest.approx(script[i])
            assert [x[0, 0].item() for x in given[i][1:]] == [
                100.0 * last + k for k in range(1, BRANCHES)
            ]
        others, T = trajectories * sum(refreshed), trajectories * len(script)
        assert list(cache.computed) == [T] + [others] * (BRANCHES - 1)
        assert list(cache.reused) == [0] + [T - others] * (BRANCHES - 1)


def trajectory(network, cache, seed, change=0.1):
    """Evaluations at STEPS slowly changing inputs, stacked."""
    x, *changes = draw(seed, (2, 1, 8, 8), STEPS)
    outputs = []
    for i in range(STEPS):
        x = x + change * changes[i - 1] if i else x
        t = torch.full((2,), 900.0 - 20 * i)
        row = cache.start(i) if cache else None
        outputs.append(network(x, t, torch.tensor([1, 5]), cache=row))
    return torch.stack(outputs)


@pytest.mark.task2_2
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_on_a_network_it_is_the_cache_of_its_own_schedule(seed, threshold):
    """Bitwise equal to cache.Cache with the steps that refreshed."""
    network = small_network(seed)
    cache = student.SimilarityCache(BRANCHES, threshold)
    outputs = trajectory(network, cache, seed)
    schedule = torch.tensor(cache.refreshed)[:, None].repeat(1, BRANCHES)
    schedule[:, 0] = True
    assert torch.equal(outputs, trajectory(network, Cache(schedule), seed))
    assert list(cache.computed) == schedule.sum(0).tolist()


@pytest.mark.task2_2
def test_thresholds_at_the_ends():
    network = small_network(0)
    always = student.SimilarityCache(BRANCHES, 0.0)
    assert torch.equal(trajectory(network, always, 0), trajectory(network, None, 0))
    never = student.SimilarityCache(BRANCHES, math.inf)
    trajectory(network, never, 0)
    assert list(never.computed) == [STEPS] + [1] * (BRANCHES - 1)


@pytest.mark.task2_2
@pytest.mark.parametrize("threshold", (0.0, *THRESHOLDS, math.inf))
def test_one_output_of_each_branch_at_most(threshold):
    """The outputs that are still in memory after a step, counted by weak references."""
    cache, alive = student.SimilarityCache(BRANCHES, threshold), weakref.WeakSet()

    def branch(value):
        output = torch.full((2, 3), value)
        alive.add(output)
        return output

    for i in range(STEPS):
        row = cache.start(i)
        for k in range(BRANCHES):
            row(k, lambda k=k, i=i: branch(1.0 + 0.05 * i + k))
        assert len(alive) <= BRANCHES
    cache.start(0)
    assert len(alive) == 0, "a new trajectory begins empty"


# ------------------------------------------------------------------------------------------------


class CountingMlp(torch.nn.Module):
    """dit.Mlp with random weights, which records the shapes of its inputs."""

    def __init__(self, seed, width):
        super().__init__()
        self.mlp = dit.Mlp(width, 4 * width, width)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        self.requires_grad_(False)
        self.given = []

    def forward(self, x):
        self.given.append(tuple(x.shape))
        return self.mlp(x)


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


@pytest.mark.task2_3
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_tokens_that_changed_most_are_computed(seed, shape):
    B, N, D = shape
    seen, kept, new, order = moved(seed, shape)
    before = [tensor.clone() for tensor in (new, seen, kept)]
    for tokens in (1, N // 2, N):
        mlp = CountingMlp(seed, D)
        seen_after, kept_after = student.token_wise(mlp, new, seen, kept, tokens)
        assert mlp.given == [(B, tokens, D)], "one call, with these tokens only"
        fresh = torch.zeros(B, N, dtype=torch.bool).scatter_(1, order[:, :tokens], True)
        torch.testing.assert_close(kept_after[fresh], mlp(new)[fresh], rtol=1e-4, atol=1e-5)
        assert torch.equal(kept_after[~fresh], kept[~fresh])
        assert torch.equal(seen_after[fresh], new[fresh])
        assert torch.equal(seen_after[~fresh], seen[~fresh])
        assert all(torch.equal(a, b) for a, b in zip((new, seen, kept), before, strict=True))


@pytest.mark.task2_3
@pytest.mark.parametrize("seed", SEEDS)
def test_a_slow_token_has_its_turn(seed):
    """At every step token 0 changes by 1 and one other token, a new one each time, by 1.5. After
    two steps token 0 has changed by 2 since it was last computed, more than any other."""
    N, D = 9, 8
    mlp, (seen, kept) = CountingMlp(seed, D), draw(seed, (1, N, D), 2)
    axis, new, turns = torch.eye(D)[0], seen.clone(), []
    for i in range(1, N):
        new = new.clone()
        new[0, 0] += axis
        new[0, i] += 1.5 * axis
        after, kept = student.token_wise(mlp, new, seen, kept, 1)
        turns += torch.nonzero((after != seen).any(-1)[0]).flatten().tolist()
        seen = after
    assert turns[:2] == [1, 0] and turns.count(0) >= 3


# ------------------------------------------------------------------------------------------------


@pytest.mark.task2_4
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("share", (0.2, 0.5, 0.8))
@pytest.mark.parametrize("seed", SEEDS)
def test_peak_bytes_is_what_the_cache_measures(seed, share, sizes):
    schedule = random_schedule(seed, share)
    before, cache = schedule.clone(), Cache(schedule)
    for i in range(STEPS):
        cache.start(i)
        for k, size in enumerate(sizes):
            cache(k, lambda size=size: torch.zeros(size, dtype=torch.uint8))
    assert student.peak_bytes(schedule, list(sizes)) == cache.peak_bytes
    assert torch.equal(schedule, before)


@pytest.mark.task2_4
def test_only_what_will_be_read_is_held():
    schedule = torch.ones(STEPS, BRANCHES, dtype=torch.bool)
    assert student.peak_bytes(schedule, list(SIZES[0])) == 0
    schedule[1:] = False
    assert student.peak_bytes(schedule, list(SIZES[0])) == sum(SIZES[0])


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


@pytest.mark.task2_5
@pytest.mark.parametrize("tokens", TOKENS)
def test_arithmetic_equals_the_count(tokens):
    """Compared with torch's own counter on the running network."""
    network, schedule = small_network(0), random_schedule(SEEDS[0] + tokens)
    cache = TokensOnly(network, schedule, tokens)
    x, t, y = torch.zeros(1, 1, 8, 8), torch.tensor([500.0]), torch.tensor([2])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for i in range(STEPS):
            network(x, t, y, cache=cache.start(i))
    computed = schedule.sum(0).tolist()
    assert student.arithmetic(network, computed, STEPS, tokens) == counter.get_total_flops()


@pytest.mark.task2_5
def test_arithmetic_of_the_digits_model():
    """Everything computed: T times the whole network."""
    with torch.device("meta"):
        network = dit.DiT(**dit.SIZES["digits"])
    branches, rest = network.flops()
    total = student.arithmetic(network, [20] * 16, 20, 49)
    assert total == 20 * (sum(branches) + rest)
