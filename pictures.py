"""Pictures in and out. Images are read from a folder, an npz file, an array or a data set by name;
they are written as a grid or as files; the router and lambda are drawn.

    total, images = pictures.read("my_folder/")      # a number and a generator of (H, W, 3)
    pictures.write(Path("grid.png"), pictures.to_pixels(x))
    pictures.heat_map(scores, tau, timesteps, branches).save("router.png")

Notation: N images, T denoising steps, K cacheable branches.
"""

import collections
import colorsys
import concurrent.futures
import contextlib
import functools
import itertools
import math
import os
import re
import textwrap
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import command
import router
import shipped

# ------------------------------------------------------------------------------------------------
# Reading

NOTES = {"items.txt", "settings.json"}  # what sample.py writes beside its images
NAMED = {  # what each is: a function -> images uint8 (N, 1 or 3, H, W)
    "digits": lambda: shipped.digits("all")[0],
    "digits-train": lambda: shipped.digits("train")[0],
    "digits-held-out": lambda: shipped.digits("held-out")[0],
    "emoji": lambda: shipped.emoji()[0],
}


def read(source, mine=range):
    """How many images `source` holds, and a generator of them, each uint8 (H, W, 3). `mine(count)`
    gives the numbers of those to read. `source` is an array uint8 (N, H, W, 3), a folder of
    pictures (see `image_files`), an npz with `arr_0`, or `digits`, `digits-train`,
    `digits-held-out`, `emoji`.

    Raises FileNotFoundError, or ValueError. The generator raises ValueError when it comes to a
    picture that cannot be read, the end of a truncated file, or another size.
    """
    if isinstance(source, np.ndarray):
        check(source.dtype, source.shape, "the array")
        return len(source), (source[j] for j in mine(len(source)))
    if is_named(source):
        images = NAMED[source]()
        pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        return len(images), (pixels[j] for j in mine(len(images)))
    path = Path(source)
    if path.is_dir():
        files = image_files(path)
        return len(files), folder_images(files, mine(len(files)))
    if path.suffix != ".npz" or not path.is_file():
        raise FileNotFoundError(f"{path} is no folder of images, npz file or {', '.join(NAMED)}")
    return npz_images(path, mine)


def is_named(source):
    """Whether `source` names one of the data sets. Raises ValueError if it could as well be a
    folder or file of the user's."""
    if not isinstance(source, str) or source not in NAMED:
        return False
    if Path(source).exists():
        raise ValueError(f"{source} is a data set's name and a file or folder here: write "
                         f".{os.sep}{source} for yours, or rename it")
    return True


def image_files(folder):
    """The pictures of a folder, by name, numbers in it by their value (2.png before 10.png): a list
    of paths. What Pillow reads is a picture, except hidden files; what is in sub-folders is not
    read. A warning says what is left out."""
    files, left_out = [], collections.Counter()
    for path in Path(folder).iterdir():
        suffix = path.suffix.lower()
        if path.is_dir():
            left_out["sub-folders"] += 1
        elif path.name in NOTES or (path.name.startswith(".") and suffix not in suffixes()):
            continue
        elif path.name.startswith("."):
            left_out["hidden"] += 1
        elif suffix not in suffixes():
            left_out[suffix or "without a suffix"] += 1
        elif not path.is_file():  # a pipe, which might never end
            left_out["not ordinary files"] += 1
        else:
            files.append(path)
    if left_out:
        words = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        warnings.warn(f"left out of {folder}: {words}", stacklevel=2)
    return sorted(files, key=by_number)


@functools.cache
def suffixes():
    """The suffixes of what Pillow can read."""
    known = Image.registered_extensions().items()
    return {suffix for suffix, kind in known if kind in Image.OPEN}


def by_number(path):
    """Sorts names as people number them: text as text, digits by their value."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(int(part), part) if part.isdecimal() else (0, part) for part in parts]


def check(dtype, shape, name):
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"{name} must hold images, uint8 (N, H, W, 3), not {dtype} {shape}")


def read_image(path):
    """uint8 (H, W, 3). Of 16 bits a pixel the upper 8 are taken. Raises ValueError that names the
    file."""
    try:
        command.check_ordinary(path)
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # Pillow would clip all above 255 to white
                grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            if image.mode in ("I", "F"):
                raise ValueError("32 bits a pixel have no usual range: save it with 8 or 16")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(f"{path} cannot be read as an image: {command.one_line(error)}"
                         ) from error


def folder_images(files, numbers):
    """A generator of the images `numbers`, decoded by several threads but held 64 at a time at
    most."""
    first = read_image(files[0]).shape if files else None
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for k in range(0, len(numbers), 64):
            part = [files[j] for j in numbers[k : k + 64]]
            for path, image in zip(part, pool.map(read_image, part), strict=True):
                if image.shape != first:
                    sizes = " x ".join(map(str, image.shape[:2])), " x ".join(map(str, first[:2]))
                    raise ValueError(f"mixed sizes: {path} is {sizes[0]}, {files[0]} {sizes[1]}")
                yield image


def npz_images(path, mine=range):
    """`arr_0` of an npz, as `read` gives it. It is read as a stream: numpy would load all of it, 10
    GB for 50,000 images of 256 x 256."""
    try:
        stream = zipfile.ZipFile(path).open("arr_0.npy")  # noqa: SIM115 (read on by the generator)
        version = np.lib.format.read_magic(stream)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
        shape, fortran, dtype = read_header(stream)
    except KeyError as error:
        raise ValueError(f"{path} holds no images: there is no arr_0 in it") from error
    except Exception as error:  # encrypted, compressed oddly, damaged: it fails in many ways
        raise ValueError(f"{path} is not a whole npz file: {command.one_line(error)}") from error
    check(dtype, shape, f"{path}: arr_0")
    if fortran:
        raise ValueError(f"{path}: arr_0 must be in C order")

    def images():
        size = math.prod(shape[1:])  # numpy's product would overflow for what a bad file claims
        wanted = iter(mine(shape[0]))
        number = next(wanted, None)
        for j in range(shape[0]):
            try:
                data = stream.read(size)
            except Exception as error:  # damaged data fails in many ways
                raise ValueError(f"{path} is damaged: {command.one_line(error)}") from error
            if len(data) < size:
                raise ValueError(f"{path} is truncated: it ends before its {shape[0]} images do")
            if j == number:
                yield np.frombuffer(data, np.uint8).reshape(shape[1:])
                number = next(wanted, None)

    return shape[0], images()


def batches(images, total, batch_size, words):
    """Stacks images: yields uint8 (B, H, W, 3), under a progress bar that says `words`."""
    with command.progress(total=total, unit="image", desc=words) as bar:
        while batch := list(itertools.islice(images, batch_size)):
            yield np.stack(batch)
            bar.update(len(batch))


# ------------------------------------------------------------------------------------------------
# Drawing and writing


def to_pixels(x):
    """Images (B, C, H, W) in [-1, 1], grey or RGB -> uint8 (B, H, W, 3)."""
    pixels = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def grid(images, columns=10, titles=None):
    """uint8 (N, H, W, 3) -> one picture, row by row; small images are enlarged. `titles`, N
    strings, are written below the images, in 5 columns then."""
    N, H, W, _ = images.shape
    bar = 34 if titles else 0
    scale = max(1, round((120 if titles else 84) / H))
    columns = min(N, 5 if titles else columns)  # titles need room
    rows = -(-N // columns)
    height, width = scale * H + scale + bar, scale * W + scale
    canvas = Image.new("RGB", (columns * width, rows * height), "white")
    font = ImageFont.load_default(12)
    for j, image in enumerate(images):
        x, y = j % columns * width, j // columns * height
        picture = Image.fromarray(image).resize((scale * W, scale * H), Image.NEAREST)
        canvas.paste(picture, (x, y))
        if titles:
            lines = textwrap.wrap(titles[j], max(8, width // 7))[:2]
            ImageDraw.Draw(canvas).text((x, y + scale * H + 2), "\n".join(lines), "black", font)
    return canvas


def stack(titles, pictures):
    """Pictures below one another, each under its title."""
    bar = 30
    height = sum(picture.height + bar for picture in pictures)
    canvas = Image.new("RGB", (max(picture.width for picture in pictures), height), "white")
    y = 0
    for title, picture in zip(titles, pictures, strict=True):
        ImageDraw.Draw(canvas).text((4, y + 6), title, "black", ImageFont.load_default(16))
        canvas.paste(picture, (0, y + bar))
        y += bar + picture.height
    return canvas


@contextlib.contextmanager
def npz_writer(out, total):
    """`with npz_writer(out, total) as append:` call append(images) until there are `total`. Images
    uint8 (B, H, W, 3) go into an ADM-style npz, as `arr_0`; latents (B, C, H, W) float32 as
    `latents`. They are written as they come: 50,000 images of 256 x 256 are 10 GB."""
    with command.replacing(out) as temporary, contextlib.ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(temporary, "w"))
        file = None

        def append(images):
            nonlocal file
            if file is None:
                name = "arr_0" if images.dtype == np.uint8 else "latents"
                # force_zip64, because the size is not known to the archive yet
                file = stack.enter_context(archive.open(f"{name}.npy", "w", force_zip64=True))
                header = np.lib.format.header_data_from_array_1_0(images)
                header["shape"] = (total, *images.shape[1:])
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(images).data)

        yield append


def write(out, images, numbers=None, titles=None):
    """uint8 (N, H, W, 3) -> a PNG grid, an ADM-style npz (`arr_0`), or, if `out` has no suffix, a
    folder of PNGs with these `numbers` (None: from 0 on). Latents (N, C, H, W) go into an npz, as
    `latents`."""
    if out.suffix == ".png":
        command.save_image(out, grid(images, titles=titles))
    elif out.suffix == ".npz":
        with npz_writer(out, len(images)) as append:
            append(images)
    else:
        for j, image in zip(numbers or range(len(images)), images, strict=True):
            command.save_image(out / f"{j:06d}.png", Image.fromarray(image))


# ------------------------------------------------------------------------------------------------
# The router and lambda

REUSED = (150, 190, 226)  # blue
CURVE = (40, 90, 160)  # darker blue


def heat_map(scores, tau, timesteps, branches):
    """Draws the router: a row per step, with its number and timestep, and a column per branch, with
    its name. scores (T, K) in [0, 1]. Computed cells go from pale to dark orange with the score;
    reused ones (score <= tau; never in row 0) are blue. -> a Pillow image."""
    T, K = scores.shape
    schedule = router.threshold(scores, tau)
    cell = max(6, min(24, 1200 // max(T, K)))
    font, small = ImageFont.load_default(max(10, cell * 2 // 3)), ImageFont.load_default(11)
    left, top, bottom = 104, 80, 56
    image = Image.new("RGB", (left + max(K * cell, 420) + 16, top + T * cell + bottom), "white")
    draw = ImageDraw.Draw(image)
    for i in range(T):
        for k in range(K):
            colour = score_colour(scores[i, k].item()) if schedule[i, k] else REUSED
            x, y = left + k * cell, top + i * cell
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour)
    every = -(-14 // cell)  # name every row and column that the font has room for
    for i in range(0, T, every):
        y = top + i * cell + cell // 2
        draw.text((30, y), str(i), "black", font, anchor="rm")
        draw.text((left - 8, y), str(timesteps[i]), "black", font, anchor="rm")
    for k in range(0, K, every):
        name = Image.new("RGB", (top - 6, font.size + 4), "white")
        ImageDraw.Draw(name).text((0, 0), branches[k], "black", font)
        image.paste(name.rotate(90, expand=True), (left + k * cell, 2))
    draw.text((30, top - 4), "step", "black", small, anchor="rb")
    draw.text((left - 8, top - 4), "timestep", "black", small, anchor="rb")
    legend = (
        f"blue: reused, scores up to tau = {tau:g} (CUR {100 * router.cur(schedule):.1f} %)\n"
        "orange: computed, the darker the higher the score"
    )
    draw.text((left, top + T * cell + 10), legend, "black", ImageFont.load_default(14))
    return image


def score_colour(score):
    """A score in [0, 1] -> RGB from pale to dark orange."""
    red, green, blue = colorsys.hsv_to_rgb(0.07, 0.15 + 0.8 * score, 1 - 0.3 * score)
    return round(255 * red), round(255 * green), round(255 * blue)


def lambda_curve(values, timesteps, weight="lambda"):
    """Draws lambda(i), or another `weight` of the steps' errors, over the executed steps, on a
    logarithmic axis. values (T,); zeros are left out. -> a Pillow image."""
    width, height, left, right, top, bottom = 760, 420, 84, 24, 44, 76
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    draw.text((left, 12), f"image error proxy: {weight} at each executed step", "black", font)
    points = [(i, math.log10(value)) for i, value in enumerate(values) if value > 0]
    if not points:
        draw.text((left, height // 2), f"{weight} is 0 everywhere: no reuse", "black", font)
        return image
    low = math.floor(min(y for _, y in points))
    high = max(low + 1, math.ceil(max(y for _, y in points)))
    T = len(values)

    def place(i, y):
        return (
            left + (width - left - right) * i / (T - 1),
            top + (height - top - bottom) * (high - y) / (high - low),
        )

    for decade in range(low, high + 1):
        draw.line([place(0, decade), place(T - 1, decade)], "lightgray")
        x, y = place(0, decade)
        draw.text((x - 8, y), f"1e{decade}", "black", font, anchor="rm")
    for i in range(0, T, -(-T // 12)):
        x, y = place(i, low)
        draw.line([(x, y), (x, y + 4)], "black")
        draw.text((x, y + 6), f"{i}\n{timesteps[i]}", "black", font, anchor="ma", align="center")
    draw.text((left, height - 22), "step, and below it its timestep", "black", font)
    draw.line([place(*point) for point in points], CURVE, width=2)
    for point in points:
        x, y = place(*point)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), CURVE)
    return image
