"""The search for a schedule: dynamic programs against enumeration, the local search against slow
walks, and the command."""

import itertools
import math
import sys

import pytest
import torch

import budget as budgets
import command
import costs
import models
import router as routers
import sample
import search
from cache import Cache
from samplers import Noise, denoise, make_sampler
from tests.small import tiny_dit, tiny_model

SEEDS = (0, 1, 2)


def random_cost(T, seed):
    """cost[j][i] for j < i <= T; a gap of 1 costs nothing."""
    values = torch.rand(T, T + 1, generator=torch.Generator().manual_seed(seed)).tolist()
    return [[values[j][i] * (i - j - 1) for i in range(T + 1)] for j in range(T)]


def along(cost, steps):
    way = [*steps, len(cost)]
    return sum(cost[a][b] for a, b in zip(way, way[1:], strict=False))


def all_steps(T, n):
    return [[0, *rest] for rest in itertools.combinations(range(1, T), n - 1)]


def make_batch(model, T=6, count=3, purpose=search.SEARCH, seed=0, sampler="ddim"):
    noise = Noise(seed, range(count), purpose)
    items = costs.choose_items(model, noise)
    return costs.Batch(model, make_sampler(sampler, T), model.guidance, noise, items)


# ------------------------------------------------------------------------------------------------
# Budgets and dynamic programs


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", (2, 5, 8))
def test_paths_against_all_sets_of_steps(T, seed):
    cost = random_cost(T, seed)
    for n, (found, steps) in enumerate(budgets.paths(cost), start=1):
        assert len(steps) == n
        assert found == pytest.approx(along(cost, steps))
        assert found == pytest.approx(min(along(cost, other) for other in all_steps(T, n)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("weights", ([3, 5, 3], [2, 2, 2], [7, 4, 1]))
def test_the_knapsack_against_all_counts(seed, weights):
    T = 5
    costs_ = torch.rand(3, T, generator=torch.Generator().manual_seed(seed)).tolist()
    budget = budgets.Budget(weights, spend=0.55 * T * sum(weights), slack=0.9)

    def spent(counts):
        return sum(n * w for n, w in zip(counts, weights, strict=True))

    def cost(counts):
        return sum(row[n - 1] for row, n in zip(costs_, counts, strict=True))

    everything = list(itertools.product(range(1, T + 1), repeat=3))
    allowed = [counts for counts in everything if abs(spent(counts) - budget.spend) <= 0.9]
    counts = budgets.knapsack(costs_, budget)
    assert tuple(counts) in allowed
    assert cost(counts) == pytest.approx(min(map(cost, allowed)))


@pytest.mark.parametrize("seed", SEEDS)
def test_branches_against_all_schedules(seed):
    T, weights = 4, [3, 5]
    tables = [random_cost(T, 10 * seed + k) for k in range(2)]
    budget = budgets.Budget(weights, spend=21.0, slack=1.0)
    schedule = budgets.by_branches(T, tables, budget)

    def cost(schedule):
        return sum(along(table, schedule[:, k].nonzero().flatten().tolist())
                   for k, table in enumerate(tables))

    best = math.inf
    for rows in itertools.product((False, True), repeat=2 * (T - 1)):
        other = torch.tensor([True, True, *rows]).view(T, 2)
        if abs(budget.spent(other) - 21) <= 1:
            best = min(best, cost(other))
    assert abs(budget.spent(schedule) - 21) <= 1
    assert cost(schedule) == pytest.approx(best)


def test_the_knapsack_takes_the_nearest_if_nothing_is_near():
    budget = budgets.Budget([10, 10], spend=34.0, slack=0.1)
    assert sum(budgets.knapsack([[1.0, 0.5, 0.0]] * 2, budget)) == 3


@pytest.mark.parametrize("name", ("digits", "emoji"))
@pytest.mark.parametrize("speedup", (1.05, 1.5, 2.5, 3, 6))
@pytest.mark.parametrize("T", (10, 20))
def test_the_budget_is_met_within_a_percent(name, speedup, T):
    model = models.load(name)
    budget = budgets.make_budget(model, T, speedup=speedup)
    cost, K = random_cost(T, 0), len(budget.weights)
    for schedule in (budgets.even(T, budget), budgets.by_steps(T, cost, budget),
                     budgets.by_branches(T, [random_cost(T, k) for k in range(K)], budget)):
        assert schedule.shape == (T, K) and schedule[0].all()
        reused = (~schedule).sum(0).tolist()
        assert model.flops(T) / model.flops(T, reused) == pytest.approx(speedup, rel=0.01)
        budget.check(schedule)


@pytest.mark.parametrize("cur", (0.1, 0.5, 0.66, 0.95))
def test_a_cur_is_met_within_a_point(cur):
    model = models.load("digits")
    budget = budgets.make_budget(model, 20, cur=cur)
    tables = [random_cost(20, k) for k in range(16)]
    for schedule in (budgets.even(20, budget), budgets.by_steps(20, tables[0], budget),
                     budgets.by_branches(20, tables, budget)):
        assert routers.cur(schedule) == pytest.approx(cur, abs=0.01)


def test_even_spacing():
    budget = budgets.make_budget(models.load("digits"), 20, cur=0.6)
    steps = budgets.even(20, budget).all(1).nonzero().flatten().tolist()
    assert steps == [0, 2, 5, 7, 10, 12, 15, 17]
    budget = budgets.make_budget(models.load("digits"), 20, cur=0.5)
    assert torch.equal(budgets.even(20, budget), routers.fora_paper(20, 16, 2))


def test_by_steps_fills_the_best_place():
    cost = random_cost(6, 3)
    budget = budgets.Budget([1] * 4, spend=10.0, slack=0.1)
    schedule = budgets.by_steps(6, cost, budget)
    whole = schedule.all(1).nonzero().flatten().tolist()
    (partial,) = [i for i in range(6) if 0 < schedule[i].sum() < 4]
    assert schedule[partial].tolist() == [True, True, False, False]
    assert along(cost, whole) == pytest.approx(min(along(cost, s) for s in all_steps(6, 2)))
    assert along(cost, sorted([*whole, partial])) == pytest.approx(
        min(along(cost, sorted([*whole, i])) for i in set(range(6)) - set(whole)))


def test_longer_gaps_are_extrapolated():
    cost = budgets.extended([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0]])
    assert cost[0][1:] == [0, 1, 1.5**4, 16]
    assert cost[3][4] == 0 and cost[2][4] == 3


# ------------------------------------------------------------------------------------------------
# Costs and the local search


@pytest.mark.parametrize("sampler", ("ddim", "dpm-solver++", "sa-solver"))
def test_sensitivity_and_costs_against_whole_walks(sampler):
    """Step i alone repeats step i - 1: a schedule that computes all others is the same walk."""
    model, T, i = tiny_model(), 6, 3
    batch = make_batch(model, T, sampler=sampler)
    uncached = costs.Uncached(batch)
    schedule = routers.none(T, 6)
    schedule[i] = False
    sensitivity = [1.0] * T
    one_step = uncached.step_costs(i - 1, 0, sensitivity)[1]
    assert uncached.sensitivity(i) * one_step == pytest.approx(batch.error(schedule, 0), rel=1e-4)
    assert uncached.step_costs(i - 1, 2, sensitivity)[0] == 0
    # A forecast of order 1 from equally spaced steps, in slow words.
    c0, c1 = uncached.outputs[1], uncached.outputs[3]
    line = {k: c1[k] + (4 - 3) / (3 - 1) * (c1[k] - c0[k]) for k in c0}
    expected = uncached.prediction_error(4, line)
    assert uncached.step_costs(3, 1, sensitivity)[1] == pytest.approx(expected, rel=1e-4)


def test_the_cost_of_a_branch():
    model, T = tiny_model(), 5
    uncached = costs.Uncached(make_batch(model, T))
    errors = []
    for i in (2, 3):
        outputs = dict(uncached.outputs[i]) | {4: uncached.outputs[1][4]}
        del outputs[5]  # the branch after it
        errors.append(uncached.prediction_error(i, outputs))
    assert errors[0] > 0
    found = uncached.branch_costs(1, 4, [1.0] * T)
    assert found[:3] == pytest.approx(
        [0, errors[0], (errors[0] ** 0.5 + errors[1] ** 0.5) ** 2], rel=1e-5)


@pytest.mark.parametrize("order", (0, 1, 2))
@pytest.mark.parametrize("sampler", ("ddim", "dpm-solver++", "sa-solver"))
def test_local_search_is_never_worse_than_its_start(order, sampler):
    """And its errors, of walks begun in the middle, are bitwise those of whole walks."""
    model, T = tiny_model(order), 6
    batch = make_batch(model, T, sampler=sampler)
    start = routers.random(T, 6, 0.5, seed=order)
    climber = search.Climber(batch, order, search.Log(), start)
    first = climber.error
    assert first == batch.error(start, order)
    climber.climb(search.step_exchanges(T, 0), 8)
    assert climber.error == batch.error(climber.schedule, order) <= first
    middle = climber.error
    climber.climb(search.entry_exchanges(T, [1] * 6, 0), 30)
    assert climber.error == batch.error(climber.schedule, order) <= middle
    assert climber.error < first
    assert climber.schedule.sum() == start.sum() and climber.schedule[0].all()


@pytest.mark.parametrize("cut", (0, 1, 4, 9, 20))
def test_a_climb_goes_on_from_its_log(cut):
    """Errors in the log are not measured again, and the others are bitwise the same."""
    batch, start = make_batch(tiny_model(1), 6), routers.random(6, 6, 0.5, seed=1)

    def climb(values):
        log = search.Log(values=values)
        climber = search.Climber(batch, 1, log, start)
        climber.climb(search.entry_exchanges(6, [1] * 6, 0), 20)
        return climber, log.values

    whole, values = climb([])
    resumed, again = climb(values[:cut])
    assert len(values) == 21 and whole.error < values[0]
    assert again == values and resumed.error == whole.error
    assert torch.equal(resumed.schedule, whole.schedule)


def test_exchanges_keep_the_arithmetic():
    weights = [3, 5, 3]
    for a, b in search.entry_exchanges(4, weights, 0):
        assert weights[a[1]] == weights[b[1]] and min(a[0], b[0]) > 0 and a != b
    pairs = search.step_exchanges(5, 0)
    assert sorted(pairs) == list(itertools.combinations(range(1, 5), 2))
    assert [b - a for a, b in pairs[:3]] == [1, 1, 1]


def test_climbing_ends_when_nothing_helps():
    batch = make_batch(tiny_model(), 4)
    climber = search.Climber(batch, 0, search.Log(), routers.fora_paper(4, 6, 2))
    climber.climb(search.step_exchanges(4, 0), 10**9)
    for a, b in search.step_exchanges(4, 0):
        other = climber.schedule.clone()
        other[[a, b]] = other[[b, a]]
        assert batch.error(other, 0) >= climber.error


# ------------------------------------------------------------------------------------------------
# The command


ARGS = ["--model", "tiny", "--steps", "10", "--images", "2", "--tries", "5", "--speedup", "2"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """`--model tiny`, of random weights."""
    model = models.Model("tiny", tiny_dit(in_channels=3), "ddim", steps=4, guidance=1.5)
    monkeypatch.setitem(models.MODELS, "tiny", lambda weights: model)


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["search", *args])
    command.run(search.main)


def test_the_command(tmp_path, monkeypatch, capsys):
    """The file holds the schedule whose errors were printed, and they can be measured anew."""
    run(monkeypatch, *ARGS, "--seed", "7", "--out", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    path = tmp_path / "out" / "router.safetensors"
    file, model = routers.load(path), models.load("tiny")
    file.check("tiny", "ddim", 10, 6)
    about, schedule = file.about, file.schedule()
    assert file.logits.abs().eq(5).all() and torch.equal(schedule, file.logits > 0)
    assert about["objective"] == "search" and about["seed"] == "7"
    cache = Cache(schedule, int(about["forecast"]))
    for purpose, key in ((3, "error"), (4, "held_out_error")):
        noise = Noise(7, range(2), purpose)
        x = noise.start(model.shape)
        condition = model.condition(noise.labels(5))
        sampler = make_sampler("ddim", 10)
        full = denoise(model.network, sampler, x, condition, 1.5, None, noise)
        cached = denoise(model.network, sampler, x, condition, 1.5, cache, noise)
        error = (cached - full).double().square().mean().item()
        assert float(about[key]) == pytest.approx(error, rel=1e-3)
        assert f"{1e3 * float(about[key]):.4g}" in printed.splitlines()[-2]
    speedup = model.flops(10) / sample.counted_flops(model, cache)
    assert speedup == pytest.approx(float(about["speedup"]), abs=1e-4)
    assert speedup == pytest.approx(2, rel=0.01)
    assert cache.cur == pytest.approx(float(about["cur"]), abs=1e-4)
    picture = str(tmp_path / "a.png")
    monkeypatch.setattr(sys, "argv", ["sample", "--model", "tiny", "--router", str(path), "--steps",
                                      "10", "--num-samples", "2", "--out", picture])
    command.run(sample.main)
    assert f"{speedup:.2f} x by arithmetic" in capsys.readouterr().out


def test_interrupted_and_resumed_it_is_bitwise_the_same(tmp_path, monkeypatch, capsys):
    args = [*ARGS, "--out"]
    run(monkeypatch, *args, str(tmp_path / "whole"))
    whole = (tmp_path / "whole" / "router.safetensors").read_bytes()
    said = capsys.readouterr().out.replace("whole", "parts")
    save, out = command.save_state, str(tmp_path / "parts")
    for count in (3, 54, 3):  # measurements until Ctrl-C; the last two within the local search
        left = iter(range(count))

        def interrupted(path, state, left=left):
            save(path, state)
            if next(left, None) is None:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(command, "save_state", interrupted)
            with pytest.raises(SystemExit) as stop:
                run(patch, *args, out, "--resume")
        assert stop.value.code == 130
        assert not (tmp_path / "parts" / "router.safetensors").exists()
    capsys.readouterr()
    run(monkeypatch, *args, out, "--resume")
    assert capsys.readouterr().out == said
    assert (tmp_path / "parts" / "router.safetensors").read_bytes() == whole


def test_a_folder_that_holds_a_search_is_not_overwritten(tmp_path, monkeypatch, capsys):
    args, out = [*ARGS, "--forecast", "1", "--tries", "0", "--out", str(tmp_path)], tmp_path
    run(monkeypatch, *args)
    before = (out / "router.safetensors").read_bytes()
    for more, words in (([], "--resume goes on"), (["--resume", "--seed", "1"], "other settings")):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *args, *more)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert (out / "router.safetensors").read_bytes() == before
    (out / "state.pt").write_bytes(b"not a state")
    with pytest.raises(SystemExit):
        run(monkeypatch, *args, "--resume")
    assert "not a whole state file" in capsys.readouterr().err
    for state in ([], {"values": 3}, {"values": ["a"]}, {"values": [math.nan]}):
        command.save_state(out / "state.pt", state)
        with pytest.raises(SystemExit):
            run(monkeypatch, *args, "--resume")
        assert "not a state of a search" in capsys.readouterr().err


def test_a_router_of_no_search_is_left_alone(tmp_path, monkeypatch, capsys):
    """Somebody's own router in --out, or a folder of its name, is found before the search."""
    trained = tmp_path / "mine" / "router.safetensors"
    trained.parent.mkdir()
    trained.write_bytes(b"trained for a day")
    (tmp_path / "folder" / "router.safetensors").mkdir(parents=True)
    for out, words in (("mine", "is of no search"), ("folder", "it is a folder")):
        with pytest.raises(SystemExit):
            run(monkeypatch, *ARGS, "--out", str(tmp_path / out), "--resume")
        assert words in capsys.readouterr().err
    assert trained.read_bytes() == b"trained for a day"


@pytest.mark.parametrize("args, words", [
    (["--speedup", "0.9"], "--speedup must be above 1"),
    (["--speedup", "1"], "--speedup must be above 1"),
    (["--speedup", "nan"], "a finite number"),
    (["--speedup", "25"], "--speedup must be above 1 and at most 15.78 at T = 20"),
    (["--speedup", "2", "--cur", "0.5"], "not allowed with"),
    (["--cur", "1"], "--cur is a share"),
    (["--cur", "50"], "--cur is a share"),
    (["--cur", "nan"], "a finite number"),
    (["--cur", "0.96"], "at most 0.950"),
    (["--forecast", "3"], "invalid choice"),
    (["--images", "0"], "--images must be 1"),
    (["--tries", "-1"], "--tries 0 or more"),
    (["--model", "letters"], "unknown model letters"),
    (["--steps", "1"], "steps must be from 2"),
    (["--steps", "101"], "100 --steps at most"),
    (["--sampler", "euler", "--steps", "9"], "unknown sampler"),
    (["--seed", "-1"], "a seed is"),
    # Before a download: there is no network here, and uvit512 has no address at all.
    (["--model", "uvit512", "--steps", "7"], "T must be even"),
    (["--model", "uvit512", "--sampler", "ddim"], "cannot be sampled with ddim"),
    (["--model", "uvit512", "--cur", "0.96"], "at most 0.950"),
])
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, args, words):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *args, "--out", str(tmp_path / "out"))
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert words in errors and errors.startswith("error: ") and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_read_is_not_written(tmp_path, monkeypatch, capsys):
    weights = tmp_path / "router.safetensors"
    weights.write_bytes((models.SHIPPED / "digits_dit.safetensors").read_bytes())
    with pytest.raises(SystemExit):
        run(monkeypatch, *ARGS, "--weights", str(weights), "--out", str(tmp_path))
    assert "is read, so it is not written" in capsys.readouterr().err
    assert weights.read_bytes() == (models.SHIPPED / "digits_dit.safetensors").read_bytes()
