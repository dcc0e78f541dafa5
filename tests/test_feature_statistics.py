"""Files of statistics: what is written is read, and what cannot be right is refused, each in one
line that names the file. The right values are those of the arrays that went in."""

import io
import os
import socket
import zipfile

import numpy as np
import pytest
import torch

import feature_statistics
import features


def known(**changes):
    """The arrays of statistics of 9 images with 3 pooled and 2 spatial features, 4 classes."""
    pooled = np.random.default_rng(0).normal(size=(9, 3))
    arrays = {
        "mu": pooled.mean(0), "sigma": np.cov(pooled, rowvar=False),
        "mu_s": pooled.mean(0)[:2], "sigma_s": np.cov(pooled[:, :2], rowvar=False),
        "pooled": pooled.astype(np.float32), "logits": np.zeros((9, 4), np.float32),
        "network": np.array("a network"), "images": np.array(9),
    }
    return {key: value for key, value in {**arrays, **changes}.items() if value is not None}


def test_what_is_written_is_read(tmp_path):
    """Also where the number of images is not known: no pickled None, which could not be read."""
    arrays = known()
    np.savez(tmp_path / "a.npz", **arrays)
    read = feature_statistics.load_statistics(tmp_path / "a.npz")
    assert (read.network, read.count, read.images) == ("a network", 9, None)
    for count in (9, None):
        read.count = count
        feature_statistics.save_statistics(tmp_path / "b.npz", read)
        again = feature_statistics.load_statistics(tmp_path / "b.npz")
        assert again.count == count
        for key in feature_statistics.ARRAYS:
            assert np.array_equal(getattr(again, key).numpy(), arrays[key])
    with np.load(tmp_path / "b.npz") as data:
        assert "images" not in data


def test_kinds_of_numbers_and_their_order_in_memory_do_not_matter(tmp_path):
    arrays = known()
    other = {"mu": arrays["mu"].astype(">f8"), "sigma": np.asfortranarray(arrays["sigma"])}
    np.savez(tmp_path / "a.npz", **{**arrays, **other, "pooled": arrays["pooled"].astype(float)})
    read = feature_statistics.load_statistics(tmp_path / "a.npz")
    assert read.mu.dtype == torch.float64 and read.pooled.dtype == torch.float32
    for key in ("mu", "sigma", "pooled"):
        assert np.array_equal(getattr(read, key).numpy(), arrays[key])


NAN, NOT_RIGHT = float("nan"), "cannot be right: "
WRONG = {  # changed arrays: what is said
    "nan": ({"mu": np.full(3, NAN)}, NOT_RIGHT + "mu holds NaN, infinite or huge"),
    "infinite": ({"sigma_s": np.full((2, 2), np.inf)}, NOT_RIGHT + "sigma_s holds NaN"),
    "huge": ({"pooled": np.full((9, 3), 1e30)}, NOT_RIGHT + "pooled holds NaN"),
    "0-d": ({"mu": np.array(3.0)}, "mu must be floating point of 1 dimensions, not float64 "),
    "complex": ({"mu": np.zeros(3, complex)}, "not complex128"),
    "float8": ({"mu": np.zeros(3, np.uint8).view("V1")}, r"not \|V1"),
    "whole numbers": ({"mu": np.zeros(3, int)}, "not int64"),
    "bool": ({"sigma": np.ones((3, 3), bool)}, "not bool"),
    "words": ({"mu": np.array(["a", "b", "c"])}, "not <U1"),
    "empty": ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "mu must be floating point"),
    "sigma's shape": ({"sigma": np.eye(4)}, NOT_RIGHT + r"sigma is \(4, 4\) for 3 features"),
    "sigma_s's shape": ({"sigma_s": np.eye(3)[:2]}, NOT_RIGHT + "sigma_s is"),
    "not symmetric": ({"sigma": np.triu(np.ones((3, 3)))}, "sigma is no covariance"),
    "correlation over 1": ({"sigma": np.eye(3) + 2 * np.eye(3)[::-1]}, "sigma is no covariance"),
    "negative": ({"sigma": -np.eye(3)}, "sigma is no covariance"),
    "pooled's width": ({"pooled": np.zeros((9, 4))}, NOT_RIGHT + r"pooled is \(9, 4\) for 3"),
    "rows": ({"logits": np.zeros((8, 4))}, NOT_RIGHT + "9 pooled, 8 logits, of 9 images"),
    "more rows than images": ({"images": np.array(8)}, NOT_RIGHT + "9 pooled, 9 logits, of 8 im"),
    "negative count": ({"images": np.array(-9)}, "does not number its images"),
    "half a count": ({"images": np.array(9.5)}, "does not number its images"),
    "list of counts": ({"images": np.array([9])}, "does not number its images"),
    "network": ({"network": np.array(5)}, "does not name its network"),
    "networks": ({"network": np.array(["a network"])}, "does not name its network"),
    "pickled": ({"mu": np.array([None] * 3)}, "Object arrays cannot be loaded"),
    "pickled count": ({"images": np.array(None)}, "Object arrays cannot be loaded"),
    "no sigma": ({"sigma": None}, "lacks sigma"),
    "no mu_s": ({"mu_s": None}, "lacks mu_s"),
    "no sigma_s": ({"sigma_s": None}, "lacks sigma_s"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_arrays_that_cannot_be_statistics(kind, tmp_path):
    changes, message = WRONG[kind]
    np.savez(tmp_path / "wrong.npz", **known(**changes))
    refused(tmp_path / "wrong.npz", message)


def refused(path, message):
    """Reading ends in a ValueError of one line that names the file."""
    with pytest.raises(ValueError, match=message) as caught:
        feature_statistics.load_statistics(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def npz(header=None, compression=zipfile.ZIP_STORED, more=b""):
    """The bytes of statistics whose `mu` has another header than its 3 numbers need."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for key, array in known().items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array)
            if key == "mu" and header:
                member = io.BytesIO()
                about = {"descr": "<f8", "fortran_order": False, "shape": header}
                np.lib.format.write_array_header_1_0(member, about)
                member.seek(0, 2)
                member.write(array.tobytes() + more)
            archive.writestr(f"{key}.npy", member.getvalue())
    return buffer.getvalue()


@pytest.mark.parametrize("shape", ((2**40,), (2**33, 2**33), (10**9,), (-1,), (4,), (2,)))
def test_a_header_that_claims_what_is_not_there(shape, tmp_path):
    """8 TiB among them: neither a lack of memory nor a long wait."""
    (tmp_path / "claims.npz").write_bytes(npz(shape))
    refused(tmp_path / "claims.npz", "claims.npz is not a whole npz of statistics: ")


def test_a_covariance_wider_than_any_networks(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_statistics, "WIDEST", 2)
    np.savez(tmp_path / "wide.npz", **known())
    refused(tmp_path / "wide.npz", r"for 3 features \(2 at most\)")


def patched(data, places, change):
    """An npz's bytes with a change to the flags in all its headers. places: {signature: offset}."""
    data = bytearray(data)
    for signature, offset in places.items():
        at = data.find(signature)
        while at >= 0:
            data[at + offset] = change(data[at + offset])
            at = data.find(signature, at + 4)
    return bytes(data)


def test_files_that_are_encrypted_oddly_compressed_or_damaged(tmp_path):
    path, whole = tmp_path / "a.npz", npz()
    path.write_bytes(npz(compression=zipfile.ZIP_LZMA))
    assert feature_statistics.load_statistics(path).count == 9  # odd, but whole
    path.write_bytes(patched(whole, {b"PK\x03\x04": 6, b"PK\x01\x02": 8}, lambda x: x | 1))
    refused(path, "is not a whole npz of statistics: File 'mu.npy' is encrypted")
    path.write_bytes(patched(whole, {b"PK\x03\x04": 8, b"PK\x01\x02": 10}, lambda x: 99))
    refused(path, "is not a whole npz of statistics: That compression method is not supported")
    at = whole.index(b"sigma.npy") + 150
    path.write_bytes(whole[:at] + b"1234567" + whole[at + 7:])
    refused(path, "is not a whole npz of statistics: Bad CRC-32 for file 'sigma.npy'")
    for data in (b"", b"no zip", whole[:300]):
        path.write_bytes(data)
        refused(path, "is not an npz file, or not a whole one")


def test_flipped_bytes_never_give_another_number(tmp_path):
    """200 files with changed bytes, most of them in the headers: refused, or read as they were."""
    whole, draw = npz(), np.random.default_rng(0)
    path, refusals = tmp_path / "a.npz", 0
    heads = [j for j in range(len(whole)) if whole.startswith((b"PK", b"\x93NUMPY"), j)]
    for _ in range(200):
        data = bytearray(whole)
        data[min(heads[draw.integers(len(heads))] + draw.integers(110), len(data) - 1)] ^= 1 + (
            draw.integers(255))
        path.write_bytes(data)
        try:
            read = feature_statistics.load_statistics(path)
        except ValueError as error:
            refusals += 1
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        for key in feature_statistics.ARRAYS if read else ():
            array = getattr(read, key)
            assert array is None or np.array_equal(array.numpy(), known()[key])
    assert refusals > 100


def test_pipes_and_devices_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(tmp_path / "socket.npz"))  # an absolute path may be too long
    for name in ("pipe.npz", "zero.npz", "socket.npz"):
        with pytest.raises(OSError, match=f"{name} is not an ordinary file"):
            feature_statistics.load_statistics(tmp_path / name)
    server.close()


def test_statistics_of_another_width_are_another_networks(tmp_path):
    np.savez(tmp_path / "a.npz", **known(network="digits classifier"))
    with pytest.raises(ValueError, match="number of features is 3, not 64; 2, not 196; 4, not 10"):
        feature_statistics.statistics_of(tmp_path / "a.npz", features.load("digits"))


def test_features_that_are_not_finite_are_refused():
    """Weights may be finite and yet too large, or a variance negative."""
    network = features.load("digits")
    network.conv1.bn.running_var.fill_(-1)
    with pytest.raises(ValueError, match="features of digits classifier are not finite"):
        feature_statistics.extract(np.zeros((2, 28, 28, 3), np.uint8), network)
    with pytest.raises(ValueError, match="images of 0 x 28 pixels"):
        feature_statistics.extract(np.zeros((2, 0, 28, 3), np.uint8), network)
