"""common/numerals.py: which words are numbers, and which only look like some."""

import pytest

from common.numerals import ONES, TEENS, TENS, in_digits

CHINESE_ONES = "一二三四五六七八九"


def test_english_numbers_below_a_million():
    units = ["zero", *ONES, *TEENS]
    names = [*units, *TENS]
    values = [*range(20), *range(20, 100, 10)]
    for ten, value in zip(TENS, values[20:]):
        names += [f"{ten}-{one}" for one in ONES] + [f"{ten} {one}" for one in ONES]
        values += [value + one for one in range(1, 10)] * 2
    assert sorted(set(values)) == list(range(100))
    for name, value in zip(names, values):
        assert in_digits(name) == str(value)
        assert in_digits(f"I see {name.upper()} cats.") == f"I see {value} cats."
        if value:
            assert in_digits(f"three hundred and {name}") == str(300 + value)
            assert in_digits(f"{name} thousand") == str(1000 * value)


def test_chinese_numbers_below_a_hundred():
    for value in range(1, 100):
        tens, ones = divmod(value, 10)
        name = ("" if tens == 1 else CHINESE_ONES[tens - 1] if tens else "") + "十" * (tens > 0)
        name += CHINESE_ONES[ones - 1] if ones else ""
        assert in_digits(name) == str(value)
        assert in_digits(f"图中有{name}个圆。") == f"图中有{value}个圆。"


@pytest.mark.parametrize("text, digits", [
    ("two hundred and three red ones", "203 red ones"),
    ("twenty two thousand three hundred", "22300"),
    ("two million, three thousand and one", "2003001"),
    ("a hundred cats, a million dogs", "100 cats, 1000000 dogs"),
    ("one, two and three", "1, 2 and 3"),
    ("two point five or three and a half", "2.5 or 3 1/2"),
    ("minus three, negative two", "-3, -2"),
    ("A dozen.", "12"),
    ("two dozen", "2 dozen"),
    ("一百零五", "105"),
    ("两百个", "200个"),
    ("一千零一", "1001"),
    ("负三", "-3"),
    ("两个圆和十二个方块", "2个圆和12个方块"),
    ("答案是三", "答案是3"),
    ("有一个或两个", "有1个或2个"),
])
def test_what_counts(text, digits):
    assert in_digits(text) == digits


@pytest.mark.parametrize("text", [
    "the red one", "no one", "this one is red", "one can see it", "one another",
    "someone", "weight", "often", "tenth", "twenty-first", "twenty first", "two thirds",
    "three-sided", "one-way", "five's", "hundreds of cats", "about a dozen cats", "a cat",
    "三角形", "五角星", "四边形", "第三个", "三分之一", "百分之五十", "三点五", "三四个", "十几个",
    "一共", "统一", "唯一的", "图中的一个圆", "十分", "千米",
])
def test_what_does_not(text):
    assert in_digits(text) == text
