"""DiT: a transformer that denoises an image cut into patches (Peebles & Xie 2023, "Scalable
Diffusion Models with Transformers", https://arxiv.org/abs/2212.09748, section 3.2).

Every block adds two residual branches to its tokens: attention and an MLP. The timestep and the
label act only through adaLN-Zero, which shifts, scales and gates each branch. HarmoniCa caches the
outputs of these branches. A forward without a cache is the paper's plain network.

    import dit
    network = dit.DiT(**dit.SIZES["XL/2"], input_size=32)        # 675 M parameters
    network.load_state_dict(dit.read_weights("DiT-XL-2-256x256.pt", network))

Notation: B images, C channels, H side of the image, P side of a patch, N = (H / P)^2 tokens,
D width of a token, L blocks, K = 2 L cacheable branches.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import checkpoint

# ------------------------------------------------------------------------------------------------
# Sizes (table 1 of the paper; the patch size follows the slash)

WIDTHS = {  # name: (D, L, heads)
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
SIZES = {
    f"{name}/{patch}": dict(hidden_size=D, depth=L, num_heads=heads, patch_size=patch)
    for name, (D, L, heads) in WIDTHS.items()
    for patch in (2, 4, 8)
}
SIZES["digits"] = dict(  # the small model that this project ships: 28 x 28 grey pixels, no latents
    hidden_size=128, depth=8, num_heads=4, patch_size=4,
    input_size=28, in_channels=1, num_classes=10,
)

# ------------------------------------------------------------------------------------------------
# Embeddings


def timestep_embedding(t, size, max_period=10000):
    """Sinusoids of the timestep, cosines first: t (B,), also fractional -> (B, size) float32."""
    j = torch.arange(size // 2, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(max_period) * j / (size // 2))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def grid_embedding(size, rows, columns, device=None):
    """Fixed 2-D sinusoids, sines first, of the places rows (h,) and columns (w,), on the CPU, whole
    or fractional: -> (h * w, size) float32, row by row. The first half of the channels encodes a
    token's column, the second its row (the official code's order)."""
    # In float64 on the CPU, because Apple's GPUs have none.
    j = torch.arange(size // 4, dtype=torch.float64, device="cpu")
    omega = 10000.0 ** -(j / (size // 4))
    row, column = (place.double()[:, None] * omega for place in (rows, columns))  # (., size / 4)
    row, column = (torch.cat([angle.sin(), angle.cos()], 1).float().to(device)
                   for angle in (row, column))
    shape = len(rows), len(columns), size // 2
    grid = [column[None, :].expand(shape), row[:, None].expand(shape)]
    return torch.cat(grid, dim=-1).reshape(-1, size)  # (h, w, size) -> (h * w, size)


def position_embedding(size, side, device=None):
    """The places of a square of tokens: -> (side * side, size) float32."""
    places = torch.arange(side, device="cpu")
    return grid_embedding(size, places, places, device)


class PatchEmbedder(nn.Module):
    """Cuts the image into P x P patches and projects each one: (B, C, H, H) -> (B, N, D)."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        x = self.proj(x).flatten(2)  # (B, D, H/P, H/P) -> (B, D, N)
        return x.transpose(1, 2).contiguous()  # (B, N, D), laid out as all that is added to it


class TimestepEmbedder(nn.Module):
    """Timestep -> vector: (B,) -> (B, D)."""

    def __init__(self, hidden_size, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t):
        return self.mlp(timestep_embedding(t, self.frequencies).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class label -> vector: (B,) -> (B, D). The table has one row more than there are classes: the
    null label, which stands for "no label" in classifier-free guidance."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


# ------------------------------------------------------------------------------------------------
# The block


def modulate(x, shift, scale):
    """adaLN: x (B, N, D), shift and scale (B, 1, D) -> (B, N, D)."""
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size, num_heads, qkv_bias=True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        x = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(D / heads)) v
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two layers with a GELU between, by its tanh approximation or ("none") exactly:
    (B, N, in) -> (B, N, hidden) -> (B, N, out)."""

    def __init__(self, in_features, hidden_features, out_features, approximate="tanh"):
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


def compute(k, branch):
    """Stands in for a cache where there is none: computes branch k."""
    return branch()


class Block(nn.Module):
    """DiT block with adaLN-Zero (figure 3 of the paper). Branch k is attention, k + 1 the MLP. A
    cache may return its kept output for either. The gates are always those of this timestep."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c, cache=compute, k=0):  # x (B, N, D), c (B, D)
        modulation = self.adaLN_modulation(c)[:, None]  # (B, 1, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * cache(k, lambda: self.attn(modulate(self.norm1(x), shift1, scale1)))
        x = x + gate2 * cache(k + 1, lambda: self.mlp(modulate(self.norm2(x), shift2, scale2)))
        return x  # (B, N, D)


class FinalLayer(nn.Module):
    """Tokens back to the pixels of their patches: (B, N, D) -> (B, N, P * P * out_channels)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


# ------------------------------------------------------------------------------------------------
# The network


class DiT(nn.Module):
    """The whole network. Parameter names are the official checkpoint's keys.

    Args, by the official code's names: `input_size` H, `patch_size` P, `in_channels` C,
        `hidden_size` D, `depth` L, `num_heads`, `mlp_ratio`, `num_classes`, and `learn_sigma`:
        predict the variance of each step beside the noise, so that C_out = 2 C, else C.
    Attributes: `branches`, the names of the K cacheable branches in execution order;
        `guidance_channels`, how many leading channels classifier-free guidance acts on: the first
        three in the official model (a quirk that its published FIDs depend on).
    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28,
        num_heads=16, mlp_ratio=4.0, num_classes=1000, learn_sigma=True,
    ):
        super().__init__()
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"DiT: input_size {input_size} must be a multiple of patch_size {patch_size}, "
                f"hidden_size {hidden_size} of num_heads {num_heads} and of 4"
            )
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.mlp_ratio = num_classes, mlp_ratio
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.guidance_channels = min(3, in_channels)
        self.branches = [f"{kind} {block}" for block in range(depth) for kind in ("attn", "mlp")]

        side = input_size // patch_size
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        places = position_embedding(hidden_size, side, self.x_embedder.proj.weight.device)
        self.register_buffer("pos_embed", places[None])  # (1, N, D)
        self.blocks = nn.ModuleList(
            [Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth)]
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

    def forward(self, x, t, y, cache=None):
        """Predicts the noise (and the variance) in x. The numbers enter and leave in x's dtype.

        x (B, C, H, H); t (B,) timesteps in [0, 1000), whole or fractional; y (B,) labels, the null
        label being `num_classes`; `cache(k, branch)` gives the output of branch k
        -> (B, C_out, H, H).
        """
        if x.shape[1:] != (self.in_channels, self.input_size, self.input_size):
            expected = f"(B, {self.in_channels}, {self.input_size}, {self.input_size})"
            raise ValueError(f"DiT: x must be (B, C, H, W) = {expected}, not {tuple(x.shape)}")
        dtype = self.x_embedder.proj.weight.dtype
        tokens = self.x_embedder(x.to(dtype)) + self.pos_embed  # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, c, cache or compute, 2 * i)  # (B, N, D)
        patches = self.final_layer(tokens, c)  # (B, N, P * P * C_out)
        return self.unpatchify(patches).to(x.dtype)  # (B, C_out, H, H)

    def unpatchify(self, patches):
        """(B, N, P * P * C_out) -> (B, C_out, H, H)."""
        side, P = self.input_size // self.patch_size, self.patch_size
        x = patches.view(-1, side, side, P, P, self.out_channels)  # (B, row, column, p, q, C_out)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C_out, row, p, column, q)
        return x.reshape(-1, self.out_channels, self.input_size, self.input_size)

    def condition(self, labels):
        """Labels (B,) -> the condition of a guided batch [labelled, null]: a tuple of (2 B,).
        Raises ValueError for a label outside 0 .. num_classes - 1."""
        labels = torch.as_tensor(labels)
        if ((labels < 0) | (labels >= self.num_classes)).any():
            raise ValueError(f"labels must be from 0 to {self.num_classes - 1}: {labels.tolist()}")
        labels = labels.to(self.pos_embed.device)
        return (torch.cat([labels, torch.full_like(labels, self.num_classes)]),)

    def flops(self):
        """Arithmetic of one image's forward, 2 per multiply-add, matrix products and convolution
        only: -> (list of K, one a branch; the rest, which no cache can save)."""
        N, D = self.pos_embed.shape[1:]
        patch = self.patch_size**2
        attention = 2 * N * 4 * D * D + 2 * 2 * N * N * D  # q k v and proj; q k^T and its use
        mlp = 2 * N * 2 * D * int(D * self.mlp_ratio)
        adaLN = 2 * D * (6 * D * len(self.blocks) + 2 * D)
        embedders = 2 * N * patch * self.in_channels * D + 2 * (256 * D + D * D)
        final = 2 * N * D * patch * self.out_channels
        return [attention, mlp] * len(self.blocks), adaLN + embedders + final


def initialize(network):
    """The official initialisation, for training from scratch: every gate and the output start at
    zero, so that each block starts as the identity (the "Zero" of adaLN-Zero)."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(network.x_embedder.proj.weight.flatten(1))
    nn.init.zeros_(network.x_embedder.proj.bias)
    nn.init.normal_(network.y_embedder.embedding_table.weight, std=0.02)
    nn.init.normal_(network.t_embedder.mlp[0].weight, std=0.02)
    nn.init.normal_(network.t_embedder.mlp[2].weight, std=0.02)
    zero = [block.adaLN_modulation[1] for block in network.blocks]
    for linear in [*zero, network.final_layer.adaLN_modulation[1], network.final_layer.linear]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return network


# ------------------------------------------------------------------------------------------------
# Official weights


def read_weights(path, network):
    """Reads a checkpoint for `network`, with the official names or in the layout of diffusers, of
    which `path` may also be a folder. -> a state dict with exactly the network's keys and shapes.

    Raises FileNotFoundError, or ValueError that names the first missing, unexpected and misshapen
    keys, as `checkpoint.read_transformer` and `checkpoint.fitted` do.
    """
    state, file = checkpoint.read_transformer(path)
    state = checkpoint.fitted(state, network, file)
    N, D = network.pos_embed.shape[1:]
    # The position embedding is fixed. Files of diffusers do not hold it.
    return {"pos_embed": position_embedding(D, math.isqrt(N))[None], **state}
