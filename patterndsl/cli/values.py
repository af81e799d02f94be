"""Which values can options have? Readers for argparse, which raise ArgumentTypeError with what is wrong."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from patterndsl.sema.parameters import MAX_HEADS, MAX_LAYER, MAX_SIZE


def _whole(least: int, most: int) -> Callable[[str], int]:
    """What reads a whole number in [least, most]."""

    def read(text: str) -> int:
        power = re.fullmatch(r"(\d{1,2})(?:\^|\*\*)(\d{1,2})|(\d{1,3})[eE]\+?(\d{1,2})", text.strip())
        if not power and not re.fullmatch(r"[+-]?\d+(?:[_,]\d+)*", text.strip()):
            raise argparse.ArgumentTypeError(f"`{_short(text)}` is not a whole number")
        if power:
            base, exponent = (int(power[1]), power[2]) if power[1] else (10, power[4])
            value: int = int(power[3] or 1) * base ** int(exponent)
        else:  # Python itself reads no numbers of thousands of digits
            value = int(text.strip().replace(",", "").replace("_", "")[:100])
        if value < least:
            raise argparse.ArgumentTypeError(f"{_short(text)} is too small; it must be {least} or more")
        if value > most:
            limit = f"{most:,}" if most < 2**20 else f"2^{most.bit_length() - 1}"
            raise argparse.ArgumentTypeError(f"{_short(text)} is too large; it must be {limit} or less")
        return value

    return read


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:30]}... ({len(text)} characters)"


length = _whole(0, MAX_SIZE)
block = _whole(1, MAX_SIZE)
heads = _whole(1, MAX_HEADS)
head = _whole(0, MAX_HEADS - 1)
layer = _whole(0, MAX_LAYER)
num_layers = _whole(1, MAX_LAYER)
seed = _whole(0, 2**62)
tensor_size = _whole(1, 2**30)


def seconds(text: str) -> float:
    """A time, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number of seconds") from None
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number of seconds")
    return value


def claim(text: str) -> str:
    """As the library or as the command line spells it."""
    return text.replace("_", "-")
