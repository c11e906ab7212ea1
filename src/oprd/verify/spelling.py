"""One spelling for the many of an answer: what math-verify does not read, or reads as something else, is rewritten."""

import re

_SIGNS = (  # noqa: SIM905
    r"−-|–-|—-|÷/|×\times |·\cdot |π\pi |∞\infty |√\sqrt |≤\le |≥\ge |≠\ne |∪\cup |∈\in |∅\emptyset |"
    r"±\pm |…\ldots |°^\circ |²^2|³^3|½\frac12|€|£|¥"
).split("|")
_TRANSLATION = {ord(x[0]): x[1:] for x in _SIGNS}
_REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\(?:boxed|fbox)(?![a-z])", ""),  # of a box in a box math-verify sees only the inner one
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle)(?![a-z])", ""),
        (r"\\!\s*", ""),
        (r"(?<!\\)\\[ ,;:]|~|\\q?quad(?![a-z])", " "),
        (r"\{([,:])\}", r"\1"),
        (r"\\\$\s*([\d.,]*\d)", r"\1 dollars"),
        (r"\\?\$|(?<!\\)\\[()]", ""),
        (r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|boldsymbol|underline)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\varnothing(?![a-z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\degree(?![a-z])", r"^\\circ "),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]\+?(-?\d+)(?![\w.])", r"\1\\times 10^{\2}"),
        (r"\\([dtc]?)frac\s*(\d)\s+(\d)(?!\d)", r"\\frac{\2}{\3}"),
        (r"(?<![\w.^])(\d+)\s+(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}"),  # a mixed number
        (r"(?<![\w.^])([1-9]\d{0,2})((?:\s\d{3})+)(?![\d\s])", lambda m: "".join(m[0].split())),
        (r"(\d\)?)_\{\s*(\d+)\s*\}", r"\1_\2"),
        (r"\((\d+)\)_", r"\1_"),
        (r"(?<![\w.^])(\d+)\s*\((?=\d|\\[dt]?frac)", r"\1\\cdot ("),  # to math-verify 2(31) is a mixed number, 33
        (r"\b0?(\d+)\s*:\s*(\d)", r"\1:\2"),
        (r"(?<=\d)\s*([aApP])\.?\s*[mM]\b", r" \1m"),  # of a clock
        (r"^\s*(?:[A-Za-z]|\([A-Za-z](?:,\s*[A-Za-z])+\))\s*(?:\\in(?![a-z])|=(?=\s*(?:[\[(]|\\\{|\d+_)))", ""),
        (r"^[\s*`]+|[\s.*`\\]+$", ""),
    )
]
_LABELLED = re.compile(r"\s*\(?([A-J])[).:]+\s*(-?[\d\\].*)")
_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])")
_THOUSANDS = re.compile(r"(?<![\w.,^])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_TOKEN = re.compile(r"\\?[{}]|[()\[\],;]|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])|\\(?:lor|vee)(?![a-z])")
_OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])|\\(?:lor|vee)(?![a-z])")
_WORDS = re.compile(r"[A-Za-z](?:[A-Za-z .'-]*[A-Za-z])?")
# math-verify drops the base of a number, dots and the space between numbers, and calculates clocks and dates
_LITERAL = re.compile(r"\d\)?_\d|\d:\d|\d/\d+/\d|\d{4}-\d\d-\d|\\[lc]?dots|^-?\d+\s+\d")
_UNITS = re.compile(
    r"(?:(?<=[\d})])|(?<=\d[A-Za-z])|(?<=\\pi))\s*"
    r"(?:\^\s*\{?\s*\\circ\s*\}?|(?:km|cm|mm|kg|ft|mph|th|st|nd|rd)(?![A-Za-z])|"
    r"(?<=\s)(?:[A-Za-z]{3,}|in|sq|cu|lb|hr|oz|yd|mi|ml|am|pm|[msghL])(?![A-Za-z]))(?:[A-Za-z\s./-]|\^\s*\{?-?\d\}?)*$"
)
_KNOWN_UNITS = re.compile(
    r"(?:\b|(?=\\))(?:(mm\b|millim)|(cm\b|centim)|(km\b|kilom)|(m\b|met)|(ft|feet|foot)|(in\b|inch)|(mi\b|mile)|(yd|yard)|"
    r"(g\b|gram)|(kg|kilog)|(lb|pound)|(s\b|sec)|(min)|(h\b|hr|hour)|(day)|(week)|(month)|"
    r"(year)|(cent)|(dollar)|(degree|\\circ)|(am\b)|(pm\b))"
)
_POWERS = {2: re.compile(r"\^\s*\{?2|\bsq"), 3: re.compile(r"\^\s*\{?3|\bcu")}
_RELATION = r"([<>]|\\[lg]eq?(?![a-z])|\\[lg]eqslant|\\[lg]t(?![a-z]))"
_BOUND = r"((?:[^<>=A-Za-z\\]|\\(?![lg][et])[a-z]+)+)"
_BOUNDED = re.compile(rf"(?:{_BOUND}{_RELATION})?\s*[A-Za-z]\s*(?:{_RELATION}{_BOUND})?")


def readings(answer: str) -> list[str]:
    """The answer in the spelling that is compared; several if "1,000" may be one number, or a letter names a value."""
    text = answer.translate(_TRANSLATION)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    labelled = _LABELLED.fullmatch(text)
    found = list(labelled.groups()) if labelled else [text]
    found += [merged for x in found if (merged := _THOUSANDS.sub(lambda m: m[0].replace(",", ""), x)) != x]
    return [_union(_DECIMAL.sub(_fraction, _REPEATING.sub(_repeating, x))) for x in found]


def _fraction(number: re.Match[str]) -> str:
    """A decimal number as a fraction: math-verify rounds decimals, and 1.9999999 is not 2."""
    return f"{{\\frac{{{(number[1] + number[2]).lstrip('0') or '0'}}}{{1{'0' * len(number[2])}}}}}"


def _repeating(number: re.Match[str]) -> str:
    return f"({number[1]}.{number[2]}0+\\frac{{{number[3]}}}{{{'9' * len(number[3])}{'0' * len(number[2])}}})"


def _union(text: str) -> str:
    """Inequalities of one letter as intervals, those joined by "or" as a union; other text as it is."""
    intervals = [_interval(x) for x in split(text)[1]]
    between = r"\cup " if _OR.search(text) else ","
    return between.join(x for x in intervals if x) if intervals and all(intervals) else text


def _interval(inequality: str) -> str | None:
    found = _BOUNDED.fullmatch(inequality)
    if not found or not (found[2] or found[3]):
        return None
    sides = [(found[1], found[2] or ""), (found[4], found[3] or "")]
    if {x.strip("\\")[:1] for _, x in sides} & {">", "g"}:
        sides.reverse()
    (low, after), (high, before) = sides
    opening, closing = "[" if "e" in after else "(", "]" if "e" in before else ")"
    return opening + (low or r"-\infty") + "," + (high or r"\infty") + closing


def split(text: str) -> tuple[str, list[str]]:
    """The brackets of a tuple or interval, else "", and the parts between its outermost commas, "or" and "and". A set is
    its elements without brackets."""
    text = text.strip()
    tokens = list(_TOKEN.finditer(text))
    depth, deepest, start, parts, enclosed = 0, 0, 0, [], bool(tokens) and tokens[0].start() == 0
    for token in tokens:
        char = token[0][-1]
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
        enclosed = enclosed and (depth == 0) == (token.end() == len(text))
        if depth == 0 and char not in ")]}":
            parts.append(text[start : token.start()])
            start = token.end()
    if not enclosed or deepest > 50:
        found = [x.strip() for x in [*parts, text[start:]] if x.strip()]
        return "", [
            y for x in found for y in ((x.replace(r"\pm", "+"), x.replace(r"\pm", "-")) if r"\pm" in x else (x,))
        ]
    brackets = tokens[0][0] + tokens[-1][0]
    kind, parts = split(text[tokens[0].end() : tokens[-1].start()])
    if brackets in ("{}", r"\{\}"):
        return kind, parts
    return (brackets, parts) if len(parts) > 1 and not kind else ("", [text])


def plain(text: str) -> str:
    """The text without spaces (but between digits) and the parentheses of a choice; words in small letters."""
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    choice = re.fullmatch(r"\(([A-Z])\)", text)
    return choice[1] if choice else text.lower() if re.fullmatch(r"[^\\^_=*+]*[A-Za-z]{2}[^\\^_=*+]*", text) else text


def is_literal(text: str) -> bool:
    """Whether only the same text is the same answer: a number in a base, a clock or ratio, a date, a text that goes on."""
    return _LITERAL.search(text) is not None


def is_word(text: str) -> bool:
    """Whether it is text, not a product of letters: one letter, over three, or capitals."""
    return _WORDS.fullmatch(text) is not None and (len(text) not in (2, 3) or not text.islower())


def measured(text: str) -> tuple[str, tuple[int | None, ...]]:
    """The text without the units at its end, and the known ones among them with their power; empty if none is known."""
    units = _UNITS.search(text)
    if not units:
        return text, ()
    known = [unit.lastindex for unit in _KNOWN_UNITS.finditer(units[0].replace("mph", "mi/h"))]
    power = next((n for n, pattern in _POWERS.items() if pattern.search(units[0])), 1)
    return text[: units.start()], (*known, power) if known else ()
