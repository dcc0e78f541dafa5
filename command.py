"""What every command shares: files that are written, or downloaded, whole or not at all; a user's
mistake that ends in one clear line and exit code 2; and the flags that mean the same everywhere."""

import argparse
import contextlib
import ctypes
import io
import os
import sys
import urllib.error
import urllib.request
import warnings
from http.client import HTTPException
from pathlib import Path

import torch


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as temporary:` write to `temporary`, and it replaces `path` at the end,
    whole. If anything goes wrong, `path` stays as it was and nothing is left beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a file is only replaced at once within one file system. With the
    # same suffix, because numpy and Pillow go by it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_state(path, state):
    """Saves a tree of dicts, lists, numbers and tensors, to be read by `load_state`."""
    buffer = io.BytesIO()  # torch.save to a full disk raises RuntimeError, write_bytes OSError
    torch.save(state, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_state(path):
    """Reads what `save_state` wrote; no code from the file is run. Raises ValueError if the file is
    truncated or something else, FileNotFoundError if it is not there."""
    data = Path(path).read_bytes()  # a file that is not there must not look like a damaged one
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a whole state file: {reason}") from error


def save_image(path, image):
    """Writes a Pillow image."""
    with replacing(path) as temporary:
        image.save(temporary)


def check_writable(path):
    """Raises OSError if no file can be made at `path`: now, rather than after an hour's work."""
    path = Path(path)
    if path.is_dir():
        raise OSError(f"cannot write {path}: it is a folder")
    with replacing(path.with_name(f".{path.name}.probe")) as temporary:
        temporary.touch()
    path.with_name(f".{path.name}.probe").unlink()


def download(url):
    """The path of the file behind `url` in torch's ordinary cache, downloaded, with a progress bar,
    if it is not there yet. A download is kept only if it has the size that the server announced.
    Raises ConnectionError."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as response:
            # torch does not notice when a connection closes early.
            size = response.headers["Content-Length"]
        if size is None:
            raise ConnectionError("the server does not announce the file's size")
        print(f"{url} -> {path}", file=sys.stderr)
        torch.hub.download_url_to_file(url, part)
        if part.stat().st_size != int(size):
            raise ConnectionError(f"got {part.stat().st_size} of {size} bytes")
        os.replace(part, path)
    except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"could not download {path.name} ({reason}): fetch it from {url} and put it at {path}, "
            "or name it with --weights"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def keep_freed_memory():
    """Has the C library keep the memory of freed tensors below 32 MB for the next ones. By default
    it returns much of it to the system at once; getting it back, page by page, took a quarter to
    two fifths of the time of sampling digits on a CPU. Only GNU's library can be told so."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_MMAP_THRESHOLD, 2**25)


def run(main):
    """Runs a command. A user's mistake (ValueError, OSError) ends in one line and exit code 2. A
    warning is one line. An interruption ends with the shell's own code, 130."""
    keep_freed_memory()
    # By default Python adds the line of code that warned.
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {message}\n"
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def add_model_flags(parser):
    """The flags that sampling and training share. What is None comes from the model's defaults."""
    parser.add_argument("--model", default="digits",
                        help="digits (default), emoji, dit256, dit512, pixart256, pixart512, "
                             "pixart1024, sigma256, sigma512, sigma1024 or sigma2048")
    parser.add_argument("--weights", help="the network's weights, if not the usual file")
    parser.add_argument("--steps", type=int, help="T, denoising steps, 2 to 1000")
    parser.add_argument("--sampler",
                        help="ddim, ddim:ETA with ETA from 0 to 1, ddpm, dpm-solver++ or sa-solver")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 is no guidance")
    parser.add_argument("--seed", type=seed, default=0, help="0 or more (default: 0)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", help="float32 (default), bfloat16 (bf16) or float16 (fp16)")


def seed(text):
    """A seed as argparse reads it: a whole number from 0 to 2^63 - 1."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 to 2^63 - 1, not {text}")
    return int(text)


def synchronize(device):
    """Waits for the device, so that a clock read next counts the work given to it before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """The most memory that this process ever took, in bytes: on a GPU what torch had there, else
    the whole process's. None where the system does not say (Windows)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
