"""U-ViT: a diffusion transformer in the shape of a U (Bao et al. 2023, "All are Worth Words",
https://arxiv.org/abs/2209.12152, section 3).

It reads like dit.py beside it. What differs:
    - the first half of the blocks, the in blocks, hand their outputs across to the out blocks: a
      long skip connection, joined by a linear layer that is never cached
    - the timestep and the label are tokens beside those of the patches, and act through attention
      only: no shift, scale or gate
    - positions are learned, also those of the two tokens
    - LayerNorm has weights and an eps of 1e-5, the MLP the exact GELU, attention no bias for q k v
    - the noise is predicted without a variance, and all channels are guided
    - timesteps are those of its own noise schedule, from 1 to 1000 (see dpm_solver.py)

    import uvit
    network = uvit.UViT(**uvit.SIZES["H/2"])        # 501 M parameters
    network.load_state_dict(uvit.read_weights("imagenet256_uvit_huge.pth", network))

Notation: B images, C channels, H side of the image, P side of a patch, N tokens, those of the
patches and one or two more, D width of a token, L + 1 blocks, K = 2 (L + 1) cacheable branches.
"""

import torch
from torch import nn

import checkpoint
from dit import Attention, Mlp, PatchEmbedder, compute, timestep_embedding

# ------------------------------------------------------------------------------------------------
# Sizes (table 1 of the paper; the patch size follows the slash). The last class is the null label.
# The two for 64 x 64 pixels of ImageNet have none, as they were trained without guidance: their
# 1,000 classes are all real, so `condition` is not for them.

WIDTHS = {  # name: (D, L, heads)
    "S": (512, 12, 8),
    "M": (768, 16, 12),
    "L": (1024, 20, 16),
    "H": (1152, 28, 16),
}
INPUTS = {  # name: (H, C, classes, convolution)
    "H/2": (32, 4, 1001, False),  # latents of ImageNet, 256 x 256
    "H/4": (64, 4, 1001, False),  # 512 x 512
    "L/2": (32, 4, 1001, True),
    "L/4": (64, 4, 1001, True),
    "L/4 imagenet64": (64, 3, 1000, True),  # pixels
    "M/4 imagenet64": (64, 3, 1000, True),
    "S/2 cifar10": (32, 3, -1, True),  # no labels
    "S/4 celeba64": (64, 3, -1, True),
}
SIZES = {
    name: dict(
        img_size=H, patch_size=int(name[2]), in_chans=C, num_classes=classes, conv=conv,
        embed_dim=WIDTHS[name[0]][0], depth=WIDTHS[name[0]][1], num_heads=WIDTHS[name[0]][2],
    )
    for name, (H, C, classes, conv) in INPUTS.items()
}  # fmt: skip

# ------------------------------------------------------------------------------------------------
# The block


class Block(nn.Module):
    """Branch k is attention, k + 1 the MLP. A cache may return its kept output for either. In an
    out block a linear layer first joins the tokens with those of its in block, always today's."""

    def __init__(self, embed_dim, num_heads, mlp_ratio, skip=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attn = Attention(embed_dim, num_heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), embed_dim, approximate="none")
        self.skip_linear = nn.Linear(2 * embed_dim, embed_dim) if skip else None

    def forward(self, x, cache=compute, k=0, skip=None):  # x and skip (B, N, D)
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + cache(k, lambda: self.attn(self.norm1(x)))
        x = x + cache(k + 1, lambda: self.mlp(self.norm2(x)))
        return x  # (B, N, D)


# ------------------------------------------------------------------------------------------------
# The network


class UViT(nn.Module):
    """The whole network. Parameter names are the official checkpoint's keys.

    Args, by the official code's names: `img_size` H, `patch_size` P, `in_chans` C, `embed_dim` D,
        `depth` L, half of it in blocks and half out blocks, with a middle block more; `num_heads`,
        `mlp_ratio`; `num_classes`, with the null label, or -1 for no labels at all;
        `mlp_time_embed`: an MLP for the timestep; `conv`: a 3 x 3 convolution at the end.
    Attributes: as those of dit.DiT. `num_classes` counts the classes without the null label.
    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12,
        mlp_ratio=4.0, num_classes=-1, mlp_time_embed=False, conv=True,
    ):  # fmt: skip
        super().__init__()
        if img_size % patch_size or embed_dim % num_heads or embed_dim % 2 or depth % 2:
            raise ValueError(
                f"UViT: img_size {img_size} must be a multiple of patch_size {patch_size}, "
                f"embed_dim {embed_dim} of num_heads {num_heads} and of 2, depth {depth} of 2"
            )
        D, side = embed_dim, img_size // patch_size
        self.input_size, self.patch_size, self.in_channels = img_size, patch_size, in_chans
        self.num_classes, self.mlp_ratio = max(0, num_classes - 1), mlp_ratio
        self.out_channels = self.guidance_channels = in_chans
        self.branches = [f"{kind} {i}" for i in range(depth + 1) for kind in ("attn", "mlp")]
        self.extras = 2 if num_classes > 0 else 1  # tokens that are no patches: label, timestep

        self.patch_embed = PatchEmbedder(patch_size, in_chans, D)
        self.time_embed = nn.Sequential(
            nn.Linear(D, 4 * D), nn.SiLU(), nn.Linear(4 * D, D)
        ) if mlp_time_embed else nn.Identity()  # fmt: skip
        self.label_emb = nn.Embedding(num_classes, D) if num_classes > 0 else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + side * side, D))
        self.in_blocks = nn.ModuleList(
            [Block(D, num_heads, mlp_ratio) for _ in range(depth // 2)]
        )
        self.mid_block = Block(D, num_heads, mlp_ratio)
        self.out_blocks = nn.ModuleList(
            [Block(D, num_heads, mlp_ratio, skip=True) for _ in range(depth // 2)]
        )
        self.norm = nn.LayerNorm(D)
        self.decoder_pred = nn.Linear(D, patch_size * patch_size * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1) if conv else nn.Identity()

    @property
    def blocks(self):
        """All blocks in execution order: a list of L + 1."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def forward(self, x, t, y=None, cache=None):
        """Predicts the noise in x. The numbers enter and leave in x's dtype.

        x (B, C, H, H); t (B,) timesteps in [1, 1000], whole or fractional; y (B,) labels, the null
        label being `num_classes` (None for a network without labels); `cache(k, branch)` gives the
        output of branch k, or a cache of hidden states runs the blocks -> (B, C, H, H).
        """
        if hasattr(cache, "run"):  # see deepcache.py
            return self.head(cache.run(self, x, t, y), x)
        skips = self.go_down(x, t, y, cache)
        tokens = self.mid_block(skips[-1], cache or compute, 2 * len(self.in_blocks))
        return self.head(self.go_up(tokens, skips, cache), x)

    def go_down(self, x, t, y=None, cache=None, depth=None):
        """The embeddings and the first `depth` in blocks (None: all) -> their outputs, a list of
        (B, N, D)."""
        if x.shape[1:] != (self.in_channels, self.input_size, self.input_size):
            expected = f"(B, {self.in_channels}, {self.input_size}, {self.input_size})"
            raise ValueError(f"UViT: x must be (B, C, H, W) = {expected}, not {tuple(x.shape)}")
        dtype = self.pos_embed.dtype
        time = timestep_embedding(t, self.pos_embed.shape[-1]).to(dtype)
        tokens = [self.time_embed(time)[:, None], self.patch_embed(x.to(dtype))]
        if self.label_emb is not None:
            tokens = [self.label_emb(y)[:, None], *tokens]
        tokens, outputs = torch.cat(tokens, dim=1) + self.pos_embed, []
        for i, block in enumerate(self.in_blocks[:depth]):
            tokens = block(tokens, cache or compute, 2 * i)
            outputs.append(tokens)
        return outputs

    def go_up(self, tokens, skips, cache=None, first=0):
        """As many out blocks as there are `skips`, the outputs of in blocks from number `first` on;
        with 0 they are the last out blocks. tokens and each skip (B, N, D) -> (B, N, D)."""
        depth = 2 * len(self.in_blocks)
        for i, skip in reversed(list(enumerate(skips, start=first))):
            # In block i has its out block at the same distance from the middle.
            out = self.out_blocks[depth // 2 - 1 - i]
            tokens = out(tokens, cache or compute, 2 * (depth - i), skip)
        return tokens

    def head(self, tokens, x):
        """The last tokens (B, N, D) -> the noise in x, shaped like it."""
        patches = self.decoder_pred(self.norm(tokens))[:, self.extras :]  # (B, N, P * P * C)
        side, P = self.input_size // self.patch_size, self.patch_size
        image = patches.view(-1, side, side, P, P, self.in_channels)  # (B, row, column, p, q, C)
        image = image.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)  # (B, C, row, p, column, q)
        return self.final_layer(image).to(x.dtype)

    def condition(self, labels):
        """Labels (B,) -> the condition of a guided batch [labelled, null]: a tuple of (2 B,).
        Raises ValueError for a label outside 0 .. num_classes - 1, so for any if there are none."""
        labels = torch.as_tensor(labels)
        if ((labels < 0) | (labels >= self.num_classes)).any():
            raise ValueError(f"labels must be from 0 to {self.num_classes - 1}: {labels.tolist()}")
        labels = labels.to(self.pos_embed.device)
        return (torch.cat([labels, torch.full_like(labels, self.num_classes)]),)

    def flops(self):
        """Arithmetic of one image's forward, 2 per multiply-add, matrix products and convolutions
        only: -> (list of K, one a branch; the rest, which no cache can save)."""
        N, D = self.pos_embed.shape[1:]
        attention = 2 * N * 4 * D * D + 2 * 2 * N * N * D  # q k v and proj; q k^T and its use
        mlp = 2 * N * 2 * D * int(D * self.mlp_ratio)
        skips = self.skip_flops() * len(self.out_blocks)
        return [attention, mlp] * len(self.blocks), skips + self.end_flops()

    def skip_flops(self):
        """Arithmetic of one out block's joint."""
        N, D = self.pos_embed.shape[1:]
        return 2 * N * 2 * D * D

    def end_flops(self):
        """Arithmetic of the embeddings and the head."""
        N, D = self.pos_embed.shape[1:]
        patch = self.patch_size**2 * self.in_channels
        convolution = 2 * 9 * self.in_channels**2 * self.input_size**2
        return (2 * (N - self.extras) * patch * D + 2 * N * D * patch
                + (2 * 8 * D * D if isinstance(self.time_embed, nn.Sequential) else 0)
                + (convolution if isinstance(self.final_layer, nn.Conv2d) else 0))


# ------------------------------------------------------------------------------------------------
# Official weights


def read_weights(path, network):
    """Reads an official checkpoint for `network`: -> a state dict with exactly its keys and shapes.
    Raises FileNotFoundError, or ValueError that names the first missing, unexpected and misshapen
    keys, as `checkpoint.read_transformer` and `checkpoint.fitted` do."""
    state, file = checkpoint.read_transformer(path)
    return checkpoint.fitted(state, network, file)
