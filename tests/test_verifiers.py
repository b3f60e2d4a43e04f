"""common/verifiers.py: every kind of answer, and mistakes of other verifiers not to be made."""

import itertools
import json
import random
import re

import numpy as np
import pytest

import toyworld
from common.verifiers import edit_distance, grade, matched, normal, score, verify, yes_no

BOX = "<|object_ref_start|>red cross<|object_ref_end|><|box_start|>{}<|box_end|>"
POINT = "<|point_start|>{}<|point_end|>"
TIME = "<|clip_time_start|>{}<|clip_time_end|>"


def meta(verifier, answer, **more):
    return {"verifier": verifier, "answer": answer, **more}


LETTER = meta("choice", "B", choices=["cat", "dog", "bird", "fish"])
NUMBER = meta("number", "5")


def right(text, m):
    return verify(text, m)[1]


CASES = [
    # (meta, right answers, wrong answers)
    (
        NUMBER,
        ["5", "5.0", " +5. ", "５", "+5.00", "5 objects", "$5$", "5%", "$5", "5°", "5^\\circ"]
        + ["5\\text{ cm}", "5 cm", "5\\,", "5 m^2", "5 km/h", "一共5个", "答案是5。"]
        + ["10/2", "\\frac{10}{2}", "4 2/2", "0.5e1", "0.5 × 10^1", "2 + 3 = 5", "x \\approx 5"]
        + ["Answer: 5", "The answer is 5 because 2 and 3 are there.", "There are 5; yes, 5."]
        + ["The answer to 2 + 3 is 5.", "The answer is 4. No, the answer is 5."]
        + ["not 4 but 5", "It isn't 4: 5", "five", "Five.", "There are five circles.", "五个"]
        + ["5 (3 red and 2 blue)", "3 red and 2 blue, so 5 objects.", "5 rather than 6"]
        + ["3 red, 2 blue: a total of five", "5 (five)", "There are 5 circles and no squares."],
        ["", "5 or 6", "five or 6", "five or six", "5 (or 6)", "fifty-five", "five-sided", "五角星"]
        + ["two fifths", "5th", "fifth", "5x", "第五个", "四五个", "十五", "5 million", "五万", "5k"]
        + ["three circles and two squares", "4 so far, or 5", "minus five", "负五"]
        + [ "55", "-5", "−5", "5-6", "5 - 6", "15", "5^2", "5²", "5½", "5,5"]
        + ["\\frac{5}{\\sqrt{2}}", "5\\pi", "nan", "inf", "5.5.5", "5/2/1", "5:5:1", "A5", "5/0"]
        + ["not 5", "It is not 5.", "x = 4 or x = 5", "The answer is not 5.", "The answer is 4."]
        + ["1e999", "5e99999", "9" * 400, "9" * 5000, "5/" + "9" * 5000, "5" + " " * 20000]
        + ["0x5", "5x5"],
    ),
    (
        meta("number", "1234.5"),
        ["1,234.5", "$1{,}234.50", "1\\,234.5", "1234½", "2469/2", "1.2345e3"]
        + ["1.2345 \\times 10^{3}", "1 234.5", "1\u202f234.5 km"],
        ["1.234,5", "1,23,4.5", "12,34.5", "1 23 4.5", "1 2345"],
    ),
    (
        meta("number", "21"),
        ["twenty-one", "Twenty one", "二十一", "一共二十一个", "2,1 - no: 21"],
        ["twenty", "twenty-first", "one", "twenty, one", "二十", "twenty one thousand"],
    ),
    (
        meta("number", "1"),
        ["one", "Only one.", "There is one circle.", "一", "有一个圆形", "one, not two"],
        ["the red one", "No one can say.", "one or two", "统一", "一样", "two, one of them red"],
    ),
    (
        meta("number", "0"),
        ["zero", "none", "None.", "There are no circles.", "No circles", "I don't see any circles."]
        + ["零", "没有圆形。", "Nobody", "There are not any."],
        ["no", "No.", "I have no idea.", "There is no way to tell.", "no more than 3", "nothing"]
        + ["I don't have any information", "没有答案", "no other", "no, there are 3"],
    ),
    (meta("number", "12"), ["A dozen.", "12", "one dozen"], ["about a dozen circles", "two dozen"]),
    (meta("number", "24"), ["two dozen", "2 dozen"], ["a dozen", "dozens"]),
    (
        meta("number", "2000000"),
        ["2 million", "two million", "2,000,000", "2 000 000", "200万", "两百万"],
        ["2", "two", "2 billion", "a million"],
    ),
    (meta("number", "1500"), ["1.5k", "1.5 thousand", "one thousand five hundred"], ["1.5 km"]),
    (meta("number", "2.5"), ["two point five", "two and a half", "5/2", "\\frac52"], ["2", "half"]),
    (
        meta("number", "-2.5"),
        ["-2.5", "−2.50", "-5/2", "-\\frac{5}{2}", "-2 1/2", "-$2.5"],
        ["2.5", "-2,5", "- 2.5 or 2.5"],
    ),
    (meta("number", "32"), ["32"], ["3²", "3^2", "3^{2}", "x^32", "3 2"]),
    (meta("number", "1/3"), ["1/3", "2/6", "\\dfrac{1}{3}", "⅓"], ["0.333", "1", "3"]),
    (
        meta("number", "100", tolerance=0.05),
        ["95", "105", "100", "104.9%"],
        ["94.9", "105.1", "-100", "1000"],
    ),
    (
        LETTER,
        ["B", "b", "(B)", "[B]", "B)", "B.", "**B**", "\\text{B}", "B. dog", "(B) dog", "So, B."]
        + ["Answer: B", "The answer is B because A is too small.", "option b", "B is correct."]
        + ["The correct option is (B).", "答案是B。", "答案：（B）"]
        + ["dog", "The dog.", "It shows a dog: B", "B, not A", "It is not A. The answer is B."]
        + ["It is not A. It is B.", "I think B", "B because it barks", "B - it barks", "It's B!"]
        + ["I would choose option B", "A is wrong, B is right.", "B rather than C", "B\nIt barks."]
        + ["(b)", "b) It barks.", "b, because it barks", "I'd go with b.", "选B", "B选项", "我选择B"]
        + ["Option B is the answer.", "C isn't correct; B is"],
        ["", "A", "A or B", "A, B", "A/B", "A B", "B or C", "B. cat", "AB", "Be", "E", "7"]
        + ["not B", "It is not a dog", "neither B nor C", "cat and dog", "A dog and a cat"]
        + ["Plan B will show it", "dogs", "the hotdog", "BECAUSE", "(A)(B)", "B?A"]
        + ["b or c", "b, or c", "a, b", "(a) or (b)", "B is wrong", "vitamin b is shown", "B-rated"]
        + ["the picture(s) of b", "I think B or C", "It is B and C"],
    ),
    (
        LETTER | {"choices": ["A. cat", "B. dog", "C. bird", "D. fish"]},
        ["B", "dog", "B. dog", "b. dog", "(B)", "The dog."],
        ["A. cat", "cat", "B. cat", "hotdog"],
    ),
    (
        meta("choice", "A", choices=list("ABCD")),
        ["A", "(a)", "a", "A.", "option a", "Answer: A", "A is right"],
        ["A cat is here", "It is a.", "The answer is A or B", "I", "I choose a cat", "so a cat"]
        + ["the option a person takes", "An option: a cat"],
    ),
    (
        meta("choice", "C"),
        ["C", "(C)", "**C**."],
        ["D", "C or D", "Vitamin C is shown"],
    ),
    (
        meta("choice", "top left", choices=toyworld.PLACES),
        ["top left", "Top  Left.", "The star is at the top left.", "not top right but top left"],
        ["top", "left", "left top", "top left or top", "bottom left", "not top left"],
    ),
    (
        meta("choice", "red", choices=["red", "blue"]),
        ["red", "RED", "The red one"],
        ["blue", "red or blue", "redder", "not red"],
    ),
    (meta("choice", "red"), ["red", "Red."], ["red or blue", "the red one"]),
    (
        meta("choice", "$5", choices=["$5", "$10", "-\\frac{1}{2}"]),
        ["$5", "5", "It costs $5."],
        ["$10", "$5 or $10", "15"],
    ),
    (
        meta("choice", "2", choices=["1", "2"]),
        ["2", "Clip 2"],
        ["1", "1 2", "12", "Clip 1 of 2"],
    ),
    (
        meta("choice", "x", choices=["x", "yy"]),  # an option's text, though it is one letter
        ["x", "X.", "It is x."],
        ["A", "yy", "x or yy", "xy"],
    ),
    (
        meta("choice", "红色", choices=["红色", "蓝色"]),
        ["红色", "答案是红色。"],
        ["蓝色", "不是红色", "红色和蓝色"],
    ),
    (
        meta("yesno", "yes"),
        ["yes", "Yes.", "YES", "Yes, there is no dog.", "The answer is yes.", "I say yes", "是的"]
        + ["Nothing wrong, yes", "Snow is visible: yes", "It is: **yes**"],
        ["no", "", "yes no", "yes or no", "Yes. No.", "yesterday", "eyes", "I do not know"]
        + ["not yes", "Is it yes or no?"],
    ),
    (
        meta("yesno", "no"),
        ["no", "No, it is not.", "No dog is there.", "it is no", "否", "False", "There is no dog."]
        + ["There are no dogs in it", "不，没有狗"],
        ["yes", "I do not know", "Nothing", "know", "snow", "none", "not"]
        + ["I have no doubt that it is so", "There is no doubt.", "No, but yes in another sense"],
    ),
    (
        meta("order", "2 1 3"),
        ["2 1 3", "2, 1, 3.", "[2, 1, 3]", "2 -> 1 -> 3", "2→1→3", "The answer is 2 1 3."]
        + ["Picture 2, picture 1, picture 3"],
        ["1 2 3", "213", "2 1", "2 1 3 3", "", "2 1 3 of 3"],
    ),
    (
        meta("order", "cat dog"),
        ["cat, dog", "Cat dog", "cat → dog", "1. cat\n2. dog", "1) cat\n2) dog", "cat, then dog"],
        ["dog cat", "cat", "catdog", "1. dog\n2. cat", "cat, bird, dog"],
    ),
    (meta("exact", "Ab"), ["Ab", " Ab. "], ["ab", "A b", "The answer is Ab"]),
    (
        meta("text", "Y9C3"),
        ["<|ocr_text_start|>Y9C3<|ocr_text_end|>", "Ｙ9C3"],
        ["y9c3", "Y9C33", ""],
    ),
    (
        meta("interval", "[0.5, 2.0]"),
        [TIME.format("[0.5, 2.0]"), TIME.format("[0.5, 2.5]"), "[0.5, 2.0]"],
        ["", "0.5 to 2", "2.0, 0.5", TIME.format("[2.0, 0.5]"), TIME.format("[0.5, 5.0]")]
        + [TIME.format("[1]"), TIME.format("[NaN, 1]"), TIME.format("[0, 1e999]")]
        + [TIME.format("[["), TIME.format("{}")],
    ),
    (
        meta("interval", "[[0, 1], [3, 4]]"),
        ["[[0, 1], [3, 4]]", "[[3, 4], [0, 1]]", "[[0, 0.5], [0.5, 1], [3, 4]]"]
        + [TIME.format("[0, 1]") + TIME.format("[3, 4]")],
        ["[[0, 10]]", TIME.format("[0, 10]")],
    ),
    (
        meta("point", "[[500, 500]]"),
        [POINT.format("[[540, 540]]"), "[[500, 500]]"],
        ["[[561, 500]]", "", "[[500, 500], [500, 500]]"],
    ),
]


@pytest.mark.parametrize("m, good, bad", CASES)
def test_verifiers(m, good, bad):
    assert [text for text in good if right(text, m) != 1] == []
    assert [text for text in bad if right(text, m) != 0] == []
    assert right(None, m) == 0 and right(m["answer"], m) == 1


@pytest.mark.parametrize(
    "m, bare, named",
    [
        (NUMBER, "5", "The answer is 5."),
        (LETTER, "B", "The answer is B."),
        (meta("choice", "red", choices=["red", "blue"]), "Red.", "The red one"),
        (meta("yesno", "no"), "no", "No dog is there."),
        (meta("order", "2 1 3"), "2, 1, 3", "Picture 2, picture 1, picture 3"),
        (meta("box", "[[0, 0, 9, 9]]"), BOX.format("[[0, 0, 9, 9]]"), "[[0, 0, 9, 9]]"),
        (meta("point", "[[9, 9]]"), POINT.format("[[9, 9]]"), "[[9, 9]]"),
        (meta("interval", "[1, 2]"), TIME.format("[1, 2]"), "[1, 2]"),
    ],
)
def test_strictness_is_how_an_answer_is_read(m, bare, named):
    assert score(bare, m) == right(bare, m) == right(named, m) == 1
    assert score(named, m) == score(None, m) == 0


def test_the_asked_form_of_coordinates_is_one_tag():
    one = BOX.format("[[0, 0, 9, 9]]")
    two = meta("box", "[[0, 0, 9, 9], [20, 20, 29, 29]]")
    each = one + BOX.format("[[20, 20, 29, 29]]")
    assert right(each, two) == 1 and score(each, two) == 0
    assert score(BOX.format("[[0, 0, 9, 9], [20, 20, 29, 29]]"), two) == 1


def test_a_wrong_truth_is_an_error_and_a_wrong_answer_is_none():
    for m in (
        meta("mood", "good"),
        meta("number", "many"),
        meta("number", "None"),  # what an empty cell became
        meta("yesno", "maybe"),
        meta("box", "here"),
        meta("interval", "[2, 1]"),
        meta("choice", "red", choices=["blue", "green"]),
    ):
        for text in ("5", None):
            with pytest.raises(ValueError, match="verifier|cannot be read"):
                verify(text, m)


@pytest.mark.parametrize("answer, worth", [
    ("rings stars dots", 1), ("stars rings dots", 1 / 3), ("stars, dots, rings", 0),
    ("rings stars", 0), ("rings stars dots dots", 0), ("rings rings rings", 0),
])
def test_an_order_is_worth_the_things_that_stand_at_their_places(answer, worth):
    """If it has all of them; it is right only as a whole."""
    outcome, right = verify(answer, meta("order", "rings stars dots"))
    assert outcome == pytest.approx(worth) and right == (worth == 1)


@pytest.mark.parametrize("answer, worth", [("7", 1), ("8", 0.25), ("5", 1 / 6), ("two", 1 / 12)])
def test_a_wrong_number_is_worth_something_where_meta_says_so(answer, worth):
    """The less the farther it lies; it is as wrong as any."""
    outcome, right = verify(answer, meta("number", "7", near=0.5))
    assert outcome == pytest.approx(worth) and right == (worth == 1)
    assert verify(answer, meta("number", "7")) == (right, right)


def test_boxes():
    one = meta("box", "[[0, 0, 100, 100]]")
    two = meta("box", "[[0, 0, 100, 100], [500, 500, 600, 600]]")

    def box(*rows):
        return BOX.format(json.dumps(rows))

    assert verify(box([50, 0, 150, 100]), one) == (pytest.approx(1 / 3), 0)
    assert verify("[0, 0, 100, 100]", one) == (1, 1)  # other people's bare JSON
    # a tag for each object
    assert verify(box([0, 0, 100, 100]) + box([500, 500, 600, 600]), two) == (1, 1)
    assert verify(box([0, 0, 100, 100]), two) == (0.5, 0)  # half of the boxes are not all
    assert verify(box([-50, -50, 100, 100]), one) == (1, 1)  # cut to the picture
    pixels = meta("box", "[[0, 0, 50, 40]]", size=[50, 40])
    assert verify(box([0, 0, 900, 900]), pixels) == (1, 1)
    assert verify(box([0, 0, 50, 20]), pixels) == (0.5, 1)
    for text in (
        "[[0, 0, 100]]",
        "[[0, 0, 100, NaN]]",
        "[" * 9999,
        "[[true, 0, 1, 1]]",
        "{}",
        "[]",
        "none",
        "[[1e999, 0, 1, 1]]",
        "[[0, 0, 1" + "0" * 5000 + ", 1]]",
        json.dumps([[0, 0, 100, 100]] * 101),
    ):
        assert verify(BOX.format(text), one) == (0, 0) and verify(text, one) == (0, 0)


def test_boxes_as_other_models_write_them():
    """JSON of Qwen's, in a fence or not, and rows in a sentence: read, but no score."""
    one = meta("box", "[[10, 20, 300, 400]]")
    two = meta("box", "[[10, 20, 300, 400], [500, 500, 600, 600]]")
    first, second = '{"bbox_2d": [10, 20, 300, 400], "label": "a [1]"}', "[500, 500, 600, 600]"
    for text in (
        first,
        f"[{first}]",
        f"```json\n[\n\t{first}\n]\n```",
        f"Here it is:\n```json\n[{first}]\n```\nIt is red.",
        "```[10, 20, 300, 400]```",
        '{"label": "cat", "bbox": [10, 20, 300, 400]}',
        "The box is [10, 20, 300, 400].",
        "(10,20),(300,400)",
        "It spans (10, 20, 300, 400)",
    ):
        assert verify(text, one) == (1, 1) and score(text, one) == 0, text
        assert verify(text, two) == (0.5, 0), text
    for text in (
        f'[{first}, {{"bbox_2d": {second}}}]',
        f'{first}\n{{"bbox_2d": {second}}}',
        f"[10, 20, 300, 400] and {second}",
    ):
        assert right(text, two) == 1 and right(text, one) == 0, text
    for text in (
        '[{"point_2d": [10, 20]}]',
        '[{"bbox_2d": [10, 20, 300]}]',
        '[{"bbox_2d": ["10", 20, 300, 400]}]',
        '[{"bbox_2d": [10, 20, 300, NaN]}]',
        '[{"label": "cat"}]',
        "[10, 20, 300, 400], [5, 6]",
        "[1.2.3, 20, 300, 400]",
        "10, 20, 300, 400",
        '{"bbox_2d": ' * 9000,
    ):
        assert verify(text, one) == (0, 0), text
    assert right("```json\n[]\n```", meta("box", "[]")) == 1 and right("{}", meta("box", "[]")) == 0


def test_points_as_other_models_write_them():
    m = meta("point", "[[500, 500]]")
    for text in ('[{"point_2d": [505, 495], "label": "x"}]', "It is at (500, 500).", "[500, 500]"):
        assert right(text, m) == 1 and score(text, m) == 0
    for text in ('{"point_2d": [1, 1]}', "(500, 500) or (1, 1)", "500, 500", '{"bbox_2d": [5, 5]}'):
        assert right(text, m) == 0


def test_a_runaway_edit_distance_is_counted():
    """Python's own table of 20,000 by 20,000 cells would take minutes."""
    assert edit_distance("ab" * 10_000, "ba" * 10_000) == 2
    assert edit_distance("a" * 20_000, "b" * 15_000) == 20_000
    assert verify("x" * 20_000, meta("text", "y" * 20_000)) == (0, 0)
    assert grade("ab" * 20_000, meta("text", "ba" * 20_000)) == 2 / 40_000


def test_matching_is_the_best_one():
    rng = random.Random(0)
    for _ in range(200):
        n, m = rng.randint(1, 5), rng.randint(1, 5)
        gain = np.array([[rng.choice([0, rng.random()]) for _ in range(m)] for _ in range(n)])
        wide = gain if n <= m else gain.T
        ways = itertools.permutations(range(max(n, m)), min(n, m))
        best = max(sum(row[j] for row, j in zip(wide, way)) for way in ways)
        assert matched(gain) == pytest.approx(best)
    assert matched(np.random.default_rng(0).random((100, 100))) > 95


def test_points_of_overlapping_boxes():
    """The first point lies in both boxes, the second in the first box alone."""
    m = meta("point", "[[50, 50], [20, 20]]", boxes=[[0, 0, 100, 100], [40, 40, 200, 200]])
    assert right("[[50, 50], [20, 20]]", m) == 1 and right("[[20, 20], [30, 30]]", m) == 0


def test_intervals():
    m = meta("interval", "[2, 4]")
    assert verify(TIME.format("[1, 3]"), m) == (pytest.approx(1 / 3), 0)
    ends = meta("interval", "[[0, 1], [9, 10]]")
    assert verify("[[0, 10]]", ends) == (pytest.approx(0.2), 0)
    assert verify("[[0, 2], [1, 3], [1, 2]]", meta("interval", "[0, 3]")) == (1, 1)  # unions
    assert verify("[2, 99]", m | {"duration": 4}) == (1, 1)  # cut to the clip
    assert verify("[50, 99]", m | {"duration": 4}) == (0, 0) and verify("[3, 3]", m) == (0, 0)
    assert verify("[1, 4]", m | {"duration": 10}) == (pytest.approx(2 / 3 * 0.9), 1)


def test_grades_are_of_the_asked_form_and_number():
    two = meta("box", "[[0, 0, 100, 100], [500, 500, 600, 600]]")
    half = "[[0, 0, 100, 100], [500, 500, 600, 550]]"
    assert grade(BOX.format(half), two) == pytest.approx(0.75)
    assert grade(half, two) == grade(BOX.format("[[0, 0, 100, 100]]"), two) == 0
    clip = meta("interval", "[2, 4]", duration=10)
    assert grade(TIME.format("[1, 4]"), clip) == pytest.approx(2 / 3)
    assert grade("ABXDE", meta("text", "ABCD")) == 0.5  # the character error rate
    assert grade("A" * 20001, meta("text", "ABCD")) == 5000


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == edit_distance("", "abc") == 3
    assert edit_distance("abc", "") == 3 and edit_distance("ab", "ab") == 0

    def naive(a, b):
        if not a or not b:
            return len(a) + len(b)
        replaced = naive(a[:-1], b[:-1]) + (a[-1] != b[-1])
        return min(replaced, naive(a[:-1], b) + 1, naive(a, b[:-1]) + 1)

    rng = random.Random(0)
    for _ in range(100):
        a, b = ("".join(rng.choices("ab红", k=rng.randint(0, 5))) for _ in range(2))
        assert edit_distance(a, b) == naive(a, b)


def test_normal():
    assert normal("<|ocr_text_start|> a  b.<|ocr_text_end|>") == "a b"


# -- what other reward functions get wrong


def test_reference_choice_extractor():
    """VLM-R1 wants a capital before punctuation or the end: real answers earn 0, the last of two
    letters counts."""

    def naive(text):
        return (re.findall(r"(?<![A-Z])([A-Z])(?=[.,?!:;]|$)", text.upper()) or [None])[-1]

    for text, letter in (
        ("(A)", "A"),
        ("A)", "A"),
        ("[B]", "B"),
        ("**B**", "B"),
        ("The answer is D because", "D"),
    ):
        assert naive(text) is None and right(text, LETTER | {"answer": letter}) == 1
    assert naive("A or B") == "B" and right("A or B", LETTER) == 0
    # an article in upper case
    assert naive("It is a.") == "A" and right("It is a.", LETTER | {"answer": "A"}) == 0


def test_reference_yes_no_substring():
    def naive(text):
        return re.search("(yes|no)", text.lower())[1]

    for text, want in (
        ("I do not know", []),
        ("Nothing wrong, yes", ["yes"]),
        ("Snow is visible: yes", ["yes"]),
    ):
        assert naive(text) == "no" and yes_no(text) == want


def test_reference_edit_distance_of_numbers():
    assert 1 - edit_distance("1998", "1999") / 4 == 0.75
    assert verify("1998", meta("number", "1999")) == (0, 0)


def test_reference_count_is_exact():
    assert [verify(text, meta("number", "10"))[0] for text in ("9", "10", "11")] == [0, 1, 0]


def test_reference_boxes_without_area():
    def area(x):
        return (x[2] - x[0]) * (x[3] - x[1])

    def naive(a, b):  # VLM-R1's
        width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
        both = width * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        return both / (area(a) + area(b) - both)

    with pytest.raises(ZeroDivisionError):
        naive([5, 5, 5, 5], [5, 5, 5, 5])
    assert verify("[[5, 5, 5, 5]]", meta("box", "[[5, 5, 5, 5]]")) == (0, 0)
    assert verify("[[9, 9, 1, 1]]", meta("box", "[[1, 1, 9, 9]]")) == (0, 0)


def test_reference_none_against_none_is_right():
    answers = ("none", "None.", "[]", "[[1, 1, 9, 9]]", "")
    assert [right(text, meta("box", "[]")) for text in answers] == [1, 1, 1, 0, 0]


def test_reference_number_of_boxes():
    """A mean over matches alone pays for one good box among a hundred, or for one of many."""
    m = meta("box", "[[0, 0, 100, 100]]")
    many = json.dumps([[0, 0, 100, 100]] + [[500, 500, 600, 600]] * 9)
    assert verify(many, m) == (pytest.approx(0.1), 0)
    assert verify("[[0, 0, 100, 100]]", meta("box", many)) == (pytest.approx(0.1), 0)


def test_reference_boxes_matched_by_sorting():
    """Pairing by sorted corners, or each with its nearest, misses the best pairing."""
    truth = [[10, 0, 110, 100], [11, 500, 111, 600]]
    got = [[12, 0, 112, 100], [9, 500, 109, 600]]
    for a, b in zip(sorted(got), sorted(truth)):
        assert right(json.dumps([a]), meta("box", json.dumps([b]))) == 0
    m = meta("box", json.dumps(truth))
    assert score(BOX.format(json.dumps(got)), m) == right(json.dumps(got), m) == 1
    # greedy would take 0.9 and leave 0; the best sum is 1.6
    assert matched(np.array([[0.9, 0.8], [0.8, 0.0]])) == pytest.approx(1.6)


def test_reference_whole_clip_always_earns():
    m = meta("interval", "[2, 3]", duration=10)
    assert verify("[0, 10]", m | {"duration": None})[0] == pytest.approx(0.1)
    assert verify("[0, 10]", m)[0] == pytest.approx(0.1 * 0.8 * 0.3)
    assert verify("[2, 3]", m) == (1, 1)


def test_reference_ocr_reports_graded_and_exact():
    assert verify("ABXD", meta("text", "ABCD")) == (0.75, 0)
    assert verify("AB  CD.", meta("text", "AB CD")) == (1, 1)
    assert verify("ABCD" * 1000, meta("text", "ABCD")) == (0, 0)  # 1 - CER would be -999
