"""The block-level feature cache: compute a branch of the network, or reuse its last outputs.

A diffusion transformer adds K residual branches to its tokens, two or three a block. Their outputs,
taken before the gate, change little from one denoising step to the next (HarmoniCa,
https://arxiv.org/abs/2410.01723, section 3). So the network calls `cache(k, branch)` where it would
have called `branch()`, in execution order, and the cache decides:

    cache = Cache(schedule)                        # bool (T, K), True: compute
    for i, t in enumerate(timesteps):
        prediction = network(x, t, y, cache=cache.start(i))

    Cache      inference: a hard schedule; a reused branch costs no arithmetic
    SoftCache  training: a soft mix of new and kept output, differentiable in the router's scores

A reused branch repeats its last computed output. With `order` 1 or 2 it is forecast instead, by the
line or the parabola through its last two or three computed outputs (TaylorSeer,
https://arxiv.org/abs/2503.06923).

A cache serves one batch at a time, along one trajectory. Step 0 begins the next one, empty.

Notation: T denoising steps, K cacheable branches, r the router's scores, tau the threshold. An
entry is a pair: the step at which an output was computed, and the output.
"""

import copy
import math

import torch


def forecast(entries, i):
    """The polynomial through the entries, a tuple, at step i. One entry is repeated as it is."""
    steps = [s for s, _ in entries]
    (_, oldest), *newer = entries
    total = oldest
    for s, output in newer:  # Lagrange's form; the weights, with the oldest's, add up to 1
        weight = math.prod((i - other) / (s - other) for other in steps if other != s)
        total = torch.add(total, output - oldest, alpha=weight)
    return total


class Cache:
    """Inference: branch k at step i is computed if schedule[i, k], and if not, forecast.

    `schedule` is a bool tensor (T, K). Its row 0 is all True: there is nothing to reuse yet.
    `order` of the forecast: 0 repeats the last output, 1 or 2 goes on with its change.
    Attributes: `computed` and `reused`, lists of K counts of what really happened; `bytes`, what
    the cache holds now, and `peak_bytes`, the most it ever held.
    Raises ValueError for another schedule or order, or if steps do not follow one another.
    """

    def __init__(self, schedule, order=0):
        if schedule.dtype != torch.bool or schedule.dim() != 2 or not (
            len(schedule) and schedule[0].all()
        ):
            raise ValueError("a schedule is a bool tensor (T, K) whose first row is all True")
        if order not in (0, 1, 2):
            raise ValueError(f"the order of a forecast is 0, 1 or 2, not {order}")
        T, K = schedule.shape
        self.schedule, self.order = schedule.tolist(), order
        self.read = read_later(self.schedule, order)
        self.steps, self.step = T, T - 1  # as after a whole trajectory: step 0 must come next
        self.kept = {}  # k: its entries, the newest last
        self.computed, self.reused = [0] * K, [0] * K
        self.bytes = self.peak_bytes = 0

    def start(self, i):
        """Call before evaluation i. -> the cache itself."""
        if i == 0:
            self.kept, self.bytes = {}, 0
        elif i != self.step + 1 or i >= self.steps:
            raise ValueError(f"cache: step {i} of {self.steps} does not follow step {self.step}")
        # Rows, which repeat: torch.compile makes a graph for each number that it reads.
        self.step, self.row, self.room = i, self.schedule[i], self.read[i]
        return self

    def __call__(self, k, branch):
        """The output of branch k, computed or forecast."""
        entries = self.kept.get(k, ())
        if self.row[k]:
            output = branch()
            self.computed[k] += 1
            self._keep(k, (*entries, (self.step, output)))
        else:
            output = forecast(entries, self.step)
            self.reused[k] += 1
            self._keep(k, entries)
        return output

    def _keep(self, k, entries):
        """Keeps of the entries only those that a later step reads."""
        self.bytes -= sum(output.nbytes for _, output in self.kept.pop(k, ()))
        entries = entries[max(0, len(entries) - self.room[k]) :]
        if entries:
            self.kept[k] = entries
        self.bytes += sum(output.nbytes for _, output in entries)
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    @property
    def cur(self):
        """Cache utilisation ratio: reused / (computed + reused), counted."""
        return sum(self.reused) / max(1, sum(self.computed) + sum(self.reused))


def read_later(schedule, order):
    """How many of a branch's newest entries are still read after each step: a list of T lists of K.
    A forecast reads order + 1. Whatever the next step computes takes the place of one."""
    after = [[0] * len(schedule[0])]  # the last step: nothing comes after it
    for row in reversed(schedule[1:]):
        after.append([max(0, n - 1) if computes else order + 1
                      for n, computes in zip(after[-1], row, strict=True)])
    return after[::-1]


class SoftCache:
    """Training: every branch is computed, and mixed with its kept output by its score r.

        m = r * new + (1 - r) * kept        and, where r > tau, m is kept, detached from the graph

    With an `order` of forecast above 0, the forecast of the kept entries takes the place of `kept`.
    Step 0 computes and keeps everything, whatever its scores. `scores(i)` gives row i, a tensor
    (K,) in (0, 1). It is asked at each start, because every step has a graph of its own.
    """

    def __init__(self, scores, tau, order=0):
        self.scores, self.tau, self.order = scores, tau, order
        self.kept = {}  # k: its entries, the newest last

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
            self.kept[k] = ((0, new.detach()),)
            return new
        # Computed even where sampling will reuse it: r learns from the difference of the two.
        r, entries = self.r[k], self.kept[k]
        mixed = r * new + (1 - r) * forecast(entries, self.step)
        if self.refresh[k]:  # the mix, as the official code keeps it
            self.kept[k] = (*entries, (self.step, mixed.detach()))[-1 - self.order :]
        return mixed

    def fork(self, scores):
        """A cache that goes on from here under other scores. Both share the entries, which are
        replaced and never written into."""
        twin = copy.copy(self)
        twin.scores, twin.kept = scores, dict(self.kept)
        return twin

    @property
    def bytes(self):
        return sum(output.nbytes for entries in self.kept.values() for _, output in entries)
