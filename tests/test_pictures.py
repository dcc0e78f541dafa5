"""Images from folders, npz files and by name; unreadable ones; the router and lambda, drawn."""

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
