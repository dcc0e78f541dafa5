"""The Stable Diffusion autoencoder: 8 x 8 pixels become one latent of 4 numbers, and back again
(Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
https://arxiv.org/abs/2112.10752, section 3.1 and appendix G).

DiT and PixArt denoise these latents, and the decoder turns them into images. The autoencoders of
this family share one architecture; only the weights and the scale differ. A diffusion model works
on `scale * latent`, which has a standard deviation of about 1. The scale is not in the weights, so
it belongs to the diffusion model: 0.18215 for `sd-vae-ft-ema` and `-mse` (DiT, PixArt-alpha),
0.13025 for `sdxl-vae` (PixArt-Sigma).

    import vae
    network = vae.Autoencoder().requires_grad_(False)            # 83.7 M parameters
    network.load_state_dict(vae.read_weights("diffusion_pytorch_model.safetensors", network))
    images = network.decode(latents / 0.18215)

In float16 the SDXL weights overflow to NaN: use bfloat16 or float32.

Notation: B images, C channels, H and W sides in latents (8 H and 8 W in pixels), N = H W tokens.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import layout

# ------------------------------------------------------------------------------------------------
# Layers


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def norm_silu(norm, x):
    """Norm, then SiLU in place: a second tensor of this size would raise the peak of memory."""
    return F.silu(norm(x), inplace=True)


class ResBlock(nn.Module):
    """Two convolutions and a shortcut: (B, C_in, H, W) -> (B, C, H, W)."""

    def __init__(self, in_channels, channels):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Identity()
        if in_channels != channels:
            self.conv_shortcut = nn.Conv2d(in_channels, channels, 1)

    def forward(self, x):
        h = norm_silu(self.norm1, x)  # (B, C_in, H, W)
        h = self.conv1(h)  # (B, C, H, W)
        h = norm_silu(self.norm2, h)
        h = self.conv2(h)
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention with one head over all places of the image: (B, C, H, W) -> the same."""

    def __init__(self, channels):
        super().__init__()
        self.group_norm = group_norm(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))  # the files say "to_out.0"

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = (to(h)[:, None] for to in (self.to_q, self.to_k, self.to_v))  # (B, 1, N, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]  # softmax(q k^T / sqrt(C)) v: (B, N, C)
        return x + self.to_out(h).transpose(1, 2).reshape(x.shape)  # (B, C, H, W)


class MidBlock(nn.Module):
    """The layers at the smallest resolution; attention lets every place see every other one.
    (B, C, H, W) -> the same."""

    def __init__(self, channels):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels)])

    def forward(self, x):
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Halves the sides: (B, C, H, W) -> (B, C, H/2, W/2). The padding is at the right and at the
    bottom only, as in the official code."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the sides, by repetition and then a convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def level(in_channels, channels, res_blocks, **resample):
    """The layers of one resolution, named as in the checkpoint. `resample` is `downsamplers` or
    `upsamplers`, a list of one layer, or of none for the last resolution."""
    inputs = [in_channels] + [channels] * (res_blocks - 1)
    parts = {"resnets": [ResBlock(size, channels) for size in inputs], **resample}
    return nn.ModuleDict({name: nn.ModuleList(layers) for name, layers in parts.items()})


class Encoder(nn.Module):
    """Pixels to the parameters of a Gaussian: (B, 3, 8 H, 8 W) -> (B, 2 C, H, W)."""

    def __init__(self, widths, res_blocks, latent_channels):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(pairwise([widths[0], *widths])):
            resample = [Downsample(width)] if i < len(widths) - 1 else []
            self.down_blocks.append(level(before, width, res_blocks, downsamplers=resample))
        self.mid_block = MidBlock(widths[-1])
        self.conv_norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)  # (B, widths[0], 8 H, 8 W)
        for block in self.down_blocks:
            for layer in (*block.resnets, *block.downsamplers):
                x = layer(x)  # down to (B, widths[-1], H, W)
        x = self.mid_block(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))  # (B, 2 C, H, W)


class Decoder(nn.Module):
    """Latents to pixels: (B, C, H, W) -> (B, 3, 8 H, 8 W). Each level has one res block more than
    in the encoder. The levels are in the order in which they run: the smallest resolution first."""

    def __init__(self, widths, res_blocks, latent_channels):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(pairwise([widths[0], *widths])):
            resample = [Upsample(width)] if i < len(widths) - 1 else []
            self.up_blocks.append(level(before, width, res_blocks + 1, upsamplers=resample))
        self.conv_norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)  # (B, widths[0], H, W)
        x = self.mid_block(x)
        for block in self.up_blocks:
            for layer in (*block.resnets, *block.upsamplers):
                x = layer(x)  # up to (B, widths[-1], 8 H, 8 W)
        return self.conv_out(norm_silu(self.conv_norm_out, x))  # (B, 3, 8 H, 8 W)


# ------------------------------------------------------------------------------------------------
# Tiles
#
# Beyond a tile's edge a convolution sees only zeros, so a tile is wrong near its edge. Therefore
# tiles overlap, and over the overlap one fades into the other.

LARGE = 128  # latents: an image with a side of this or more (1024 pixels) is decoded in tiles
TILE = 80  # the largest side of a tile; 1024 pixels take 2 x 2 tiles of 72 latents


def cut(length, tile, overlap):
    """Cuts a side of `length` into as few pieces as possible, all equally long, at most `tile`,
    evenly spread and overlapping by at least `overlap` -> (length of a piece, list of starts)."""
    count = max(1, math.ceil((length - overlap) / (tile - overlap)))
    piece = math.ceil((length + (count - 1) * overlap) / count)
    return piece, [i * (length - piece) // max(1, count - 1) for i in range(count)]


def shares(piece, starts, overlap):
    """The weight of each piece at each of its places -> (pieces, piece) float64. At every place of
    the side the weights add up to 1. Where there is one piece only, its weight is exactly 1."""
    place = torch.arange(piece, dtype=torch.float64) + 0.5  # the middle of each latent or pixel
    ramp = torch.minimum(place, piece - place).clamp(max=max(overlap, 0.5))
    total = torch.zeros(starts[-1] + piece, dtype=torch.float64)
    for start in starts:
        total[start : start + piece] += ramp
    return torch.stack([ramp / total[start : start + piece] for start in starts])


# ------------------------------------------------------------------------------------------------
# The autoencoder


class Autoencoder(nn.Module):
    """Encoder and decoder. The parameters have the names that the library diffusers writes today.

    Args:
        channels: width of the largest resolution.
        multipliers: width of each resolution as a multiple of `channels`. Each resolution has half
            the sides of the one before it.
        res_blocks: per resolution of the encoder; the decoder has one more.
        latent_channels: C.
    Attribute: `factor`, pixels along the side of a latent; 8 for four resolutions.
    Raises ValueError for widths that are not multiples of 32, the number of a norm's groups.
    """

    def __init__(self, channels=128, multipliers=(1, 2, 4, 4), res_blocks=2, latent_channels=4):
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        if any(width % 32 for width in widths):
            raise ValueError(f"Autoencoder: widths {widths} must be multiples of 32")
        self.factor, self.latent_channels = 2 ** (len(widths) - 1), latent_channels
        self.encoder = Encoder(widths, res_blocks, latent_channels)
        self.decoder = Decoder(widths, res_blocks, latent_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def moments(self, images):
        """Images (B, 3, 8 H, 8 W) in [-1, 1] -> mean and logarithm of the variance of each latent's
        Gaussian, each (B, C, H, W). Raises ValueError for sides that are not multiples of 8."""
        if images.dim() != 4 or images.shape[1] != 3 or any(
            side % self.factor for side in images.shape[2:]
        ):
            expected = f"(B, 3, H, W) with sides that are multiples of {self.factor}"
            raise ValueError(f"encode: images must be {expected}, not {tuple(images.shape)}")
        parameters = self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))
        mean, log_variance = parameters.to(images.dtype).chunk(2, dim=1)  # (B, 2 C, H, W), halved
        return mean, log_variance.clamp(-30, 20)  # the limits of the official code

    def encode(self, images, noise=None):
        """Images (B, 3, 8 H, 8 W) in [-1, 1] -> latents (B, C, H, W), not yet scaled, in the dtype
        of `images`: the mean, or a sample if `noise` (B, C, H, W) from N(0, I) is given.
        Raises ValueError like `moments`."""
        mean, log_variance = self.moments(images)
        return mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise

    def decode(self, latents, slice_size=1, tile=None, overlap=16):
        """Latents (B, C, H, W), divided by the scale -> images (B, 3, 8 H, 8 W) in the dtype of
        `latents`, in [-1, 1] with some overshoot.

        Beside the images themselves, memory is bounded (`decode_bytes`), however many and large
        they are: `slice_size` images are decoded at a time, and images of 1024 pixels and more in
        overlapping tiles. `tile` is the largest side of a tile in latents: by default 80 if a side
        of the image is 128 or more, else the whole image. Tiles overlap by at least `overlap`
        latents.

        Slices do not change an image. Tiles do, as norms and attention see only their own tile.
        With the random weights of tests/test_vae.py and 2 x 2 tiles, an image is off by 7 % of its
        norm if the latents are noise, and by 21 % if left and right are very different; there is no
        seam. Tiles that only touch are off by 33 and 47 %, with a seam. The error on trained
        weights is not measured here. With enough memory, `tile=max(H, W)` decodes without tiles.

        Raises ValueError for another shape, slice_size < 1, or an overlap as large as a tile.
        """
        if latents.dim() != 4 or latents.shape[1] != self.latent_channels:
            expected = f"(B, {self.latent_channels}, H, W)"
            raise ValueError(f"decode: latents must be {expected}, not {tuple(latents.shape)}")
        rows, columns = self._cuts(*latents.shape[2:], slice_size, tile, overlap)
        slices = latents.split(slice_size)
        return torch.cat([self._decode(part, rows, columns, overlap) for part in slices])

    def decode_bytes(self, height, width, slice_size=1, tile=None, overlap=16):
        """The calculated peak of `decode`'s memory for latents (B, C, height, width): bytes beside
        weights, latents and images.

        The peak is in the first res block at full resolution: its input, the normed input and the
        output of the convolution, (256 + 256 + 128) numbers a pixel at the official size. Memory
        that the convolution library takes for itself is not counted. Raises ValueError like
        `decode`.
        """
        (h, _), (w, _) = self._cuts(height, width, slice_size, tile, overlap)
        weight = self.decoder.up_blocks[-1].resnets[0].conv1.weight  # (out, in, 3, 3)
        numbers = 2 * weight.shape[1] + weight.shape[0]
        return slice_size * numbers * h * w * self.factor**2 * weight.element_size()

    def _cuts(self, height, width, slice_size, tile, overlap):
        """How `decode` cuts the rows and the columns -> the results of `cut` for both."""
        longest = max(height, width)
        if tile is None:
            # The second is so large that one tile covers the side, whatever the overlap.
            tile = TILE if longest >= LARGE else longest + overlap + 1
        if slice_size < 1 or not 0 <= overlap < tile:
            raise ValueError(
                "decode: needs slice_size >= 1 and 0 <= overlap < tile, "
                f"not slice_size {slice_size}, overlap {overlap}, tile {tile}"
            )
        return cut(height, tile, overlap), cut(width, tile, overlap)

    def _decode(self, latents, rows, columns, overlap):
        """Decodes one slice tile by tile; `rows` and `columns` are results of `cut`."""
        B, _, H, W = latents.shape
        f, (h, tops), (w, lefts) = self.factor, rows, columns
        z = self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype))
        images = latents.new_zeros(B, 3, f * H, f * W)
        row_shares = shares(f * h, [f * top for top in tops], f * overlap).to(images)
        column_shares = shares(f * w, [f * left for left in lefts], f * overlap).to(images)
        for top, row_share in zip(tops, row_shares, strict=True):
            for left, column_share in zip(lefts, column_shares, strict=True):
                tile = self.decoder(z[:, :, top : top + h, left : left + w])  # (B, 3, f h, f w)
                tile = row_share[:, None] * column_share * tile.to(images.dtype)  # fades at edges
                images[:, :, f * top : f * (top + h), f * left : f * (left + w)] += tile
        return images


# ------------------------------------------------------------------------------------------------
# Official weights


def our_name(key, levels):
    """The key of a parameter in a file -> its name here. The file is from diffusers, of today or of
    2022 (such as `sd-vae-ft-ema`), or from Stable Diffusion. The latter numbers the decoder's
    `levels` from the largest resolution on, so their order is reversed."""
    names = {
        # early diffusers
        ".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0.",
        # Stable Diffusion
        ".mid.block_1.": ".mid_block.resnets.0.",
        ".mid.block_2.": ".mid_block.resnets.1.",
        ".mid.attn_1.norm.": ".mid_block.attentions.0.group_norm.",
        ".mid.attn_1.q.": ".mid_block.attentions.0.to_q.",
        ".mid.attn_1.k.": ".mid_block.attentions.0.to_k.",
        ".mid.attn_1.v.": ".mid_block.attentions.0.to_v.",
        ".mid.attn_1.proj_out.": ".mid_block.attentions.0.to_out.0.",
        ".down.": ".down_blocks.",
        **{f".up.{i}.": f".up_blocks.{levels - 1 - i}." for i in range(levels)},
        ".block.": ".resnets.",
        ".downsample.": ".downsamplers.0.",
        ".upsample.": ".upsamplers.0.",
        ".nin_shortcut.": ".conv_shortcut.",
        ".norm_out.": ".conv_norm_out.",
    }
    for theirs, ours in names.items():
        key = key.replace(theirs, ours)
    return key


def read_weights(path, network):
    """Reads a checkpoint in `.safetensors` or torch's own format, in any layout that `our_name`
    knows, or a folder of diffusers (`layout.find`) -> a state dict with exactly the keys and
    shapes of `network`.

    From a file of the whole Stable Diffusion model it takes the part `first_stage_model`. It skips
    what training left in a file (`loss.`, `model_ema.`). Raises FileNotFoundError, or ValueError
    that names the first five keys that are missing, unexpected, doubled or of another shape, or
    the first that is no weight (see `checkpoint.check_weight`), or a config.json that does not fit.
    """
    path = layout.find(path, "vae")
    if path.name.startswith(layout.STEM):
        layout.check_config(path, network)
    state, part = checkpoint.read(path), "first_stage_model."
    state = {key.removeprefix(part): state[key] for key in state if key.startswith(part)} or state
    expected, weights, problems = network.state_dict(), {}, []
    for key, value in state.items():
        name, shape = our_name(key, len(network.decoder.up_blocks)), getattr(value, "shape", ())
        if key.startswith(("loss.", "model_ema.")):
            continue
        if name not in expected or name in weights:
            problems.append(f"{'second' if name in weights else 'unexpected'} {key}")
            continue
        size = expected[name].shape
        if ".attn_1." in key and shape == (*size, 1, 1):
            value, shape = value[:, :, 0, 0], size  # Stable Diffusion projects by 1 x 1 convolution
        if shape != size:
            problems.append(f"{key} is {tuple(shape)}, not {tuple(size)}")
        weights[name] = value
    problems = [f"missing {name}" for name in expected if name not in weights] + problems
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit this network: " + "; ".join(problems[:5]) + more)
    for name, value in weights.items():
        checkpoint.check_weight(value, f"{path}: {name}")
    return weights
