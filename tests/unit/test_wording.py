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
    ("hours", "shown"), [(0, "0 s"), (0.5 / 3600, "0.5 s"), (0.25, "15 min"), (2.5, "2.5 h"), (12345, "12,345 h")]
)
def test_a_time_is_in_the_largest_unit_of_which_it_is_one(hours, shown):
    assert wording.time_of(hours) == shown
