"""The block-level feature cache: compute a branch of the network, or reuse its last output.

A diffusion transformer adds K residual branches to its tokens, two or three a block. Their outputs,
taken before the gate, change little from one denoising step to the next (HarmoniCa,
https://arxiv.org/abs/2410.01723, section 3). So the network calls `cache(k, branch)` where it would
have called `branch()`, in execution order, and the cache decides:

    cache = Cache(schedule)                        # bool (T, K), True: compute
    for i, t in enumerate(timesteps):
        prediction = network(x, t, y, cache=cache.start(i))

    Cache      inference: a hard schedule; a reused branch costs no arithmetic
    SoftCache  training: a soft mix of new and kept output, differentiable in the router's scores

A cache serves one batch at a time, along one trajectory. Step 0 begins the next one, empty.

Notation: T denoising steps, K cacheable branches, r the router's scores, tau the threshold.
"""

import copy

import torch


class Cache:
    """Inference: branch k at step i is computed if schedule[i, k], and reused if not.

    `schedule` is a bool tensor (T, K). Its row 0 is all True: there is nothing to reuse yet.
    Attributes: `computed` and `reused`, lists of K counts of what really happened; `bytes`, what
    the cache holds now, and `peak_bytes`, the most it ever held.
    Raises ValueError for another kind of schedule, or if the steps do not follow one another.
    """

    def __init__(self, schedule):
        if schedule.dtype != torch.bool or schedule.dim() != 2 or not (
            len(schedule) and schedule[0].all()
        ):
            raise ValueError("a schedule is a bool tensor (T, K) whose first row is all True")
        T, K = schedule.shape
        self.schedule = schedule.tolist() + [[True] * K]  # nothing is reused after the last step
        self.steps, self.step = T, T - 1  # as after a whole trajectory: step 0 must come next
        self.kept = {}
        self.computed, self.reused = [0] * K, [0] * K
        self.bytes = self.peak_bytes = 0

    def start(self, i):
        """Call before evaluation i. -> the cache itself."""
        if i == 0:
            self.kept, self.bytes = {}, 0
        elif i != self.step + 1 or i >= self.steps:
            raise ValueError(f"cache: step {i} of {self.steps} does not follow step {self.step}")
        # torch.compile makes a graph for each number it reads: rows, which repeat, instead of i.
        self.step, self.row, self.next_row = i, self.schedule[i], self.schedule[i + 1]
        return self

    def __call__(self, k, branch):
        """The output of branch k, computed or kept."""
        if self.row[k]:
            self.kept[k] = branch()
        output = self.kept[k]
        self._count(k, output)
        self._drop_unread(k, output)
        return output

    def _count(self, k, output):
        if self.row[k]:
            self.computed[k] += 1
            self.bytes += output.nbytes
        else:
            self.reused[k] += 1

    def _drop_unread(self, k, output):
        """Drops the output at once if the next step computes its own: then nothing reads it."""
        if self.next_row[k]:
            del self.kept[k]
            self.bytes -= output.nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    @property
    def cur(self):
        """Cache utilisation ratio: reused / (computed + reused), counted."""
        return sum(self.reused) / max(1, sum(self.computed) + sum(self.reused))


class SoftCache:
    """Training: every branch is computed, and mixed with its kept output by its score r.

        m = r * new + (1 - r) * kept        and, where r > tau, m is kept, detached from the graph

    Step 0 computes and keeps everything, whatever its scores. `scores(i)` gives row i, a tensor
    (K,) in (0, 1). It is asked at each start, because every step has a graph of its own.
    """

    def __init__(self, scores, tau):
        self.scores, self.tau = scores, tau
        self.kept = {}

    def start(self, i):
        """Call before evaluation i. -> the cache itself."""
        self.step = i
        row = self.scores(i)
        # Unbound and copied to the host once a step: reading single scores would wait for a GPU.
        self.r, self.refresh = row.unbind(), (row > self.tau).tolist()
        return self

    def __call__(self, k, branch):
        """The output of branch k, mixed."""
        new = branch()
        if self.step == 0:
            self.kept[k] = new.detach()
            return new
        # Computed even where sampling will reuse it: r learns from the difference of the two.
        r = self.r[k]
        mixed = r * new + (1 - r) * self.kept[k]
        if self.refresh[k]:
            self.kept[k] = mixed.detach()  # the mix, as the official code keeps it
        return mixed

    def fork(self, scores):
        """A cache that goes on from here under other scores. Both share the entries, which are
        replaced and never written into."""
        twin = copy.copy(self)
        twin.scores, twin.kept = scores, dict(self.kept)
        return twin

    @property
    def bytes(self):
        return sum(entry.nbytes for entry in self.kept.values())
