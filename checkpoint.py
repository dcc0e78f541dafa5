"""Files of weights, and the official codes' router files, read without running code from them.

    state, file = checkpoint.read_transformer("DiT-XL-2-256x256.pt")   # or a folder of diffusers
    network.load_state_dict(checkpoint.fitted(state, network, file))
    logits, about = checkpoint.read_official_router("ckpt.pt")   # router.load does this for a .pt

Weights fit strictly: every name and shape is the network's own, after the translation of the names
that the library diffusers has for them.
"""

import argparse
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import command
import layout
from layout import few

# ------------------------------------------------------------------------------------------------
# Weights


AVERAGED = ("ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model")
LAST = ("state_dict", "model", "module")  # of the last training step


def read(path):
    """The tensors by name of a `.safetensors` file, of a file that torch saved (`.pt`, `.pth`,
    `.bin`, `.ckpt`), or of all the shards of an index (`.json`). What torch saved may be the state
    dict itself, or hold it under one of AVERAGED or LAST: an average of the weights is better than
    the last ones. What wrappers put before every name is taken off.

    Raises FileNotFoundError, or ValueError if the file is damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".json":
        return without_prefix(read_shards(path))
    state = read_file(path)
    held = [key for key in (*AVERAGED, *LAST) if isinstance(state, dict)
            and isinstance(state.get(key), dict)]
    if held and held[0] in AVERAGED and held[-1] in LAST:
        tell_of_average(path, held[0])
    state = state[held[0]] if held else state
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no state dict: not bare, under `ema`, `state_dict` or "
                         "`model`")
    return without_prefix({str(key): value for key, value in state.items()})


def read_file(path):
    """What one file holds, whatever it is. Raises ValueError if it is damaged."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mmap = zipfile.is_zipfile(path)  # torch cannot map the format it had before 1.6
        with torch.serialization.safe_globals([argparse.Namespace]):  # the flags, as in DiT's
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not a whole checkpoint, or holds objects that only running "
                         f"code could read{unsafe_names(path)}: use a .safetensors file"
                         ) from error
    except Exception as error:  # a damaged file fails in many ways
        reason = command.one_line(error) or type(error).__name__
        raise ValueError(f"{path} is not a whole checkpoint: {reason}") from error


def read_shards(index):
    """The tensors of all shards, by name. Raises ValueError if a shard holds other tensors than
    the index says, and as `read` and `layout.shards` do."""
    whole = {}
    for file, names in layout.shards(index).items():
        state = read_file(file)
        if not isinstance(state, dict):
            raise ValueError(f"{file} holds no state dict")
        twice = sorted(whole.keys() & state.keys())
        if twice:
            raise ValueError(f"{file} holds {few('', twice)}, which another shard holds too")
        problems = [few("has no", sorted(names - state.keys())),
                    few("has also", sorted(state.keys() - names))]
        if any(problems):
            raise ValueError(f"{file} is not the shard that {Path(index).name} names: it "
                             + ", it ".join(filter(None, problems)))
        whole |= state
    return whole


def read_transformer(path):
    """The weights of a DiT or PixArt, from a file (see `read`) or a folder (see `layout.find`).
    Averaged weights are also found by what stands before their names, beside the last ones.
    -> the tensors by name, and the file that they are from."""
    file = layout.find(path, "transformer")
    state = read(file)
    for prefix in ("model_ema.", "ema_model.", "ema."):
        found = [name.startswith(prefix) for name in state]
        if any(found):
            if not all(found):
                tell_of_average(file, prefix)
            return averaged(state, prefix), file
    return state, file


def averaged(state, prefix):
    """Of a state dict with averaged weights under `prefix` and the last ones beside them, those
    averaged. Some trainers leave the dots out of their names, and take no average of what is not
    trained."""
    last = {name.removeprefix("model."): value for name, value in state.items()
            if not name.startswith(prefix)}
    dotted = {name.replace(".", ""): name for name in last}
    average = {name[len(prefix):]: value for name, value in state.items()
               if name.startswith(prefix)}
    average = without_prefix({dotted.get(name, name): value for name, value in average.items()
                              if name not in ("decay", "num_updates", "initted", "step")})
    fixed = {name: value for name, value in without_prefix(last).items()
             if name in ("pos_embed", "y_embedder.y_embedding")}
    return {**fixed, **average}


def tell_of_average(path, name):
    warnings.warn(f"{path} holds averaged weights, `{name}`, beside the last ones: the averaged "
                  "are used", stacklevel=3)


def unsafe_names(path):
    """What a file names beyond tensors and plain values, in brackets, or ''."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # damaged, or in the format from before torch 1.6
        return ""
    return f" ({', '.join(names[:3])})" if names else ""


# DistributedDataParallel's, torch.compile's, ComfyUI's, and attributes that people give a network
PREFIXES = ("module.", "_orig_mod.", "model.diffusion_model.", "diffusion_model.", "model.", "net.")


def without_prefix(state):
    """A state dict without what stands before every one of its names, however often."""
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return without_prefix({name[len(prefix):]: value for name, value in state.items()})
    return state


def fitted(state, network, path):
    """`state`, read from `path`, with exactly the network's names and shapes. The layout of
    diffusers is translated; what it lacks is not in the result (`dit.read_weights` and
    `pixart.read_weights` supply it).

    Raises ValueError that names the first missing, unexpected and misshapen keys, or what is no
    weight: a whole number, NaN, a tensor without data; and for weights of another resolution.
    """
    expected = network.state_dict()
    diffusers = "pos_embed.proj.weight" in state and type(network).__name__ in DIFFUSERS
    if diffusers:
        expected = to_diffusers(expected, network)
    check_resolution(state, network, path)
    # Some files hold the fixed position embedding, and some networks compute it.
    unused = {"pos_embed", "pos_embed.pos_embed"} - expected.keys()
    state = {key: value for key, value in state.items() if key not in unused}
    shapes = {key: tuple(getattr(value, "shape", ())) for key, value in state.items()}
    problems = [
        few("missing", [key for key in expected if key not in state]),
        few("unexpected", [key for key in state if key not in expected]),
        few("", [f"{key} is {shapes[key]}, not {tuple(expected[key].shape)}" for key in expected
                 if key in state and shapes[key] != expected[key].shape]),
    ]
    if any(problems):
        raise ValueError(f"{path} does not fit this network: " + "; ".join(filter(None, problems)))
    for key in expected:
        check_weight(state[key], f"{path}: {key}")
    return from_diffusers(state, network) if diffusers else state


def check_weight(value, name):
    """Raises ValueError for what cannot be a weight."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        raise ValueError(f"{name} is no ordinary tensor with data")
    if not value.is_floating_point():
        raise ValueError(f"{name} is {str(value.dtype).removeprefix('torch.')}, not floating point:"
                         " quantised weights need their scales, which are not read")
    if value.dtype.itemsize == 1 and value.float().abs().max() == torch.finfo(value.dtype).max:
        # Weights that were only rounded to float8 are far from its largest number.
        raise ValueError(f"{name} fills the range of {str(value.dtype).removeprefix('torch.')}: it "
                         "was scaled to it, and its scale is not read")
    if not value.float().isfinite().all() and not name.endswith("y_embedding"):
        raise ValueError(f"{name} holds NaN or infinite numbers: its training had diverged, or the "
                         "file is damaged")


def check_resolution(state, network, path):
    """Raises ValueError if a file says that it is for another resolution. The official files of a
    family differ in nothing else: with the wrong one every picture would be wrong, without a word.
    What says it is a position embedding in the file, or diffusers' config.json beside it."""
    side = getattr(network, "input_size", None)
    if side is None:
        return
    tokens = (side // network.patch_size) ** 2 + getattr(network, "extras", 0)
    for key in ("pos_embed", "pos_embed.pos_embed"):
        shape = tuple(getattr(state.get(key), "shape", ()))
        if len(shape) == 3 and shape[1] != tokens:
            raise ValueError(f"{path} is for pictures of {shape[1]} tokens, this network for "
                             f"{tokens}: it was trained at another resolution")
    known = type(network).__name__ in DIFFUSERS
    if known and ("pos_embed.proj.weight" in state or Path(path).name.startswith(layout.STEM)):
        layout.check_config(path, network)


# ------------------------------------------------------------------------------------------------
# The layout of diffusers

# Its names -> ours. Both may end in .weight or .bias; {i} counts the
# blocks. A triple (ours, j, n) is the j-th of n equal parts of our tensor. In a DiT of diffusers
# every block repeats the embedders of the timestep and the label.
DIT = {
    "pos_embed.proj": "x_embedder.proj",
    "transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
    "transformer_blocks.{i}.norm1.linear": "blocks.{i}.adaLN_modulation.1",
    "transformer_blocks.{i}.attn1.to_q": ("blocks.{i}.attn.qkv", 0, 3),
    "transformer_blocks.{i}.attn1.to_k": ("blocks.{i}.attn.qkv", 1, 3),
    "transformer_blocks.{i}.attn1.to_v": ("blocks.{i}.attn.qkv", 2, 3),
    "transformer_blocks.{i}.attn1.to_out.0": "blocks.{i}.attn.proj",
    "transformer_blocks.{i}.ff.net.0.proj": "blocks.{i}.mlp.fc1",
    "transformer_blocks.{i}.ff.net.2": "blocks.{i}.mlp.fc2",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
PIXART = {
    "pos_embed.proj": "x_embedder.proj",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.emb.resolution_embedder.linear_1": "csize_embedder.mlp.0",
    "adaln_single.emb.resolution_embedder.linear_2": "csize_embedder.mlp.2",
    "adaln_single.emb.aspect_ratio_embedder.linear_1": "ar_embedder.mlp.0",
    "adaln_single.emb.aspect_ratio_embedder.linear_2": "ar_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "transformer_blocks.{i}.scale_shift_table": "blocks.{i}.scale_shift_table",
    "transformer_blocks.{i}.attn1.to_q": ("blocks.{i}.attn.qkv", 0, 3),
    "transformer_blocks.{i}.attn1.to_k": ("blocks.{i}.attn.qkv", 1, 3),
    "transformer_blocks.{i}.attn1.to_v": ("blocks.{i}.attn.qkv", 2, 3),
    "transformer_blocks.{i}.attn1.to_out.0": "blocks.{i}.attn.proj",
    "transformer_blocks.{i}.attn2.to_q": "blocks.{i}.cross_attn.q_linear",
    "transformer_blocks.{i}.attn2.to_k": ("blocks.{i}.cross_attn.kv_linear", 0, 2),
    "transformer_blocks.{i}.attn2.to_v": ("blocks.{i}.cross_attn.kv_linear", 1, 2),
    "transformer_blocks.{i}.attn2.to_out.0": "blocks.{i}.cross_attn.proj",
    "transformer_blocks.{i}.ff.net.0.proj": "blocks.{i}.mlp.fc1",
    "transformer_blocks.{i}.ff.net.2": "blocks.{i}.mlp.fc2",
    "proj_out": "final_layer.linear",
    "scale_shift_table": "final_layer.scale_shift_table",
}
DIFFUSERS = {"DiT": DIT, "PixArt": PIXART}  # by the class of our network


def diffusers_names(network):
    """The network's table, written out: {its name: (our name, j, n)}."""
    ours, names = network.state_dict().keys(), {}
    for new, old in DIFFUSERS[type(network).__name__].items():
        old, j, n = old if isinstance(old, tuple) else (old, 0, 1)
        for i in range(len(network.blocks)):
            for end in ("", ".weight", ".bias"):
                if (old + end).format(i=i) in ours:
                    names[(new + end).format(i=i)] = (old + end).format(i=i), j, n
    return names


def to_diffusers(state, network):
    """A state dict of the network -> the same weights in the layout of diffusers."""
    names = diffusers_names(network)
    return {new: state[old].chunk(n)[j].clone() for new, (old, j, n) in names.items()}


def from_diffusers(state, network):
    """A whole state dict in the layout of diffusers -> the network's names, without the tensors
    that the layout lacks. Raises ValueError if a repeated tensor is not the same in every block."""
    parts = {}
    for new, (old, j, n) in diffusers_names(network).items():
        known = parts.setdefault(old, [None] * n)
        if known[j] is not None and not torch.equal(known[j], state[new]):
            raise ValueError(f"{new} is not the same in every block")
        known[j] = state[new]
    return {old: torch.cat(part) for old, part in parts.items()}


# ------------------------------------------------------------------------------------------------
# The official codes' router files
#
# HarmoniCa and Learning-to-Cache save a dict: `routers`, the rows "0.prob", "1.prob", ... of K
# logits each; `opt`, the optimiser; `args`, the flags as an argparse.Namespace. Their rows are
# numbered by respaced timestep index, so the last one is the first step executed.
#
# The two differ in one rule. Learning-to-Cache trains the even rows only: its odd rows stay as they
# were drawn, and steps of odd index always compute. HarmoniCa trains all rows but the last, which
# it sets to 5.
#
# Learning-to-Cache's routers for U-ViT are rows alone, and otherwise numbered: see `uvit_rows`.

HIGHEST = 5.0  # what HarmoniCa sets the last row's logits to
ALWAYS = 100.0  # a logit whose score is 1 in float32, above every tau
UNNAMED = "an unnamed model"
OFFICIAL_MODELS = {("DiT-XL/2", 256): "dit256", ("DiT-XL/2", 512): "dit512"}


def read_official_router(path):
    """An official `.pt` -> logits (T, K) in executed order, and a dict of strings, `about`, as in
    router.RouterFile. Nothing is unpickled but tensors, plain containers and argparse.Namespace.
    Raises ValueError."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler fail in many ways
        raise ValueError(
            f"{path} is not a router file: it is damaged, or it holds pickled objects other than "
            "tensors and an argparse.Namespace, which are not loaded, as they could run any code"
        ) from error
    try:
        if "0.prob" in content:
            return uvit_rows(content), ABOUT_UVIT
        rows, args = content["routers"], content.get("args")
        logits = torch.stack([rows[f"{i}.prob"] for i in reversed(range(len(rows)))])
        if not logits.is_floating_point():
            raise ValueError(f"its rows are {logits.dtype}")
        logits = logits.float()
        if isinstance(args, dict):  # written by `export_router`
            return logits, {str(key): str(value) for key, value in args.items()}
        args = {} if args is None else vars(args)
        learning_to_cache = "lambda_c" not in args and not (logits[0] == HIGHEST).all()
        if learning_to_cache:
            odd = torch.arange(len(logits)).flip(0) % 2 == 1  # by respaced index
            logits[odd] = ALWAYS
        return logits, about_official(args, learning_to_cache)
    except Exception as error:  # whatever else a dict, its rows and its flags may be
        raise ValueError(
            f"{path} is not a router file of HarmoniCa or Learning-to-Cache: it has no "
            "`routers` with rows 0.prob, 1.prob, ... of equal length (for U-ViT an even number of "
            "them, without `routers`)"
        ) from error


# Published with tau 0.9, and trained without guidance (on real images).
ABOUT_UVIT = {"model": UNNAMED, "sampler": "dpm-solver-2s", "guidance": "1.0", "tau": "0.9",
              "objective": "learning-to-cache"}


def uvit_rows(rows):
    """Learning-to-Cache's T rows for U-ViT -> logits (T, K) in executed order. Row s, counted from
    the noisiest, is that of step s of order 2, so of evaluation 2 s, which may reuse what the
    evaluation in the middle of the step before has computed. All else computes: step 0, and every
    middle. The rows from T / 2 on belong to no step, and stay as they were drawn."""
    rows = torch.stack([rows[f"{i}.prob"] for i in range(len(rows))])
    if not rows.is_floating_point() or len(rows) % 2:
        raise ValueError(f"its {len(rows)} rows are {rows.dtype}")
    rows = rows.float()
    logits = torch.full_like(rows, ALWAYS)
    logits[2::2] = rows[1 : len(rows) // 2]
    return logits


def about_official(args, learning_to_cache):
    """The official training code's flags, a dict, by our names. Flags that are missing get the
    published values: DDIM; tau 0.1 (0.9 for Learning-to-Cache at 512 x 512); guidance 1.5 for
    HarmoniCa, 1 (none) for Learning-to-Cache."""
    model, size, tau = (args.get(key) for key in ("model", "image_size", "ste_threshold"))
    if tau is None:
        tau = 0.9 if learning_to_cache and size == 512 else 0.1
    about = {
        "model": OFFICIAL_MODELS.get((model, size), f"{model} at {size}") if model else UNNAMED,
        "sampler": "ddim",
        "guidance": args.get("cfg_scale", 1.0 if learning_to_cache else 1.5),
        "tau": tau,
        "objective": "learning-to-cache" if learning_to_cache else "iepo",
    }
    if "l1" in args:
        about["beta"] = args["l1"]
    return {key: str(value) for key, value in about.items()}


def export_router(path, file):
    """Writes a router (a router.RouterFile) as a `.pt` that the official sampling code loads.

    HarmoniCa's code then takes the same decisions. Learning-to-Cache's computes all of each step of
    odd index, whatever the router says. `args` holds our settings as a plain dict: with a Namespace
    there, torch from 2.6 on refuses the file when the official code loads it.
    """
    rows = {f"{i}.prob": row for i, row in enumerate(file.logits.flip(0))}
    command.save_state(path, {"routers": rows, "args": file.about})
