"""Compare two texts number by number, so that stored outputs hold on another machine too.

Everything but numbers must agree exactly, up to white space (the width of a column follows its
numbers).  Integers must agree exactly.  Floats, written with a point or an exponent, must agree to
``rtol`` of the stored value or to ``atol``, whichever is wider.  Cells may loosen this by a tag,
``nbval-rtol=0.02`` or ``nbval-atol=0.01``, up to 0.1.
"""

import re

RTOL, ATOL, LOOSEST = 1e-4, 0.0, 0.1

# Digits that follow a letter (Lorenz63) and versions (2.13.0) are text.
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(\.\d+)?([eE][-+]?\d+)?(?!\d|\.\d)")


def is_float(number: str) -> bool:
    """Return whether a number is written with a point or an exponent."""
    return bool(set(number) & set(".eE"))


def agrees(stored: str, fresh: str, rtol: float = RTOL, atol: float = ATOL) -> bool:
    """Return whether a fresh text agrees with the stored one within the tolerances."""
    numbers = [[match[0] for match in NUMBER.finditer(text)] for text in (stored, fresh)]
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (stored, fresh)]
    if words[0] != words[1] or len(numbers[0]) != len(numbers[1]):
        return False
    for a, b in zip(*numbers, strict=True):
        if is_float(a) != is_float(b):
            return False
        if not is_float(a) and int(a) != int(b):
            return False
        if abs(float(a) - float(b)) > max(rtol * abs(float(a)), atol):
            return False
    return True


def tolerances(tags: list[str]) -> tuple[float, float]:
    """Return (rtol, atol) of a cell from its tags; refuse what would compare next to nothing."""
    found = {"nbval-rtol": RTOL, "nbval-atol": ATOL}
    for tag in tags:
        name, _, value = tag.partition("=")
        if name not in found:
            continue
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(f"tag {tag!r}: expected a number after {name}=") from None
        if not 0 <= found[name] <= LOOSEST:
            raise ValueError(f"tag {tag!r}: a tolerance lies between 0 and {LOOSEST}")
    return found["nbval-rtol"], found["nbval-atol"]


class ToleratedText(str):
    """A text whose equality is `agrees`; the left side of the comparison is the stored one."""

    rtol, atol = RTOL, ATOL

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and agrees(self, other, self.rtol, self.atol)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__
