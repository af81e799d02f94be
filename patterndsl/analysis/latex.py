"""How is text written in LaTeX, and shown in a notebook? Its signs escaped, those of formulas as formulas."""

from __future__ import annotations

_SIGNS = {
    "\\": r"\textbackslash{}",
    "%": r"\%",
    "_": r"\_",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"$\sim$",
    "^": r"\^{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "≥": r"$\ge$",
    "≤": r"$\le$",
    "·": r"$\cdot$",
    "√": r"$\surd$",
    "⌊": r"$\lfloor$",
    "⌋": r"$\rfloor$",
    "Θ": r"$\Theta$",
    "²": "$^2$",
    "³": "$^3$",
}


def words(text: str) -> str:
    """The text within a formula."""
    return rf"\text{{{''.join(_SIGNS.get(sign, sign) for sign in text)}}}" if text else ""


class Shown:
    """What a notebook shows: what `str` says, as text and in LaTeX."""

    __slots__ = ()

    def _repr_latex_(self) -> str:
        lines = list(map(words, str(self).splitlines()))
        if len(lines) == 1:
            return f"${lines[0]}$"
        return r"$\begin{array}{l} " + r" \\ ".join(lines) + r" \end{array}$"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": str(self), "text/latex": self._repr_latex_()}
