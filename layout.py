"""Folders of weights in the layout of the library diffusers: which file in them holds the weights,
and what config.json beside it says that they are for. (`checkpoint.py` has the names of tensors.)

    file = layout.find("DiT-XL-2-256", "transformer")   # a pipeline's folder, or its transformer/

A pipeline's folder has a folder for each part: transformer/, vae/, text_encoder/, tokenizer/. The
weights of a part are one file, or several shards and an index that says which tensor is in which.
"""

import json
import re
import warnings
from pathlib import Path

import command

STEM = "diffusion_pytorch_model"  # what diffusers calls every file of weights
KINDS = ("safetensors", "bin")

# ------------------------------------------------------------------------------------------------
# Files


def pipeline(path):
    """The folder of a pipeline that `path` names, or None if it names something else."""
    return Path(path) if path is not None and (Path(path) / "transformer").is_dir() else None


def find(path, part):
    """The file of weights that `path` stands for: itself, or the one in a folder, which is that of
    a pipeline with `part` ("transformer", "vae") in it, or of the part. For shards it is the index.

    Where there are only variants (fp16), the one there is, with a warning. Raises FileNotFoundError
    if the folder holds no weights or no config.json, ValueError if several files could be meant.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    folder = path / part if (path / part).is_dir() else path
    file = weight_file(folder)
    if file is None:
        lacks = f"{STEM}.safetensors, no {STEM}.bin and no index of them"
        if folder == path and (path / "model_index.json").exists():
            lacks = f"{part}/, so it is a pipeline of another kind"
        raise FileNotFoundError(f"no weights at {folder}: the folder has no {lacks}")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, which says what its weights are "
                                f"for: name the file {file.name} to do without")
    return file


def weight_file(folder):
    """The one file of weights, or the one index, in the folder of a part; None if there is none."""
    for kind in KINDS:
        whole, index = folder / f"{STEM}.{kind}", folder / f"{STEM}.{kind}.index.json"
        found = [file for file in (whole, index) if file.is_file()]
        if found:
            return only(found)
    for kind in KINDS:
        variant = re.compile(rf"{STEM}\.(\w+\.{kind}|{kind}\.index\.\w+\.json)")
        found = [file for file in sorted(folder.iterdir()) if variant.fullmatch(file.name)]
        if found:
            file = only(found)
            warnings.warn(f"{folder} has no {STEM}.{kind}: {file.name} is read", stacklevel=3)
            return file
    return None


def only(files):
    """The one file of a list. Raises ValueError if there are more."""
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{files[0].parent} holds {names}: name the one to read")
    return files[0]


def shards(index):
    """What an index says: {path of a shard: the names of its tensors}. Raises ValueError if it is
    damaged or names a file outside its folder, FileNotFoundError for shards that are not there."""
    try:
        files = json.loads(command.read_bytes(index))["weight_map"]
        pairs = [(name, file) for name, file in files.items() if isinstance(file, str)]
        if not pairs or len(pairs) < len(files):
            raise ValueError("its weight_map is empty, or not of names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a whole index of shards: {type(error).__name__}: {error}"
                         ) from error
    names = {}
    for name, file in pairs:
        # The name as written, because in the library's cache every file is a link to elsewhere.
        if file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise ValueError(f"{index} names a shard outside its folder: {file!r}")
        names.setdefault(Path(index).with_name(file), set()).add(name)
    missing = [file.name for file in names if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names shards that are not there: {few('', missing)}")
    return names


def few(word, names):
    """Up to three names after a word, and how many more there are; '' if there are none."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{word} {', '.join(names[:3])}{more}".strip() if names else ""


# ------------------------------------------------------------------------------------------------
# What config.json says

CLASSES = {  # the class of our network: diffusers' names for it, now and before 2024
    "DiT": ("DiTTransformer2DModel", "Transformer2DModel"),
    "PixArt": ("PixArtTransformer2DModel", "Transformer2DModel"),
    "Autoencoder": ("AutoencoderKL",),
}


def config(file):
    """What config.json beside a file of weights says: a dict, empty if there is none.
    Raises ValueError if it is no such file."""
    path = Path(file).with_name("config.json")
    if not path.is_file():
        return {}
    try:
        about = json.loads(command.read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} is not diffusers' config.json: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} is not diffusers' config.json: it holds no names and values")
    return about


def described(network):
    """What diffusers' config.json says of a network like ours: a dict."""
    if type(network).__name__ == "Autoencoder":
        return dict(latent_channels=network.latent_channels, norm_num_groups=32)
    D, heads = network.x_embedder.proj.out_channels, network.blocks[0].attn.num_heads
    about = dict(
        sample_size=network.input_size, patch_size=network.patch_size,
        in_channels=network.in_channels, out_channels=network.out_channels,
        num_layers=len(network.blocks), num_attention_heads=heads, attention_head_dim=D // heads,
    )
    if type(network).__name__ == "DiT":
        return {**about, "num_embeds_ada_norm": network.num_classes}
    return {**about, "caption_channels": network.caption_channels,
            "interpolation_scale": network.pe_interpolation,
            "use_additional_conditions": network.micro_conditions}


def differences(about, network):
    """Where a config of diffusers, a dict, and our network differ, in words: a list. What the
    config leaves out, or leaves to be chosen (None), is no difference."""
    kind = about.get("_class_name")
    if kind is not None and kind not in CLASSES[type(network).__name__]:
        return [f"it is a {kind}"]
    return [f"{key} is {about[key]}, not {value}" for key, value in described(network).items()
            if about.get(key) is not None and about[key] != value]


def check_config(file, network):
    """Raises ValueError if config.json beside a file of weights says that they are for another
    network. Weights of the same shapes can differ in the resolution, the heads or the places of
    the tokens: with the wrong ones every picture would be wrong, without a word."""
    about = config(file)
    size, side = about.get("sample_size"), getattr(network, "input_size", None)
    problems = differences(about, network)
    if side is not None and size not in (None, side) and problems[0].startswith("sample_size"):
        raise ValueError(f"{file} is for sides of {size}, by its config.json, this network for "
                         f"{side}: it was trained at another resolution")
    if problems:
        raise ValueError(f"{Path(file).with_name('config.json')} does not fit this network: "
                         + few("", problems))
