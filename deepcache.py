"""Two caches that the shape of a U allows: some evaluations run all of U-ViT, and the others go on
from hidden states that the last such evaluation, the key, has kept.

    DeepCache         keeps the state that enters the last m out blocks, and runs the first m in
                      blocks and the last m out blocks (Ma et al. 2023,
                      https://arxiv.org/abs/2312.00858)
    Faster Diffusion  keeps what the in blocks and the middle block gave, and runs the out blocks
                      (Li et al. 2023, https://arxiv.org/abs/2312.09608)

    cached = DeepCache(network, key_evaluations(20, "middles"), depth=2)
    x = denoise(cached, sampler, x, condition, guidance, cache=cached)

Neither has public code for U-ViT; these are consistent with their papers. The object stands where
the network does, and also where the cache does, so that it knows the evaluation's number.

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

    Attributes: `blocks`, how many blocks it has run, and `bytes`, what it keeps.
    Raises ValueError for other keys or another depth, or if evaluations do not follow one another.
    """

    def __init__(self, network, keys, depth):
        if not 1 <= depth <= len(network.out_blocks):
            raise ValueError(f"the depth of DeepCache is from 1 to {len(network.out_blocks)}, the "
                             f"number of out blocks, not {depth}")
        if not keys or not keys[0]:
            raise ValueError("the first evaluation must be a key: there is nothing to reuse yet")
        self.network, self.keys, self.depth = network, keys, depth
        self.guidance_channels = network.guidance_channels
        self.steps, self.i, self.blocks, self.bytes = len(keys), len(keys) - 1, 0, 0

    def start(self, i):
        """Call before evaluation i. -> the cache itself."""
        if i != (self.i + 1) % self.steps:
            raise ValueError(f"cache: evaluation {i} of {self.steps} does not follow {self.i}")
        self.i = i
        return self

    def __call__(self, x, t, y, cache=None):
        """The prediction, as UViT.forward gives it. `cache` is this object, and of no use here."""
        tokens = self.evaluate_key(x, t, y) if self.keys[self.i] else self.evaluate_rest(x, t, y)
        return self.network.head(tokens, x)

    def evaluate_key(self, x, t, y):
        """All blocks: -> the last tokens (B, N, D). Keeps what the last `depth` out blocks see."""
        network, m = self.network, self.depth
        skips = network.go_down(x, t, y)
        self.kept = network.go_up(network.mid_block(skips[-1]), skips[m:], first=m)
        self.bytes = self.kept.nbytes
        self.blocks += len(network.blocks)
        return network.go_up(self.kept, skips[:m])

    def evaluate_rest(self, x, t, y):
        """The outermost blocks, on today's x, t and label and on the state kept."""
        self.blocks += 2 * self.depth
        return self.network.go_up(self.kept, self.network.go_down(x, t, y, depth=self.depth))

    def flops(self):
        """Arithmetic of one image's trajectory, one half of the guided batch."""
        branches, rest = self.network.flops()
        block, keys = branches[0] + branches[1], sum(self.keys)
        outer = self.depth * (2 * block + self.network.skip_flops()) + self.network.end_flops()
        return keys * (sum(branches) + rest) + (self.steps - keys) * outer


class FasterDiffusion(DeepCache):
    """The same with another share of the work: `keys` as above, no depth."""

    def __init__(self, network, keys):
        super().__init__(network, keys, len(network.out_blocks))

    def evaluate_key(self, x, t, y):
        network = self.network
        self.skips = network.go_down(x, t, y)
        self.kept = network.mid_block(self.skips[-1])
        self.bytes = self.kept.nbytes + sum(skip.nbytes for skip in self.skips)
        self.blocks += len(network.blocks)
        return network.go_up(self.kept, self.skips)

    def evaluate_rest(self, x, t, y):
        """The out blocks, which see nothing of today's x, t and label."""
        self.blocks += len(self.network.out_blocks)
        return self.network.go_up(self.kept, self.skips)

    def flops(self):
        branches, rest = self.network.flops()
        out, keys = len(self.network.out_blocks), sum(self.keys)
        block = branches[0] + branches[1] + self.network.skip_flops()
        decoder = out * block + self.network.end_flops()
        return keys * (sum(branches) + rest) + (self.steps - keys) * decoder
