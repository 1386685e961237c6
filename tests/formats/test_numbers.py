"""Numbers as text: what int() takes or refuses otherwise than it looks."""

from __future__ import annotations

import pytest

from diskmorph.formats.numbers import whole_number


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("0", 0),
        ("007", 7),
        ("99", 99),
        ("100", None),
        ("0" * 9000 + "5", 5),
        ("9" * 9000, None),
        ("", None),
        ("-1", None),
        ("+1", None),
        (" 1", None),
        ("1_0", None),
        ("\u00b2", None),
        ("\u0663", None),
        ("1.0", None),
    ],
    ids=lambda value: ascii(value)[:12],
)
def test_only_digits_up_to_the_most_are_numbers(text: str, want: int | None) -> None:
    assert whole_number(text, 99) == want
    assert whole_number(text.encode(), 99) == want
