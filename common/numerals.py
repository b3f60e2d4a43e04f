"""Number words as digits, so that one reader of numbers reads them all.

    in_digits("There are twenty-one circles.")    "There are 21 circles."
    in_digits("图中有三个三角形")                  "图中有3个三角形"

Only words that count become digits: not the "one" of "the red one" and "no one", nor "first", "two
thirds", "three-sided"; not 三角形 (triangle), 第三 (third), 三分之一, 三四个 (three or four).
"""

import re

# --------------------------------------------------------------------------------------------------
# English

ONES = "one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORTH = {word: value for value, word in enumerate(["zero", *ONES, *TEENS])}
WORTH |= {word: 10 * value for value, word in enumerate(TENS, 2)}
SCALE = {"thousand": 10**3, "million": 10**6, "billion": 10**9}

SCALES = "|".join(SCALE)
SMALL = rf"(?:(?:{'|'.join(TENS)})[- ](?:{'|'.join(ONES)})|{'|'.join(WORTH)})\b"  # twenty-one
# two hundred and three, a hundred, the "a" of a thousand
HUNDREDS = rf"(?:an?(?= (?:hundred|{SCALES})\b)|{SMALL})(?: hundred\b(?:(?: and)? {SMALL})?)?"
# No count: what another word goes on ("three-sided"), or a fraction or an ordinal ends.
NO_COUNT = (
    r"['’-]?\w| (?:half|halves|first|thirds?|quarters?"
    r"|(?:four|fif|six|seven|eigh|nin|ten|hundred)ths?)\b"
)
# (?>..): all of it or nothing, else "twenty" would be left of "twenty-first"
ENGLISH = (
    rf"(?i)(?<![\w'’-])(?>{HUNDREDS}(?: (?:{SCALES})\b(?:,? (?:and )?{HUNDREDS})?)*)(?!{NO_COUNT})"
)
# "one" counts behind these words and at the beginning of a clause, but not in "one can see".
BEFORE_ONE = (
    r"(?i)(?:^|[^\w\s]|\n|'s|\b(?:is|are|was|were|see|counts?|counted|find|found|has|have|had"
    r"|contains?|shows?|only|just|exactly|about|or|and|plus|minus|to))\s*$"
)
AFTER_ONE = r" (?:another|by one|can|could|may|might|must|should|would)\b"


def english_digits(match):
    """The digits of an ENGLISH match, as a replacement for re.sub."""
    words = match[0].lower()
    if words == "one":
        before = match.string[max(0, match.start() - 30) : match.start()]
        after = match.string[match.end() : match.end() + 10]
        if not re.search(BEFORE_ONE, before) or re.match(AFTER_ONE, after):
            return match[0]
    total = part = 0
    for word in re.findall("[a-z]+", words):
        if word in SCALE:
            total += max(1, part) * SCALE[word]  # 1: "a million"
            part = 0
        elif word == "hundred":
            part = 100 * max(1, part)
        else:
            part += WORTH.get(word, 0)  # 0: "a", "and"
    return str(total + part)


# --------------------------------------------------------------------------------------------------
# Chinese

DIGIT = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
UNIT = {"千": 1000, "百": 100, "十": 10, "": 1}

D = f"[{''.join(DIGIT)}]"
NUMERAL = rf"(?=[十{''.join(DIGIT)}])(?:{D}千零?)?(?:{D}百零?)?(?:{D}?十)?{D}?"  # 一百二十三
MEASURE = "[个只条张块颗辆人位名本件把棵朵头匹架座间种次幅根台项页岁天元万亿]"
# Where a numeral may stand without such a word behind it: at the beginning of a clause, "= 三", ..
BEGIN = r"(?:^|(?<=[\s,、:=(是为有共只或和与至到负]))"
# No numeral begins behind these: 第三 (third), 分之三, 点五, 几十
INSIDE = rf"(?<![第之点几数千百十{''.join(DIGIT)}])"
# Most one-character words with 一 are no numbers (统一, 唯一): it counts where a clause begins.
CHINESE = (
    rf"(?:{BEGIN}|{INSIDE}(?!一{MEASURE})){NUMERAL}(?={MEASURE})|{BEGIN}{NUMERAL}(?=\W|$)"
)


def chinese_digits(match):
    pairs = re.findall(f"({D}?)([千百十]?)", match[0])
    return str(sum(DIGIT.get(digit, 1) * UNIT[unit] for digit, unit in pairs if digit or unit))


# --------------------------------------------------------------------------------------------------
# both

# What is left to do once numbers are digits: pattern, what takes its place.
AFTERWARDS = {
    r"(?i)^\W*(?:an?|1) dozen\W*$": "12",  # in a sentence, "a dozen" is about twelve
    r"(?i)\b(?:minus|negative) (?=\d)|负(?=\d)": "-",
    r"(?i)(?<=\d) point (?=\d)": ".",  # two point five
    r"(?i)(?<=\d) and a half\b": " 1/2",
}


def in_digits(text: str) -> str:
    """The text with the numbers that it counts with in digits."""
    text = re.sub(ENGLISH, english_digits, text)
    text = re.sub(CHINESE, chinese_digits, text)
    for pattern, new in AFTERWARDS.items():
        text = re.sub(pattern, new, text)
    return text
