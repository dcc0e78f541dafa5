"""Images from folders, npz files and by name, and what is said of those that cannot be read."""

import numpy as np
import pytest
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
