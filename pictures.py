"""A set of images, wherever it is: a folder, an npz file, an array or a data set by name.

    total, images = pictures.read("my_folder/")      # a number and a generator of (H, W, 3)
"""

import concurrent.futures
import itertools
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import shipped

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
NAMED = {"digits": "all", "digits-train": "train", "digits-held-out": "held-out"}


def read(source):
    """How many images `source` holds, and a generator of them, each uint8 (H, W, 3). `source` is an
    array uint8 (N, H, W, 3), a folder of pictures (in the order of their names), an npz with
    `arr_0`, or `digits`, `digits-train`, `digits-held-out`.

    Raises FileNotFoundError, or ValueError; for a picture that cannot be read, a truncated file or
    mixed sizes once the generator comes to it.
    """
    if isinstance(source, np.ndarray):
        check(source.dtype, source.shape, "the array")
        return len(source), iter(source)
    if source in NAMED:
        images = shipped.digits(NAMED[source])[0]  # (N, 1, 28, 28)
        return len(images), iter(images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        return len(files), folder_images(files)
    if path.suffix != ".npz" or not path.is_file():
        raise FileNotFoundError(f"{path} is no folder of images, npz file or {', '.join(NAMED)}")
    return npz_images(path)


def check(dtype, shape, name):
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"{name} must hold images, uint8 (N, H, W, 3), not {dtype} {shape}")


def read_image(path):
    """uint8 (H, W, 3). Raises ValueError that names the file."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def folder_images(files):
    """A generator of images, decoded by several threads but held 64 at a time at most."""
    first = None
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for k in range(0, len(files), 64):
            part = files[k : k + 64]
            for path, image in zip(part, pool.map(read_image, part), strict=True):
                first = image.shape if first is None else first
                if image.shape != first:
                    sizes = " x ".join(map(str, image.shape[:2])), " x ".join(map(str, first[:2]))
                    raise ValueError(f"mixed sizes: {path} is {sizes[0]}, {files[0]} {sizes[1]}")
                yield image


def npz_images(path):
    """`arr_0` of an npz, as `read` gives it. It is read as a stream: numpy itself would load
    all of it, 10 GB for 50,000 images of 256 x 256."""
    try:
        stream = zipfile.ZipFile(path).open("arr_0.npy")  # noqa: SIM115 (read on by the generator)
        version = np.lib.format.read_magic(stream)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
        shape, fortran, dtype = read_header(stream)
    except KeyError as error:
        raise ValueError(f"{path} holds no images: there is no arr_0 in it") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole npz file: {error}") from error
    check(dtype, shape, f"{path}: arr_0")
    if fortran:
        raise ValueError(f"{path}: arr_0 must be in C order")

    def images():
        size = int(np.prod(shape[1:]))
        for _ in range(shape[0]):
            try:
                data = stream.read(size)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise ValueError(f"{path} is damaged: {error}") from error
            if len(data) < size:
                raise ValueError(f"{path} is truncated: it ends before its {shape[0]} images do")
            yield np.frombuffer(data, np.uint8).reshape(shape[1:])

    return shape[0], images()


def batches(images, total, batch_size, words):
    """Stacks images: yields uint8 (B, H, W, 3), under a progress bar that says `words`."""
    with tqdm(total=total, unit="image", desc=words, disable=None) as bar:
        while batch := list(itertools.islice(images, batch_size)):
            yield np.stack(batch)
            bar.update(len(batch))
