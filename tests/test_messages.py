import time

import pytest

from spinlock_fast.messages import format_bytes, one_line, printable, shown


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain", "plain"),
        ("café, naïve, 数据", "café, naïve, 数据"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\x00b\x9bc", "a\\x00b\\x9bc"),
        ("a\udcffb", "a\\udcffb"),
        ("abc\u202ecba", "abc\\u202ecba"),
        ("a\u2028b", "a\\u2028b"),
    ],
)
def test_control_characters_are_escaped_and_letters_are_not(text, escaped):
    assert printable(text) == escaped


def test_a_message_is_one_line_of_bounded_length():
    assert one_line("a\n  b\tc") == "a b c"
    text = one_line("begin " + "x" * 10**6 + " end", 200)
    assert len(text) <= 210
    assert text.startswith("begin")
    assert text.endswith("end")


def _nested(levels):
    value = ["x"] * 9
    for _ in range(levels):
        value = [value] * 9
    return value


@pytest.mark.parametrize("value", [_nested(40), 10**100_000, "x" * 10**7, {"a": _nested(40)}, [10**5000]], ids=range(5))
def test_a_value_is_shown_in_bounded_time_and_length(value):
    started = time.perf_counter()
    assert len(shown(value)) <= 60
    assert time.perf_counter() - started < 1.0


def test_short_values_are_shown_as_python_writes_them():
    for value in (3, "text", [1, 2.5], {"a": [1]}, None, True):
        assert shown(value) == repr(value)
    assert shown("\x1b[31m") == repr("\x1b[31m")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (36_900, "36.9 kB"),
        (999_900, "1 MB"),
        (1.25e9, "1.25 GB"),
        (4e15, "4e+03 TB"),
    ],
)
def test_bytes_have_three_digits_and_a_unit(size, text):
    assert format_bytes(size) == text
