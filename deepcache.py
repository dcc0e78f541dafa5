"""Two caches that the shape of a U allows: some evaluations run all of U-ViT, and the others go on
from hidden states that the last such evaluation, the key, has kept.

    DeepCache         keeps the state that enters the last m out blocks, and runs the first m in
                      blocks and the last m out blocks (Ma et al. 2023,
                      https://arxiv.org/abs/2312.00858)
    Faster Diffusion  keeps what the in blocks and the middle block gave, and runs the out blocks
                      (Li et al. 2023, https://arxiv.org/abs/2312.09608)

    cache = DeepCache(key_evaluations(20, "middles"), depth=2)
    x = denoise(network, sampler, x, condition, guidance, cache)

Neither has public code for U-ViT; these are consistent with their papers. To the sampler they are
caches like any other. The network leaves the way through its blocks to them (`run`).

What the U gives: in DeepCache the skip connections carry the details of today's x across to the out
blocks. What U-ViT takes away: its out blocks see the timestep and the label only through tokens of
the in blocks. With all of these kept, Faster Diffusion's out blocks repeat the key's prediction to
the last bit, and their work is wasted.

Notation: T evaluations, B images, N tokens, D width of a token.
"""

# ------------------------------------------------------------------------------------------------
# Which evaluations are keys


def key_evaluations(steps, where):
    """The keys among T evaluations of a sampler with two in a step: a list of T bools.

    `where` decides most of all. "starts": every step's start is a key, and its middle reuses it.
    "middles": evaluation 0 and the middles are keys, and the next start reuses the middle before
    it, which is nearer, as Learning-to-Cache pairs them. "all": no evaluation reuses. Raises
    ValueError for another word.
    """
    if where not in ("starts", "middles", "all"):
        raise ValueError(f"keys are starts, middles or all, not {where}")
    return [where == "all" or i == 0 or i % 2 == (where == "middles") for i in range(steps)]


# ------------------------------------------------------------------------------------------------
# The caches


class DeepCache:
    """`keys`, T bools, the first of them True; `depth` m from 1 to the number of out blocks.

    Attributes, counted: `blocks`, how many blocks it has run; `cur`, the share that it has not;
    `bytes`, what it keeps now, and `peak_bytes`, the most it ever kept.
    Raises ValueError for other keys or another depth, or if evaluations do not follow one another.
    """

    def __init__(self, keys, depth):
        if not keys or not keys[0]:
            raise ValueError("the first evaluation must be a key: there is nothing to reuse yet")
        self.keys, self.depth = keys, depth
        self.steps, self.i = len(keys), len(keys) - 1  # as after a whole trajectory
        self.blocks = self.all_blocks = self.bytes = self.peak_bytes = 0

    def start(self, i):
        """Call before evaluation i. -> the cache itself."""
        if i != (self.i + 1) % self.steps:
            raise ValueError(f"cache: evaluation {i} of {self.steps} does not follow {self.i}")
        self.i = i
        return self

    def run(self, network, x, t, y):
        """The blocks of this evaluation: -> the last tokens (B, N, D)."""
        run = self.run_key if self.keys[self.i] else self.run_rest
        tokens = run(network, x, t, y)
        self.all_blocks += len(network.blocks)
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return tokens

    @property
    def cur(self):
        return 1 - self.blocks / max(1, self.all_blocks)

    def run_key(self, network, x, t, y):
        """All blocks. Keeps what enters the last m out blocks."""
        if not 1 <= self.depth <= len(network.out_blocks):
            raise ValueError(f"the depth of DeepCache is from 1 to {len(network.out_blocks)}, the "
                             f"number of out blocks, not {self.depth}")
        skips = network.go_down(x, t, y)
        outer, inner = skips[: self.depth], skips[self.depth :]
        self.kept = network.go_up(network.mid_block(skips[-1]), inner, first=self.depth)
        self.bytes = self.kept.nbytes
        self.blocks += len(network.blocks)
        return network.go_up(self.kept, outer)

    def run_rest(self, network, x, t, y):
        """The outermost blocks, on today's x, t and label and on the state kept."""
        self.blocks += self.outer(network)
        return network.go_up(self.kept, network.go_down(x, t, y, depth=self.depth))

    def outer(self, network):
        """How many blocks run where no key is."""
        return 2 * self.depth

    def flops(self, network):
        """Arithmetic of one image's trajectory, one half of the guided batch, in FLOP."""
        block = sum(network.flops()[0][:2])
        outer = self.depth * (2 * block + network.skip_flops()) + network.end_flops()
        return self.total(network, outer)

    def total(self, network, rest):
        """Keys at their full arithmetic, and each other evaluation at `rest`."""
        branches, other = network.flops()
        keys = sum(self.keys)
        return keys * (sum(branches) + other) + (self.steps - keys) * rest


class FasterDiffusion(DeepCache):
    """The same with another share of the work. It has `keys` and no depth."""

    def __init__(self, keys):
        super().__init__(keys, depth=None)

    def run_key(self, network, x, t, y):
        """All blocks. Keeps what the in blocks and the middle block gave."""
        self.skips = network.go_down(x, t, y)
        self.kept = network.mid_block(self.skips[-1])
        self.bytes = self.kept.nbytes + sum(skip.nbytes for skip in self.skips)
        self.blocks += len(network.blocks)
        return network.go_up(self.kept, self.skips)

    def run_rest(self, network, x, t, y):
        """The out blocks, which see nothing of today's x, t and label."""
        self.blocks += self.outer(network)
        return network.go_up(self.kept, self.skips)

    def outer(self, network):
        return len(network.out_blocks)

    def flops(self, network):
        block = sum(network.flops()[0][:2]) + network.skip_flops()
        return self.total(network, self.outer(network) * block + network.end_flops())
