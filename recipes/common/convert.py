"""A flag's text, or what YAML made of a value, as the type that a settings field is declared with."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def convert(value: Any, hint: Any) -> Any:
    """`value` as `hint`.

    Args:
        value: text, or a YAML value. YAML 1.1 reads 1e-3 as text and a bare `no` as False: both are
            understood.
        hint: int, float, str, bool, a Literal, a tuple, or one of these `| None`.

    Raises:
        ValueError: the value does not fit; the message says what was expected.
    """
    if get_origin(hint) in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return convert(value, without_none(hint))
    if get_origin(hint) is Literal:
        return _literal(value, get_args(hint))
    if get_origin(hint) is tuple:
        return _tuple(value, get_args(hint))
    if hint is bool:
        if str(value).lower() not in _TRUE + _FALSE:
            raise ValueError("expected true or false")
        return str(value).lower() in _TRUE
    if hint is str:
        if value is None or isinstance(value, (bool, list, dict)):
            raise ValueError("expected text")
        return str(value)
    return _number(value, hint)


def without_none(hint: Any) -> Any:
    """`X` of `X | None`; other types as they are."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    return next(option for option in get_args(hint) if option is not type(None))


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`; did you mean NAME?` with the nearest name, or nothing."""
    near = difflib.get_close_matches(word, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _number(value: Any, hint: Any) -> Any:
    expected = "expected a whole number" if hint is int else "expected a number"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(expected)
    try:
        number = hint(value)
    except (ValueError, OverflowError):
        raise ValueError(expected) from None
    if hint is float and not math.isfinite(number):
        raise ValueError("expected a finite number")
    if hint is int and number != (value if not isinstance(value, str) else number):
        raise ValueError(expected)  # 1.5 for an int
    return number


def _literal(value: Any, options: tuple[Any, ...]) -> Any:
    words: tuple[str, ...] = (str(value),)
    if isinstance(value, bool):
        words = _TRUE if value else _FALSE
    for option in options:
        if str(option) in words:
            return option
    raise ValueError(
        f"expected one of {', '.join(map(str, options))}{did_you_mean(words[0], map(str, options))}"
    )


def _tuple(value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    numeric = str not in hints
    parts = value
    if isinstance(value, str):
        text = value.lower().replace("x", ",") if numeric else value
        parts = [part.strip() for part in text.split(",")] if value else []
    elif not isinstance(value, (list, tuple)):
        parts = [value]
    if len(hints) == 2 and hints[1] is Ellipsis:
        return tuple(convert(part, hints[0]) for part in parts)
    if len(parts) == 1 and hints == (int, int):
        parts = [*parts, *parts]  # one number is a square
    expected = (
        "expected N or HxW" if hints == (int, int) else f"expected {len(hints)} values with commas between"
    )
    if len(parts) != len(hints):
        raise ValueError(expected)
    return tuple(convert(part, hint) for part, hint in zip(parts, hints, strict=True))
