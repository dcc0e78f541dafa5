"""How the tests of assignment 3 call your functions where plain numbers are not enough. It runs in
the same process as student.py, which each function gets first."""

import torch

import dit
from samplers import DDIM

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


def gradient(student, name, logits, arguments, weights):
    """student.NAME(logits, *arguments) -> its result, and the derivative of the result's sum, with
    these weights, with respect to the logits (None if there is none)."""
    logits = logits.clone().requires_grad_(True)
    result = getattr(student, name)(logits, *arguments)
    if not result.requires_grad:
        return [result, None]
    (weights * result).sum().backward()
    return [result.detach(), logits.grad]


class Spy:
    """An optimiser that changes nothing and records which rows have a gradient."""

    def __init__(self):
        self.rows, self.seen = [], []

    def step(self):
        self.seen.append([i for i, row in enumerate(self.rows, 1) if row.grad is not None])

    def zero_grad(self, set_to_none=True):
        for row in self.rows:
            row.grad = None


def train(student, seed, steps, images, relaxation, settings, gates=None):
    """sdt_trajectory on a small network, from drawn rows. `relaxation` is "plain" (the score),
    "steep" (another function of it) or "gates" (fixed ones); `settings` has costs, beta, tau,
    lambda and lr, which is None for the Spy.
    -> losses, x_0, the rows after it, the steps that relax was called for, what the Spy saw."""
    network, calls = small_network(seed), []
    x, condition = draw(seed, images, 1, 8, 8), network.condition(torch.arange(images))
    rows = [torch.nn.Parameter(row.clone()) for row in draw(seed + 1, steps - 1, 6)]
    optimizer = Spy()
    if settings["lr"] is not None:
        optimizer = torch.optim.SGD(rows, lr=settings["lr"])

    def relax(i, logits):
        calls.append(i)
        if isinstance(optimizer, Spy):
            optimizer.rows = [*optimizer.rows[: i - 1], logits]
        if relaxation == "gates":
            return gates[i - 1].double() + 0 * logits
        return torch.sigmoid(3 * logits + 1 if relaxation == "steep" else logits)

    losses, x0 = student.sdt_trajectory(
        network, DDIM(steps), x, condition, GUIDANCE, rows, relax, optimizer, settings["costs"],
        settings["tau"], settings["beta"], settings["lambda"],
    )
    seen = optimizer.seen if isinstance(optimizer, Spy) else []
    return {"losses": losses, "x0": x0, "rows": [row.detach() for row in rows], "calls": calls,
            "seen": seen}
