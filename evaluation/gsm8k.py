"""GSM8K's answers: which number a text gives, and whether it is the right one, as the harness has it."""

from __future__ import annotations

import re

STRICT_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")
ANY_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def score_number(gold: str, text: str) -> dict[str, float]:
    """exact_match: the number after `####` equals the gold one; flexible_match: the last number anywhere does."""
    strict = STRICT_NUMBER.findall(text)
    anywhere = ["".join(groups) for groups in ANY_NUMBER.findall(text)]
    wanted = normalise_number(gold)
    return {
        "exact_match": float(bool(strict) and normalise_number(strict[0]) == wanted),
        "flexible_match": float(bool(anywhere) and normalise_number(anywhere[-1]) == wanted),
        "answered": float(bool(anywhere)),
    }


def normalise_number(text: str) -> str:
    """What follows `#### `, without commas, dollar signs and a full stop at its end, as the harness compares it."""
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.strip().lower()
