"""How the tests of assignment 4 call your functions where plain numbers are not enough. It runs in
the same process as student.py, which each function gets first."""

import torch

import dit
from samplers import Noise, make_sampler

GUIDANCE = 1.5


def case(seed, images, steps):
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
    scores = torch.rand(steps, 4, generator=generator)
    return network, x, condition, scores, noise


def measure(student, function, seed, images, sampler, scores, tau, last):
    """masked_errors, truncated_proxy or sparse_proxy on a small network whose parameters would
    take gradients; `last` is the groups, the horizon or the rows.
    -> what it returns, the evaluations of the network, how many with gradients, the scores after.
    """
    network, x, condition, _, noise = case(seed, images, len(scores))
    calls = []
    network.requires_grad_(True)
    network.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    found = getattr(student, function)(network, make_sampler(sampler, len(scores)), x, condition,
                                       GUIDANCE, scores, tau, last, noise)
    return {"found": found, "calls": len(calls), "with_gradients": sum(calls), "scores": scores}
