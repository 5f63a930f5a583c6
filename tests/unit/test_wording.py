import pytest

from maskray import wording


@pytest.mark.parametrize(
    ("number", "unit", "shown"),
    [
        (0, "", "0"),
        (0, "FLOP", "0 FLOP"),
        (999, "", "999"),
        (999.6, "", "1 k"),
        (999_600, "B", "1 MB"),
        (86_400_000, "", "86.4 M"),
        (1.2345e12, "FLOP", "1.23 TFLOP"),
        (4.2e17, "", "420 P"),
        (3e21, "FLOP", "3 ZFLOP"),
    ],
)
def test_a_number_has_three_digits_and_a_prefix(number, unit, shown):
    assert wording.short(number, unit) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.75, "0.75"),
        (1e-4, "0.0001"),
        (2, "2"),
        (True, "true"),
        (None, "null"),
        ([3, 7], "[3, 7]"),
        ("block", "block"),
        ({"kind": "grid", "unit": "ü"}, '{"kind": "grid", "unit": "ü"}'),
    ],
)
def test_a_value_is_written_as_in_the_yaml(value, shown):
    assert wording.value(value) == shown
