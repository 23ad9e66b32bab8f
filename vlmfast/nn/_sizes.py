"""Checks of the numbers that a module is made of, before anything is allocated."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any


def check_integer(name: str, argument: str, value: object, *, least: int | None = 1) -> None:
    """
    Args:
        name: of the class. least: None: any.
    Raises:
        TypeError: value is no integer.
        ValueError: it is less than least.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be an integer; got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name}: {argument} must be at least {least}; got {value}")


def check_integers(name: str, *, least: int = 1, **values: object) -> None:
    """`check_integer` of each argument by its name."""
    for argument, value in values.items():
        check_integer(name, argument, value, least=least)


def check_side(name: str, argument: str, value: object, *, dimensions: int = 2) -> None:
    """An integer of at least 1, or one for each dimension."""
    each = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if each is value and len(each) != dimensions:
        raise ValueError(f"{name}: {argument} must be an integer or {dimensions} of them; got {value!r}")
    for one in each:
        check_integer(name, argument, one)


def check_real(name: str, argument: str, value: object, allowed: str, holds: Callable[[float], bool]) -> None:
    """
    Args:
        allowed: the range in words.
        holds: whether a number is in it.
    Raises:
        TypeError: value is no number.
        ValueError: it is out of range or not finite.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be a number; got {value!r}")
    if not math.isfinite(value) or not holds(float(value)):
        raise ValueError(f"{name}: {argument} must be {allowed}; got {value}")


def check_numbers(name: str, argument: str, values: Any, number: int | None) -> tuple[float, ...]:
    """values as floats.

    Args:
        number: of them, one per channel; None: any but none.
    Raises:
        TypeError: values are no numbers.
        ValueError: they are not as many, or not finite.
    """
    try:
        floats = tuple(map(float, values))
    except (TypeError, ValueError):
        raise TypeError(f"{name}: {argument} must be a number per channel; got {values!r}") from None
    if not floats or len(floats) != (number or len(floats)) or not all(map(math.isfinite, floats)):
        many = "one or more" if number is None else number
        raise ValueError(f"{name}: {argument} must be {many} finite numbers, one per channel; got {values}")
    return floats


def check_patch_fits(name: str, image_size: Any, patch_size: Any) -> None:
    """
    Raises:
        ValueError: the patch is larger than the image.
    """
    sides = [size if isinstance(size, Sequence) else (size, size) for size in (image_size, patch_size)]
    if any(side < patch for side, patch in zip(*sides, strict=True)):
        raise ValueError(f"{name}: patch_size must be at most image_size {image_size}; got {patch_size}")


def check_divides(name: str, argument: str, heads: int, width_name: str, width: int) -> None:
    """
    Raises:
        ValueError: heads does not divide width.
    """
    if width % heads:
        raise ValueError(f"{name}: {argument} must divide {width_name} {width}; got {heads}")


def check_config(name: str, config: Any, sizes: Sequence[str], sides: Sequence[str] = ()) -> None:
    """`check_integer` and `check_side` of a configuration's entries."""
    for entry in sizes:
        check_integer(name, f"config.{entry}", getattr(config, entry))
    for entry in sides:
        check_side(name, f"config.{entry}", getattr(config, entry))


def arguments_of(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """By name, defaults included, what a method would be called with beside self."""
    bound = inspect.signature(function).bind(None, *args, **kwargs)
    bound.apply_defaults()
    return dict([*bound.arguments.items()][1:])
