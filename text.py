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
import html
import json
import re
import unicodedata
import urllib.parse
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import command

# ------------------------------------------------------------------------------------------------
# Hashed words


def hashed_words(prompts, tokens=12, channels=128):
    """A list of B prompts -> features (B, tokens, channels) float32 and mask (B, tokens) bool, True
    for a word; the rest of the features is 0.

    Each word is one token. Words are lower-cased; anything but a letter or a digit ends a word. The
    vector of a word does not depend on its place, so for cross-attention the caption is a set of
    words. An empty prompt has no words: its mask is all False, which means the null caption. Words
    beyond `tokens` are cut, with a warning.
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
    """A word -> its vector (channels,): float32 N(0, 1) numbers from numpy's Philox generator. Its
    key is the first 16 bytes of the word's SHA-256, read as two little-endian numbers."""
    # Python's own hash() differs from process to process; SHA-256 is the same everywhere.
    key = np.frombuffer(hashlib.sha256(word.encode()).digest()[:16], "<u8")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(channels, np.float32)


def warn_of_cut(prompt, tokens, cut):
    """Warns that a prompt has more than `tokens` tokens and that its end, `cut`, is ignored."""
    start = prompt if len(prompt) <= 40 else prompt[:40] + "..."
    warnings.warn(f'prompt "{start}" is over {tokens} tokens, cut: "{cut}"', stacklevel=3)


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
        model: a name at Hugging Face or a folder.
        max_length: tokens at most, with the closing </s> that T5 was trained with: 120 for
            PixArt-alpha, 300 for Sigma. The end of a longer prompt is cut, with a warning when it
            is encoded.
        device: by default cuda if there is one.
        dtype: of the encoder, by default bfloat16 on cuda and float32 on the CPU.
        file: a .safetensors file (see `read_kept`). New features are added to it; if the encoding
            is interrupted, what was done is kept.
        clean: apply `clean_caption`. Without it prompts are only stripped and lower-cased, as in
            the official code.

    Raises ValueError if transformers is not installed or `file` is damaged, ConnectionError if
    there are no weights and no network.
    """
    texts = [prepare(prompt, clean) for prompt in prompts]
    keys = [key_of(model, max_length, text) for text in texts]
    kept = read_kept(file, keys) if file else {}
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
    kept = read_kept(file, [key]) if file else {}
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
    """A prompt -> the text that the tokenizer gets."""
    return clean_caption(prompt) if clean else prompt.lower().strip()


@torch.no_grad()
def run_t5(texts, model, max_length, device=None, dtype=None, batch_size=8):
    """Yields the features (n, C) of each text, on the CPU, in the encoder's dtype."""
    tokenizer, encoder, device = place_t5(model, device, dtype)
    for first in tqdm(range(0, len(texts), batch_size), "T5", unit="batch", disable=None):
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
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    usual = torch.float32 if device.type == "cpu" else torch.bfloat16
    tokenizer, encoder = load_t5(model, dtype or usual)
    return tokenizer, encoder.eval().to(device), device


def load_t5(model, dtype):
    """-> the tokenizer and the encoder. Raises ValueError or ConnectionError, see `encode_each`."""
    try:
        from transformers import AutoTokenizer, T5EncoderModel  # takes seconds
    except ImportError as error:
        raise ValueError(
            "new prompts for this model need the T5 encoder: "
            'pip install "transformers>=4.56" sentencepiece protobuf'
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        return tokenizer, T5EncoderModel.from_pretrained(model, dtype=dtype)
    except Exception as error:  # the library raises many kinds, some with many lines
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConnectionError(
            f"could not load the text encoder {model} ({reason}): with a network it is downloaded "
            "on first use; without one, give a folder that holds it, or a file of kept features "
            "with these prompts"
        ) from error


def free_memory(device):
    """Returns the memory of deleted tensors to the GPU; torch would keep it for itself."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------
# The file of kept features
#
# A .safetensors file with one tensor (n, C) a prompt: the features of its real tokens, in the
# encoder's dtype, so that the next run gets the same bits. With T5 XXL a token takes 8,192 bytes in
# bfloat16, twice that in float32: 98 kB for a prompt of 12 tokens in bfloat16, where (120, 4096) in
# float32 would take 2 MB.


def key_of(model, max_length, text):
    """The name of a prompt's features in the file. `text` is the prompt after `prepare`; None means
    the null caption with its padding."""
    return json.dumps([str(model), max_length, text], ensure_ascii=False)


def read_kept(file, keys):
    """The features in `file` of those `keys` that it has: {key: (n, C)}. Raises ValueError if the
    file is damaged."""
    if not Path(file).exists():
        return {}
    try:
        with safe_open(file, framework="pt") as kept:  # reads only the tensors asked for
            return {key: kept.get_tensor(key) for key in set(keys) & set(kept.keys())}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole file of caption features: {error}") from error


def append_kept(file, new):
    """Adds features {key: (n, C)} to `file`. It is written anew and replaced at once, so an
    interruption loses nothing."""
    old = load_file(file) if Path(file).exists() else {}
    with command.replacing(file) as temporary:
        save_file({**old, **new}, temporary)


# ------------------------------------------------------------------------------------------------
# Caption cleaning
#
# Regular expressions and what replaces them, in the order and with the effect of the official code.

ADDRESSES = [
    # https: and www: with the character after them, and names like example.com/page
    (r"\b(?:(?:https?|www):(?:/{1,3}|[a-z0-9%])"
     r"|[a-z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@))", ""),
]  # fmt: skip
SYMBOLS = [
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # Chinese characters and their neighbours, Katakana extensions
    # every dash of Unicode, and every quotation mark, becomes the one of the keyboard
    (r"[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
     r"\ufe31\ufe32\ufe58\ufe63\uff0d]+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # a time at the end
    (r"\\n", " "),  # a line break written as two characters
    (r"#\d{1,3}\b|#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),  # long numbers
    (r"\S+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)", ""),  # file names
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    ("[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\\[\\]{}|\\\\/*]+",
     " "),
    (r"\s+\.\s+", " "),
]  # fmt: skip
ADVERTISING = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article numbers: ab1234, a1b, 12cd34
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (r"\b(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # sizes: 30x40
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),  # a space after punctuation
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),  # quotation marks around everything
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]


def clean_caption(caption):
    """Cleans a caption from the web as DeepFloyd IF and PixArt's training did before T5. Addresses,
    markup, file names, article numbers and advertising are removed; letters become lower-case;
    dashes and quotation marks are of one kind.

    Two steps of the official code use libraries that are not needed here. Instead of BeautifulSoup,
    Python's own HTML parser removes the markup. ftfy repairs text of a wrong encoding; here such
    text stays, and only letters and their accents are composed.
    """
    for _ in range(2):  # twice, as in the official code: what one pass uncovers, the next removes
        caption = urllib.parse.unquote_plus(caption).strip().lower()
        caption = substitute(caption.replace("<person>", "person"), ADDRESSES)
        caption = substitute(without_markup(caption), SYMBOLS)
        if len(re.findall("[-_]", caption)) > 3:  # this-is-my-cute-cat
            caption = re.sub("[-_]", " ", caption)
        caption = unicodedata.normalize("NFC", caption)
        caption = html.unescape(html.unescape(caption)).strip()
        caption = substitute(caption, ADVERTISING).strip()
    return caption


def substitute(caption, rules):
    """Applies a list of (pattern, replacement), one after another."""
    for pattern, replacement in rules:
        caption = re.sub(pattern, replacement, caption)
    return caption


def without_markup(caption):
    """The text between HTML tags; character references such as &amp; become characters."""
    pieces = []
    parser = HTMLParser()
    parser.handle_data = pieces.append
    parser.feed(caption)
    parser.close()
    return "".join(pieces)
