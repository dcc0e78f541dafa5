"""The tests of assignment 3. `python -m pytest notebooks/assignments/a3_router -m task3_1`"""

from types import SimpleNamespace

import pytest
import student
import torch
import torch.nn.functional as F
from cases import BETA, BUDGETS, CURS, IMAGES, SEEDS, SHAPES, STEPS, TAUS, TEMPERATURES

import dit
import router as routers
from cache import Cache
from samplers import DDIM, denoise
from train_stepwise import Chunk, train_trajectory

POINTS = {"task3_1": 2, "task3_2": 2, "task3_3": 4, "task3_4": 4, "task3_5": 2, "task3_6": 4}
GUIDANCE = 1.5


def draw(seed, *shape):
    """From N(0, 1), float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def small_network(seed):
    """A frozen DiT of 16 tokens and 6 branches in float64, with no gate at zero."""
    network = dit.DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=3,
                      num_heads=2, num_classes=5)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return network.double().eval().requires_grad_(False)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------


@pytest.mark.task3_1
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("seed", SEEDS)
def test_gumbel_sigmoid_solved_for_the_noise(seed, temperature):
    """temperature logit(r) - z must be the logistic noise, whose sigmoid is u."""
    logits, u = draw(seed, 50), torch.sigmoid(draw(seed + 100, 50))
    r = student.gumbel_sigmoid(logits, u, temperature)
    close(torch.sigmoid(temperature * torch.logit(r) - logits), u)


@pytest.mark.task3_1
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gates_above_a_half_are_as_frequent_as_the_score(temperature):
    """At every temperature. 20,001 values of u, evenly spaced, stand for all of them."""
    u = (torch.arange(20001, dtype=torch.float64) + 0.5) / 20001
    for logit in (-2.0, 0.3, 4.0):
        r = student.gumbel_sigmoid(torch.full_like(u, logit), u, temperature)
        share = (r > 0.5).double().mean().item()
        assert share == pytest.approx(torch.sigmoid(torch.tensor(logit)).item(), abs=1e-3)


@pytest.mark.task3_1
def test_gumbel_sigmoid_has_a_gradient():
    logits, u = draw(3, 6).requires_grad_(True), torch.sigmoid(draw(4, 6))
    assert torch.autograd.gradcheck(lambda z: student.gumbel_sigmoid(z, u, 0.5), logits)


# ------------------------------------------------------------------------------------------------


@pytest.mark.task3_2
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("seed", SEEDS)
def test_straight_through_is_hard_forward_and_soft_backward(seed, tau):
    """In float32, where a sum in the wrong order gives 0.99999994."""
    logits = (3 * draw(seed, 1000)).float().requires_grad_(True)
    weights = draw(seed + 1, 1000).float()
    r = student.straight_through(logits, tau)
    p = torch.sigmoid(logits.detach())
    assert r.dtype == torch.float32 and torch.equal(r.detach(), (p > tau).float())
    (weights * r).sum().backward()
    torch.testing.assert_close(logits.grad, weights * p * (1 - p))


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
def test_the_gradient_by_hand_is_autograds(seed, temperature):
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
    (error + BETA * (costs * torch.sigmoid(z)).sum()).backward()

    upstream = [mixed.grad for mixed in cache.mixed]
    new = [output.detach() for output in cache.new]
    with torch.no_grad():
        found = student.row_gradient(logits, u, temperature, new, first.new, upstream, costs, BETA)
    close(found, z.grad)


# ------------------------------------------------------------------------------------------------


def trajectory(seed, relax, costs=None, beta=BETA, lr=0.0, tau=0.5, optimizer=None, lambda_=None):
    """Runs the student's function. -> losses, x_0, the rows, and its inputs."""
    network, K = small_network(seed), 6
    x, condition = draw(seed, IMAGES, 1, 8, 8), network.condition(torch.arange(IMAGES))
    rows = [torch.nn.Parameter(row.clone()) for row in draw(seed + 1, STEPS - 1, K)]
    optimizer = optimizer or torch.optim.SGD(rows, lr=lr)
    losses, x0 = student.sdt_trajectory(
        network, DDIM(STEPS), x, condition, GUIDANCE, rows, relax, optimizer,
        torch.ones(K).double() if costs is None else costs, tau, beta, lambda_ or [1.0] * STEPS,
    )
    return losses, x0, rows, (network, x, condition)


def plain(i, logits):
    return torch.sigmoid(logits)


@pytest.mark.task3_4
@pytest.mark.parametrize("seed", SEEDS)
def test_with_plain_sigmoids_it_is_train_stepwise(seed):
    """Losses, updated logits and x_0 are those of the repository's trainer at equal prices."""
    lambda_ = [0.0, *draw(seed, STEPS - 1).exp().tolist()]
    losses, x0, rows, (network, x, condition) = trajectory(
        seed, plain, lr=50.0, tau=0.3, lambda_=lambda_
    )
    router = routers.Router(STEPS, 6).double()
    with torch.no_grad():
        for row, start in zip(router.rows, draw(seed + 1, STEPS - 1, 6), strict=True):
            row.copy_(start)
    chunk = Chunk(x, condition, None, DDIM(STEPS), 1.0)
    optimizer = torch.optim.SGD(router.parameters(), lr=50.0)
    expected, _ = train_trajectory(
        SimpleNamespace(network=network), router, optimizer, [chunk], lambda_, GUIDANCE, 0.3, BETA
    )
    assert losses == pytest.approx(expected, rel=1e-9)
    close(torch.stack(list(rows)).detach(), torch.stack(list(router.rows)).detach())
    close(x0, chunk.x)


@pytest.mark.task3_4
@pytest.mark.parametrize("seed", SEEDS)
def test_with_hard_gates_it_equals_inference(seed):
    """Bitwise: straight-through training sees exactly what sampling will do."""
    gates = draw(seed + 1, STEPS - 1, 6) > 0
    _, x0, _, (network, x, condition) = trajectory(
        seed, lambda i, logits: gates[i - 1].double() + 0 * logits
    )
    schedule = torch.cat([torch.ones(1, 6, dtype=torch.bool), gates])
    expected = denoise(network, DDIM(STEPS), x, condition, GUIDANCE, Cache(schedule))
    assert torch.equal(x0, expected) and not x0.requires_grad


@pytest.mark.task3_4
def test_usage_is_the_price_of_the_scores_not_of_the_gates():
    costs = draw(9, 6).exp()
    relax, calls = (lambda i, logits: calls.append(i) or torch.sigmoid(3 * logits + 1)), []
    with_usage, _, rows, _ = trajectory(0, relax, costs)
    assert calls == list(range(1, STEPS)), "relax is called once a step, and not for row 0"
    without, *_ = trajectory(0, relax, costs, beta=0.0)
    usage = [BETA * (costs * torch.sigmoid(row)).sum().item() for row in rows]
    found = [a - b for a, b in zip(with_usage, without, strict=True)]
    assert with_usage[0] == 0 and found[1:] == pytest.approx(usage, rel=1e-6)


class Spy:
    """An optimiser that changes nothing and records which rows have a gradient."""

    def __init__(self):
        self.rows, self.seen = [], []

    def step(self):
        self.seen.append([i for i, row in enumerate(self.rows, 1) if row.grad is not None])

    def zero_grad(self, set_to_none=True):
        for row in self.rows:
            row.grad = None


@pytest.mark.task3_4
def test_each_update_finds_a_gradient_on_its_own_row_only():
    spy = Spy()

    def relax(i, logits):
        spy.rows = spy.rows if i > 1 else []
        spy.rows.append(logits)
        return torch.sigmoid(logits)

    trajectory(1, relax, optimizer=spy)
    assert spy.seen == [[i] for i in range(1, STEPS)]


# ------------------------------------------------------------------------------------------------


@pytest.mark.task3_5
@pytest.mark.parametrize("cur", CURS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_budget_is_met_exactly_by_the_lowest_scores(seed, shape, cur):
    T, K = shape
    scores = torch.sigmoid(draw(seed, T, K))
    scores[0] = 0  # the lowest scores, but row 0 is computed all the same
    schedule = student.budgeted_schedule(scores, cur)
    assert schedule.dtype == torch.bool and schedule.shape == (T, K) and schedule[0].all()
    assert (~schedule).sum() == round(cur * T * K)
    reused, computed = scores[~schedule], scores[1:][schedule[1:]]
    assert not len(reused) or not len(computed) or reused.max() <= computed.min()


@pytest.mark.task3_5
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_scores_do_not_change_the_count(shape):
    T, K = shape
    scores = torch.full((T, K), 0.4)
    for cur in CURS:
        assert (~student.budgeted_schedule(scores, cur)).sum() == round(cur * T * K)
    for cur in (-0.1, (T - 0.5) / T):
        with pytest.raises(ValueError):
            student.budgeted_schedule(scores, cur)


# ------------------------------------------------------------------------------------------------


@pytest.mark.task3_6
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_scores_meet_the_budget_by_one_shift(seed, budget):
    logits = 3 * draw(seed, 6)
    scores = student.budgeted_scores(logits, budget)
    assert scores.sum().item() == pytest.approx(budget, abs=1e-6)
    shifts = torch.logit(scores) - logits
    close(shifts, shifts.mean().expand(6), 1e-5)


@pytest.mark.task3_6
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_goes_through_the_shift(seed, budget):
    """Compared with finite differences. The sum is constant, so its own gradient is 0."""
    logits = draw(seed, 6).requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda z: student.budgeted_scores(z, budget), logits, eps=1e-5, atol=1e-5
    )


@pytest.mark.task3_6
def test_a_budget_that_cannot_be_met_is_refused():
    for budget in (0.0, -1.0, 6.0, 7.5):
        with pytest.raises(ValueError):
            student.budgeted_scores(draw(0, 6), budget)
