"""The autoencoder against diffusers, tiles and memory of `decode`, and every layout of weights."""

import contextlib
import os
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vae

SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])
OFFICIAL = (128, 256, 512, 512)  # the width of each resolution


def tiny(seed=0, **changes):
    """A frozen autoencoder with random parameters that keep activations of order 1: matrices keep
    the variance, norms and biases are near 1 and 0. A latent is 4 pixels wide."""
    sizes = dict(channels=32, multipliers=(1, 1, 2), res_blocks=1)
    network = vae.Autoencoder(**{**sizes, **changes})
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            noise /= parameter[0].numel() ** 0.5
        else:
            noise = 0.3 * noise + ("norm" in name and name.endswith("weight"))
        parameter.data = noise
    return network.eval().requires_grad_(False)


def diffusers_vae(widths, res_blocks=2, latent_channels=4):
    return AutoencoderKL(
        block_out_channels=widths, layers_per_block=res_blocks, latent_channels=latent_channels,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
    ).eval()


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def relative_error(result, expected):
    return ((result - expected).norm() / expected.norm()).item()


# ------------------------------------------------------------------------------------------------
# The numbers, against an independent implementation


@pytest.mark.parametrize(
    "dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
@pytest.mark.parametrize(
    "seed, multipliers, res_blocks, C",
    [(0, (1, 1, 2, 2), 2, 4), (1, (1, 2, 4, 4), 2, 4), (2, (2, 1), 1, 3), (3, (1, 1, 2), 3, 8)],
    ids=str,
)
@torch.no_grad()
def test_equals_diffusers_with_the_same_weights(dtype, limit, seed, multipliers, res_blocks, C):
    network = tiny(seed, multipliers=multipliers, res_blocks=res_blocks, latent_channels=C)
    other = diffusers_vae([32 * multiplier for multiplier in multipliers], res_blocks, C)
    other.load_state_dict(network.state_dict())
    network, other, f = network.to(dtype), other.to(dtype), network.factor
    images, latents = normal(seed, 2, 3, 3 * f, 2 * f).to(dtype), normal(seed, 2, C, 3, 2).to(dtype)
    gaussian = other.encode(images).latent_dist
    mean, log_variance = network.moments(images)
    assert relative_error(mean, gaussian.mean) < limit
    assert relative_error(log_variance, gaussian.logvar) < limit
    assert relative_error(network.decode(latents), other.decode(latents).sample) < limit
    noise = normal(seed, *mean.shape).to(dtype)
    assert torch.equal(network.encode(images), mean)
    sample = gaussian.mean + gaussian.std * noise
    assert relative_error(network.encode(images, noise), sample) < limit


def test_the_log_variance_is_clamped_from_minus_30_to_20():
    network = tiny()
    network.quant_conv.bias[4:] = torch.tensor([-1000.0, 1000.0, -10.0, 10.0])
    images = normal(0, 1, 3, 16, 16)
    mean, log_variance = network.moments(images)
    assert (log_variance[:, 0] == -30).all() and (log_variance[:, 1] == 20).all()
    assert (log_variance[:, 2:].abs() < 20).all()
    spread = (network.encode(images, torch.ones_like(mean)) - mean)[:, 1]
    torch.testing.assert_close(spread, torch.full_like(spread, torch.tensor(10.0).exp()))


def test_downsampling_pads_at_the_right_and_the_bottom_only():
    layer, x = vae.Downsample(1), normal(0, 1, 1, 6, 8)
    layer.conv.bias.data.zero_()
    for tap in ((0, 0), (2, 1), (2, 2)):
        layer.conv.weight.data.zero_()[0, 0, tap[0], tap[1]] = 1
        beyond = F.pad(x, (0, 8, 0, 8))[:, :, tap[0] :: 2, tap[1] :: 2]
        assert torch.equal(layer(x), beyond[:, :, :3, :4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_decide_the_arithmetic_and_the_input_the_dtype(dtype):
    network = tiny(multipliers=(1, 1))
    images, latents = normal(0, 1, 3, 8, 8).to(dtype), normal(0, 1, 4, 4, 4).to(dtype)
    expected = network.decode(latents)
    network.bfloat16()
    assert network.encode(images).dtype == network.decode(latents).dtype == dtype
    assert 1e-4 < relative_error(network.decode(latents), expected) < 0.1


# ------------------------------------------------------------------------------------------------
# Slices and tiles


@SEEDS
def test_slices_change_nothing(seed):
    network, latents = tiny(seed), normal(seed, 5, 4, 4, 3)
    whole = network.decoder(network.post_quant_conv(latents))
    for size in (1, 2, 7):
        images = network.decode(latents, slice_size=size)
        torch.testing.assert_close(images, whole, rtol=0, atol=1e-5)
    assert torch.equal(network.decode(latents, slice_size=5), whole)  # one tile: weight 1


class Local(nn.Module):
    """A decoder whose pixels depend on their own latent only, so tiles must be exact. It records
    the shapes of its inputs."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, z):
        self.shapes.append(tuple(z.shape))
        return F.interpolate(z[:, :3], scale_factor=4.0)


@pytest.mark.parametrize("tile, overlap", [(8, 0), (8, 1), (9, 4), (10, 9), (13, 3), (40, 16)])
def test_tiles_of_a_local_decoder_are_exact(tile, overlap):
    """Every pixel is in its place, and the weights of its tiles add up to 1."""
    network, latents = tiny().double(), normal(0, 3, 4, 21, 34).double()
    network.decoder = Local()
    expected = Local()(network.post_quant_conv(latents))
    images = network.decode(latents, 2, tile, overlap)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-13)
    assert max(max(shape[2:]) for shape in network.decoder.shapes) <= tile
    assert (len(network.decoder.shapes) > 2) == (tile < 34)


@pytest.mark.parametrize(
    "shape, expected",
    [((127, 90), [(127, 90)]), ((1, 1), [(1, 1)]), ((128, 128), [(72, 72)] * 4),
     ((64, 128), [(64, 72)] * 2), ((256, 256), [(76, 76)] * 16), ((10, 130), [(10, 73)] * 2)],
    ids=str,
)  # fmt: skip
def test_images_of_128_latents_and_more_are_decoded_in_tiles(shape, expected):
    network = tiny()
    network.decoder = Local()
    network.decode(normal(0, 1, 4, *shape))
    assert [shape[2:] for shape in network.decoder.shapes] == expected


def test_a_cut_covers_everything_with_the_overlap_and_no_tile_too_many():
    for length in range(1, 90):
        for tile, overlap in ((1, 0), (7, 0), (7, 3), (7, 6), (20, 16), (100, 5)):
            piece, starts = vae.cut(length, tile, overlap)
            assert piece <= tile and starts[0] == 0 and starts[-1] + piece == length
            steps = [after - before for before, after in zip(starts, starts[1:], strict=False)]
            assert all(0 < step <= piece - overlap for step in steps)
            # One tile fewer could not reach the end.
            assert (len(starts) - 1) * (tile - overlap) + overlap < length or len(starts) == 1


def jumps(result, whole):
    """How far the error jumps from column to column (root mean square over the rows) -> the largest
    jump near the middle, where tiles without overlap meet; the largest anywhere; the median."""
    jump = (result - whole).diff(dim=-1).square().mean((0, 1, 2)).sqrt()
    middle = jump.numel() // 2
    return jump[middle - 4 : middle + 5].max().item(), jump.max().item(), jump.median().item()


@pytest.mark.parametrize("unlike", [0.0, 1.0], ids=["noise", "left and right differ"])
def test_tiles_leave_no_seam(unlike):
    """The errors are those in the docstring of `decode`. The error jumps where tiles only touch;
    where they overlap, it jumps nowhere much more than elsewhere."""
    network = tiny(res_blocks=2)
    latents = normal(0, 1, 4, 40, 40) + unlike * torch.linspace(-1, 1, 40)
    whole = network.decode(latents)
    touching = network.decode(latents, tile=20, overlap=0)
    overlapping = network.decode(latents, tile=28)
    at, most, typical = jumps(touching, whole)
    assert at == most and at > 1.8 * typical
    at, most, typical = jumps(overlapping, whole)
    assert at < 1.2 * typical and most < 1.8 * typical
    stated = (0.21, 0.47) if unlike else (0.07, 0.33)
    measured = relative_error(overlapping, whole), relative_error(touching, whole)
    assert measured == pytest.approx(stated, abs=0.01)


# ------------------------------------------------------------------------------------------------
# Memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made and not yet freed, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        old = {x.untyped_storage()._cdata for x in tree_leaves(args) if torch.is_tensor(x)}
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in old | self.storages:
                self.storages.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, key, size):
        self.storages.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    "multipliers, dtype, options",
    [((1, 2, 2), torch.float32, {}), ((1, 1, 2), torch.float32, dict(slice_size=2)),
     ((1, 2, 2), torch.float64, dict(tile=10, overlap=3))],
    ids=str,
)  # fmt: skip
def test_decode_bytes_is_the_measured_peak(multipliers, dtype, options):
    network = tiny(multipliers=multipliers).to(dtype)
    latents = normal(0, 4, 4, 14, 12).to(dtype)
    with LiveBytes() as live:
        images = network.decode(latents, **options)
    assert live.now == images.nbytes
    calculated = network.decode_bytes(14, 12, **options)
    # Not in the calculation: the images, the latents, and the three channels of the last tile.
    beside = live.peak - calculated
    assert 0 < beside < images.nbytes + latents.nbytes + 0.03 * calculated


def test_decode_bytes_at_the_official_size():
    with torch.device("meta"):
        network = vae.Autoencoder()
    assert network.decode_bytes(64, 64) == 640 * 512 * 512 * 4
    assert network.decode_bytes(64, 64, slice_size=3) == 3 * 640 * 512 * 512 * 4
    assert network.decode_bytes(128, 128) == 640 * 576 * 576 * 4
    assert network.bfloat16().decode_bytes(256, 256) == 640 * 608 * 608 * 2


# ------------------------------------------------------------------------------------------------
# Sizes and mistakes


def test_the_official_size_has_the_official_names_and_parameters():
    with torch.device("meta"):
        network, other = vae.Autoencoder(), diffusers_vae(OFFICIAL)
    ours, theirs = network.state_dict(), other.state_dict()
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in theirs.items()}
    assert sum(parameter.numel() for parameter in network.parameters()) == 83_653_863
    assert network.factor == 8


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 8, 10), (1, 3, 9, 8)], ids=str)
def test_images_of_another_shape_raise(shape):
    with pytest.raises(ValueError, match="multiples of 4"):
        tiny().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 3, 8, 8), (1, 8, 8, 8)], ids=str)
def test_latents_of_another_shape_raise(shape):
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, H, W\)"):
        tiny().decode(torch.zeros(shape))


@pytest.mark.parametrize(
    "options",
    [dict(slice_size=0), dict(tile=16), dict(tile=0), dict(tile=8, overlap=-1), dict(overlap=90)],
    ids=str,
)
def test_empty_slices_and_tiles_that_are_all_overlap_raise(options):
    network = tiny()
    for act in (lambda: network.decode(torch.zeros(1, 4, 128, 1), **options),
                lambda: network.decode_bytes(128, 1, **options)):  # fmt: skip
        with pytest.raises(ValueError, match="slice_size >= 1 and 0 <= overlap < tile"):
            act()


def test_widths_that_the_groups_do_not_divide_raise():
    with pytest.raises(ValueError, match="multiples of 32"):
        vae.Autoencoder(channels=48)


# ------------------------------------------------------------------------------------------------
# Weights


def early_diffusers(state):
    """Our names -> those in the diffusers files of 2022."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    early = {}
    for key, value in state.items():
        path, _, name = key.rpartition("attentions.0.")
        kind, _, end = name.rpartition(".")
        early[f"{path}attentions.0.{names.get(kind, kind)}.{end}" if path else key] = value
    return early


def stable_diffusion(state, levels, res_blocks):
    """Our names -> those in Stable Diffusion's files, module by module."""
    new = {}

    def take(theirs, ours, convolution=False):
        for end in ("weight", "bias"):
            value = state[f"{ours}.{end}"]
            convolved = convolution and end == "weight"
            new[f"{theirs}.{end}"] = value[:, :, None, None] if convolved else value

    def take_block(theirs, ours):
        for part in ("norm1", "conv1", "norm2", "conv2"):
            take(f"{theirs}.{part}", f"{ours}.{part}")
        if f"{ours}.conv_shortcut.weight" in state:
            take(f"{theirs}.nin_shortcut", f"{ours}.conv_shortcut")

    for side in ("encoder", "decoder"):
        for part in ("conv_in", "conv_out"):
            take(f"{side}.{part}", f"{side}.{part}")
        take(f"{side}.norm_out", f"{side}.conv_norm_out")
        take_block(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0")
        take_block(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1")
        theirs, ours = f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0"
        take(f"{theirs}.norm", f"{ours}.group_norm")
        for part in "qkv":
            take(f"{theirs}.{part}", f"{ours}.to_{part}", convolution=True)
        take(f"{theirs}.proj_out", f"{ours}.to_out.0", convolution=True)
    for i in range(levels):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{levels - 1 - i}"
        for j in range(res_blocks):
            take_block(f"encoder.down.{i}.block.{j}", f"{down}.resnets.{j}")
        for j in range(res_blocks + 1):
            take_block(f"decoder.up.{i}.block.{j}", f"{up}.resnets.{j}")
        if i < levels - 1:
            take(f"encoder.down.{i}.downsample.conv", f"{down}.downsamplers.0.conv")
        if i > 0:
            take(f"decoder.up.{i}.upsample.conv", f"{up}.upsamplers.0.conv")
    for part in ("quant_conv", "post_quant_conv"):
        take(part, part)
    assert len(new) == len(state)
    return new


def layouts(network):
    """The same weights in the layout of each kind of file: {file name: content}."""
    state = network.state_dict()
    own = stable_diffusion(state, levels=3, res_blocks=1)
    rest = {"model_ema.decay": torch.tensor(0.9), "loss.logvar": torch.tensor(0.0)}
    whole = {f"first_stage_model.{key}": value for key, value in own.items()}
    unet = {"model.diffusion_model.out.0.weight": torch.zeros(2)}
    return {
        "today.safetensors": state,
        "early.safetensors": early_diffusers(state),
        "early.bin": early_diffusers(state),
        "sdxl_vae.safetensors": own,
        "ema-pruned.ckpt": {"state_dict": {**own, **rest}, "global_step": 840000},
        "whole.safetensors": {**unet, **whole},
    }


def save(path, content):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in content.items()}, path)
    else:
        torch.save(content, path)
    return path


def test_every_layout_gives_the_same_weights(tmp_path):
    network, other = tiny(1), tiny(2)
    state, latents = network.state_dict(), normal(0, 1, 4, 2, 2)
    for name, content in layouts(network).items():
        read = vae.read_weights(save(tmp_path / name, content), other)
        assert read.keys() == state.keys(), name
        assert all(torch.equal(read[key], state[key]) for key in state), name
    other.load_state_dict(read)
    assert torch.equal(other.decode(latents), network.decode(latents))


def test_diffusers_reads_the_test_files_the_same_way():
    """Without this the layouts above could be wrong in the same way as the reader."""
    state = tiny(1).state_dict()
    other = diffusers_vae((32, 32, 64), res_blocks=1)
    early = other._fix_state_dict_keys_on_load(early_diffusers(state))
    own = convert_ldm_vae_checkpoint(layouts(tiny(1))["whole.safetensors"], dict(other.config))
    for read in (early, own):
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)


def test_the_official_size_has_the_names_of_stable_diffusion_s_own_files():
    """Each of the 248 keys has a name here. Some keys and shapes are written down from memory."""
    with torch.device("meta"):
        network = vae.Autoencoder()
    keys = stable_diffusion(network.state_dict(), levels=4, res_blocks=2)
    assert len(keys) == 248
    assert {vae.our_name(key, 4) for key in keys} == set(network.state_dict())
    for key, shape in {
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "encoder.norm_out.weight": (512,),
        "quant_conv.weight": (8, 8, 1, 1),
    }.items():
        assert keys[key].shape == shape


@pytest.mark.parametrize("layout", ["today.safetensors", "sdxl_vae.safetensors"])
def test_one_error_names_the_keys_that_do_not_fit(tmp_path, layout):
    network = tiny()
    state = dict(layouts(network)[layout])
    del state["decoder.conv_in.bias"]
    state["quant_conv.bias"] = torch.zeros(7)
    state["decoder.extra.weight"] = torch.zeros(1)
    if layout == "today.safetensors":  # the same parameter under two names
        state["decoder.mid_block.attentions.0.query.bias"] = torch.zeros(64)
    with pytest.raises(ValueError) as caught:
        vae.read_weights(save(tmp_path / layout, state), network)
    message = str(caught.value)
    for part in (
        str(tmp_path / layout), "missing decoder.conv_in.bias", "unexpected decoder.extra.weight",
        "quant_conv.bias is (7,), not (8,)",
    ):
        assert part in message
    second = "second decoder.mid_block.attentions.0." in message
    assert second == (layout == "today.safetensors")
    assert message.count(";") == 2 + second


def test_a_file_of_another_size_gives_one_short_error(tmp_path):
    path = save(tmp_path / "w.safetensors", tiny(multipliers=(1, 2, 2)).state_dict())
    with pytest.raises(ValueError, match=r"does not fit this network.*; and \d+ more$") as caught:
        vae.read_weights(path, tiny())
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


class Code:
    """Pickles as a function call: unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "w.ckpt", tmp_path / "trace"
    torch.save({"state_dict": tiny().state_dict(), "callbacks": Code(trace)}, path)
    with pytest.raises(ValueError, match="only running code could read .posix.mkdir.: use a .safe"):
        vae.read_weights(path, tiny())
    assert not trace.exists()
    with contextlib.suppress(Exception):  # the trap works: a careless reader runs the code
        torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_file_raises(tmp_path, name, share):
    path = save(tmp_path / name, tiny().state_dict())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=f"{name} is (not a whole checkpoint|damaged)"):
        vae.read_weights(path, tiny())


@pytest.mark.parametrize(
    "content", [[1], torch.zeros(3), None, {"state_dict": [1]}, {1: torch.zeros(1)}, {}], ids=str
)
def test_another_content_raises(tmp_path, content):
    with pytest.raises(ValueError, match=r"w\.ckpt (holds no state dict|does not fit)"):
        vae.read_weights(save(tmp_path / "w.ckpt", content), tiny())


def test_a_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights"):
        vae.read_weights(tmp_path / "w.safetensors", tiny())


@pytest.mark.parametrize("change, words", [
    (lambda value: value.long(), "is int64, not floating point"),
    (lambda value: value.bool(), "is bool, not floating point"),
    (lambda value: value * torch.nan, "holds NaN or infinite"),
    (lambda value: value.to_sparse(), "no ordinary tensor"),
    (lambda value: value.to("meta"), "no ordinary tensor"),
])  # fmt: skip
def test_numbers_that_are_no_weights_are_refused_by_name(tmp_path, change, words):
    network = vae.Autoencoder(channels=32, multipliers=(1, 1), res_blocks=1)
    state = network.state_dict()
    state["quant_conv.weight"] = change(state["quant_conv.weight"])
    torch.save(state, tmp_path / "vae.pt")
    with pytest.raises(ValueError, match=f"quant_conv.weight {words}|quant_conv.weight is {words}"):
        vae.read_weights(tmp_path / "vae.pt", network)
