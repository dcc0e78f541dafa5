import math
import weakref

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import router
from cache import Cache, SoftCache, forecast
from samplers import DDIM, Noise, denoise
from tests.small import tiny_dit

SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])
T, K = 7, 6


def newest(cache):
    """The last output kept of each branch: {k: output}."""
    return {k: entries[-1][1] for k, entries in cache.kept.items()}


def random_schedule(seed, share=0.5):
    """True where computed; about half, and row 0."""
    schedule = torch.rand(T, K, generator=torch.Generator().manual_seed(seed)) < share
    schedule[0] = True
    return schedule


def run(network, cache=None, images=2):
    """A whole guided trajectory -> x_0."""
    noise = Noise(0, range(images))
    condition = network.condition(noise.labels(5))
    return denoise(network, DDIM(T), noise.start((2, 8, 8)), condition, 1.5, cache)


def modules(network):
    """The K branches themselves, in execution order."""
    return [module for block in network.blocks for module in (block.attn, block.mlp)]


def count_calls(network):
    """-> a list of K counts that forward hooks keep."""
    counts = [0] * K
    for k, module in enumerate(modules(network)):

        def count(module, args, output, k=k):
            counts[k] += 1

        module.register_forward_hook(count)
    return counts


def outputs_of(network, cache, steps=T):
    """Evaluates the network at each step with another x and t -> what the blocks received for
    each branch, [step][k], and the final outputs, [step]."""
    noise, received, results = Noise(1, range(2)), [], []
    for i in range(steps):
        row = cache.start(i)
        answers = []

        def listen(k, branch, row=row, answers=answers):
            answers.append(row(k, branch))
            return answers[-1]

        x, t = noise.step(i, torch.zeros(2, 2, 8, 8)), torch.full((2,), 900.0 - 100 * i)
        results.append(network(x, t, torch.tensor([1, 5]), cache=listen))
        received.append(answers)
    return received, results


# ------------------------------------------------------------------------------------------------
# Inference: what it computes and what it reuses


@SEEDS
def test_computing_everything_is_bitwise_the_network_without_a_cache(seed):
    network = tiny_dit(seed)
    cache = Cache(torch.ones(T, K, dtype=torch.bool))
    assert torch.equal(run(network, cache), run(network))
    assert (cache.computed, cache.reused, cache.cur) == ([T] * K, [0] * K, 0)
    assert cache.peak_bytes == 0  # nothing is kept that nothing reads


@SEEDS
def test_reusing_everything_repeats_the_branches_of_the_first_step(seed):
    network, schedule = tiny_dit(seed), torch.zeros(T, K, dtype=torch.bool)
    schedule[0] = True
    cache = Cache(schedule)
    received, results = outputs_of(network, cache)
    for later in received[1:]:
        assert all(a is b for a, b in zip(later, received[0], strict=True))
    assert not torch.equal(results[1], results[2])  # gates, x and t are still those of the step
    assert (cache.computed, cache.reused) == ([1] * K, [T - 1] * K)
    assert cache.cur == (T - 1) / T


@SEEDS
def test_a_random_schedule_equals_a_cache_that_keeps_everything_for_ever(seed):
    network, schedule = tiny_dit(seed), random_schedule(seed)
    kept, step = {}, [-1]

    def plain(k, branch):
        step[0] += k == 0
        if schedule[step[0], k]:
            kept[k] = branch()
        return kept[k]

    plain.start = lambda i: None
    expected = run(network, plain)
    assert torch.equal(run(network, Cache(schedule)), expected)
    assert not torch.equal(run(network), expected)


@pytest.mark.parametrize("seed", range(6))
def test_executed_branches_are_those_of_the_schedule(seed):
    """Counted by hooks on the attention and MLP modules: a reused branch costs nothing."""
    network, schedule = tiny_dit(), random_schedule(seed, share=(seed + 1) / 8)
    counts, cache = count_calls(network), Cache(schedule)
    for trajectories in (1, 2):  # the counts go on over trajectories
        run(network, cache)
        assert counts == cache.computed == (trajectories * schedule.sum(0)).tolist()
        assert cache.reused == (trajectories * (~schedule).sum(0)).tolist()
    assert cache.cur == pytest.approx((~schedule).float().mean().item())


def test_the_closure_of_a_reused_branch_is_never_called():
    """Not even the norm and the modulation are evaluated, which no hook on a branch would see."""
    cache = Cache(torch.tensor([[True, True], [False, True]]))

    def boom():
        raise AssertionError("evaluated")

    row = cache.start(0)
    kept = row(0, lambda: torch.ones(3))
    row(1, lambda: torch.ones(3))
    row = cache.start(1)
    assert row(0, boom) is kept
    with pytest.raises(AssertionError, match="evaluated"):
        row(1, boom)


def test_a_cur_of_nothing_is_zero():
    assert Cache(random_schedule(0)).cur == 0


# ------------------------------------------------------------------------------------------------
# Inference: what it holds


@SEEDS
def test_an_entry_is_held_exactly_as_long_as_a_step_will_read_it(seed):
    """After branch k of step i the cache holds the branches up to k that step i + 1 reuses, and of
    those after k the ones that step i is about to reuse."""
    network, schedule = tiny_dit(seed), random_schedule(seed)
    reused = torch.cat([~schedule, torch.zeros(1, K, dtype=torch.bool)]).tolist()
    size = 2 * 16 * 32 * 4  # (B, N, D) float32
    cache, bytes_seen = Cache(schedule), []
    for i in range(T):
        row = cache.start(i)

        def watch(k, branch, i=i, row=row):
            output = row(k, branch)
            held = [j for j in range(K) if reused[i + 1 if j <= k else i][j]]
            assert sorted(cache.kept) == held and cache.bytes == size * len(held)
            bytes_seen.append(cache.bytes)
            return output

        network(torch.ones(2, 2, 8, 8), torch.ones(2), torch.tensor([1, 2]), cache=watch)
    assert len(bytes_seen) == T * K
    assert cache.peak_bytes == max(bytes_seen) > 0
    assert cache.bytes == 0 and cache.kept == {}


@SEEDS
def test_dropped_entries_are_really_freed(seed):
    """Weak references to every branch output: after each step only those that step i + 1 reuses
    are alive, and none after the last."""
    network, schedule = tiny_dit(seed), random_schedule(seed)
    born = []  # (step, k, weak reference)
    cache = Cache(schedule)
    for k, module in enumerate(modules(network)):
        module.register_forward_hook(
            lambda module, args, output, k=k: born.append((cache.step, k, weakref.ref(output)))
        )
    for i in range(T):
        network(torch.ones(2, 2, 8, 8), torch.ones(2), torch.tensor([1, 2]), cache=cache.start(i))
        alive = [(step, k) for step, k, reference in born if reference() is not None]
        needed = [k for k in range(K) if i + 1 < T and not schedule[i + 1, k]]
        last = [max(step for step in range(i + 1) if schedule[step, k]) for k in needed]
        assert sorted(alive) == sorted(zip(last, needed, strict=True))


def test_the_peak_is_below_the_full_size_if_the_schedule_allows_it():
    """Only the branches of one block are ever reused, so only they are ever held."""
    network, schedule = tiny_dit(), torch.ones(T, K, dtype=torch.bool)
    schedule[1::2, 2:4] = False
    cache = Cache(schedule)
    run(network, cache, images=3)
    assert cache.peak_bytes == 2 * (2 * 3 * 16 * 32 * 4)  # guidance doubles the three images
    everything = torch.zeros(T, K, dtype=torch.bool)
    everything[0] = True
    full = Cache(everything)
    run(network, full, images=3)
    assert full.peak_bytes == 3 * cache.peak_bytes


def test_bytes_of_several_batches_are_those_of_the_largest():
    """The last batch of a command is often a smaller one."""
    network, schedule = tiny_dit(), torch.zeros(T, K, dtype=torch.bool)
    schedule[0] = True
    cache = Cache(schedule)
    for images in (2, 3, 1):
        run(network, cache, images=images)
    assert cache.peak_bytes == K * (2 * 3 * 16 * 32 * 4)


def test_bytes_follow_the_dtype():
    schedule = torch.tensor([[True], [False]])
    for dtype, size in ((torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)):
        cache = Cache(schedule)
        cache.start(0)(0, lambda dtype=dtype: torch.zeros(5, dtype=dtype))
        assert cache.bytes == cache.peak_bytes == 5 * size


def test_step_0_begins_empty_after_an_interrupted_trajectory():
    """What an abandoned batch left behind is neither read nor held."""
    network, schedule = tiny_dit(), random_schedule(0)
    cache = Cache(schedule)
    outputs_of(network, cache, steps=3)
    assert cache.bytes > 0
    cache.start(0)
    assert cache.bytes == 0 and cache.kept == {}
    assert torch.equal(run(network, cache, images=3), run(network, Cache(schedule), images=3))
    assert cache.bytes == 0


def test_a_compiled_network_gives_the_same_images_from_few_graphs():
    """One graph for each kind of step, and a few until the compiler knows that counts change: with
    the step's number in it, each of 2 x 12 steps would have its own."""
    network, compiled_steps = tiny_dit(), 12
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(network, backend=counter)
    noise, sampler = Noise(0, range(2)), DDIM(compiled_steps)
    x, condition = noise.start((2, 8, 8)), network.condition(noise.labels(5))
    schedule = router.fora(compiled_steps, K, 2)  # two kinds of steps
    cache, expected = Cache(schedule), Cache(schedule)
    for _ in range(2):
        got = denoise(compiled, sampler, x, condition, 1.5, cache)
        torch.testing.assert_close(got, denoise(network, sampler, x, condition, 1.5, expected))
    assert counter.frame_count < 8  # torch gives up after 8
    assert cache.computed == expected.computed and cache.peak_bytes == expected.peak_bytes


# ------------------------------------------------------------------------------------------------
# Inference: mistakes


@pytest.mark.parametrize("steps", [[1], [-1], [T], [0, 0, 2], [0, 2], [0, 1, 1], [0, 1, 3]])
def test_a_start_out_of_order_raises(steps):
    cache = Cache(random_schedule(0))
    for i in steps[:-1]:
        cache.start(i)
    with pytest.raises(ValueError, match="does not follow"):
        cache.start(steps[-1])


def test_a_start_after_the_last_step_raises():
    cache = Cache(random_schedule(0))
    outputs_of(tiny_dit(), cache)
    with pytest.raises(ValueError, match=f"step {T} of {T}"):
        cache.start(T)
    cache.start(0)


@pytest.mark.parametrize(
    "schedule",
    [
        torch.ones(T, K),
        torch.ones(T, K, dtype=torch.int64),
        torch.ones(K, dtype=torch.bool),
        torch.ones(2, T, K, dtype=torch.bool),
        torch.ones(0, K, dtype=torch.bool),
        torch.tensor([[True, False], [True, True]]),
    ],
)
def test_another_kind_of_schedule_raises(schedule):
    with pytest.raises(ValueError, match="bool tensor"):
        Cache(schedule)


# ------------------------------------------------------------------------------------------------
# Training


def scores(seed):
    """A table (T, K) that asks for a gradient."""
    table = torch.rand(T, K, generator=torch.Generator().manual_seed(50 + seed))
    return table.requires_grad_()


def drive(cache, news, steps):
    """Feeds given branch outputs [step][k] to the cache, without a network -> its answers."""
    answers = []
    for i in steps:
        row = cache.start(i)
        answers.append([row(k, lambda i=i, k=k: news[i][k]) for k in range(K)])
    return answers


def branch_outputs(seed):
    return torch.randn(T, K, 3, 4, generator=torch.Generator().manual_seed(seed))


@SEEDS
def test_soft_mix_and_its_gradient_equal_a_slow_restatement(seed):
    """By numbers, one at a time: m = r new + (1 - r) kept, dm/dr = new - kept, dm/dnew = r."""
    table, news, tau = scores(seed), branch_outputs(seed).requires_grad_(), 0.4
    cache = SoftCache(lambda i: table[i], tau)
    answers = drive(cache, news, range(T))
    for k in range(K):
        kept = news[0, k].detach().double()
        assert torch.equal(answers[0][k], news[0, k])
        for i in range(1, T):
            r, new = table[i, k].item(), news[i, k].detach().double()
            expected = r * new + (1 - r) * kept
            torch.testing.assert_close(answers[i][k].double(), expected, rtol=1e-5, atol=1e-5)
            to_table, to_news = torch.autograd.grad(
                answers[i][k].sum(), [table, news], retain_graph=True
            )
            # Nothing flows to another step: what was kept is a constant.
            only = torch.zeros(T, K, dtype=torch.float64)
            only[i, k] = (new - kept).sum()
            torch.testing.assert_close(to_table.double(), only, rtol=1e-4, atol=1e-5)
            only = torch.zeros(T, K, 3, 4)
            only[i, k] = r
            torch.testing.assert_close(to_news, only)
            kept = expected if r > tau else kept
        torch.testing.assert_close(newest(cache)[k].double(), kept, rtol=1e-5, atol=1e-5)


@SEEDS
def test_soft_cache_keeps_the_mix_only_above_tau_and_detached(seed):
    table, news = scores(seed), branch_outputs(seed)
    table.data[2, 0] = 0.5  # exactly tau: not above it
    cache = SoftCache(lambda i: table[i], 0.5)
    before = None
    for i in range(T):
        (answers,) = drive(cache, news, [i])
        assert not any(entry.requires_grad for entry in newest(cache).values())
        for k in range(K):
            if i == 0 or table[i, k] > 0.5:
                assert torch.equal(newest(cache)[k], answers[k])
            else:
                assert newest(cache)[k] is before[k]
            assert answers[k].requires_grad == (i > 0)
        before = newest(cache)


@SEEDS
def test_step_0_of_the_soft_cache_is_exact_whatever_the_scores(seed):
    """Also in the second trajectory, when there would be something to mix with."""
    network, table = tiny_dit(seed), 0.3 * scores(seed).detach()
    cache = SoftCache(lambda i: table[i], 0.9)
    plain = Cache(torch.ones(T, K, dtype=torch.bool))
    for _ in range(2):
        received, results = outputs_of(network, cache, steps=2)
        exact, expected = outputs_of(network, plain, steps=2)
        assert torch.equal(results[0], expected[0])
        assert not torch.equal(results[1], expected[1])
        # The scores are all below tau: step 0's entries stay, and step 1 mixes with them.
        assert all(torch.equal(newest(cache)[k], exact[0][k]) for k in range(K))


@SEEDS
def test_scores_of_one_are_bitwise_the_network_without_a_cache(seed):
    network = tiny_dit(seed)
    cache = SoftCache(lambda i: torch.ones(K), 0.5)
    assert torch.equal(run(network, cache), run(network))


@SEEDS
def test_scores_of_zero_and_one_are_bitwise_the_inference_cache(seed):
    """Where the scores have settled, what was trained is what will run."""
    network, schedule = tiny_dit(seed), random_schedule(seed)
    soft = SoftCache(lambda i: schedule[i].float(), 0.5)
    assert torch.equal(run(network, soft), run(network, Cache(schedule)))


def test_the_soft_cache_computes_every_branch_and_holds_every_entry():
    network, table = tiny_dit(), scores(0).detach()
    counts, cache = count_calls(network), SoftCache(lambda i: table[i], 0.5)
    run(network, cache, images=3)
    assert counts == [T] * K
    assert cache.bytes == K * 2 * 3 * 16 * 32 * 4


def test_scores_are_asked_for_at_every_start():
    """So that each step has a graph of its own, and sees what the optimiser did to the others."""
    asked = []
    cache = SoftCache(lambda i: asked.append(i) or torch.full((K,), 0.5), 0.5)
    drive(cache, branch_outputs(0), range(T))
    assert asked == list(range(T))


@SEEDS
def test_a_fork_shares_the_entries_and_disturbs_nothing(seed):
    table, other, news = scores(seed).detach(), scores(seed + 9).detach(), branch_outputs(seed)
    expected = drive(SoftCache(lambda i: table[i], 0.5), news, range(T))

    def equal(answers, reference):
        return all(torch.equal(a, b) for row, to in zip(answers, reference, strict=True)
                   for a, b in zip(row, to, strict=True))

    cache = SoftCache(lambda i: table[i], 0.5)
    drive(cache, news, range(3))
    at_fork = dict(cache.kept)
    values = {k: output.clone() for k, output in newest(cache).items()}
    same, fork = cache.fork(lambda i: table[i]), cache.fork(lambda i: other[i])
    assert all(fork.kept[k] is at_fork[k] for k in range(K))  # no copy of memory

    forked = drive(fork, -news, range(3, T))
    assert all(cache.kept[k] is at_fork[k] for k in range(K))
    assert all(torch.equal(at_fork[k][-1][1], values[k]) for k in range(K))
    assert equal(drive(cache, news, range(3, T)), expected[3:])
    assert equal(drive(same, news, range(3, T)), expected[3:])

    # The fork mixed with the entries of the original, by its own scores.
    for k in range(K):
        r = other[3, k]
        torch.testing.assert_close(forked[0][k], r * -news[3, k] + (1 - r) * values[k])


# ------------------------------------------------------------------------------------------------
# Forecasting


def slow_forecast(entries, i):
    """The polynomial through (step, output) pairs in Newton's form, number by number."""
    steps = [s for s, _ in entries]
    numbers = np.array([output.double().numpy() for _, output in entries])
    result = np.empty(numbers.shape[1:])
    for place in np.ndindex(result.shape):
        values = numbers[(slice(None), *place)].tolist()
        coefficients, column = [values[0]], values
        for n in range(1, len(steps)):
            column = [(column[j + 1] - column[j]) / (steps[j + n] - steps[j])
                      for j in range(len(column) - 1)]
            coefficients.append(column[0])
        result[place] = sum(c * math.prod(i - s for s in steps[:n])
                            for n, c in enumerate(coefficients))
    return torch.from_numpy(result)


@pytest.mark.parametrize("steps", ((4,), (2, 3), (0, 5), (0, 2, 3), (1, 4, 9)))
def test_a_forecast_equals_newtons_polynomial(steps):
    generator = torch.Generator().manual_seed(0)
    entries = tuple((s, torch.randn(2, 3, generator=generator)) for s in steps)
    for i in range(steps[-1] + 1, steps[-1] + 4):
        torch.testing.assert_close(forecast(entries, i).double(),
                                   slow_forecast(entries, i), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", (0, 1, 2))
def test_a_polynomial_of_its_order_is_forecast_exactly(order):
    entries = tuple((s, torch.tensor([float(s) ** n for n in range(order + 1)]))
                    for s in (1, 2, 5)[: order + 1])
    expected = torch.tensor([7.0**n for n in range(order + 1)])
    torch.testing.assert_close(forecast(entries, 7), expected)


@pytest.mark.parametrize("order", (0, 1, 2))
@SEEDS
def test_a_forecasting_cache_equals_a_slow_one_and_keeps_no_more_than_is_read(order, seed):
    """The slow one keeps every output for ever, and forecasts from the last order + 1 of them."""
    schedule = random_schedule(seed)
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(T, K, 4, generator=generator)
    cache, history = Cache(schedule, order), {k: [] for k in range(K)}
    for i in range(T):
        row = cache.start(i)
        for k in range(K):
            got = row(k, lambda i=i, k=k: outputs[i, k])
            if schedule[i, k]:
                history[k].append((i, outputs[i, k]))
                assert torch.equal(got, outputs[i, k])
            else:
                expected = slow_forecast(history[k][-1 - order :], i).float()
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            later = schedule[i + 1 :, k].tolist()
            # An entry is read if a later step reuses before order + 1 newer ones are there.
            first = later.index(False) if False in later else len(later)
            needed = max(0, order + 1 - first) if False in later else 0
            assert len(cache.kept.get(k, ())) == min(len(history[k]), needed)
        held = sum(output.nbytes for entries in cache.kept.values() for _, output in entries)
        assert cache.bytes == held <= cache.peak_bytes
    assert cache.bytes == 0


@pytest.mark.parametrize("order", (1, 2))
def test_a_soft_cache_mixes_with_the_forecast_of_what_it_kept(order):
    scores = torch.tensor([[1.0, 1.0], [0.5, 0.05], [0.6, 0.7], [0.3, 0.02], [0.8, 0.9]])
    cache, kept = SoftCache(scores.__getitem__, 0.1, order), {0: [], 1: []}
    generator = torch.Generator().manual_seed(0)
    for i, row in enumerate(scores):
        cache.start(i)
        for k in range(2):
            new = torch.randn(3, generator=generator)
            got = cache(k, lambda new=new: new)
            expected = new if i == 0 else (
                row[k] * new + (1 - row[k]) * slow_forecast(kept[k][-1 - order :], i).float())
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            if row[k] > 0.1:
                kept[k].append((i, expected))
            assert cache.bytes <= 2 * (order + 1) * 12


def test_another_order_is_refused():
    for order in (-1, 3, 0.5, None):
        with pytest.raises(ValueError, match="0, 1 or 2"):
            Cache(random_schedule(0), order)
