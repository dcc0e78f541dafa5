"""A file of weights becomes a network's: read without running code from it, and fitted strictly,
whether it has the official names or those of the library diffusers.

    state = checkpoint.read("DiT-XL-2-256x256.pt")
    network.load_state_dict(checkpoint.fitted(state, network, "DiT-XL-2-256x256.pt"))
"""

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file


def read(path):
    """The tensors by name of a `.safetensors` file or of one that torch saved (`.pt`, `.pth`,
    `.bin`, `.ckpt`), where a state dict is bare or under `ema` or `state_dict`.

    Raises FileNotFoundError, or ValueError if the file is damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            mmap = zipfile.is_zipfile(path)  # the format from before torch 1.6 is none
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not a whole checkpoint, or holds objects that only running "
                         "code could read: use a .safetensors file") from error
    except Exception as error:  # a damaged file fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a whole checkpoint: {reason}") from error
    for key in ("ema", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no state dict: not bare, under `ema` or `state_dict`")
    return {str(key): value for key, value in state.items()}


def fitted(state, network, path):
    """`state`, read from `path`, with exactly the names and shapes that `network` has. From the
    layout of diffusers it is converted; fixed position embeddings, which only some files have, may
    be left over. Raises ValueError that names every missing, unexpected and misshapen key."""
    expected = network.state_dict()
    diffusers = "pos_embed.proj.weight" in state
    if diffusers:
        expected = to_diffusers(expected, network)
    unused = {"pos_embed", "pos_embed.pos_embed"} - expected.keys()
    state = {key: value for key, value in state.items() if key not in unused}
    shapes = {key: tuple(getattr(value, "shape", ())) for key, value in state.items()}
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    problems += [
        f"{key} is {shapes[key]}, not {tuple(expected[key].shape)}"
        for key in expected
        if key in state and shapes[key] != expected[key].shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit this network: " + "; ".join(problems))
    return from_diffusers(state, network) if diffusers else state


# ------------------------------------------------------------------------------------------------
# The layout of diffusers, for a network that has a table of its names, `network.diffusers`, and
# `not_in_diffusers()`, the tensors that the layout lacks


def diffusers_names(network):
    """The network's table, written out: {its name: (our name, j, n)}."""
    ours, names = network.state_dict().keys(), {}
    for new, old in network.diffusers.items():
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
    """A whole state dict in the layout of diffusers -> the network's own. What that layout does not
    have, the network supplies. Raises ValueError if what it repeats is not equal everywhere."""
    parts = {}
    for new, (old, j, n) in diffusers_names(network).items():
        known = parts.setdefault(old, [None] * n)
        if known[j] is not None and not torch.equal(known[j], state[new]):
            raise ValueError(f"{new} is not the same in every block")
        known[j] = state[new]
    return {**network.not_in_diffusers(), **{old: torch.cat(part) for old, part in parts.items()}}
