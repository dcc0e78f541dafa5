"""Images from folders, npz files and by name; unreadable ones; the router and lambda, drawn."""

import os
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pictures
import shipped


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_a_folder_an_npz_and_an_array_give_the_same_images(tmp_path):
    images = random_images(150, 6, 8, 3)
    for j, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{j:03}.png")
    (tmp_path / "notes.txt").write_text("no image")
    np.savez(tmp_path / "plain.npz", arr_0=images)
    packed = tmp_path / "packed.npz"
    np.savez_compressed(packed, other=np.zeros(3), arr_0=images)
    for source in (images, tmp_path, str(tmp_path), tmp_path / "plain.npz", packed):
        total, generator = pictures.read(source)
        assert total == 150
        assert np.array_equal(np.stack(list(generator)), images)


def test_digits_by_name_are_grey_pictures():
    total, generator = pictures.read("digits-held-out")
    images = np.stack(list(generator))
    expected, _ = shipped.digits("held-out")
    assert total == 1000 and images.shape == (1000, 28, 28, 3)
    assert np.array_equal(images[..., 0], expected[:, 0].numpy())
    assert np.array_equal(images[..., 0], images[..., 2])


def test_grey_and_transparent_pictures_become_rgb(tmp_path):
    Image.new("L", (4, 4), 7).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "b.PNG")
    images = np.stack(list(pictures.read(tmp_path)[1]))
    assert images[:, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


def test_batches_cover_all():
    images = random_images(10, 2, 2, 3)
    parts = list(pictures.batches(iter(images), 10, 4, "test"))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert np.array_equal(np.concatenate(parts), images)


def test_mixed_sizes_and_unreadable_pictures_are_named(tmp_path):
    Image.new("RGB", (4, 6)).save(tmp_path / "a.png")
    Image.new("RGB", (5, 6)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"mixed sizes: .*b.png is 6 x 5, .*a.png 6 x 4"):
        list(pictures.read(tmp_path)[1])
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"b.png cannot be read as an image"):
        list(pictures.read(tmp_path)[1])


def test_npz_files_that_hold_no_images(tmp_path):
    np.savez(tmp_path / "a.npz", latents=np.zeros((2, 4, 8, 8)))
    with pytest.raises(ValueError, match="a.npz holds no images: there is no arr_0"):
        pictures.read(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((2, 8, 8, 3)))
    wrong = r"b.npz: arr_0 must hold images, uint8 \(N, H, W, 3\), not float64 \(2, 8, 8, 3\)"
    with pytest.raises(ValueError, match=wrong):
        pictures.read(tmp_path / "b.npz")
    with pytest.raises(ValueError, match=r"the array must hold images, .* not uint8 \(8, 8, 3\)"):
        pictures.read(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(FileNotFoundError, match="nothing.npz is no folder of images, npz file or"):
        pictures.read(tmp_path / "nothing.npz")


def test_damaged_npz_files(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=random_images(20, 16, 16, 3))
    data = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[:2000])
    with pytest.raises(ValueError, match="cut.npz is not a whole npz file"):
        pictures.read(tmp_path / "cut.npz")
    (tmp_path / "flipped.npz").write_bytes(data[:5000] + b"123456789" + data[5009:])
    with pytest.raises(ValueError, match="flipped.npz is damaged: Bad CRC-32"):
        list(pictures.read(tmp_path / "flipped.npz")[1])


# ------------------------------------------------------------------------------------------------
# Folders as people have them


def save(path, level=0, mode="RGB"):
    Image.new(mode, (4, 4), (level,) * 3 if mode == "RGB" else level).save(path)


def names(folder):
    return [path.name for path in pictures.image_files(folder)]


def test_numbers_in_names_are_sorted_by_value(tmp_path):
    """By Python's own sort of (text, number, text), written by hand."""
    expected = ["1.png", "2.png", "010.png", "10.png", "a1b2.png", "a1b10.png", "a2.png", "b.png"]
    for name in reversed(expected):
        save(tmp_path / name)
    assert names(tmp_path) == expected
    padded = tmp_path / "padded"
    padded.mkdir()
    for j in range(120):
        save(padded / f"{j:06}.png", j)
    assert names(padded) == sorted(path.name for path in padded.iterdir())


def test_plain_and_padded_numbers_give_the_same_order(tmp_path):
    """Picture j is of grey j, so the order of the names is that of the levels: 0 to 119."""
    for form in ("{}.png", "{:03}.png", "sample-{}-seed7.png"):
        folder = tmp_path / form
        folder.mkdir()
        for j in range(120):
            save(folder / form.format(j), j)
        total, images = pictures.read(folder)
        assert total == 120 and [image[0, 0, 0] for image in images] == list(range(120))


def test_digits_of_other_scripts_in_names_are_sorted(tmp_path):
    for name in ("²3.png", "٣.png", "é.png", "9.png", "-1.png", "1.5.png", "1e5.png"):
        save(tmp_path / name)
    assert len(names(tmp_path)) == 7


def test_every_suffix_that_pillow_reads_is_a_picture(tmp_path):
    for suffix in ("png", "jpg", "JPEG", "tif", "TIFF", "gif", "bmp", "webp", "ppm"):
        save(tmp_path / f"{suffix}.{suffix}", 100)
    Image.new("RGB", (4, 4), (100,) * 3).save(tmp_path / "jfif.jfif", format="JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        total, images = pictures.read(tmp_path)
    assert total == 10 and {int(image[0, 0, 0]) for image in images} == {100}


def test_what_is_left_out_is_told_in_one_line(tmp_path):
    """macOS's ._NAME, our own temporary files, sub-folders, texts, a pipe. What sample.py notes
    beside its images, and hidden files that are no pictures, are none of it."""
    save(tmp_path / "a.png")
    for name in ("._a.png", ".b.png.123.part.png"):
        (tmp_path / name).write_bytes(b"no picture")
    for name in ("items.txt", "settings.json", ".DS_Store", "letter.doc", "other.doc", "README"):
        (tmp_path / name).write_text("words")
    (tmp_path / "sub.png").mkdir()
    save(tmp_path / "sub.png" / "b.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.warns(UserWarning) as seen:
        assert names(tmp_path) == ["a.png"]
    assert [str(one.message) for one in seen] == [
        f"left out of {tmp_path}: 2 .doc, 2 hidden, 1 not ordinary files, 1 sub-folders, "
        "1 without a suffix"]


def test_a_link_to_a_picture_is_one_and_a_broken_link_is_not(tmp_path):
    save(tmp_path / "a.png", 7)
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.warns(UserWarning, match="1 not ordinary files"):
        assert names(tmp_path) == ["a.png", "b.png"]


def test_the_name_of_a_data_set_is_refused_where_it_is_also_a_folders(tmp_path, monkeypatch):
    assert pictures.is_named("digits") and pictures.is_named("emoji")
    for other in ("digit", "./digits", Path("digits"), np.zeros(3), None, ""):
        assert not pictures.is_named(other)
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    save(Path("digits/a.png"))
    Path("emoji").write_text("a file")
    for name in ("digits", "emoji"):
        with pytest.raises(ValueError, match=f"{name} is a data set's name and a file or folder"):
            pictures.read(name)
    assert pictures.read("./digits")[0] == 1 and pictures.read("digits-train")[0] == 4000


# ------------------------------------------------------------------------------------------------
# Modes


def test_16_bits_a_pixel_lose_their_lower_8(tmp_path):
    """Pillow alone makes all above 255 white. The right values are the levels' upper bytes."""
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for name in ("a.png", "a.tif"):
        Image.fromarray(levels).save(tmp_path / name)
        image = pictures.read_image(tmp_path / name)
        assert image.dtype == np.uint8 and image.shape == (256, 256, 3)
        assert np.array_equal(image, np.repeat((levels // 256)[..., None], 3, 2))


@pytest.mark.parametrize("kind", (np.float32, np.int32))
def test_32_bits_a_pixel_are_refused(tmp_path, kind):
    Image.fromarray(np.full((4, 4), 70_000, kind)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a.tif cannot be read as an image: 32 bits a pixel"):
        pictures.read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK"))
def test_other_modes_are_read_as_pillow_converts_them(tmp_path, mode):
    image = Image.fromarray(random_images(6, 8, 3)).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    assert np.array_equal(pictures.read_image(path), np.asarray(image.convert("RGB")))


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png cannot be read as an image: .*not an ordinary"):
        pictures.read_image(tmp_path / "a.png")


# ------------------------------------------------------------------------------------------------
# npz files, written as they come


@pytest.mark.parametrize("sizes", ((7,), (3, 3, 1), (1,) * 7))
def test_an_npz_in_parts_is_numpys_own(tmp_path, sizes):
    """Read back by numpy, and with the same bytes of the array as numpy.savez writes."""
    for kind, images in (("arr_0", random_images(7, 6, 8, 3)),
                         ("latents", np.random.default_rng(0).normal(size=(7, 4, 2, 2)))):
        images = images.astype(np.uint8 if kind == "arr_0" else np.float32)
        with pictures.npz_writer(tmp_path / "a.npz", 7) as append:
            for part in np.split(images, np.cumsum(sizes)[:-1]):
                append(part)
        np.savez(tmp_path / "b.npz", **{kind: images})
        with np.load(tmp_path / "a.npz") as data:
            assert data.files == [kind] and np.array_equal(data[kind], images)
        written, expected = (zipfile.ZipFile(tmp_path / name).read(f"{kind}.npy")
                             for name in ("a.npz", "b.npz"))
        assert written == expected
    assert pictures.read(tmp_path / "b.npz" if kind == "arr_0" else random_images(7, 6, 8, 3))


def test_parts_that_do_not_lie_in_order_in_memory(tmp_path):
    images = random_images(4, 3, 6, 8).transpose(0, 2, 3, 1)
    pictures.write(tmp_path / "a.npz", images)
    assert np.array_equal(np.stack(list(pictures.read(tmp_path / "a.npz")[1])), images)


def test_an_npz_takes_no_more_memory_than_a_part(tmp_path):
    part = random_images(8, 128, 128, 3)  # 0.4 MB
    tracemalloc.start()
    with pictures.npz_writer(tmp_path / "a.npz", 8 * 64) as append:
        for _ in range(64):
            append(part)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "a.npz").stat().st_size > 64 * part.nbytes > 10 * peak
    total, images = pictures.read(tmp_path / "a.npz")
    assert total == 512
    assert all(np.array_equal(image, part[j % 8]) for j, image in enumerate(images))


def test_an_npz_that_is_not_finished_leaves_the_old_one(tmp_path):
    pictures.write(tmp_path / "a.npz", random_images(2, 4, 4, 3))
    before = (tmp_path / "a.npz").read_bytes()
    with pytest.raises(KeyboardInterrupt), pictures.npz_writer(tmp_path / "a.npz", 4) as append:
        append(random_images(2, 4, 4, 3))
        raise KeyboardInterrupt
    assert (tmp_path / "a.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_npz_files_that_claim_more_than_they_hold(tmp_path):
    """Also encrypted, and compressed in a way that nobody knows: one line, at once."""
    for shape in ((2**40, 64, 64, 3), (3, 64, 64, 3), (2, 2**20, 2**20, 3)):
        about = {"descr": "|u1", "fortran_order": False, "shape": shape}
        archive = zipfile.ZipFile(tmp_path / "a.npz", "w")
        with archive, archive.open("arr_0.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, about)
            file.write(bytes(2 * 64 * 64 * 3))
        with pytest.raises(ValueError, match="a.npz is truncated: it ends before its"):
            list(pictures.read(tmp_path / "a.npz")[1])
    data = (tmp_path / "a.npz").read_bytes()
    local, central = data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02")
    for at, value, words in ((6, 1, "is encrypted"), (8, 99, "compression method is not")):
        odd = bytearray(data)
        odd[local + at] = odd[central + at + 2] = value
        (tmp_path / "b.npz").write_bytes(odd)
        with pytest.raises(ValueError, match=f"b.npz is not a whole npz file: .*{words}"):
            pictures.read(tmp_path / "b.npz")


# ------------------------------------------------------------------------------------------------
# The router and lambda, drawn


@pytest.mark.parametrize("steps, branches", ((2, 2), (4, 6), (20, 56), (250, 56)))
@pytest.mark.parametrize("seed", (0, 1, 2))
def test_heat_map_shows_every_decision(seed, steps, branches):
    scores = torch.rand(steps, branches, generator=torch.Generator().manual_seed(seed))
    scores[0, 0] = 0  # below tau, and computed all the same: row 0
    tau, names = 0.3, [f"mlp {k}" for k in range(branches)]
    image = pictures.heat_map(scores, tau, list(range(steps)), names).convert("RGB")

    # Text is grey, cells are not: so the coloured part of the picture is the table.
    pixels = torch.from_numpy(np.array(image)).int()
    coloured = (pixels.amax(2) != pixels.amin(2)).nonzero()
    (top, left), (bottom, right) = coloured.amin(0).tolist(), coloured.amax(0).tolist()
    cell = (right - left + 2) // branches  # a line of one pixel between cells
    assert (right - left + 2, bottom - top + 2) == (branches * cell, steps * cell)

    for i in range(steps):
        for k in range(branches):
            y, x = top + i * cell + cell // 2, left + k * cell + cell // 2
            red, _, blue = pixels[y, x].tolist()
            computed = i == 0 or scores[i, k].item() > tau
            assert (red > blue) == computed  # orange: computed, blue: reused


def test_heat_map_is_darker_for_higher_scores():
    brightness = [sum(pictures.score_colour(n / 10)) for n in range(11)]
    assert brightness == sorted(brightness, reverse=True) and len(set(brightness)) == 11


def blue_pixels(values):
    """(x, y) of every pixel of the curve, sorted."""
    image = pictures.lambda_curve(values, list(range(len(values)))[::-1]).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).int()
    return (pixels == torch.tensor(pictures.CURVE)).all(2).T.nonzero()


def test_a_falling_curve_falls():
    pixels = blue_pixels([0.0] + [10.0**-n for n in range(1, 20)])
    height = [pixels[pixels[:, 0] == x, 1].float().mean() for x in pixels[:, 0].unique()]
    assert len(height) > 300  # one line through all points
    assert all(low <= high + 4 for low, high in zip(height, height[1:], strict=False))
    assert height[-1] - height[0] > 200  # downwards in the picture


def test_curve_without_errors_has_no_line():
    assert len(blue_pixels([0.0] * 4)) == 0


@pytest.mark.parametrize("where", (1, 3))
def test_curve_of_one_value_is_one_point(where):
    values = [0.0] * 4
    values[where] = 1e-4  # a whole decade
    pixels = blue_pixels(values)
    assert 9 <= len(pixels) <= 100
    assert (pixels.amax(0) - pixels.amin(0)).max() < 10


def test_curve_takes_the_shortest_run():
    assert len(blue_pixels([0.0, 0.02])) > 0
