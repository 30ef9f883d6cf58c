"""Which versions of nnj a plugin was written for, as its distribution says
(PEP 440, for versions that are plain numbers).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NAME = re.compile(r"\s*nnj(?![\w.-])\s*(?:\[[^\]]*\])?\s*\(?([^;)@]*)\)?\s*(;)?", re.IGNORECASE)
_CLAUSE = re.compile(r"\s*(~=|==|!=|<=|>=|<|>)\s*(\d+(?:\.\d+)*)(\.\*)?\s*")


def required(requirements: Iterable[str]) -> str:
    """What `Requires-Dist` lines ask of nnj, such as ">=1,<2"; "" for nothing. Lines with a
    condition are left out.
    """
    found = [match for line in requirements if (match := _NAME.match(line))]
    return ",".join(
        match[1].replace(" ", "") for match in found if not match[2] and match[1].strip()
    )


def fits(version: str, clauses: str) -> bool:
    """Whether a version is among those that the clauses allow. What cannot be read (a pre-release)
    excludes nothing.
    """
    return re.fullmatch(r"\d+(\.\d+)*", version) is None or all(
        _fits(_numbers(version), c) for c in clauses.split(",") if c
    )


def _fits(version: list[int], clause: str) -> bool:
    match = _CLAUSE.fullmatch(clause)
    if match is None:
        return True
    operator, bound = match[1], _numbers(match[2])
    if match[3] or operator == "~=":  # the same beginning: all of it, or all but the last number
        alike = len(bound) - (operator == "~=")
        begins = _padded(version, alike)[:alike] == bound[:alike]
        return (
            not begins
            if operator == "!="
            else begins and (operator == "==" or _compare(version, bound) >= 0)
        )
    order = _compare(version, bound)
    return {
        "==": order == 0,
        "!=": order != 0,
        "<=": order <= 0,
        ">=": order >= 0,
        "<": order < 0,
        ">": order > 0,
    }[operator]


def _compare(a: list[int], b: list[int]) -> int:
    a, b = _padded(a, len(b)), _padded(b, len(a))
    return (a > b) - (a < b)


def _padded(numbers: list[int], length: int) -> list[int]:
    return numbers + [0] * (length - len(numbers))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(".")]
