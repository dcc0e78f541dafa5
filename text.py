"""Text: a prompt becomes caption features, one vector a token, which PixArt's cross-attention reads
(Chen et al. 2023, "PixArt-alpha", https://arxiv.org/abs/2310.00426, section 2.3).

The small model's features need no weights: every word is a fixed pseudo-random vector, the same on
every machine.

    features, mask = text.hashed_words(["a red apple", ""])  # (2, 12, 128), (2, 12)

The official models use the encoder of T5 v1.1 XXL (Raffel et al. 2020,
https://arxiv.org/abs/1910.10683), here through the library transformers. It has 4.7 B parameters.
So all prompts are encoded first, their features are kept in a file, and the encoder is freed. A
prompt that is in the file needs neither T5 nor transformers.

    features, mask = text.encode(["a red apple"], file="captions.safetensors")  # (1, 120, 4096)

Notation: B prompts, L tokens at most, n tokens of one prompt, C channels of a token.
"""

import hashlib
import importlib
import json
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

import command
import hub
from cleaning import clean_caption

# ------------------------------------------------------------------------------------------------
# Hashed words


def hashed_words(prompts, tokens=12, channels=128):
    """A list of B prompts -> features (B, tokens, channels) float32 and mask (B, tokens) bool, True
    for a word; the rest of the features is 0.

    Each word is one token. Words are lower-cased; anything but a letter or a digit ends a word. The
    vector of a word does not depend on its place, so for cross-attention the caption is a set of
    words. An empty prompt has no words: its mask is all False, which means the null caption. So is
    that of a prompt of signs only, with a warning. Words beyond `tokens` are cut, with a warning.
    Raises ValueError for text that is none (see `check`).
    """
    features = np.zeros((len(prompts), tokens, channels), np.float32)
    mask = np.zeros((len(prompts), tokens), bool)
    for b, prompt in enumerate(prompts):
        check(prompt)
        words = re.findall(r"[^\W_]+", prompt.lower())
        if prompt.strip() and not words:
            warn_of_nothing(prompt, "no word of it is understood")
        if len(words) > tokens:
            warn_of_cut(prompt, tokens, " ".join(words[tokens:]))
        for j, word in enumerate(words[:tokens]):
            features[b, j] = word_vector(word, channels)
            mask[b, j] = True
    return torch.from_numpy(features), torch.from_numpy(mask)


def word_vector(word, channels):
    """A word -> its vector (channels,): float32 N(0, 1) numbers from numpy's Philox generator. Its
    key is the first 16 bytes of the word's SHA-256, read as two little-endian numbers."""
    # Python's own hash() differs from process to process; SHA-256 is the same everywhere.
    key = np.frombuffer(hashlib.sha256(word.encode()).digest()[:16], "<u8")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(channels, np.float32)


def check(prompt):
    """Raises ValueError for a prompt with half a character, which UTF-8 cannot write. So Python
    reads the bytes of a command line that are no UTF-8."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(f'prompt "{shortened(prompt)}" is not a text in UTF-8')


def warn_of_cut(prompt, tokens, cut):
    """Warns that a prompt has more than `tokens` tokens and that its end, `cut`, is ignored."""
    warnings.warn(f'prompt "{shortened(prompt)}" is over {tokens} tokens, cut: '
                  f'"{shortened(cut, 200)}"', stacklevel=3)


def warn_of_nothing(prompt, why):
    """Warns that a prompt that is not empty is drawn as if it were."""
    warnings.warn(f'prompt "{shortened(prompt)}": {why}, so it is drawn like an empty one',
                  stacklevel=3)


def shortened(prompt, length=40):
    return prompt if len(prompt) <= length else prompt[:length] + "..."


# ------------------------------------------------------------------------------------------------
# T5 features

T5_XXL = "DeepFloyd/t5-v1_1-xxl"


def encode(prompts, model=T5_XXL, max_length=120, device=None, dtype=None, file=None, clean=False):
    """T5 features of B prompts, in their order -> features (B, L, C) float32 and mask (B, L) bool,
    True for a token; the rest of the features is 0. L is `max_length`; C is 4096 for T5 XXL.

    The mask of an empty prompt is all False, which means the null caption. Arguments, errors and
    warnings are those of `encode_each`.
    """
    each = encode_each(prompts, model, max_length, device, dtype, file, clean)
    features = torch.zeros(len(prompts), max_length, each[0].shape[1] if each else 0)  # (B, L, C)
    mask = torch.zeros(len(prompts), max_length, dtype=torch.bool)  # (B, L)
    for b, prompt in enumerate(prompts):
        n = len(each[b]) if prepare(prompt, clean) else 0
        features[b, :n] = each[b][:n]
        mask[b, :n] = True
    return features, mask


def encode_each(
    prompts, model=T5_XXL, max_length=120, device=None, dtype=None, file=None, clean=False
):
    """T5 features of B prompts, in their order, without padding -> a list of B tensors (n, C).
    Equal prompts are encoded once. For very many prompts, call this once, which fills the file, and
    then `encode` on one batch at a time.

    Args:
        model: a name at Hugging Face, or a folder, also that of a pipeline of diffusers, with
            text_encoder/ and tokenizer/ in it.
        max_length: tokens at most, with the closing </s> that T5 was trained with: 120 for
            PixArt-alpha, 300 for Sigma. The end of a longer prompt is cut, with a warning when it
            is encoded.
        device: by default the first of cuda, mps and cpu that there is.
        dtype: of the encoder, by default bfloat16 on a GPU and float32 on the CPU.
        file: a .safetensors file (see `read_kept`). New features are added to it; if the encoding
            is interrupted, what was done is kept.
        clean: apply `clean_caption`, as the official code of PixArt-alpha does. Without it prompts
            are only stripped, as in that of Sigma.

    Raises ValueError if transformers or what it needs is not installed, or `file` is damaged;
    ConnectionError if there are no weights and no network. A prompt of which cleaning leaves
    nothing is the empty one, with a warning.
    """
    texts = [prepare(prompt, clean) for prompt in prompts]
    for prompt, text in zip(prompts, texts, strict=True):
        if prompt.strip() and not text:
            warn_of_nothing(prompt, "cleaning leaves nothing of it (--raw-captions does not clean)")
    keys = [key_of(model, max_length, text) for text in texts]
    kept = read_kept(file, keys, max_length) if file else {}
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in kept}
    if missing:
        if file:
            command.check_writable(file)
        new = {}
        encoded = run_t5(list(missing.values()), model, max_length, device, dtype)
        try:
            for key, features in zip(missing, encoded, strict=True):
                new[key] = features
        finally:  # after an interruption too
            if file and new:
                append_kept(file, new)
        kept.update(new)
    return [kept[key] for key in keys]


@torch.no_grad()
def null_caption(model=T5_XXL, max_length=120, device=None, dtype=None, file=None):
    """T5 features of the empty prompt at all L places, padding included -> (L, C).

    PixArt-Sigma uses them for "no caption". So do weights in the layout of diffusers, which hold no
    null caption. Arguments, file and errors are those of `encode_each`.
    """
    key = key_of(model, max_length, None)
    kept = read_kept(file, [key], max_length) if file else {}
    if key in kept:
        return kept[key]
    if file:
        command.check_writable(file)
    tokenizer, encoder, device = place_t5(model, device, dtype)
    ids = tokenizer("", padding="max_length", max_length=max_length, return_tensors="pt").to(device)
    features = encoder(ids.input_ids, ids.attention_mask).last_hidden_state[0].cpu()  # (L, C)
    del encoder
    free_memory(device)
    if file:
        append_kept(file, {key: features})
    return features


def prepare(prompt, clean):
    """A prompt -> the text that the tokenizer gets. Raises ValueError, see `check`."""
    check(prompt)
    return clean_caption(prompt) if clean else prompt.strip()


@torch.no_grad()
def run_t5(texts, model, max_length, device=None, dtype=None, batch_size=8):
    """Yields the features (n, C) of each text, on the CPU, in the encoder's dtype."""
    tokenizer, encoder, device = place_t5(model, device, dtype)
    for first in command.progress(range(0, len(texts), batch_size), desc="T5", unit="batch"):
        tokens = [tokenize(tokenizer, t, max_length) for t in texts[first : first + batch_size]]
        lengths = [len(ids) for ids in tokens]
        # Padded to the longest of the batch, not to L: on a CPU 120 tokens take ten times as long.
        # The value of the padding does not matter, as the mask hides it from every token.
        ids = pad_sequence(tokens, batch_first=True).to(device)  # (batch, longest)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(device)
        features = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.cpu()
        for row, n in zip(features, lengths, strict=True):  # row (longest, C)
            yield row[:n].clone()  # a view would keep the whole batch in memory
    del encoder  # now, so that the line below finds its memory free
    free_memory(device)


def tokenize(tokenizer, text, max_length):
    """A text -> token numbers (n,) with the closing </s>, n at most `max_length`."""
    ids = tokenizer(text, verbose=False).input_ids
    if len(ids) > max_length:
        warn_of_cut(text, max_length, tokenizer.decode(ids[max_length - 1 : -1]))
        ids = ids[: max_length - 1] + ids[-1:]  # the closing </s> stays
    return torch.tensor(ids)


def place_t5(model, device, dtype):
    """-> the tokenizer, the encoder on its device, the device. Defaults are those of
    `encode_each`."""
    device = torch.device(device or command.devices()[0])
    usual = torch.float32 if device.type == "cpu" else torch.bfloat16
    tokenizer, encoder = load_t5(model, dtype or usual)
    return tokenizer, encoder.eval().to(device), device


def load_t5(model, dtype):
    """-> the tokenizer and the encoder. Raises ValueError or ConnectionError, see `encode_each`."""
    try:
        import transformers  # takes seconds

        transformers.utils.logging.set_verbosity_error()  # what matters is raised
        kinds = transformers.AutoTokenizer, transformers.T5EncoderModel
    except Exception as error:  # if parts of it are broken, it raises RuntimeError
        missing = isinstance(error, ModuleNotFoundError) and error.name == "transformers"
        raise ValueError(
            'new prompts for this model need the T5 encoder: pip install "transformers>=4.56" '
            "sentencepiece protobuf" if missing else
            f"transformers is installed, but does not load ({hub.reason(error)}): mend it, or use "
            "a file of kept features with these prompts"
        ) from error
    try:
        return load_parts(model, dtype, *kinds)
    except Exception as error:  # the library raises many kinds, some with many lines
        missing = missing_modules(model)
        if missing and not isinstance(error, OSError):
            raise ValueError(f"the tokenizer of {model} cannot be read without: "
                             f"pip install {' '.join(missing)}") from error
        advice = ("a folder must hold T5's config.json, weights and tokenizer"
                  if Path(model).exists() else hub.advice(error))
        raise ConnectionError(
            f"could not load the text encoder {model} ({hub.reason(error)}): {advice}, or give a "
            "folder that holds it, or a file of kept features with these prompts"
        ) from error


def load_parts(model, dtype, tokenizer, encoder):
    """The tokenizer and the encoder by their classes: from a folder or the cache, which take no
    network, else from the hub, if it answers."""
    words, layers = places_of(model)

    def load(**flags):
        return (tokenizer.from_pretrained(words, **flags),
                encoder.from_pretrained(layers, dtype=dtype, **flags))

    try:
        return load(local_files_only=True)
    except Exception as error:
        if Path(model).exists() or (missing_modules(model) and not isinstance(error, OSError)):
            raise
    hub.probe(str(model), "config.json")
    return load()


def places_of(model):
    """Where the tokenizer and the encoder are: two folders of a pipeline, or both in one place."""
    if (Path(model) / "text_encoder").is_dir():
        return Path(model) / "tokenizer", Path(model) / "text_encoder"
    return model, model


def missing_modules(model):
    """What T5's own tokenizer file, spiece.model, needs and is not installed, by the names for pip.
    A folder may hold another, tokenizer.json."""
    folder, missing = Path(places_of(model)[0]), []
    if folder.exists() and ((folder / "tokenizer.json").exists()
                            or not (folder / "spiece.model").exists()):
        return missing
    for package, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")):
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(package)
    return missing


def free_memory(device):
    """Returns the memory of deleted tensors to the GPU; torch would keep it for itself."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


# ------------------------------------------------------------------------------------------------
# The file of kept features
#
# A .safetensors file with one tensor (n, C) a prompt: the features of its real tokens, in the
# encoder's dtype, so that the next run gets the same bits. With T5 XXL a token takes 8,192 bytes in
# bfloat16, twice that in float32: 98 kB for a prompt of 12 tokens in bfloat16, where (120, 4096) in
# float32 would take 2 MB.


def key_of(model, max_length, text):
    """The name of a prompt's features in the file. `text` is the prompt after `prepare`, so that a
    cleaned prompt and a raw one never mix; None means the null caption with its padding."""
    return json.dumps([str(model), max_length, text], ensure_ascii=False)


def read_kept(file, keys, max_length):
    """The features in `file` of those `keys` that it has: {key: (n, C)}. Raises ValueError if the
    file is damaged or holds something else, OSError if it is not an ordinary file."""
    command.check_ordinary(file)
    if not Path(file).exists():
        return {}
    try:
        with safe_open(file, framework="pt") as kept:  # reads only the tensors asked for
            features = {key: kept.get_tensor(key) for key in set(keys) & set(kept.keys())}
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(f"{file} is not a whole file of caption features: {hub.reason(error)}"
                         ) from error
    for key, value in features.items():
        *_, prompt = json.loads(key)
        name = "the null caption" if prompt is None else f'"{shortened(prompt)}"'
        rows = [max_length] if prompt is None else range(1, max_length + 1)
        if value.dim() != 2 or len(value) not in rows or not value.is_floating_point():
            raise ValueError(f"{file}: features of {name} must be (n, channels) numbers for up to "
                             f"{max_length} tokens, not {value.dtype} {tuple(value.shape)}")
        if not value.float().isfinite().all():
            raise ValueError(f"{file}: features of {name} hold NaN or infinite numbers: the text "
                             "encoder overflowed, or the file is damaged")
    if len({value.shape[1] for value in features.values()}) > 1:
        raise ValueError(f"{file} holds features of different widths for these prompts")
    return features


def append_kept(file, new):
    """Adds features {key: (n, C)} to `file`. It is written anew and replaced at once, so an
    interruption loses nothing."""
    old = load_file(file) if Path(file).exists() else {}
    with command.replacing(file) as temporary:
        save_file({**old, **new}, temporary)
