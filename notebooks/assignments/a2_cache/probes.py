"""How the tests of assignment 2 call your functions where plain numbers are not enough. It runs in
the same process as student.py, which each function gets first."""

import weakref

import torch

import dit


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
        self.given.append(list(x.shape))
        return self.mlp(x)


def play(student, branches, threshold, script, times):
    """Trajectories in which branch 0 outputs the script's numbers, branch k 100 i + k at step i.
    -> for each trajectory: the outputs that the cache returned [i][k], how often each branch was
    computed [i][k], and the cache's own lists."""
    cache, found = student.SimilarityCache(branches, threshold), []
    for _ in range(times):
        given, ran = [], []
        for i, value in enumerate(script):
            row, calls = cache.start(i), [0] * branches

            def branch(k, value=value, i=i, calls=calls):
                calls[k] += 1
                return torch.full((2, 3), value if k == 0 else 100.0 * i + k)

            outputs = [row(k, lambda k=k, branch=branch: branch(k)) for k in range(branches)]
            given.append([output[0, 0].item() for output in outputs])
            ran.append(calls)
        found.append({"given": given, "ran": ran, "refreshed": list(map(bool, cache.refreshed)),
                      "computed": list(cache.computed), "reused": list(cache.reused)})
    return found


def trajectory(network, cache, seed, steps, change=0.1):
    """Evaluations at slowly changing inputs, stacked."""
    x, *changes = draw(seed, (2, 1, 8, 8), steps)
    outputs = []
    for i in range(steps):
        x = x + change * changes[i - 1] if i else x
        t = torch.full((2,), 900.0 - 20 * i)
        row = cache.start(i) if cache else None
        outputs.append(network(x, t, torch.tensor([1, 5]), cache=row))
    return torch.stack(outputs)


def on_a_network(student, seed, steps, branches, threshold):
    """-> the outputs, and the cache's own lists."""
    cache = student.SimilarityCache(branches, threshold)
    outputs = trajectory(small_network(seed), cache, seed, steps)
    return [outputs, list(map(bool, cache.refreshed)), list(cache.computed)]


def alive(student, steps, branches, threshold):
    """How many outputs are in memory after each step, and once a new trajectory begins."""
    cache, outputs, counts = student.SimilarityCache(branches, threshold), weakref.WeakSet(), []

    def branch(value):
        output = torch.full((2, 3), value)
        outputs.add(output)
        return output

    for i in range(steps):
        row = cache.start(i)
        for k in range(branches):
            row(k, lambda k=k, i=i: branch(1.0 + 0.05 * i + k))
        counts.append(len(outputs))
    cache.start(0)
    return [counts, len(outputs)]


def token_wise(student, seed, new, seen, kept, tokens):
    """-> seen and kept after the step, the shapes that the MLP was run on, and the inputs after."""
    mlp = CountingMlp(seed, new.shape[-1])
    seen_after, kept_after = student.token_wise(mlp, new, seen, kept, tokens)
    return [seen_after, kept_after, mlp.given, [new, seen, kept]]


def arithmetic(student, size, computed, steps, tokens):
    """On the small network ("small") or one of dit.SIZES without weights."""
    if size == "small":
        network = small_network(0)
    else:
        with torch.device("meta"):
            network = dit.DiT(**dit.SIZES[size])
    return student.arithmetic(network, computed, steps, tokens)
