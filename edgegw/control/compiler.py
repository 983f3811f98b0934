"""The compiler: CEL to expressions, type-checked. Only a site that has rules loads it, which takes 10 MB."""

import re
from collections.abc import Iterable, Mapping

from cel_expr_python import cel
from cel_expr_python.ext import ext_math

from edgegw.control.expression import Expression, did_you_mean

KINDS = {"number": cel.Type.DOUBLE, "bool": cel.Type.BOOL, "string": cel.Type.STRING}
_NAMES = {"DOUBLE": "a number", "BOOL": "a bool", "STRING": "a string", "INT": "an integer", "LIST": "a list"}
_NAME = re.compile(r"\b([a-z][a-z0-9_]{0,62})\s*\.\s*([a-z][a-z0-9_]{0,62})\b")
_TEXT = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'")
_SIGNS = {"and": "&&", "or": "||", "not": "!", "=": "=="}
_WORD = re.compile(r"\b(?:and|or|not)\b|(?<![=!<>])=(?!=)")
_BARE_INTEGER = re.compile(r"(?<![\w.])(\d+)(?![\w.])")


class Compiler:
    """Compiles expressions over a fixed set of names."""

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self._kinds = dict(kinds)
        number = cel.Type.DOUBLE
        clamp = cel.Overload("clamp_number", number, [number, number, number], False, _clamp)
        self._env = cel.NewEnv(
            variables={name: KINDS[kind] for name, kind in kinds.items()},
            extensions=[ext_math.ExtMath()],
            functions=[cel.FunctionDecl("clamp", [clamp])],
        )

    def compile(self, text: str, kind: str) -> Expression:
        """Compile for a result of a kind: number, bool or string; raise ValueError with the place and a hint."""
        if not text.strip():
            raise ValueError(f"found nothing; expected an expression that is a {kind}")
        try:
            compiled = self._env.compile(text)
        except RuntimeError as error:
            raise ValueError(self._explained(text, str(error))) from None
        found = compiled.return_type()
        if found != KINDS[kind]:
            hint = "; every number is a double: write 80.0 for 80" if found == cel.Type.INT else ""
            raise ValueError(
                f"{text!r} is {_NAMES.get(found.name(), found.name().lower())}; expected a {kind}{hint}"
            )
        return Expression(text, kind, self.names(text), compiled)

    def names(self, text: str) -> frozenset[str]:
        """Return the names of tags and windows that a text mentions, be it in a string or a comment."""
        return frozenset(".".join(name) for name in _NAME.findall(text)) & self._kinds.keys()

    def _explained(self, text: str, error: str) -> str:
        """Turn the engine's error into a line, the text with a caret, and a hint."""
        match = re.search(r"ERROR: <input>:(\d+):(\d+): (.*?)(?:\n|$)", error)
        if match is None:
            return f"{text!r}: {error.splitlines()[0].partition(' [')[0]}"
        line, column, what = int(match[1]), int(match[2]), match[3].partition(" expecting {")[0]
        what = what.replace(" (in container '')", "")
        shown = text.splitlines()[line - 1] if text.splitlines() else ""
        return f"{what}{self._hint(text, what)}\n    {shown}\n    {' ' * (column - 1)}^"

    def _hint(self, text: str, what: str) -> str:
        if unknown := re.search(r"undeclared reference to '([^']*)'", what):
            if unknown[1] == "math":
                return "; there are math.least, math.greatest, math.abs, math.floor, math.ceil, math.round"
            return did_you_mean(unknown[1], self._kinds) or f"; there are {_some(self._kinds)}"
        if (
            "no matching overload" in what
            and "int" in what
            and (bare := _BARE_INTEGER.search(_TEXT.sub("", text)))
        ):
            return f"; every number is a double: write {bare[1]}.0 for {bare[1]}"
        if what.startswith("Syntax error") and (word := _WORD.search(_TEXT.sub("", text))):
            return f"; write {_SIGNS[word[0].strip()]} for {word[0].strip()}"
        return ""


def _clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def _some(names: Iterable[str]) -> str:
    known = sorted(names)
    return ", ".join(known[:6]) + (", ..." if len(known) > 6 else "")
