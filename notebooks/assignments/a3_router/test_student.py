"""The tests of assignment 3. `python -m pytest notebooks/assignments/a3_router -m task3_1`

`student` calls the functions of student.py, and those of probes.py, by `student.probe`.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import BETA, BUDGETS, CURS, IMAGES, SEEDS, SHAPES, STEPS, TAUS, TEMPERATURES
from comparing import check, is_tensor, refuses, same
from probes import GUIDANCE, draw, small_network

import router as routers
from cache import Cache
from samplers import DDIM, denoise
from train_stepwise import Chunk, train_trajectory

POINTS = {"task3_1": 2, "task3_2": 2, "task3_3": 4, "task3_4": 4, "task3_5": 2, "task3_6": 4}
NEEDS = "dit", "cache", "samplers"  # the modules that student.py may import


# ------------------------------------------------------------------------------------------------


@pytest.mark.task3_1
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("seed", SEEDS)
def test_gumbel_sigmoid_solved_for_the_noise(student, seed, temperature):
    """temperature logit(r) - z must be the logistic noise, whose sigmoid is u."""
    logits, u = draw(seed, 50), torch.sigmoid(draw(seed + 100, 50))
    r = student.gumbel_sigmoid(logits, u, temperature)
    noise = torch.logit(u)
    is_tensor(r, (50,), torch.float64, "gumbel_sigmoid")
    same(torch.sigmoid(temperature * torch.logit(r) - logits), u,
         f"u, found again from r = gumbel_sigmoid with temperature {temperature}", 1e-9, {
             "only the logit is divided by the temperature": torch.sigmoid(temperature * noise),
             "the sign of the noise": 1 - u})


@pytest.mark.task3_1
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gates_above_a_half_are_as_frequent_as_the_score(student, temperature):
    """At every temperature. 20,001 values of u, evenly spaced, stand for all of them."""
    u = (torch.arange(20001, dtype=torch.float64) + 0.5) / 20001
    for logit in (-2.0, 0.3, 4.0):
        r = student.gumbel_sigmoid(torch.full_like(u, logit), u, temperature)
        is_tensor(r, u.shape, torch.float64, "gumbel_sigmoid")
        score = torch.sigmoid(torch.tensor(logit)).item()
        same((r > 0.5).double().mean().item(), score, f"the share of gates above a half for z = "
             f"{logit}, which is sigmoid(z), at temperature {temperature}", 1e-3)


@pytest.mark.task3_1
def test_gumbel_sigmoid_has_a_gradient(student):
    logits, u, weights = draw(3, 6), torch.sigmoid(draw(4, 6)), draw(5, 6)
    _, found = student.probe("gradient", "gumbel_sigmoid", logits, [u, 0.5], weights)
    r = torch.sigmoid((logits + torch.logit(u)) / 0.5)
    same(found, weights * r * (1 - r) / 0.5, "the gradient of gumbel_sigmoid", 1e-9,
         {"the temperature is missing in the gradient": weights * r * (1 - r)})


# ------------------------------------------------------------------------------------------------


@pytest.mark.task3_2
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("seed", SEEDS)
def test_straight_through_is_hard_forward_and_soft_backward(student, seed, tau):
    """In float32, where a sum in the wrong order gives 0.99999994."""
    logits, weights = (3 * draw(seed, 1000)).float(), draw(seed + 1, 1000).float()
    r, found = student.probe("gradient", "straight_through", logits, [tau], weights)
    p = torch.sigmoid(logits)
    hard = (p > tau).float()
    same(r, hard, f"straight_through with tau = {tau}", 0, {
        "the sum is taken in an order that rounds: add p - p.detach(), in brackets, to the hard "
        "gate": hard, "the gate is soft in the forward pass": p})
    check(found is not None, "straight_through has no gradient: p must keep its graph, and only "
          "the hard part be without")
    same(found, weights * p * (1 - p), "the gradient of straight_through, that of sigmoid(z)", 1e-5,
         {"there is no gradient: p must keep its graph": torch.zeros(1000)})


# ------------------------------------------------------------------------------------------------


class Mixed:
    """A cache that mixes new and kept outputs by r and records both; without r it computes."""

    def __init__(self, r=None, kept=None):
        self.r, self.kept = r, kept
        self.new, self.mixed = [], []

    def __call__(self, k, branch):
        self.new.append(branch())
        if self.r is None:
            return self.new[k]
        self.mixed.append(self.r[k] * self.new[k] + (1 - self.r[k]) * self.kept[k])
        self.mixed[k].retain_grad()
        return self.mixed[k]


@pytest.mark.task3_3
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_by_hand_is_autograds(student, seed, temperature):
    network, K = small_network(seed), 6
    logits, u, costs = draw(seed, K), torch.sigmoid(draw(seed + 1, K)), draw(seed + 2, K).exp()
    x, target = draw(seed + 3, 2, IMAGES, 2, 8, 8)
    labels, (early, late) = torch.arange(IMAGES), torch.tensor([[700.0], [600.0]]).double()

    first = Mixed()
    network(x[:, :1], early.expand(IMAGES), labels, cache=first)
    z = logits.clone().requires_grad_(True)
    r = torch.sigmoid((z + u.log() - (1 - u).log()) / temperature)
    cache = Mixed(r, first.new)
    error = F.mse_loss(network(x[:, :1], late.expand(IMAGES), labels, cache=cache), target)
    price = BETA * (costs * torch.sigmoid(z)).sum()
    (error + price).backward()

    upstream = [mixed.grad for mixed in cache.mixed]
    new = [output.detach() for output in cache.new]
    found = student.row_gradient(logits, u, temperature, new, first.new, upstream, costs, BETA)
    p = torch.sigmoid(logits)
    of_price = BETA * costs * p * (1 - p)
    of_error = z.grad - of_price
    size = new[0].numel()
    same(found, z.grad, f"row_gradient at temperature {temperature}, against autograd", 1e-9, {
        "the derivative of the gate lacks 1 / temperature": of_error * temperature + of_price,
        "the price of the scores is missing": of_error,
        "the price lacks the derivative of the score": of_error + BETA * costs,
        "the sum over the elements of m is a mean": of_error / size + of_price})


# ------------------------------------------------------------------------------------------------


def train(student, seed, relaxation="plain", gates=None, **changes):
    """Runs the student's function. -> what probes.train does."""
    settings = {"costs": torch.ones(6).double(), "beta": BETA, "tau": 0.5, "lr": 0.0,
                "lambda": [1.0] * STEPS, **changes}
    try:
        found = student.probe("train", seed, STEPS, IMAGES, relaxation, settings, gates)
    except Exception as error:
        if "second time" in str(error):
            raise AssertionError(
                "the backward pass of a step reaches the step before. Likely mistake: a missing "
                "detach: x, or a kept output, keeps the graph of the previous step") from None
        raise
    check(isinstance(found["losses"], list) and len(found["losses"]) == STEPS and all(
        isinstance(loss, float) for loss in found["losses"]), f"losses is a list of {STEPS} floats")
    is_tensor(found["x0"], (IMAGES, 1, 8, 8), torch.float64, "x_0")
    return found


@functools.cache
def trained(seed, lambda_):
    """The same by the repository's trainer: losses, the rows after it, x_0."""
    network = small_network(seed)
    x, condition = draw(seed, IMAGES, 1, 8, 8), network.condition(torch.arange(IMAGES))
    router = routers.Router(STEPS, 6).double()
    with torch.no_grad():
        for row, start in zip(router.rows, draw(seed + 1, STEPS - 1, 6), strict=True):
            row.copy_(start)
    chunk = Chunk(x, condition, None, DDIM(STEPS), 1.0)
    optimizer = torch.optim.SGD(router.parameters(), lr=50.0)
    losses, _ = train_trajectory(SimpleNamespace(network=network), router, optimizer, [chunk],
                                 list(lambda_), GUIDANCE, 0.3, BETA)
    return list(losses), [row.detach() for row in router.rows], chunk.x


@pytest.mark.task3_4
@pytest.mark.parametrize("seed", SEEDS)
def test_with_plain_sigmoids_it_is_train_stepwise(student, seed):
    """Losses, updated logits and x_0 are those of the repository's trainer at equal prices."""
    lambda_ = [0.0, *draw(seed, STEPS - 1).exp().tolist()]
    found = train(student, seed, lr=50.0, tau=0.3, **{"lambda": lambda_})
    losses, rows, x0 = trained(seed, tuple(lambda_))
    same(found["losses"], [float(loss) for loss in losses],
         "the losses, compared with train_stepwise.py", 1e-9)
    for i, (row, right) in enumerate(zip(found["rows"], rows, strict=True), 1):
        same(row, right, f"the logits of row {i} after the trajectory", 1e-9)
    same(found["x0"], x0, "x_0, compared with train_stepwise.py", 1e-9)


@pytest.mark.task3_4
@pytest.mark.parametrize("seed", SEEDS)
def test_with_hard_gates_it_equals_inference(student, seed):
    """Bitwise: straight-through training sees exactly what sampling will do."""
    gates = draw(seed + 1, STEPS - 1, 6) > 0
    found = train(student, seed, "gates", gates)
    schedule = torch.cat([torch.ones(1, 6, dtype=torch.bool), gates])
    network = small_network(seed)
    expected = denoise(network, DDIM(STEPS), draw(seed, IMAGES, 1, 8, 8),
                       network.condition(torch.arange(IMAGES)), GUIDANCE, Cache(schedule))
    same(found["x0"], expected, "x_0 with hard gates, compared with sampling", 0)
    check(not found["x0"].requires_grad, "x_0 has a graph: detach it")


@pytest.mark.task3_4
def test_usage_is_the_price_of_the_scores_not_of_the_gates(student):
    costs = draw(9, 6).exp()
    with_usage = train(student, 0, "steep", costs=costs)
    same(with_usage["calls"], list(range(1, STEPS)),
         "the steps for which relax is called, once each and not for row 0")
    without = train(student, 0, "steep", costs=costs, beta=0.0)
    pairs = list(zip(with_usage["losses"], without["losses"], strict=True))
    same(pairs[0][0], 0.0, "the loss of step 0")
    rows = draw(1, STEPS - 1, 6)
    usage = [BETA * (costs * torch.sigmoid(row)).sum().item() for row in rows]
    gates = [BETA * (costs * torch.sigmoid(3 * row + 1)).sum().item() for row in rows]
    mean = [price / 6 for price in usage]
    same([a - b for a, b in pairs[1:]], usage, "beta's part of the losses from step 1 on", 1e-9, {
        "the price is that of the gates, not of the scores": gates,
        "the price is a mean over the branches, not a sum": mean})


@pytest.mark.task3_4
def test_each_update_finds_a_gradient_on_its_own_row_only(student):
    found = train(student, 1, lr=None)
    same(len(found["seen"]), STEPS - 1, "the number of the optimiser's steps, one for each i > 0")
    for i, rows in enumerate(found["seen"], 1):
        same(rows, [i], f"the rows with a gradient when the optimiser steps after L_{i}. Gradients "
             "are set to None after each step, and x is detached: this holds")


# ------------------------------------------------------------------------------------------------


@pytest.mark.task3_5
@pytest.mark.parametrize("cur", CURS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_budget_is_met_exactly_by_the_lowest_scores(student, seed, shape, cur):
    T, K = shape
    scores = torch.sigmoid(draw(seed, T, K))
    scores[0] = 0  # the lowest scores, but row 0 is computed all the same
    schedule = student.budgeted_schedule(scores, cur)
    is_tensor(schedule, (T, K), torch.bool, "budgeted_schedule")
    check(schedule[0].all(), "row 0 of budgeted_schedule computes everything")
    same(int((~schedule).sum()), round(cur * T * K),
         f"the reuses for a CUR of {cur} and T, K = {T}, {K}", likely={
             "the share is of the T - 1 rows below row 0": round(cur * (T - 1) * K)})
    reused, computed = scores[~schedule], scores[1:][schedule[1:]]
    check(not len(reused) or not len(computed) or reused.max() <= computed.min(),
          "a score that is computed is lower than one that is reused: reuse the lowest scores")


@pytest.mark.task3_5
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_scores_do_not_change_the_count(student, shape):
    T, K = shape
    scores = torch.full((T, K), 0.4)
    for cur in CURS:
        schedule = student.budgeted_schedule(scores, cur)
        is_tensor(schedule, (T, K), torch.bool, "budgeted_schedule")
        same(int((~schedule).sum()), round(cur * T * K),
             f"the reuses for a CUR of {cur} where all scores are equal")
    for cur in (-0.1, (T - 0.5) / T):
        refuses(student.budgeted_schedule, scores, cur, what=f"the impossible CUR of {cur}")


# ------------------------------------------------------------------------------------------------


@pytest.mark.task3_6
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_scores_meet_the_budget_by_one_shift(student, seed, budget):
    logits = 3 * draw(seed, 6)
    scores = student.budgeted_scores(logits, budget)
    is_tensor(scores, (6,), torch.float64, "budgeted_scores")
    same(scores.sum().item(), budget, "the sum of budgeted_scores", 1e-6)
    shifts = torch.logit(scores) - logits
    same(shifts, shifts.mean().expand(6), "logit(score) - z, the same shift for all logits", 1e-5)


@pytest.mark.task3_6
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_goes_through_the_shift(student, seed, budget):
    """As the sum is constant, db/dz_j = -s_j / sum_k s_k with s = p (1 - p)."""
    logits, weights = draw(seed, 6), draw(seed + 7, 6)
    scores, found = student.probe("gradient", "budgeted_scores", logits, [budget], weights)
    is_tensor(scores, (6,), torch.float64, "budgeted_scores")
    s = scores * (1 - scores)
    constant = weights * s
    check(found is not None, "budgeted_scores has no gradient")
    same(found, constant - s * (constant.sum() / s.sum()), "the gradient of budgeted_scores with a "
         f"budget of {budget}", 1e-5, {
             "the shift b is treated as a constant, but it depends on all logits": constant})


@pytest.mark.task3_6
def test_a_budget_that_cannot_be_met_is_refused(student):
    for budget in (0.0, -1.0, 6.0, 7.5):
        refuses(student.budgeted_scores, draw(0, 6), budget, what=f"a budget of {budget} of 6")
