"""Caption cleaning, as DeepFloyd IF and PixArt-alpha clean captions from the web before T5.

    clean_caption("<b>A</b> red   cat &amp; https://cats.com")      # "a red cat"
"""

import collections
import html.entities
import math
import re
import unicodedata
import urllib.parse
from html.parser import HTMLParser

# ------------------------------------------------------------------------------------------------
# Regular expressions and what replaces them, in the order and with the effect of the official code.
# Their time grows with the length, also for 20,000 characters without a space: the official
# patterns for addresses and file names go back from every place of a word, these from its first
# only, as there is a match from some place of it only if there is one from the first. So they have
# a second alternative, which takes such a word and puts it back ("\1").

DOMAIN = r"[a-z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"  # example.com/page


def address(scheme):
    """The rule for addresses: `scheme`, a colon and a character, and domains."""
    start = rf"{scheme}:(?:/{{1,3}}|[a-z0-9%])"
    return rf"\b(?:{start}|{DOMAIN})|\b((?:(?!{scheme}:)[a-z0-9.-])+)", r"\1"


ADDRESSES = [address("https?"), address("www")]
SYMBOLS = [
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # Chinese characters and their neighbours, Katakana extensions
    # every dash of Unicode, and every quotation mark, becomes the one of the keyboard
    (r"[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
     r"\ufe31\ufe32\ufe58\ufe63\uff0d]+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # a time at the end
    (r"\\n", " "),  # a line break written as two characters
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),  # long numbers
    (r"\S+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)|(\S+)", r"\1"),  # file names
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    ("[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\\[\\]{}|\\\\/*]+",
     " "),
    (r"(?<!\s)\s+\.\s+", " "),
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
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),
    (r"\b\d+(?:\.\d*)?[x\u0445\u00d7]\d+(?:\.\d*)?\b", ""),  # sizes: 30x40
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),  # a space after punctuation
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),  # quotation marks around everything
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]


def clean_caption(caption):
    """Addresses, markup, file names, article numbers and advertising are removed; letters become
    lower-case; dashes and quotation marks are of one kind.

    Two steps of the official code use libraries that are not needed here: `without_markup` has the
    effect of BeautifulSoup, `repaired` that of ftfy, except that text read in a wrong encoding
    stays as it is.
    """
    for _ in range(2):  # twice, as in the official code: what one pass uncovers, the next removes
        caption = urllib.parse.unquote_plus(caption).strip().lower()
        caption = substitute(caption.replace("<person>", "person"), ADDRESSES)
        caption = substitute(without_markup(caption), SYMBOLS)
        if len(re.findall("[-_]", caption)) > 3:  # this-is-my-cute-cat
            caption = re.sub("[-_]", " ", caption)
        caption = unescaped(unescaped(repaired(caption)))
        caption = substitute(caption, ADVERTISING).strip()
    return caption


def substitute(caption, rules):
    """Applies a list of (pattern, replacement), one after another."""
    for pattern, replacement in rules:
        caption = re.sub(pattern, replacement, caption)
    return caption


def unescaped(caption):
    """Character references such as &amp; become characters; numbers too long for one stay."""
    try:
        return html.unescape(caption)
    except ValueError:  # Python reads no number of more than 4,300 digits
        return caption


CONTROL = [*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF,
           *range(0xFFF9, 0xFFFD)]
LIGATURES = "\u0132\u0133\u0149\u01f1\u01f2\u01f3\u01c4\u01c5\u01c6\u01c7\u01c8\u01c9\u01ca\u01cb"
REPAIRS = {
    **dict.fromkeys(CONTROL),  # None: removed
    **{code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(128, 160)},
    **{ord(c): unicodedata.normalize("NFKC", c) for c in LIGATURES + "\u01cc\ufb00\ufb01\ufb02"},
    **{ord(c): unicodedata.normalize("NFKC", c) for c in "\ufb03\ufb04\ufb06"}, 0xFB05: "\u017ft",
    # the full-width and half-width forms of East Asian text
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in (0x3000, *range(0xFF01, 0xFFF0))},
    **dict.fromkeys(map(ord, "\u02bc\u2018\u2019\u201a\u201b"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"'),
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),  # halves of characters
}


def repaired(caption):
    """Ligatures, widths and quotation marks of one kind, without control characters, accents on
    their letters: what ftfy does, but for text that was read in a wrong encoding."""
    for _ in range(2):  # once more for what the first time made
        caption = unicodedata.normalize("NFC", caption.translate(REPAIRS))
    return caption


# ------------------------------------------------------------------------------------------------
# Markup


def without_markup(caption):
    """The text between HTML tags; character references such as &amp; become characters."""
    # Without an end there is no tag. Some versions of Python leave out the rest of the text there.
    end = caption.rfind(">") + 1
    rest = re.sub("<[a-zA-Z/!?][^<]*<|<", lambda part: html.escape(part[0], False), caption[end:])
    markup = Markup()
    markup.feed(caption[:end] + rest)
    markup.close()
    markup.end_text()
    return "".join(markup.pieces)


class Markup(HTMLParser):
    """Collects the text of an HTML document in `pieces`, by the rules of BeautifulSoup: not that
    of scripts, styles, templates and the readings of ruby characters; text that is only space is
    one space. (The methods have the names that Python's parser calls.)"""

    EMPTY = {"area", "base", "br", "col", "embed", "hr", "img", "input", "keygen", "link",
             "menuitem", "meta", "param", "source", "track", "wbr", "basefont", "bgsound",
             "command", "frame", "image", "isindex", "nextid", "spacer"}
    HIDDEN = {"rt", "rp", "style", "script", "template"}

    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.pieces, self.run = [], []  # of text; of the text since the last tag
        self.tags, self.count = [], collections.Counter()  # that are open
        self.unclosed = math.inf  # the first place from which a comment does not end

    def handle_data(self, data):
        self.run.append(data)

    def handle_entityref(self, name):
        known = html.entities.html5
        self.run.append(known.get(name) or known.get(name + ";") or "&" + name)

    def handle_charref(self, name):
        self.run.append(unescaped(f"&#{name};"))

    def end_text(self):
        """Ends a text: it goes into `pieces` if it is shown."""
        text, self.run = "".join(self.run), []
        if text and not text.strip(" \n\t\f\r") and not self.count["pre"] + self.count["textarea"]:
            text = "\n" if "\n" in text else " "
        if not any(self.count[tag] for tag in self.HIDDEN):
            self.pieces.append(text)

    def handle_starttag(self, tag, attributes):
        self.end_text()
        if tag not in self.EMPTY:
            self.tags.append(tag)
            self.count[tag] += 1

    def handle_startendtag(self, tag, attributes):
        self.end_text()

    def handle_endtag(self, tag):
        self.end_text()
        while self.count[tag]:
            last = self.tags.pop()
            self.count[last] -= 1
            if last == tag:
                break

    def handle_comment(self, data):
        self.end_text()

    handle_decl = handle_pi = handle_comment

    def unknown_decl(self, data):
        self.end_text()
        if data.upper().startswith("CDATA["):
            self.pieces.append(data[6:])

    def parse_comment(self, i, report=True):
        return self.once(super().parse_comment, i, report)

    def parse_marked_section(self, i, report=1):
        """In Python's parser a section that HTML does not know ends in an AssertionError, up to
        3.13.0. Here it is a comment, as in HTML 5."""
        try:
            return self.once(super().parse_marked_section, i, report)
        except AssertionError:
            self.end_text()
            return self.rawdata.find(">", i) + 1 or -1

    def once(self, parse, i, report):
        """parse(i, report), -1 if there is no end; after the first of those none is looked for."""
        if i >= self.unclosed:
            return -1
        end = parse(i, report)
        if end < 0:
            self.unclosed = i
        return end
