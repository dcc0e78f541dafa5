"""Assignment 2, caches that decide at run time: what you hand in. See README.md in this folder.

Notation: B rows of a batch, N tokens, D width of a token, T denoising steps, K cacheable branches.
"""

import torch  # noqa: F401 (you may want it)


def relative_change(new, old):
    """How much an output has changed: the mean of |new - old| over the mean of |old|, both over all
    elements. 0 if both are zero everywhere, infinite if only `old` is.

    new and old, tensors of one shape -> float.
    """
    raise NotImplementedError("task2_1: relative_change")


class SimilarityCache:
    """A cache that needs no schedule. Every step computes branch 0. If its output has changed by
    more than `threshold` (relative_change) since the last refresh, the step is a refresh: all other
    branches are computed and kept. Otherwise their kept outputs are used. Step 0 of a trajectory is
    a refresh. The cache is used like cache.Cache:

        cache = SimilarityCache(branches=16, threshold=0.1)
        for i, t in enumerate(timesteps):
            prediction = network(x, t, y, cache=cache.start(i))

    Attributes: `computed` and `reused`, lists of K counts over all trajectories so far;
    `refreshed`, a list of bools, one for each step of this trajectory so far.
    It never keeps more than one output of each branch.
    """

    def __init__(self, branches, threshold):
        raise NotImplementedError("task2_2: SimilarityCache")

    def start(self, i):
        """Call before evaluation i; 0 begins a new trajectory, empty. -> the cache itself."""
        raise NotImplementedError("task2_2: SimilarityCache.start")

    def __call__(self, k, branch):
        """The output of branch k, computed (by `branch()`) or kept: (B, N, D)."""
        raise NotImplementedError("task2_2: SimilarityCache.__call__")


def token_wise(mlp, new, seen, kept, tokens):
    """A token-wise cache of an MLP: recomputes, in each row of the batch, the `tokens` tokens whose
    input has changed most (Euclidean norm) since they themselves were last computed.

    mlp, a module (B, M, D) -> (B, M, D) that treats each token alone; new (B, N, D), its input now;
    seen (B, N, D), for each token the input at which it was last computed; kept (B, N, D), the
    output then; tokens, M, from 1 to N -> seen and kept after this step, both (B, N, D). The inputs
    stay unchanged. The mlp is run once, on M tokens of each row.
    """
    raise NotImplementedError("task2_3: token_wise")


def peak_bytes(schedule, entry_bytes):
    """The most that cache.Cache ever holds for a schedule, without running anything.

    An entry is held from its computation, if the next step reuses it, to its last reuse. Branches
    run in order k = 0 .. K - 1, steps i = 0 .. T - 1.

    schedule, bool (T, K), True: compute; entry_bytes, a list of K ints -> int.
    """
    raise NotImplementedError("task2_4: peak_bytes")


def arithmetic(network, computed, steps, tokens):
    """The arithmetic of one row's trajectory with a token-wise cache in every MLP. Branch k is
    computed computed[k] times. An attention costs the same each time; an MLP costs all N tokens the
    first time and `tokens` tokens each later time. What no cache can save is done at every step.

    network, a dit.DiT with `branches` (the names) and `flops()`; computed, a list of K counts from
    1 to T; steps, T; tokens, from 1 to N -> FLOP, an int.
    """
    raise NotImplementedError("task2_5: arithmetic")
