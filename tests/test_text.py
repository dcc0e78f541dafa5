"""Prompts to caption features: hashed words."""

import hashlib
import warnings

import numpy as np
import pytest
import torch

import text

# ------------------------------------------------------------------------------------------------
# Hashed words

STORED = {  # the first four and the last of 128 numbers, as made once, on x86-64 with numpy 2.4
    "apple": [-0.5430479, -0.33944738, -1.6320665, -2.2964404, 0.4357142],
    "face": [-0.9651901, -0.671894, -0.89545363, -0.9022351, 2.2480595],
    "3": [0.099368066, -0.7973179, -0.4679084, -1.5576651, -1.4305867],
    "größe": [-1.532482, -2.0049298, 0.26561213, -1.010336, 0.2912672],
}


def test_hashed_words_are_the_stored_numbers():
    """What the shipped model was trained with. A change here makes its captions meaningless."""
    features, _ = text.hashed_words([" ".join(STORED)])
    for vector, stored in zip(features[0], STORED.values(), strict=False):
        np.testing.assert_allclose(vector[[0, 1, 2, 3, 127]], stored, rtol=1e-6)


def test_the_key_of_a_word_is_the_start_of_its_sha256():
    value = int(hashlib.sha256("straße".encode()).hexdigest()[:32], 16).to_bytes(16, "big")
    key = int.from_bytes(value, "little")  # numpy takes the low 64 bits first
    expected = np.random.Generator(np.random.Philox(key=key)).standard_normal(7, np.float32)
    assert text.hashed_words(["STRASSE straße"], 2, 7)[0][0, 1].tolist() == expected.tolist()


def test_words_are_lower_case_letters_and_digits():
    prompts = ["Cat, Dog_3!", "cat dog 3", "3  dog\ncat", "Äpfel—ÄPFEL"]
    features, mask = text.hashed_words(prompts, 5)
    assert features.shape == (4, 5, 128) and features.dtype == torch.float32
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True] * 3 + [False] * 2] * 3 + [[True] * 2 + [False] * 3]
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0, :3].flip(0), features[2, :3])
    assert torch.equal(features[3, 0], features[3, 1])
    assert not features[~mask].any()


@pytest.mark.parametrize("prompt", ["", "  ", "!?"])
def test_a_prompt_without_words_is_the_null_caption(prompt):
    features, mask = text.hashed_words([prompt, "cat"], 3, 8)
    assert not mask[0].any() and not features[0].any() and mask[1].tolist() == [True, False, False]


def test_vectors_of_words_are_standard_normal_and_unrelated():
    words = [f"word{n}" for n in range(1000)]
    vectors = text.hashed_words([" ".join(words)], 1000)[0][0].double()  # (1000, 128)
    assert abs(vectors.mean()) < 4 / np.sqrt(vectors.numel())
    assert abs(vectors.std() - 1) < 4 / np.sqrt(2 * vectors.numel())
    cosine = torch.nn.functional.normalize(vectors, dim=1)
    cosine = cosine @ cosine.T - torch.eye(1000)
    assert cosine.abs().max() < 5.5 / np.sqrt(128)  # 5.5 deviations, 499,500 pairs


def test_a_prompt_over_the_limit_warns_of_what_is_cut():
    with pytest.warns(match='"One two, three four!" is over 2 tokens, cut: "three four"'):
        cut, _ = text.hashed_words(["One two, three four!"], 2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, _ = text.hashed_words(["one two"], 2, 8)
    assert torch.equal(cut, whole)
