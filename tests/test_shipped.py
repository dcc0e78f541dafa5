"""The shipped data sets and how they are split."""

import numpy as np
import pytest
import torch

import shipped


def test_held_out_digits_are_the_last_100_of_each_class():
    images, labels = shipped.digits("train")
    held_out, held_out_labels = shipped.digits("held-out")
    assert images.shape == (4000, 1, 28, 28) and held_out.shape == (1000, 1, 28, 28)
    assert labels.bincount().tolist() == [400] * 10
    assert held_out_labels.bincount().tolist() == [100] * 10
    assert images.min() == 0 and images.max() == 255
    trained = {image.numpy().tobytes() for image in images}
    assert not any(image.numpy().tobytes() in trained for image in held_out)
    every, every_label = shipped.digits("all")
    with np.load(shipped.DATA / "digits28.npz") as data:
        assert np.array_equal(every[:, 0].numpy(), data["images"])
        assert np.array_equal(every_label.numpy(), data["labels"])
    threes = every[every_label == 3]
    assert torch.equal(held_out[held_out_labels == 3], threes[400:])


def test_folds_hold_out_disjoint_hundreds_of_each_class():
    _, labels = shipped.digits("all")
    masks = torch.stack([shipped.held_out(labels, fold) for fold in range(5)])
    assert masks.sum(0).eq(1).all()
    assert all(labels[mask].bincount().tolist() == [100] * 10 for mask in masks)


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="unknown part test: use all, train, held-out"):
        shipped.digits("test")


def test_the_emoji_that_the_model_learned_come_first():
    images, captions = shipped.emoji()
    assert images.shape == (1026, 3, 32, 32) and len(captions) == 1026
    every, every_caption = shipped.emoji(every=True)
    assert every.shape == (1911, 3, 32, 32) and every_caption[:1026] == captions
    assert torch.equal(every[:1026], images)
    assert "red apple" in captions and "flag: japan" not in captions
    assert sorted(shipped.emoji_prompts()) == sorted(captions) != shipped.emoji_prompts()


def test_prompts_from_a_file(tmp_path):
    assert len(shipped.read_prompts()) >= 100
    (tmp_path / "a.txt").write_text("a dog\n\nein \u00c4ffchen\n", encoding="utf-8")
    assert shipped.read_prompts(tmp_path / "a.txt") == ["a dog", "ein \u00c4ffchen"]
    (tmp_path / "b.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="b.txt is not a text in UTF-8"):
        shipped.read_prompts(tmp_path / "b.txt")
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts: write one a line"):
        shipped.read_prompts(tmp_path / "a.txt")
