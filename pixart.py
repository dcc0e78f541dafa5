"""PixArt: a transformer that denoises latents by a caption (Chen et al. 2023, "PixArt-alpha",
https://arxiv.org/abs/2310.00426, section 2.3; PixArt-Sigma, https://arxiv.org/abs/2403.04692).

It is DiT with two changes. Every block also attends to the caption: a cross-attention between the
self-attention and the MLP, without norm, modulation or gate. And the modulation is computed from
the timestep once for all blocks; each block adds a table of its own (adaLN-single). HarmoniCa
caches the outputs of a block's three residual branches.

    import pixart
    network = pixart.PixArt(**pixart.SIZES["alpha256"])          # 611 M parameters
    network.load_state_dict(pixart.read_weights("PixArt-XL-2-256x256.pth", network))

Notation: B images, C channels, H and W sides of the latent, P side of a patch, N = H W / P^2
tokens, M caption tokens, D width of a token, L blocks, K = 3 L cacheable branches.
"""


import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
from dit import Attention, Mlp, PatchEmbedder, TimestepEmbedder, compute, grid_embedding, modulate
from samplers import noise_levels

# ------------------------------------------------------------------------------------------------
# The published variants: all have the default width, depth and heads (XL/2). `pe_interpolation`
# divides the places of the tokens, so that a larger picture spans the places of a smaller one.

SIZES = {
    "alpha256": dict(input_size=32),
    "alpha512": dict(input_size=64),
    "alpha1024": dict(input_size=128, pe_interpolation=2.0, micro_conditions=True),
    "sigma256": dict(input_size=32, pe_interpolation=0.5, model_max_length=300),
    "sigma512": dict(input_size=64, pe_interpolation=1.0, model_max_length=300),
    "sigma1024": dict(input_size=128, pe_interpolation=2.0, model_max_length=300),
    "sigma2048": dict(input_size=256, pe_interpolation=4.0, model_max_length=300),
    "emoji": dict(  # the small model that this project ships: 32 x 32 colour pixels, no latents
        hidden_size=256, depth=6, num_heads=8, patch_size=8, predict_v=True,
        input_size=32, in_channels=3, caption_channels=128, model_max_length=12,
    ),
}  # fmt: skip

# Aspect ratios, height / width, that the official sampling of alpha 1024 tells the network: that of
# the picture's sides is rounded to the nearest.
RATIOS = (
    0.25, 0.28, 0.32, 0.33, 0.35, 0.4, 0.42, 0.48, 0.5, 0.52, 0.57, 0.6, 0.68, 0.72, 0.78, 0.82,
    0.88, 0.94, 1.0, 1.07, 1.13, 1.21, 1.29, 1.38, 1.46, 1.67, 1.75, 2.0, 2.09, 2.4, 2.5, 3.0, 4.0,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------
# The caption


class CaptionEmbedder(nn.Module):
    """Caption features -> tokens: (B, M, caption_channels) -> (B, M, D). `y_embedding` holds the
    features of the null caption, which stands for "no caption" in classifier-free guidance. They
    are drawn once and not trained."""

    def __init__(self, caption_channels, hidden_size, tokens):
        super().__init__()
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)
        null = torch.randn(tokens, caption_channels) / caption_channels**0.5
        self.register_buffer("y_embedding", null)  # (M, caption_channels)

    def forward(self, y):
        return self.y_proj(y)

    @property
    def null(self):
        """The features of the null caption (M, caption_channels), or None if the weights have none.
        A state dict cannot hold None, so `read_weights` fills their place with NaN."""
        return None if self.y_embedding.isnan().any() else self.y_embedding


class CrossAttention(nn.Module):
    """Image tokens attend to caption tokens: x (B, N, D), y (B, M, D) -> (B, N, D). Where mask
    (B, M) is False, the caption is padding and gets no attention."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x, y, mask):
        (B, N, D), M = x.shape, y.shape[1]
        q = self.q_linear(x).view(B, N, self.num_heads, -1).transpose(1, 2)  # (B, heads, N, D / .)
        k, v = self.kv_linear(y).view(B, M, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])  # (B, 1, 1, M)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


# ------------------------------------------------------------------------------------------------
# The block


class Block(nn.Module):
    """PixArt block with adaLN-single (figure 4 of the paper). Branch k is the self-attention, k + 1
    the cross-attention, k + 2 the MLP. A cache may return its kept output for each. The gates are
    always those of this timestep."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), hidden_size)
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)

    def forward(self, x, y, mask, modulation, cache=compute, k=0):
        """x (B, N, D), y (B, M, D), mask (B, M), modulation (B, 6, D) -> (B, N, D)."""
        parts = (self.scale_shift_table + modulation).chunk(6, dim=1)  # each (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * cache(k, lambda: self.attn(modulate(self.norm1(x), shift1, scale1)))
        x = x + cache(k + 1, lambda: self.cross_attn(x, y, mask))
        x = x + gate2 * cache(k + 2, lambda: self.mlp(modulate(self.norm2(x), shift2, scale2)))
        return x  # (B, N, D)


class FinalLayer(nn.Module):
    """Tokens back to the pixels of their patches: (B, N, D) -> (B, N, P * P * C_out). Its table is
    added to the timestep's embedding c (B, D) itself, not to the modulation made of it."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(self, x, c):
        shift, scale = (self.scale_shift_table + c[:, None]).chunk(2, dim=1)  # each (B, 1, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))


# ------------------------------------------------------------------------------------------------
# The network


def noise_of_v(output, x, t):
    """Turns the leading channels of a network's output (B, C or 2 C, H, W), v at x (B, C, H, W) and
    t (B,), into eps = sigma x + alpha v; the variance channels stay as they are."""
    C = x.shape[1]
    alpha, sigma, _ = noise_levels(t.cpu().numpy())
    alpha, sigma = (torch.from_numpy(level).to(x)[:, None, None, None] for level in (alpha, sigma))
    return torch.cat([sigma * x + alpha * output[:, :C], output[:, C:]], dim=1)


class PixArt(nn.Module):
    """The whole network. Parameter names are the official checkpoint's keys.

    Args, by the official code's names: `input_size`, the side H of the latents it was trained on
        (others are allowed, also H != W), `patch_size` P, `in_channels` C, `hidden_size` D, `depth`
        L, `num_heads`, `mlp_ratio`, `caption_channels`, `model_max_length` M, `learn_sigma`:
        predict the variance beside the noise, so that C_out = 2 C, else C; `pe_interpolation`, the
        divisor of the tokens' places; `micro_conditions`: also condition on the picture's size and
        aspect ratio (alpha 1024). And one of our own, `predict_v`: the last layer predicts
        v = alpha eps - sigma x_0 (Salimans and Ho 2022, https://arxiv.org/abs/2202.00512,
        appendix D), which `forward` turns into the noise. At high noise x is almost eps: a network
        that predicts eps must first reproduce x to within 1 % before its loss depends on x_0.
        There v is almost -x_0, so predicting v asks for x_0 directly.
    Attributes: `branches`, the names of the K cacheable branches in execution order;
        `guidance_channels`, how many leading channels classifier-free guidance acts on: all, as the
        official code has it with DPM-Solver++ and SA-Solver (with IDDPM the first three: set it).
    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28,
        num_heads=16, mlp_ratio=4.0, caption_channels=4096, model_max_length=120,
        learn_sigma=True, pe_interpolation=1.0, micro_conditions=False, predict_v=False,
    ):
        super().__init__()
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"PixArt: input_size {input_size} must be a multiple of patch_size {patch_size}, "
                f"hidden_size {hidden_size} of num_heads {num_heads} and of 4"
            )
        if micro_conditions and hidden_size % 3:
            raise ValueError(f"PixArt: for micro_conditions hidden_size {hidden_size} must be a "
                             "multiple of 3")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size, self.mlp_ratio = hidden_size, mlp_ratio
        self.caption_channels, self.model_max_length = caption_channels, model_max_length
        self.pe_interpolation, self.micro_conditions = pe_interpolation, micro_conditions
        self.predict_v = predict_v
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.guidance_channels = in_channels
        kinds = ("attn", "cross", "mlp")
        self.branches = [f"{kind} {block}" for block in range(depth) for kind in kinds]

        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        if micro_conditions:
            self.csize_embedder = TimestepEmbedder(hidden_size // 3)
            self.ar_embedder = TimestepEmbedder(hidden_size // 3)
        self.blocks = nn.ModuleList(
            [Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth)]
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

    def forward(self, x, t, y, mask, size=None, ratio=None, cache=None):
        """Predicts the noise (and the variance) in x. The numbers enter and leave in x's dtype.

        x (B, C, H, W); t (B,) timesteps in [0, 1000), whole or fractional; y (B, M,
        caption_channels), mask (B, M) and, with micro-conditions, size (B, 2) and ratio (B, 1) as
        `condition` makes them; `cache(k, branch)` gives the output of branch k
        -> (B, C_out, H, W).
        """
        P, (H, W) = self.patch_size, x.shape[-2:]
        if x.dim() != 4 or x.shape[1] != self.in_channels or H % P or W % P:
            raise ValueError(f"PixArt: x must be (B, {self.in_channels}, H, W) with H and W "
                             f"multiples of {P}, not {tuple(x.shape)}")
        dtype = self.x_embedder.proj.weight.dtype
        places = self.places(H // P, W // P, x.device).to(dtype)  # (N, D)
        tokens = self.x_embedder(x.to(dtype)) + places  # (B, N, D)
        c = self.t_embedder(t)  # (B, D)
        if self.micro_conditions:
            size = self.csize_embedder(size.flatten()).view(len(x), -1)  # (B, 2 D / 3)
            c = c + torch.cat([size, self.ar_embedder(ratio.flatten())], dim=1)  # (B, D)
        modulation = self.t_block(c).view(len(x), 6, -1)  # (B, 6, D)
        y = self.y_embedder(y.to(dtype))  # (B, M, D)
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, y, mask, modulation, cache or compute, 3 * i)  # (B, N, D)
        patches = self.final_layer(tokens, c)  # (B, N, P * P * C_out)
        output = self.unpatchify(patches, H, W).to(x.dtype)  # (B, C_out, H, W)
        return noise_of_v(output, x, t) if self.predict_v else output

    def places(self, rows, columns, device=None):
        """The position embedding of rows x columns tokens: -> (N, D) float32. Whatever their
        number, they span the places of the training size, divided by `pe_interpolation`."""
        base = self.input_size // self.patch_size
        row, column = (
            torch.arange(n, dtype=torch.float32, device="cpu") / (n / base) / self.pe_interpolation
            for n in (rows, columns)
        )
        return grid_embedding(self.hidden_size, row, column, device)

    def unpatchify(self, patches, H, W):
        """(B, N, P * P * C_out) -> (B, C_out, H, W)."""
        P, C = self.patch_size, self.out_channels
        x = patches.view(-1, H // P, W // P, P, P, C)  # (B, row, column, p, q, C_out)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C_out, row, p, column, q)
        return x.reshape(-1, C, H, W)

    def condition(self, captions, mask, size=None, null=None):
        """Captions -> the condition of a guided batch [captions, null]: a tuple for 2 B rows.

        captions (B, M, caption_channels), the features of the prompts; mask (B, M), True (or 1) at
        their tokens, False at padding; size (height, width) of the pictures in pixels, by default
        that of training, which only micro-conditions need; null (M, caption_channels), the features
        of the null caption, by default those of the checkpoint.
        -> y (2 B, M, caption_channels), mask (2 B, M) bool, and with micro-conditions also
        size (2 B, 2) and aspect ratio (2 B, 1), of RATIOS the nearest to height / width.

        The mask is repeated, so the null half attends to as many tokens as the caption beside it.
        So do PixArt-Sigma's code, and PixArt-alpha's with DPM-Solver++ and SA-Solver; with IDDPM
        the latter (`PixArtMS.forward_with_cfg`) drops the mask.

        An empty prompt (zero features and a mask that is all False, as the hashed words make it) is
        the null caption itself, with all its tokens.

        alpha's null caption is in the checkpoint (`y_embedder.y_embedding`). Sigma was trained with
        T5's 300 features of the empty string in its place, and the official sampling encodes them
        anew: give them as `null` to do the same. Files of the diffusers layout hold no null
        caption, so they need `null` too.

        Raises ValueError for other shapes, a mask that is all False with a caption that is not
        zero, or a null caption that is needed and not given.
        """
        shape = self.model_max_length, self.caption_channels
        null = self.y_embedder.null if null is None else null
        if null is None:
            raise ValueError("these weights hold no null caption (those of the diffusers layout "
                             "never do): give the features of the empty prompt as `null`")
        device = self.x_embedder.proj.weight.device
        captions, mask, null = captions.to(device), mask.to(device).bool(), null.to(device)
        if captions.shape[1:] != shape or mask.shape != captions.shape[:2] or null.shape != shape:
            raise ValueError(
                f"captions must be (B, M, channels) = (B, {shape[0]}, {shape[1]}), their mask "
                f"(B, {shape[0]}) and the null caption {shape}, not {tuple(captions.shape)}, "
                f"{tuple(mask.shape)} and {tuple(null.shape)}"
            )
        unseen = ~mask.any(dim=1)  # (B,)
        if (unseen & captions.any(dim=2).any(dim=1)).any():
            raise ValueError("a caption's mask is all False: all of it would be left out")
        null = null.to(captions.dtype).expand_as(captions)
        captions = torch.where(unseen[:, None, None], null, captions)
        mask = mask | unseen[:, None]
        y, mask = torch.cat([captions, null]), torch.cat([mask, mask])
        if not self.micro_conditions:
            return y, mask
        height, width = size or (8 * self.input_size, 8 * self.input_size)
        ratio = min(RATIOS, key=lambda known: abs(known - height / width))
        size, ratio = (torch.tensor([row], dtype=torch.float32, device=device).repeat(len(y), 1)
                       for row in ([height, width], [ratio]))
        return y, mask, size, ratio

    def flops(self, H=None, W=None):
        """Arithmetic of one image's forward, 2 per multiply-add, matrix products and convolution
        only, for latents H x W (by default those of training): -> (list of K, one a branch; the
        rest, which no cache can save)."""
        patch, D, M = self.patch_size**2, self.hidden_size, self.model_max_length
        N = (H or self.input_size) * (W or self.input_size) // patch
        attention = 2 * N * 4 * D * D + 2 * 2 * N * N * D  # q k v and proj; q k^T and its use
        cross = 2 * N * 2 * D * D + 2 * M * 2 * D * D + 2 * 2 * N * M * D  # q and proj; k v; use
        mlp = 2 * N * 2 * D * int(D * self.mlp_ratio)
        embedders = 2 * N * patch * self.in_channels * D + 2 * (256 * D + D * D)
        embedders += 2 * M * (self.caption_channels * D + D * D)
        if self.micro_conditions:
            embedders += 3 * 2 * (256 * (D // 3) + (D // 3) ** 2)
        rest = embedders + 2 * D * 6 * D + 2 * N * D * patch * self.out_channels
        return [attention, cross, mlp] * len(self.blocks), rest


def initialize(network):
    """For training from scratch: the official initialisation with one departure, the caption's
    path. The output starts at zero, the gates at small random values. Officially the caption's
    first layers are N(0, 0.02^2), for the 4,096 channels of T5, and the cross-attentions start at
    zero. Here all of these are Xavier's, the cross-attentions' outputs at half of that."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(network.x_embedder.proj.weight.flatten(1))
    nn.init.zeros_(network.x_embedder.proj.bias)
    embedders = [network.t_embedder]
    if network.micro_conditions:
        embedders += [network.csize_embedder, network.ar_embedder]
    for linear in [network.t_block[1], *(part.mlp[i] for part in embedders for i in (0, 2))]:
        nn.init.normal_(linear.weight, std=0.02)
    for block in network.blocks:
        nn.init.xavier_uniform_(block.cross_attn.proj.weight, gain=0.5)
    nn.init.zeros_(network.final_layer.linear.weight)
    return network


# ------------------------------------------------------------------------------------------------
# Official weights


def read_weights(path, network):
    """Reads a checkpoint for `network`: official, or in the layout of diffusers, of which `path`
    may also be a folder; it lacks the null caption (see `PixArt.condition`). -> a state dict with
    exactly the network's keys.

    Raises FileNotFoundError, or ValueError: for the weights of another PixArt, and as
    `checkpoint.fitted`.
    """
    state, path = checkpoint.read_transformer(path)
    # PixArt-alpha's own files in the layout of diffusers hold the null caption after all.
    if "caption_projection.y_embedding" in state:
        state["y_embedder.y_embedding"] = state.pop("caption_projection.y_embedding")
    null = state.get("y_embedder.y_embedding")
    tokens = tuple(getattr(null, "shape", ()))[:1]
    if tokens not in ((), (network.model_max_length,)):
        raise ValueError(f"{path} is for captions of {tokens[0]} tokens, this network for "
                         f"{network.model_max_length} (PixArt-alpha has 120, PixArt-Sigma 300)")
    micro = bool(state.keys() & {"csize_embedder.mlp.0.weight",
                                 "adaln_single.emb.resolution_embedder.linear_1.weight"})
    if micro != network.micro_conditions:
        raise ValueError(f"{path} has {'' if micro else 'no '}micro-conditions, unlike the network "
                         "(of the published models only alpha 1024 has them)")
    if "pos_embed.proj.weight" in state:  # the layout of diffusers
        state.pop("y_embedder.y_embedding", None)
        if null is None:
            null = torch.full((network.model_max_length, network.caption_channels), torch.nan)
        return {**checkpoint.fitted(state, network, path), "y_embedder.y_embedding": null}
    return checkpoint.fitted(state, network, path)
