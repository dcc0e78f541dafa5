"""Folders of weights as diffusers writes them, whole and in shards, and what is wrong with them."""

import json
import os
import shutil
import warnings

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from safetensors.torch import load_file, save_file

import checkpoint
import dit
import layout
import models
import pixart
import vae

from .small import tiny_dit
from .test_dit import diffusers_dit
from .test_pixart import diffusers_pixart, tiny_pixart

WHOLE = layout.STEM + ".safetensors"
INDEX = WHOLE + ".index.json"


def save(folder, other=None, size="40KB", **flags):
    """Writes a network of diffusers, by default the tiny DiT, in shards. -> the folder."""
    (other or diffusers_dit(tiny_dit(1))).save_pretrained(folder, max_shard_size=size, **flags)
    return folder


def equal(one, other):
    """Whether two state dicts are the same, bitwise; NaN is equal to itself."""
    return one.keys() == other.keys() and all(
        torch.equal(one[key].nan_to_num(7), other[key].nan_to_num(7)) for key in one)


@pytest.fixture
def folder(tmp_path):
    """The tiny DiT in a folder, in shards."""
    return save(tmp_path / "transformer")


def edit(path, change):
    """Reads a JSON file, has `change` change it, writes it."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("size", ["10GB", "40KB"], ids=["whole", "shards"])
@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_a_folder_holds_the_same_weights_whole_and_in_shards(tmp_path, kind, size, safe):
    network, other, make = {
        "dit": (tiny_dit(1), tiny_dit(2), diffusers_dit),
        "pixart": (tiny_pixart(1), tiny_pixart(2), diffusers_pixart)}[kind]
    read = {"dit": dit.read_weights, "pixart": pixart.read_weights}[kind]
    save(tmp_path / "w", make(network), size, safe_serialization=safe)
    files = [file for file in (tmp_path / "w").iterdir() if file.name != "config.json"]
    assert (len(files) > 3) == (size == "40KB")
    single = tmp_path / "single.safetensors"
    save_file(checkpoint.to_diffusers(network.state_dict(), network), single)
    expected = read(single, other)
    assert equal(read(tmp_path / "w", other), expected)
    index = next((file for file in files if file.suffix == ".json"), files[0])
    assert equal(read(index, other), expected)  # named itself
    other.load_state_dict(expected)
    assert torch.equal(other.blocks[1].attn.qkv.weight, network.blocks[1].attn.qkv.weight)


def test_a_sharded_autoencoder(tmp_path):
    sizes = dict(channels=32, multipliers=(1, 1), res_blocks=1)
    network, other = vae.Autoencoder(**sizes), vae.Autoencoder(**sizes)
    theirs = AutoencoderKL(block_out_channels=(32, 32), layers_per_block=1,
                           down_block_types=["DownEncoderBlock2D"] * 2,
                           up_block_types=["UpDecoderBlock2D"] * 2)
    theirs.load_state_dict(network.state_dict())
    save(tmp_path / "pipe" / "vae", theirs, "200KB")
    for path in (tmp_path / "pipe", tmp_path / "pipe" / "vae"):
        assert equal(vae.read_weights(path, other), network.state_dict())
    edit(tmp_path / "pipe" / "vae" / "config.json", lambda c: c.update(norm_num_groups=16))
    with pytest.raises(ValueError, match="config.json does not fit .* norm_num_groups is 16, not"):
        vae.read_weights(tmp_path / "pipe", other)
    with pytest.raises(ValueError, match="config.json does not fit this network: it is a DiTTr"):
        vae.read_weights(save(tmp_path / "transformer"), other)


def test_links_as_in_the_librarys_cache_are_followed(folder, tmp_path):
    """There every file of a snapshot is a link to blobs/, which is outside its folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "transformer"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    assert equal(dit.read_weights(snapshot, tiny_dit()), dit.read_weights(folder, tiny_dit()))


@pytest.mark.parametrize("size", ["10GB", "40KB"], ids=["whole", "shards"])
def test_a_variant_is_read_where_there_is_no_other_and_told(tmp_path, size):
    network = tiny_dit(1)
    half = diffusers_dit(network).half()
    folder = save(tmp_path / "w", half, size, variant="fp16")
    with pytest.warns(UserWarning, match=rf"w has no {WHOLE}: \S*fp16\S* is read"):
        read = dit.read_weights(folder, tiny_dit(2))
    assert equal({key: value.float() for key, value in read.items() if key != "pos_embed"},
                 {key: value.half().float() for key, value in network.state_dict().items()
                  if key != "pos_embed"})
    save(folder, diffusers_dit(network))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # now the plain one is there
        assert equal(dit.read_weights(folder, tiny_dit(2)), network.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "old.pt", "folder"])
def test_files_in_16_bits_and_of_old_torch(tmp_path, name, dtype):
    """Loaded as float32, the numbers are those of the file."""
    network, other = tiny_dit(1), tiny_dit(2)
    state = {key: value.to(dtype) for key, value in network.state_dict().items()}
    path = tmp_path / name
    if name == "folder":
        save(path, diffusers_dit(network).to(dtype))
        state["pos_embed"] = network.pos_embed
    elif name == "w.safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name != "old.pt")
    other.load_state_dict(dit.read_weights(path, other))
    assert {value.dtype for value in other.state_dict().values()} == {torch.float32}
    assert equal(other.state_dict(), {key: value.float() for key, value in state.items()})


# ------------------------------------------------------------------------------------------------
# A whole pipeline


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A pipeline of diffusers like DiT-XL/2 at 256, but tiny, and its autoencoder."""
    sizes = dict(hidden_size=32, depth=2, num_heads=2, patch_size=8, input_size=32, in_channels=4,
                 num_classes=1000)
    torch.manual_seed(0)
    decoder = AutoencoderKL(block_out_channels=(32, 32), layers_per_block=1,
                            down_block_types=["DownEncoderBlock2D"] * 2,
                            up_block_types=["UpDecoderBlock2D"] * 2)
    path = tmp_path_factory.mktemp("pipe") / "DiT-XL-2-256"
    DiTPipeline(diffusers_dit(tiny_dit(3, **sizes)), decoder, DDIMScheduler()).save_pretrained(path)
    return path, sizes, decoder


@pytest.fixture
def tiny_names(pipe, monkeypatch):
    """`dit256` and the autoencoder, made as small as those of `pipe`."""
    names = ("hidden_size", "depth", "num_heads", "patch_size")
    monkeypatch.setitem(dit.SIZES, "XL/2", {name: pipe[1][name] for name in names})
    make = vae.Autoencoder
    monkeypatch.setattr(vae, "Autoencoder", lambda: make(32, (1, 1), res_blocks=1))
    monkeypatch.setattr(models, "hugging_face", lambda *args: pytest.fail(f"asked for {args}"))


def test_a_pipeline_brings_its_own_autoencoder(pipe, tiny_names, tmp_path):
    """Its transformer/ alone brings none. The same weights have the same fingerprint."""
    path, sizes, decoder = pipe
    model = models.load("dit256", str(path), "cpu")
    assert equal(model.network.state_dict(), tiny_dit(3, **sizes).state_dict())
    assert equal(models.load_autoencoder(model).state_dict(), decoder.state_dict())
    alone = models.load("dit256", path / "transformer", "cpu")
    assert alone.fingerprint() == model.fingerprint() and alone.part("vae") is None
    for given in (path, path / "vae", path / "vae" / WHOLE):
        assert equal(models.load_autoencoder(alone, given).state_dict(), decoder.state_dict())
    whole = shutil.copytree(path, tmp_path / "copy")
    edit(whole / "vae" / "config.json", lambda config: config.update(scaling_factor=0.13025))
    with pytest.raises(ValueError, match="latents at scale 0.13025, by its config.json; dit256 den"
                                         "oises latents at 0.18215"):
        models.load_autoencoder(models.load("dit256", whole, "cpu"))
    shutil.rmtree(whole / "vae")
    assert models.load("dit256", whole, "cpu").part("vae") is None


def test_a_pipeline_of_another_kind(pipe, tiny_names, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    shutil.copytree(pipe[0] / "transformer", tmp_path / "unet")
    with pytest.raises(FileNotFoundError, match="no transformer/, so it is a pipeline of another"):
        models.load("dit256", tmp_path, "cpu")
    (tmp_path / "unet").rename(tmp_path / "transformer")
    config = tmp_path / "transformer" / "config.json"
    edit(config, lambda config: config.update(_class_name="FluxTransformer2DModel"))
    with pytest.raises(ValueError, match="does not fit this network: it is a FluxTransformer2DMod"):
        models.load("dit256", tmp_path, "cpu")
    with pytest.raises(ValueError, match="sides of 32, by its config.json, this network for 64"):
        models.load("dit512", pipe[0], "cpu")


# ------------------------------------------------------------------------------------------------
# What is refused, each in one line


def refused(path, words, kind=ValueError):
    with pytest.raises(kind, match=words) as caught:
        dit.read_weights(path, tiny_dit())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("change, words", [
    (dict(_class_name="UNet2DConditionModel"), "it is a UNet2DConditionModel"),
    (dict(_class_name="PixArtTransformer2DModel"), "it is a PixArtTransformer2DModel"),
    (dict(sample_size=16), "for sides of 16, by its config.json, this network for 8"),
    (dict(num_attention_heads=4, attention_head_dim=8), "num_attention_heads is 4, not 2, att"),
    (dict(num_layers=28), "num_layers is 28, not 3"),
    (dict(num_embeds_ada_norm=1000), "num_embeds_ada_norm is 1000, not 5"),
    (dict(patch_size="2"), "patch_size is 2, not 2"),
])  # fmt: skip
def test_a_config_that_does_not_fit(folder, change, words):
    """The heads of attention cannot be told from the shapes of the weights."""
    dit.read_weights(folder, tiny_dit())
    edit(folder / "config.json", lambda config: config.update(change))
    refused(folder, words)
    refused(folder / INDEX, words)


def test_the_places_of_the_tokens_are_part_of_the_config(tmp_path):
    """PixArt at other scales has the same shapes."""
    folder = save(tmp_path / "w", diffusers_pixart(tiny_pixart(pe_interpolation=2.0)))
    with pytest.raises(ValueError, match="interpolation_scale is 2.0, not 1.0"):
        pixart.read_weights(folder, tiny_pixart())
    edit(folder / "config.json", lambda config: config.update(interpolation_scale=None))
    pixart.read_weights(folder, tiny_pixart())


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "\x00"])
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json is not diffusers' config.json")


def test_a_folder_without_weights_or_config(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "DiT-XL-2-256x256.pt").touch()
    refused(tmp_path / "empty", f"no weights at .*empty: the folder has no {WHOLE}, no "
                                f"{layout.STEM}.bin and no index", FileNotFoundError)
    (folder / "config.json").unlink()
    refused(folder, f"has no config.json.*: name the file {INDEX} to do", FileNotFoundError)
    dit.read_weights(folder / INDEX, tiny_dit())


def test_a_folder_with_two_choices(folder, tmp_path):
    save_file({"x": torch.ones(1)}, folder / WHOLE)
    refused(folder, f"holds {WHOLE}, {INDEX}: name the one to read")
    variants = save(tmp_path / "w", size="10GB", variant="fp16")
    shutil.copy(variants / f"{layout.STEM}.fp16.safetensors",
                variants / f"{layout.STEM}.non_ema.safetensors")
    refused(variants, r"holds \S*fp16.safetensors, \S*non_ema.safetensors: name the one")


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}',
    '{"weight_map": null}', "\xff\xfe",
])  # fmt: skip
def test_an_index_that_is_damaged(folder, text):
    (folder / INDEX).write_bytes(text.encode("latin-1"))
    refused(folder, "is not a whole index of shards")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "",
                                  "a\\b.safetensors", "a\0"])
def test_an_index_that_leads_out_of_its_folder(folder, name):
    shutil.copy(next(folder.glob("*-of-*")), folder.parent / "x.safetensors")
    edit(folder / INDEX, lambda index: index["weight_map"].update({"proj_out_1.bias": name}))
    refused(folder, "index.json names a shard outside its folder")


def test_shards_that_are_not_as_the_index_says(folder):
    first, second, *_ = sorted(folder.glob("*-of-*"))
    states = load_file(first), load_file(second)
    key = sorted(states[0])[0]
    save_file({**states[1], key: states[0][key]}, second)
    refused(folder, f"{second.name} holds {key}, which another shard holds too")
    save_file({**states[1], "extra": torch.ones(1)}, second)
    refused(folder, f"{second.name} is not the shard that {INDEX} names: it has also extra")
    gone = sorted(states[1])[0]
    save_file({name: value for name, value in states[1].items() if name != gone}, second)
    refused(folder, f"{second.name} is not the shard that {INDEX} names: it has no {gone}")
    second.write_bytes(second.read_bytes()[:100])
    refused(folder, f"{second.name} is not a whole checkpoint")
    second.unlink()
    refused(folder, f"index.json names shards that are not there: {second.name}", FileNotFoundError)


def test_a_shard_of_no_names(tmp_path):
    folder = save(tmp_path / "w", safe_serialization=False)
    torch.save([torch.ones(1)], sorted(folder.glob("*-of-*"))[0])
    refused(folder, "holds no state dict")
