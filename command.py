"""What every command shares: files that are written, or downloaded, whole or not at all; a user's
mistake that ends in one clear line and exit code 2; and the flags that mean the same everywhere."""

import argparse
import contextlib
import ctypes
import io
import json
import math
import os
import re
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
import warnings
from http.client import HTTPException
from pathlib import Path

import torch
from tqdm import tqdm


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as temporary:` write to `temporary`, and it replaces `path` at the end,
    whole. If anything goes wrong, `path` stays as it was and nothing is left beside it."""
    temporary = temporary_for(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_for(path):
    """Where a file is written before it replaces `path`, in a folder that is there afterwards."""
    path = Path(path)
    check_ordinary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OSError(f"cannot write {path}: {path.parent} is no folder") from error
    # In the same folder, because a file is only replaced at once within one file system. With the
    # same suffix, because numpy and Pillow go by it.
    return path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")


LEFT_BEHIND = re.compile(r"\..+\.(\d+)\.part(\.\w+)?")  # what `replacing` names its files


def check_ordinary(path):
    """Raises OSError for a device, a pipe or a socket: replacing it would remove it, and reading it
    may never end."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(f"{path} is not an ordinary file: name another")


def read_bytes(path):
    """The bytes of an ordinary file. Raises FileNotFoundError, or another OSError."""
    check_ordinary(path)
    return Path(path).read_bytes()


def clear_left_behind(folder):
    """Removes the temporary files of `replacing` whose process was killed and is gone."""
    for path in folder.iterdir():
        match = LEFT_BEHIND.fullmatch(path.name)
        if match and not is_running(int(match[1])):
            path.unlink(missing_ok=True)


def is_running(process):
    try:
        os.kill(process, 0)  # no signal: only whether it is there
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's, or a system that does not say
        return True
    return True


@contextlib.contextmanager
def locked(folder):
    """`with locked(folder):` no other process can do the same meanwhile. The folder itself is
    locked, so nothing is left in it; if it was made for that and stays empty, it goes again. Raises
    OSError if another process has it; does nothing where there are no such locks (Windows)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OSError(f"{folder} is no folder")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"{folder} is in use by another process: wait, or name another"
                          ) from error
        yield
    finally:
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def save_state(path, state):
    """Saves a tree of dicts, lists, numbers and tensors, to be read by `load_state`."""
    buffer = io.BytesIO()  # torch.save to a full disk raises RuntimeError, write_bytes OSError
    torch.save(state, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_state(path):
    """Reads what `save_state` wrote; no code from the file is run. Raises ValueError if the file is
    truncated or something else, FileNotFoundError if it is not there."""
    data = read_bytes(path)  # a file that is not there must not look like a damaged one
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a whole state file: {reason}") from error


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def keep_lines(path, count):
    """Cuts a file down to its first `count` lines; makes it if there is none."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    with replacing(path) as temporary:
        temporary.write_text("".join(lines[:count]))


def save_image(path, image):
    """Writes a Pillow image."""
    with replacing(path) as temporary:
        image.save(temporary)


def check_not_read(out, *sources):
    """Raises ValueError if `out` is one of the files that are read (None: no file)."""
    for source in sources:
        # Path.resolve raises RuntimeError for a link to itself.
        if source is not None and os.path.realpath(source) == os.path.realpath(out):
            raise ValueError(f"{source} is read, so it is not written: choose another name")


def check_writable(path):
    """Raises OSError if no file can be made at `path`: now, rather than after an hour's work. Also
    clears what killed processes left beside it."""
    path = Path(path)
    if path.is_dir():
        raise OSError(f"cannot write {path}: it is a folder")
    temporary = temporary_for(path)
    try:
        temporary.touch()
    except OSError as error:  # its own words name the temporary file
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    clear_left_behind(path.parent)


TIMEOUT = 30  # seconds of silence after which a download is given up


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
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            # torch does not notice when a connection closes early.
            size = response.headers["Content-Length"]
        if size is None:
            raise ConnectionError("the server does not announce the file's size")
        print(f"{url} -> {path}", file=sys.stderr)
        # torch's download has no time-out of its own: a server that falls silent would hold it.
        socket.setdefaulttimeout(TIMEOUT)
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
        socket.setdefaulttimeout(None)
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


def run(main, several=False):
    """Runs a command. A user's mistake (ValueError, OSError), a lack of memory, and what torch
    cannot do on Apple's GPUs end in one line and exit code 2. A warning is one line. An
    interruption ends in one, too, which says how to go on if the KeyboardInterrupt does, and with
    the shell's own code, 130. `several`: whether processes of torchrun may share the work."""
    keep_freed_memory()
    if "startup" in sys.modules:  # from here on Ctrl-C is a KeyboardInterrupt again
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A folder may be listed several times.
    warnings.simplefilter("once" if rank() == 0 else "ignore")
    # By default Python adds the line of code that warned.
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {one_line(message)}\n"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path that the console cannot print is no failure
            stream.reconfigure(errors="backslashreplace")
    try:
        if processes() > 1 and not several:
            raise ValueError("this command's work is not shared: start it by python, not torchrun")
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # or it complains
    except (ValueError, OSError) as error:
        end(one_line(error))
    except NotImplementedError as error:
        if "MPS" not in str(error):
            raise
        end("torch lacks an operation on mps: use --device cpu, or set "
            "PYTORCH_ENABLE_MPS_FALLBACK=1, and it is done on the CPU "
            f"({one_line(error)[:100]}...)")
    except (MemoryError, RuntimeError) as error:
        if is_lack_of_memory(error):
            end("out of memory: try a smaller --batch-size or --micro-batch, fewer pixels, or "
                f"--dtype bfloat16 ({one_line(error)[:200]})")
        if is_lost_connection(error):
            end(f"another process has ended, or cannot be reached ({one_line(error)[:200]})")
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            end(f"torch.compile fails here: leave --compile out ({one_line(error)[:200]})")
        raise
    except KeyboardInterrupt as error:
        if rank() == 0:
            print(one_line(f"interrupted: {error}" if str(error) else "interrupted"),
                  file=sys.stderr)
        sys.exit(130)


def processes():
    """How many processes torchrun started; 1 without it. (distributed.size() counts those that have
    joined.)"""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """The number that torchrun gave this process; 0 without it."""
    return int(os.environ.get("RANK", 0)) if processes() > 1 else 0


def end(message):
    """Ends the command with one line and exit code 2."""
    if rank() > 0:  # mostly the first process says the same, and torchrun ends the others then
        time.sleep(10)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def one_line(message):
    """A message without line breaks, and without what a terminal would take for a command."""
    words = " ".join(str(message).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def is_lack_of_memory(error):
    """Whether numpy, or torch on a CPU or a GPU, could not get the memory it asked for."""
    words = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "out of memory" in words or "not enough memory" in words or "can't allocate memory" in words
    )


def is_lost_connection(error):
    """Whether torch.distributed cannot reach another process."""
    words = str(error).lower()
    return processes() > 1 and ("gloo" in words or "nccl" in words)


class Lines:
    """Takes the texts of a progress bar, which would overwrite each other, and writes lines."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


def progress(items=None, **options):
    """tqdm's progress bar, for a command's terminal. Where there is none, as in a log, it is a line
    every 30 seconds. In a notebook, and in all processes but the first, there is nothing."""
    if sys.stderr.isatty() and rank() == 0:
        return tqdm(items, **options)
    silent = rank() > 0 or "startup" not in sys.modules  # which every command imports
    return tqdm(items, file=Lines(), mininterval=30, maxinterval=30, delay=30, leave=False,
                ncols=100, disable=silent, **options)


class Parser(argparse.ArgumentParser):
    """Reads a command's flags; `doc` is the head of its file. A mistake in them is a ValueError
    like any other, and one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise ValueError(f"{message} (--help explains the flags)")


def add_forecast_flag(parser, default=None):
    """`--forecast`, the order of cache.forecast; `default` None leaves it to the router."""
    words = "the router's own, or 0" if default is None else default
    parser.add_argument("--forecast", type=int, choices=[0, 1, 2], default=default,
                        help="a reused branch repeats its last output (0), or continues the line "
                             f"(1) or the parabola (2) through its last ones ({words})")


def add_captions_flag(parser):
    parser.add_argument("--raw-captions", action="store_true",
                        help="leave captions as they are (PixArt-alpha's are cleaned for T5)")


def add_compile_flag(parser):
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the branches: slow at first, meant for long work")


def add_model_flags(parser, steps=20):
    """The flags that sampling and training share. What is None comes from the model's defaults;
    `steps` is every model's T, for the help."""
    parser.add_argument("--model", default="digits",
                        help="digits (default), emoji, dit256, dit512, pixart256, pixart512, "
                             "pixart1024, sigma256, sigma512, sigma1024, sigma2048, uvit256 or "
                             "uvit512")
    parser.add_argument("--weights", type=place,
                        help="the network's weights, if not the usual: a file or a folder")
    parser.add_argument("--steps", type=int, help=f"T, denoising steps, 2 to 1000 ({steps})")
    parser.add_argument("--sampler", type=name,
                        help="ddim, ddim:ETA with ETA from 0 to 1, ddpm, dpm-solver++ or "
                             "sa-solver; for U-ViT dpm-solver-2s or dpm-solver-3s (digits, dit: "
                             "ddim; emoji, pixart, sigma: dpm-solver++; uvit: dpm-solver-2s)")
    parser.add_argument("--guidance", type=finite,
                        help="guidance scale; 1 is no guidance (digits: 2.5; emoji: 2; dit: 1.5; "
                             "pixart, sigma: 4.5; uvit256: 1.4; uvit512: 1.7)")
    parser.add_argument("--seed", type=seed, default=0, help="0 or more (default: 0)")
    add_device_flag(parser)
    parser.add_argument("--dtype", type=name,
                        help="float32 (default), bfloat16 (bf16) or float16 (fp16)")


def add_device_flag(parser):
    parser.add_argument("--device", type=name,
                        help="cuda, cuda:1, mps (Apple's GPUs; what torch cannot do there, it does "
                             "on the CPU with PYTORCH_ENABLE_MPS_FALLBACK=1) or cpu (default: the "
                             "first of these that there is)")


def finite(text):
    """A number as argparse reads it, but neither nan nor inf."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"a finite number, not {text}")
    return number


def name(text):
    """A name as argparse reads it, but not an empty one."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("a name, not an empty one")
    return text


def place(text):
    """A file or a folder as argparse reads it: a name, without the slash that a shell may add."""
    return str(path(text))


def path(text):
    """A path as argparse reads it, but not an empty one, which would be the folder one is in."""
    return Path(name(text))


def seed(text):
    """A seed as argparse reads it: a whole number from 0 to 2^63 - 1."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 to 2^63 - 1, not {text}")
    return int(text)


def devices():
    """What `--device` takes on this machine, as torch finds it: a list, the usual device first."""
    cuda = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    names = ["cuda", *(f"cuda:{k}" for k in cuda)] if cuda else []
    return names + ["mps"] * torch.backends.mps.is_available() + ["cpu"]


def synchronize(device):
    """Waits for the device, so that a clock read next counts the work given to it before."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def peak_memory(device):
    """The most memory that this process ever took, in bytes: on a CUDA GPU what torch's tensors had
    there, on a CPU the whole process's. Torch counts no peak on Apple's GPUs: there it is what
    their driver holds for the process now, with the freed memory that torch keeps for later.
    None where the system does not say (Windows)."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if kind == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
