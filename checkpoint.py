"""A file of weights becomes a network's: read without running code from it, and fitted strictly.

    state = checkpoint.read("DiT-XL-2-256x256.pt")
    network.load_state_dict(checkpoint.fitted(state, network, "DiT-XL-2-256x256.pt"))
"""

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
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file makes the unpickler fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a whole checkpoint: {reason}") from error
    for key in ("ema", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no state dict: not bare, under `ema` or `state_dict`")
    return state


def fitted(state, network, path):
    """`state`, if it has exactly the names and shapes that `network` has. Raises ValueError that
    names every missing, unexpected and misshapen key; `path` is for the message."""
    expected = network.state_dict()
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
    return state
