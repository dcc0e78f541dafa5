"""Plain data from one process to another: None, bools, numbers, text, lists, dicts and tensors.

A message is JSON and, after it, the bytes of the tensors. What is read is made here from these:
no object of the sender's, and no code. Tuples arrive as lists, numpy's arrays as tensors.
"""

import io
import json
import struct
import sys

DTYPES = {"bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"}
LARGEST = 10_000_000, 100_000_000  # bytes of a message's JSON, and of its tensors
HEAD = struct.Struct(">QQ")  # the bytes of the JSON, and those of the tensors


def encode(value, parts):
    """A value as JSON can hold it. Appends the bytes of its tensors to the list `parts`. Raises
    TypeError for anything but plain data."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [encode(item, parts) for item in value]
    if isinstance(value, dict):
        return {"dict": {str(key): encode(item, parts) for key, item in value.items()}}
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    grad = False
    if torch is not None and isinstance(value, torch.Tensor):
        grad = bool(value.requires_grad)
        value = value.detach().cpu().numpy()
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        if value.dtype.name in DTYPES:
            parts.append(numpy.ascontiguousarray(value).tobytes())
            return {"tensor": value.dtype.name, "shape": list(value.shape), "grad": grad,
                    "bytes": len(parts[-1])}
        raise TypeError(f"an array of {value.dtype}, not of numbers")
    raise TypeError(f"a {type(value).__name__}, which is no number, text, list, dict or tensor")


def decode(tree, body):
    """What `encode` was given. `body` is a binary stream of the tensors' bytes, in their order."""
    if isinstance(tree, list):
        return [decode(item, body) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "dict" in tree:
        return {key: decode(item, body) for key, item in tree["dict"].items()}
    import numpy
    import torch

    if tree["tensor"] not in DTYPES:
        raise ValueError(f"no tensor has the type {tree['tensor']}")
    numbers = numpy.frombuffer(body.read(int(tree["bytes"])), dtype=tree["tensor"])
    tensor = torch.from_numpy(numbers.reshape(tree["shape"]).copy())
    return tensor.requires_grad_(tree["grad"] is True and tensor.is_floating_point())


def write(stream, value):
    """Writes one message to a binary stream. Raises TypeError, and writes nothing, if the value is
    not plain."""
    parts = []
    text = json.dumps(encode(value, parts)).encode()
    stream.write(HEAD.pack(len(text), sum(map(len, parts))) + text + b"".join(parts))
    stream.flush()


def read(stream):
    """Reads one message; raises EOFError at the end of the stream, ValueError if it is no message.
    """
    sizes = HEAD.unpack(exactly(stream, HEAD.size))
    if any(size > most for size, most in zip(sizes, LARGEST, strict=True)):
        found, most = (f"{text:,} bytes and {tensors:,} of tensors"
                       for text, tensors in (sizes, LARGEST))
        raise ValueError(f"a message of {found}: {most} at most")
    text, body = (exactly(stream, size) for size in sizes)
    try:
        return decode(json.loads(text), io.BytesIO(body))
    except Exception as error:  # it may be any bytes
        raise ValueError("not a message of plain data") from error


def exactly(stream, size):
    """`size` bytes of a stream. Raises EOFError if it ends before."""
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def copy(value):
    """The value as a reader gets it. Raises TypeError if it is not plain."""
    parts = []
    tree = encode(value, parts)
    return decode(json.loads(json.dumps(tree)), io.BytesIO(b"".join(parts)))
