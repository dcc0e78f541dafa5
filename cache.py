"""The block-level feature cache: run a branch of the network, or reuse what it gave before.

A network calls `cache(k, branch)` where it would have called `branch()`, for each of its K residual
branches in execution order, and `cache.start(i)` comes before each evaluation i = 0 .. T - 1. What
is kept is the branch's output before its gate (HarmoniCa, https://arxiv.org/abs/2410.01723,
section 3). There are two uses, hence two classes of one shape:

    Cache      inference: a hard schedule; a reused branch costs no arithmetic.
    SoftCache  training: a soft mix of new and kept, differentiable in the router's scores.

    cache = Cache(schedule)                        # bool (T, K), True: compute
    for i, t in enumerate(timesteps):
        prediction = network(x, t, y, cache=cache.start(i))

A cache serves one batch at a time, along one trajectory; step 0 begins the next one, empty.
"""

import copy

import torch


class Cache:
    """Inference: branch k at step i is computed if schedule[i, k], else its kept output is used.

    `schedule` is a bool tensor (T, K) whose row 0 is all True: there is nothing to reuse yet.
    Attributes: `computed` and `reused`, lists of K counts of what really happened; `bytes`, what
    the cache holds now, `peak_bytes`, the most it ever held, and `full_bytes`, what all K entries
    of the largest batch take.
    Raises ValueError for another kind of schedule, or if the steps do not follow one another.
    """

    def __init__(self, schedule):
        if schedule.dtype != torch.bool or schedule.dim() != 2 or not (
            len(schedule) and schedule[0].all()
        ):
            raise ValueError("a schedule is a bool tensor (T, K) whose first row is all True")
        T, K = schedule.shape
        self.schedule = schedule.tolist() + [[True] * K]  # nothing is reused after the last step
        self.steps, self.step = T, T - 1
        self.kept = {}
        self.computed, self.reused = [0] * K, [0] * K
        self.bytes = self.peak_bytes = self.first_bytes = self.full_bytes = 0

    def start(self, i):
        """Call before evaluation i. -> the cache itself."""
        if i == 0:
            self.kept, self.bytes, self.first_bytes = {}, 0, 0
        elif i != self.step + 1 or i >= self.steps:
            raise ValueError(f"cache: step {i} of {self.steps} does not follow step {self.step}")
        self.step = i
        return self

    def __call__(self, k, branch):
        """The output of branch k, computed or kept. It stays only if the next step reuses it."""
        reused_next = not self.schedule[self.step + 1][k]
        if self.schedule[self.step][k]:
            self.computed[k] += 1
            output = branch()
            if self.step == 0:
                self.first_bytes += output.nbytes
                self.full_bytes = max(self.full_bytes, self.first_bytes)
            if reused_next:
                self.kept[k] = output
                self.bytes += output.nbytes
                self.peak_bytes = max(self.peak_bytes, self.bytes)
            return output
        self.reused[k] += 1
        output = self.kept[k]
        if not reused_next:
            del self.kept[k]
            self.bytes -= output.nbytes
        return output

    @property
    def cur(self):
        """Cache utilisation ratio: reused / (computed + reused), counted."""
        return sum(self.reused) / max(1, sum(self.computed) + sum(self.reused))


class SoftCache:
    """Training: every branch is computed, and mixed with the kept output by its score r.

        m = r * new + (1 - r) * kept        and, where r > tau, m is kept, detached from the graph.

    Step 0 computes and keeps everything, whatever its scores. `scores(i)` gives row i, a tensor
    (K,) in (0, 1); it is asked at each start, so that every step has a graph of its own.
    """

    def __init__(self, scores, tau):
        self.scores, self.tau = scores, tau
        self.kept = {}

    def start(self, i):
        """Call before evaluation i. -> the cache itself."""
        self.step = i
        row = self.scores(i)
        self.r, self.refresh = row.unbind(), (row > self.tau).tolist()
        return self

    def __call__(self, k, branch):
        """The output of branch k, mixed."""
        new = branch()
        if self.step == 0:
            self.kept[k] = new.detach()
            return new
        r = self.r[k]
        mixed = r * new + (1 - r) * self.kept[k]
        if self.refresh[k]:
            self.kept[k] = mixed.detach()
        return mixed

    def fork(self, scores):
        """A cache that goes on from here under other scores. The entries are shared: they are
        replaced, never written into."""
        twin = copy.copy(self)
        twin.scores, twin.kept = scores, dict(self.kept)
        return twin

    @property
    def bytes(self):
        return sum(entry.nbytes for entry in self.kept.values())
