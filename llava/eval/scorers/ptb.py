r"""Penn Treebank tokens for caption scores, without Java.

Special here: published CIDEr is worked out on the output of Stanford's PTBTokenizer (CoreNLP 3.4.1,
`-preserveLines -lowerCase`, as pycocoevalcap calls it) less its punctuation tokens. This module
gives the same tokens: at each place the longest match of the rules below wins, of equals the first.
It was made by asking that program what it returns, not from its source; docs/Evaluation.md says on
which texts the two were compared.

Almost everything is decided between two spaces, so words are cached and a caption costs a few
look-ups.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

DROPPED = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--",
     "...", ";")
)  # fmt: skip
"""What pycocoevalcap drops. It compares capitals: "-lrb-", lower-cased before, stays a token."""


def _words(text: str) -> list[str]:
    return text.split()


ABBREVIATIONS = _words("""
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg
    blvd brig bros calif capt cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec
    dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov govs hon inc ind insp
    intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn
    mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc
    ppte ppty pres prof profs pte ptes pty ptys pvt rd rep reps rev rt sen sens sep sept seq
    sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs treas tue tues univ va vs vt
    wed wis wisc wm wyo
""")
"""Words that keep a period behind them."""
CAPITALISED = _words("""
    ark az del ill la mass miss ore pa tex wash
""")
"""The same, with a capital only."""
NUMBERED = _words("no nos fig figs art op pp prop ph")
"""The same, before a number only."""
STARTERS = _words(
    """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last
    Many More Now Once One Other Our She Since So Some Such That The Their Then There These They
    This We What When While Yet You
    """
)
"""In front of these a single letter with a period ends a sentence."""
EXTENSIONS = _words(
    "bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php "
    "pl png ppt ps py sql tar txt wav x xml zip"
)
WITH_APOSTROPHE = _words(
    "c'mon c'est e'er ne'er hawai'i hallowe'en ma'am s'mores d'ye dunkin' somethin' ol' 'em "
    "'cause 'til 'till"
)

_SPACES = re.compile(r"[ \t\r\n\f\v\u0085\u1680\u2000-\u200a\u2028\u2029\u3000]+")
_INITIAL = re.compile(r"[a-z]\.")
_GLUE = "\u00a0"
_JOINED = (  # the only tokens with a space in them; they keep it as a no-break space
    (re.compile(r"(?<!\S)(\(\d{3}\)) (?=\d{3}-\d{4}(?!\w))"), rf"\1{_GLUE}"),
    (re.compile(r"(?<!\S)(\d{1,4}) (?=\d{1,4}/\d{1,4}(?![\w/-]))"), rf"\1{_GLUE}"),
)

# ----------------------------------------------------------------------------- parts of the rules
L = r"[^\W\d_¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]"
A = "[A-Za-z0-9]"
Q = "['’]"
NUM = r"(?:\d*(?:[.:,]\d+)+|\d+)"
WORD = rf"{L}(?:{L}|\d)*(?:[.!?]{L}(?:{L}|\d)*)*"
END = rf"(?!{L}|\d)"
NOT = rf"[nN]{Q}[tT]{END}"
PART = rf"(?:[dDoOlL]{Q}[A-Za-z]{{2,}}|(?:{L}|\d)+)"
HYPHENS = rf"{A}(?:{A}|[.,])*(?:-(?:{PART}|(?:[A-Za-z]\.)+[A-Za-z]\.))+"
JOINED = rf"{PART}(?:[-_]{PART})+"
SLASHED = rf"{A}+(?:-[A-Za-z]+){{0,2}}"


def _any(words: list[str]) -> str:
    return "|".join(re.escape(word).replace("'", Q) for word in sorted(words, key=len)[::-1])


Rule = tuple[re.Pattern[str], Callable[[str], list[str]]]


def _rule(pattern: str, make: Callable[[str], list[str]] = lambda text: [text]) -> Rule:
    return re.compile(pattern), make


def _split(place: int) -> Callable[[str], list[str]]:
    return lambda text: [text[:place], text[place:]]


def _plain_quote(text: str) -> list[str]:
    return [text.replace("’", "'")]


def _as(table: dict[str, str]) -> Callable[[str], list[str]]:
    return lambda text: [table[text.lower()]]


BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
CURRENCY = {"£": "#", "€": "$", "¢": "cents", "¤": "$"}
FRACTIONS = {
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "⅛": "1/8", "⅜": "3/8",
    "⅝": "5/8", "⅞": "7/8",
}  # fmt: skip
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'"}
QUOTES = {"“": "``", "”": "''", "‘": "`", "’": "'"}
MARKS = {
    "—": "--", "–": "--", "…": "...", '"': "''", "«": "``", "»": "''", "“": "``", "”": "''",
    "‘": "`",
}  # fmt: skip


def _brackets_in(text: str) -> list[str]:
    return [text.replace("(", "-lrb-").replace(")", "-rrb-")]


RULES: tuple[Rule, ...] = (
    # words and what hangs on them
    _rule(NOT, _plain_quote),
    _rule(rf"{Q}(?:[msdMSD]|re|ve|ll|RE|VE|LL|Re|Ve|Ll){END}", _plain_quote),
    _rule(rf"(?i:cannot|gonna|gotta|lemme|gimme|wanna){END}(?!{Q}{L})", _split(3)),
    _rule(rf"'(?i:tis|twas)(?={NOT}|$|[^A-Za-z0-9])", _split(2)),
    _rule(WORD),
    _rule(rf"(?i:{_any(WITH_APOSTROPHE)}){END}", _plain_quote),
    _rule(rf"(?i:qu{Q}){L}+", _plain_quote),
    _rule(rf"{Q}[nN](?:{Q}|(?=\s|$))", _plain_quote),
    _rule(rf"[dDoOlL]{Q}[A-Za-z]{{2,}}", _plain_quote),
    _rule(rf"[lLdDjJyY]{Q}(?={L})", _plain_quote),
    _rule(r"[A-Za-z](?:\.[A-Za-z])+\.?|[A-Za-z]\.|(?i:ph\.d)\.?"),
    _rule(rf"(?i:{_any(ABBREVIATIONS)})\."),
    _rule(rf"(?=[A-Z])(?i:{_any(CAPITALISED)})\."),
    _rule(rf"(?i:{_any(NUMBERED)})\.(?=\s?\d)"),
    _rule(HYPHENS, _plain_quote),
    _rule(JOINED, _plain_quote),
    _rule(rf"(?:{WORD}|{A}+|{HYPHENS}|{PART}|[A-Z]+(?:&[A-Z]+)+)\.(?=[,;:])", _plain_quote),
    _rule(rf"{SLASHED}(?:/{SLASHED}){{1,2}}"),
    _rule(r"[A-Z]+(?:&[A-Z]+)+"),
    _rule(rf"{A}+"),
    # numbers
    _rule(rf"[-+]?{NUM}"),
    _rule(rf"{Q}(?:\d\d$|\d0s(?!{L}|\d|'s))", _plain_quote),
    _rule(rf"\d{{1,4}}[-{_GLUE}]\d{{1,4}}/\d{{1,4}}"),
    _rule(rf"(?:\(\d{{3}}\){_GLUE}?)?\d{{3}}-\d{{4}}", _brackets_in),
    _rule(r"[A-Z]*\$"),
    _rule("[£€¢¤]", _as(CURRENCY)),
    _rule("[" + "".join(FRACTIONS) + "]", _as(FRACTIONS)),
    # addresses
    _rule(r"https?://[^\s<>\"()|]+[^\s<>\"()|.!?,-]"),
    _rule(r"(?:[A-Za-z0-9][^\s\"'<>|.!?()@,/:;]*\.)+(?:com|net|org|edu)(?![A-Za-z0-9])"),
    _rule(r"[A-Za-z0-9][^\s\"<>|()@]*@(?:[^\s\"<>|().@,]+\.)*[^\s\"<>|().@]+"),
    _rule(rf"@[A-Za-z_][A-Za-z_0-9]*|\#{L}+"),
    _rule(rf"{A}+(?:\.{A}+)*\.(?i:{_any(EXTENSIONS)}){END}"),
    _rule(r"</?[A-Za-z][\w-]*/?>"),
    # marks
    _rule(r"(?i:&(?:amp|lt|gt|quot|apos);)", _as(ENTITIES)),
    _rule(r"\.{3,}", lambda text: ["..."]),
    _rule(r"[!?]+|\*+|_+|\#+|~+|\^_\^|<<|>>|C\+\+"),
    _rule(r"-{2,4}(?!-)", lambda text: ["--"]),
    _rule(r"-{5,}"),
    _rule("[“”‘’]{2}", lambda text: ["".join(QUOTES[mark] for mark in text)]),
    _rule("``|''"),
    _rule(rf"[<>]?[:;=][-o*\']?[()DPdpO\\{{@|\[\]3]{END}", _brackets_in),
    _rule(r"[()\[\]{}]", _as(BRACKETS)),
    _rule('[–—…“”‘"«»]', _as(MARKS)),
    _rule(Q, _plain_quote),
    _rule(r"[-.,;:&/\\|+=<>%@$`^°©®™•·§¶†„~¡¿×÷±¥]"),
)


BEFORE_NOT = re.compile(rf"{L}(?:{L}|\d)*?(?={NOT})")
"""A word up to "n't" wins over the longer match."""


@lru_cache(maxsize=1 << 18)
def _tokens(chunk: str) -> tuple[str, ...]:
    """Tokens of what stands between two spaces, lower case."""
    found: list[str] = []
    place = 0
    while place < len(chunk):
        before_not = BEFORE_NOT.match(chunk, place)
        if before_not:
            found.append(before_not.group())
            place = before_not.end()
            continue
        best, make = 0, None
        for pattern, maker in RULES:
            match = pattern.match(chunk, place)
            if match and match.end() - place > best:
                best, make = match.end() - place, maker
        if make is None:  # the program deletes what it does not know
            place += 1
            continue
        found += make(chunk[place : place + best])
        place += best
    return tuple(token.lower() for token in found)


def tokens(text: str, next_text: str = "") -> list[str]:
    """All tokens of a text, punctuation too; next_text: what stands on the next line."""
    text = text.replace("\u00ad", "")
    for pattern, glued in _JOINED:
        text = pattern.sub(glued, text)
    chunks = [chunk for chunk in _SPACES.split(text) if chunk]
    next_word = next_text if not next_text else _SPACES.split(next_text)[0]
    found: list[str] = []
    for place, chunk in enumerate(chunks):
        behind = chunks[place + 1] if place + 1 < len(chunks) else next_word
        # Only "No. 5" looks at what follows the space.
        if chunk[-1] == "." and behind[:1].isdigit():
            found += _tokens(f"{chunk} 0")[:-1]
        else:
            found += _tokens(chunk)
        # "J. Smith" is a name, "plan B. The cat" the end of a sentence.
        if behind in STARTERS and found and _INITIAL.fullmatch(found[-1]):
            found[-1:] = [found[-1][0], "."]
    return found


def tokenise(text: str, next_text: str = "") -> str:
    """A caption as the scores see it: tokens joined by spaces, punctuation dropped.

    next_text: the caption behind it, which the program is given on the next line.
    """
    return " ".join(token for token in tokens(text, next_text) if token not in DROPPED)


def tokenise_all(texts: Sequence[str]) -> list[str]:
    """Captions as pycocoevalcap hands them over, all at once."""
    return [tokenise(*pair) for pair in zip(texts, [*texts[1:], ""], strict=True)]
