"""Equal and other spellings of a reference answer, made by its kind: integer, number, expression, equation, tuple, set, text."""

import re
import zlib
from collections.abc import Sequence
from fractions import Fraction

EACH = 5
_INTEGER, _DECIMAL = re.compile(r"-?\d+"), re.compile(r"-?\d*\.\d+")
_FRACTION = re.compile(r"(-?)\\d?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d+))")
_TEXT = re.compile(r"\\text\{(\(?)([A-Za-z]+)\)?\}")
_UNIT = re.compile(r"(.*?)\s*\\(?:text|mbox)\{ (cents|cm|inches|degrees)\}(\^2)?")
_SYMMETRIC = re.compile(r"(\d) \\pm (.*)")
WORDS = ("Evelyn", "Navin", "east", "ellipse", "even", "odd", "west", "hyperbola")
OTHER_UNITS = {"cents": "dollars", "cm": "m", "inches": "feet", "degrees": "hours"}


def spellings(gold: str) -> tuple[list[str], list[str]]:
    """(equal, other) answers, EACH of both, chosen by the gold's own text so that all kinds get their turn."""
    equal, other = _all(gold)
    return _some(gold, equal), _some(gold, other)


def _some(gold: str, found: Sequence[str]) -> list[str]:
    found = list(dict.fromkeys(found))
    assert len(found) >= EACH, (gold, found)
    start = zlib.crc32(gold.encode()) % len(found)
    return [found[(start + i) % len(found)] for i in range(EACH)]


def _all(gold: str) -> tuple[list[str], list[str]]:
    boxed = re.fullmatch(r"\\boxed\{(\d+)\}", gold)
    plain = boxed[1] if boxed else re.sub(r",\s*\\!\s*|(?<=\d),(?=\d{3})", "", gold)
    if _INTEGER.fullmatch(plain):
        return _integer(int(plain))
    for kind in (_number, _measured, _text, _list, _equation):
        if found := kind(gold):
            return found
    return _expression(gold)


def _integer(n: int) -> tuple[list[str], list[str]]:
    grouped = f"{n:,}"
    equal = [
        f"{n}.0", rf"\frac{{{2 * n}}}{{2}}", f"x = {n}", rf"{n}\text{{ units}}", rf"\mathbf{{{n}}}", rf"{n + 1} - 1", f"{3 * n}/3",
        grouped, grouped.replace(",", "{,}"), grouped.replace(",", r"\,"), rf"\text{{{n}}}", f"${n}$", rf"\({n}\)", rf"\left({n}\right)",
        f"{n}.", rf"\dfrac{{{n}}}{{1}}", rf"-({-n})", rf"\boxed{{{n}}}", rf"{n} \cdot 1", rf"N={n}",
    ]  # fmt: skip
    other = [
        f"{n + 1}", f"{n - 1}", f"{10 * n + 7}", f"{n}.5", rf"\frac{{{n + 1}}}{{7{abs(n)}}}", f"{n},{n + 1}", f"({n},{n + 1})", f"{n}_8",
        f"{n or 1}x", rf"{n + 1}\pi", rf"{n - 1} \text{{ or }} {n}", f"x < {n}", r"\text{none}", f"{n}1", f"-{abs(n) + 1}", f"x = {n + 2}",
        rf"{n + 3}\text{{ units}}", rf"\sqrt{{{n * n + 1}}}", f"{n}:2", f"[{n}, {n + 1}]", f"{n} = {n + 1}", rf"{n} \pm 1",
    ]  # fmt: skip
    return equal, other


def _number(gold: str) -> tuple[list[str], list[str]] | None:
    """A fraction or a decimal."""
    if found := _FRACTION.fullmatch(gold):
        sign, a, b, c, d = found.groups()
        value = Fraction(int(a or b), int(c or d)) * (-1 if sign else 1)
    elif _DECIMAL.fullmatch(gold):
        value = Fraction(gold)
    elif found := re.fullmatch(r"(\d+)\s*\\frac\{?(\d)\}?\{?(\d)\}?", gold):
        value = int(found[1]) + Fraction(int(found[2]), int(found[3]))
    else:
        return None
    n, d = value.numerator, value.denominator
    equal = [
        f"{n}/{d}", rf"\frac{{{2 * n}}}{{{2 * d}}}", rf"\dfrac{{{n}}}{{{d}}}", rf"x = \frac{{{n}}}{{{d}}}", rf"\tfrac{{{3 * n}}}{{{3 * d}}}",
        rf"\left(\frac{{{n}}}{{{d}}}\right)", rf"${n}/{d}$", rf"\frac{{{n}}}{{{d}}}\text{{ units}}", rf"-\frac{{{-n}}}{{{d}}}", rf"1-\frac{{{d - n}}}{{{d}}}",
    ]  # fmt: skip
    other = [
        rf"\frac{{{n + 1}}}{{{d}}}", rf"\frac{{{d}}}{{{n}}}", rf"\frac{{{n}}}{{{d + 1}}}", rf"-\frac{{{n}}}{{{d}}}", f"{n}", f"{n}{d}",
        f"({n},{d})", f"{n}:{d}", rf"\frac{{{n}}}{{{d}}}x", rf"\frac{{{n}}}{{{d}}}, 0", f"{float(value) + 1e-4:.7f}", rf"\sqrt{{\frac{{{abs(n)}}}{{{d}}}}}",
    ]  # fmt: skip
    return equal, other


def _measured(gold: str) -> tuple[list[str], list[str]] | None:
    """A number with a unit, degrees, money, or the base that it is written in."""
    if found := re.fullmatch(r"(\d+)_\{?(\d)\}?", gold):
        n, base = found.groups()
        equal = [
            f"{n}_{{{base}}}",
            f"${n}_{base}$",
            rf"{n}_{{\text{{{base}}}}}",
            rf"({n})_{base}",
            f"x={n}_{{{base}}}",
            rf"\mathbf{{{n}_{base}}}",
        ]
        return equal, [n, f"{n}_{int(base) + 1}", f"1{n}_{base}", str(int(n, int(base))), f"{n}{base}", f"{base}_{n}"]
    if found := re.fullmatch(r"(\d+)\^\\circ", gold):
        n = found[1]
        equal = [
            n,
            f"{n}°",
            rf"{n}^{{\circ}}",
            rf"{n} \text{{ degrees}}",
            rf"{n}\degree",
            rf"\angle A = {n}^\circ",
            f"${n}^\\circ$",
        ]
        wrong = [
            rf"{int(n) + 1}^\circ",
            f"{n}.5",
            rf"{n}\text{{ hours}}",
            rf"\frac{{{n}}}{{180}}",
            rf"{n}\pi",
            f"{n},{n}0",
        ]
        return equal, wrong
    if found := re.fullmatch(r"\\\$([\d.,\\! ]+)", gold):
        n = re.sub(r"[,\\! ]", "", found[1])
        equal = [n, rf"\${n}", f"{n} dollars", rf"{n}\text{{ dollars}}", rf"\$ {n}", f"x = {n}"]
        return equal, [f"{n}1", rf"\${n}5", f"{n} cents", f"-{n}", f"1{n}", f"{n}, 1"]
    if found := _UNIT.fullmatch(gold):
        n, unit, square = found.groups(default="")
        written = f"square {unit}" if square else unit
        equal = [
            n,
            rf"{n} \text{{ {unit}}}{square}",
            rf"{n}\ \mathrm{{{unit}}}{square}",
            rf"{n} \text{{ {written}}}",
            f"x = {n}",
            f"${n}$",
        ]
        wrong = [
            rf"{n} \text{{ {OTHER_UNITS[unit]}}}{square}",
            f"1{n}",
            rf"1+{n}",
            f"-{n}",
            rf"{n} \text{{ {unit}}}^3",
            f"{n}, 0",
        ]
        return equal, wrong
    return None


def _text(gold: str) -> tuple[list[str], list[str]] | None:
    found = _TEXT.fullmatch(gold)
    if not found:
        return None
    if found[1]:
        x, others = found[2], [x for x in "ABCDEF" if x != found[2]]
        equal = [x, f"({x})", rf"\text{{{x}}}", rf"\textbf{{({x})}}", f"{x}.", rf"\mathrm{{{x}}}", rf"\text{{({x})}}"]
        return equal, [
            *others,
            f"({others[0]})",
            f"{others[0]}{x}",
            rf"\text{{{x} and {others[1]}}}",
            rf"\textbf{{({others[2]})}}",
        ]
    word, others = found[2], [other for other in WORDS if other != found[2]]
    equal = [
        word,
        rf"\textbf{{{word}}}",
        rf"\mathrm{{{word}}}",
        rf"\text{{ {word} }}",
        f"{word}.",
        word.lower(),
        rf"\text{{{word}}}.",
    ]
    return equal, [
        *others,
        word[::-1],
        f"not {word}",
        rf"\text{{{word} and {others[0]}}}",
        rf"\text{{{word}, {others[1]}}}",
    ]


def _list(gold: str) -> tuple[list[str], list[str]] | None:
    """A tuple, an interval, a union, a set or a list: in other words and orders, with one part or bracket changed."""
    text = re.sub(r"\\left|\\right", "", gold.removeprefix(r"x \in ")).strip()
    if r"\cup" in text:
        one, two = map(str.strip, text.split(r"\cup"))
        equal = [
            rf"{two} \cup {one}",
            rf"x \in {text}",
            text.replace(" ", ""),
            rf"\left{one[:-1]}\right{one[-1]} \cup {two}",
            text.replace(r"\cup", "∪"),
        ]
        other = [one, two, rf"{one[:-1]}] \cup {two}", rf"{one} \cup [{two[1:]}", rf"{one} \cap {two}", f"{one}, 1"]
        return equal, other
    if r"\pm" in text:
        inside, rest = re.sub(r"^\\\{|\\\}$", "", text), ""
        if "," in inside:
            inside, rest = inside.split(",")
        a, b = map(str.strip, inside.split(r"\pm"))
        parts = [f"{a}+{b}", f"{a}-{b}", *([rest] if rest else [])]
        equal = [
            ", ".join(parts),
            ", ".join(parts[::-1]),
            r" \text{ or } ".join(parts),
            rf"\{{{', '.join(parts)}\}}",
            " and ".join(parts),
            f"x={inside}" if not rest else f"{rest}, {inside}",
        ]
        other = [
            parts[0],
            parts[1],
            f"{parts[0]}, {b}",
            f"({', '.join(parts)})",
            ", ".join([*parts, "7"]),
            rf"{a} \pm {b}0",
        ]
        return equal, other
    brackets = (
        text[0] + text[-1] if text[0] in "([" and text[-1] in ")]" and text.count("(") + text.count("[") == 1 else ""
    )
    inside = text[1:-1] if brackets else text
    parts = [part.strip() for part in inside.split(",")]
    if len(parts) < 2 or (not brackets and r"\begin" in text):
        return None
    changed = ", ".join([*parts[:-1], "17"])
    if not brackets:
        equal = [
            ", ".join(parts[::-1]),
            r" \text{ and } ".join(parts),
            rf"\{{{', '.join(parts)}\}}",
            ", ".join(f"x={part}" for part in parts),
            " or ".join(parts),
            f"${','.join(parts)}$",
        ]
        return equal, [
            parts[0],
            parts[-1],
            changed,
            f"({', '.join(parts)})",
            ", ".join([*parts, "17"]),
            f"[{parts[0]}, {parts[1]}]",
        ]
    left, right = brackets
    equal = [
        rf"\left{left}{', '.join(parts)}\right{right}", f"{left}{','.join(parts)}{right}", f"${left}{', '.join(parts)}{right}$", rf"\bigl{left}{','.join(parts)}\bigr{right}",
        f"{left} {' , '.join(parts)} {right}.", f"{left}{', '.join(x if chr(92) in x else f'{x}.0' for x in parts)}{right}", f"{left}{', '.join(rf'{chr(92)}frac{{2({x})}}{{2}}' if 'infty' not in x else x for x in parts)}{right}",
    ]  # fmt: skip
    turned = "[" if left == "(" else "("
    other = [
        f"{turned}{', '.join(parts)}{right}", f"{left}{changed}{right}", f"{left}{', '.join([*parts, '1'])}{right}", ", ".join(parts), parts[0],
        rf"\{{{', '.join(parts)}\}}", f"{left}{', '.join(parts[::-1])}{right}",
    ]  # fmt: skip
    return equal, other


def _equation(gold: str) -> tuple[list[str], list[str]] | None:
    if gold.count("=") != 1:
        return None
    left, right = (side.strip() for side in gold.split("="))
    equal = [
        f"{right} = {left}",
        f"{left}={right}",
        f"${gold}$",
        rf"\boxed{{{gold}}}",
        f"{left} - ({right}) = 0",
        rf"\displaystyle {gold}",
    ]
    return equal, [
        f"{left} = {right} - 2",
        f"{left} = {right} + 1",
        f"2({left}) = {right} - 1",
        f"w = {right}5",
        f"{left} + 1 = {right}",
        f"{left} < {right}",
    ]


def _expression(gold: str) -> tuple[list[str], list[str]]:
    """Anything that can be calculated with: numbers with roots and pi, polynomials, matrices."""
    if r"\begin" in gold:
        rows = gold.replace(r"\begin{pmatrix}", "").replace(r"\end{pmatrix}", "").strip()
        other_kind = gold.replace("pmatrix", "bmatrix")
        equal = [
            other_kind,
            rf"\left({rows}\right)".join(["", ""]) and f"${gold}$",
            gold.replace(" ", ""),
            rf"\mathbf{{v}} = {gold}",
            rf"\displaystyle {gold}",
            rf"\boxed{{{gold}}}",
        ]
        wrong = [
            gold.replace(r"\begin{pmatrix} ", r"\begin{pmatrix} 7"),
            gold.replace(r" \end", r"1 \end"),
            "0",
            gold.replace(r"\\", "&"),
            rows.split()[0],
            f"{gold}, 1",
        ]
        return equal, wrong
    g = gold
    equal = [
        rf"1\cdot\left({g}\right)", rf"\frac{{2({g})}}{{2}}", f"({g})+0", f"-(-({g}))", f"${g}$", rf"\displaystyle {g}", rf"\left({g}\right)",
        g.replace(r"\frac", r"\dfrac"), g.replace(" ", "") if r"\pi" not in g and r"\cot" not in g else g.replace(r" \pi", r"\pi"), f"y = {g}", rf"{{{g}}}",
    ]  # fmt: skip
    other = [
        f"({g})+1", f"2({g})", f"-({g})", rf"\frac{{{g}}}{{3}}", f"({g})^2+1", f"{g}, 1", r"\text{undefined}", f"({g}, 0)", f"({g})-w", f"({g}) \\pi + 1",
    ]  # fmt: skip
    return equal, other
