"""Text: a prompt becomes caption features, one vector a token, that PixArt's cross-attention reads.

The small model's features need no weights: every word is a fixed pseudo-random vector, the same
on every machine.

    features, mask = text.hashed_words(["red apple", ""])  # (2, 12, 128), (2, 12)

Letters: B prompts, L tokens, C channels of a token.
"""

import hashlib
import re
import warnings

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------
# Hashed words


def hashed_words(prompts, tokens=12, channels=128):
    """Each lower-cased word is one token; anything but a letter or a digit ends a word.

    A list of B prompts -> features (B, tokens, channels) float32 and mask (B, tokens) bool, True
    for a word; the rest is zeros. An empty prompt has no words: its mask is all False, which stands
    for the null caption. Words beyond `tokens` are cut, and a warning says which. A word's place
    leaves no trace in its vector: to cross-attention such a caption is a set of words.
    """
    features = np.zeros((len(prompts), tokens, channels), np.float32)
    mask = np.zeros((len(prompts), tokens), bool)
    for b, prompt in enumerate(prompts):
        words = re.findall(r"[^\W_]+", prompt.lower())
        if len(words) > tokens:
            warn_of_cut(prompt, tokens, " ".join(words[tokens:]))
        for j, word in enumerate(words[:tokens]):
            features[b, j] = word_vector(word, channels)
            mask[b, j] = True
    return torch.from_numpy(features), torch.from_numpy(mask)


def word_vector(word, channels):
    """A word -> its vector (channels,): float32 N(0, 1) numbers from numpy's Philox generator, the
    key being the first 16 bytes of the word's SHA-256 as two little-endian numbers."""
    key = np.frombuffer(hashlib.sha256(word.encode()).digest()[:16], "<u8")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(channels, np.float32)


def warn_of_cut(prompt, tokens, cut):
    """Warns that a prompt has more than `tokens` tokens, and that `cut` is lost."""
    start = prompt if len(prompt) <= 40 else prompt[:40] + "..."
    warnings.warn(f'prompt "{start}" is over {tokens} tokens, cut: "{cut}"', stacklevel=3)
