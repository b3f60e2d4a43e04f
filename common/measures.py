r"""How the field's own code reads answers, scores them, and sums up: a small function each.

    letter("The answer is (B).", {"A": "cat", "B": "dog"})      "B"
    relaxed("105", ["100"])                                     1.0

A score can be compared with published ones only where every answer is read as theirs were, so the
rules are kept with their oddities. Their sources, as the docstrings name them: VLMEvalKit
("upstream"), the fork of it in Kwai-Keye/Keye that scores KC-MMBench ("keye"), and the authors of
TempCompass and of the VQA challenge. Where the two kits differ, `rules` picks one.

`ask` is a language model that reads what rules cannot: ask(prompt, tries, read) gives the first of
its replies that `read` finds something in, as found, or None. Without one (None) the rules decide.
"""

import ast
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import chain

from common.verifiers import edit_distance

FAILED_CALL = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NO_OPTION = "Z"  # how VLMEvalKit writes that no option is meant


def literal(text: str):
    """The Python value that a text is, None for any other text. Nothing in it is evaluated."""
    try:
        return ast.literal_eval(text.strip(" \t"))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def parsed_list(text: str) -> list | None:
    """The Python list that a text is, else None."""
    value = literal(text)
    return value if isinstance(value, list) else None


# --------------------------------------------------------------------------------------------------
# multiple choice


def letter(reply: str, options: dict[str, str], rules: str = "upstream") -> str:
    """The option that a reply names: its letter, "Z" (none of them), or "": not read.

    VLMEvalKit, can_infer_option: the letter alone among the words. upstream: near the end, or
    behind "answer is", where any word that begins with a to d is taken for a letter.
    """
    if FAILED_CALL in reply:
        return ""
    if any(refusal in reply for refusal in REFUSALS):
        return NO_OPTION
    words = reply.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
    named = [key for key in options if key in words]
    if len(named) == 1:
        near_end = words.index(named[0]) > len(words) - 5
        if rules == "keye" or near_end:
            return named[0]
    if not named and NO_OPTION in words:
        return NO_OPTION
    if rules == "upstream":
        stated = re.search(r"answer\s+is\s+\**([A-D])", reply, re.IGNORECASE)
        if stated and stated[1].upper() in options:
            return stated[1].upper()
    return ""


def option_in(reply: str, options: dict[str, str], rules: str = "upstream") -> str:
    """The one option whose text is in the reply, be it in a word; "" for none or several.

    VLMEvalKit, can_infer_text. upstream: not in a reply of twice the options' length.
    """
    reply = reply.lower()
    if rules == "upstream" and len(reply) > 2 * sum(map(len, options.values())):
        return ""
    found = [key for key, text in options.items() if text.lower() in reply]
    return found[0] if len(found) == 1 else ""


def choice(reply: str, options: dict[str, str], rules: str = "upstream") -> str:
    """VLMEvalKit, can_infer: the letter, else the text; "" where neither is read."""
    return letter(reply, options, rules) or option_in(reply, options, rules)


def choice_with_judge(reply, question, options, rules, ask, seed) -> str:
    """choice, else the judge's choice in three tries, else any (VLMEvalKit draws one): by seed."""
    read = choice(reply, options, rules)
    if read or ask is None:
        return read or NO_OPTION
    listed = "\n".join(f"{key}. {text}" for key, text in options.items())
    prompt = (
        "Which option does the answer to this question mean? Reply with its letter alone, or with "
        f"Z where it means none of them.\nQuestion: {question}\nOptions:\n{listed}\n"
        f"Answer: {reply}"
    )
    read = ask(prompt, 3, lambda said: choice(said, options, rules))
    return read or random.Random(seed).choice([*options, NO_OPTION])


# --------------------------------------------------------------------------------------------------
# yes or no


def without_punctuation(text: str) -> str:
    """The VQA challenge's processPunctuation, as VLMEvalKit has it.

    A sign that somewhere stands beside a blank is deleted wherever it stands, as are all of them
    where the text has a number like 1,000; the others become blanks. Then stops, 32 of them.
    """
    number = re.search(r"\d,\d", text)
    out = text
    for sign in ';/[]"{}()=+\\_-><@`,?!':
        delete = number or f"{sign} " in text or f" {sign}" in text
        out = out.replace(sign, "" if delete else " ")
    return re.sub(r"(?<!\d)\.(?!\d)", "", out, count=32)


def yes_no(reply: str) -> str:
    """VLMEvalKit, YOrN_Extraction: "Yes" or "No", the one of the words that is there; "Unknown"."""
    words = without_punctuation(reply.lower()).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def without_thinking(reply: str) -> str:
    """keye: every pair of tags, with what is in it; one without its other half stays."""
    return re.sub("<think>.*?</think>", "", reply, flags=re.DOTALL)


def chinese_yes_no(reply: str) -> str:
    """keye, of KC-MMBench: "是" or "否", also for "yes" and "no" in small letters; "Unknown"."""
    words = without_punctuation(without_thinking(reply)).split()
    for yes, no in (("是", "否"), ("yes", "no")):
        if (yes in words) != (no in words):
            return "是" if yes in words else "否"
    return "Unknown"


# --------------------------------------------------------------------------------------------------
# open answers

NUMBERS = "none zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(max(0, number - 1)) for number, word in enumerate(NUMBERS)}
# The VQA challenge's contractions. An answer may lack one apostrophe of them.
CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
you'll you're you've""".split()


def apostrophes():
    """{"dont": "don't", ...}, with the one that the challenge has the wrong way round."""
    whole = {"somebody'd": "somebodyd"}
    for word in CONTRACTED:
        for at, sign in enumerate(word):
            if sign == "'":
                whole[word[:at] + word[at + 1 :]] = word
    return whole


WHOLE = apostrophes()


def vqa_words(text: str) -> str:
    """VLMEvalKit, process_answer: what the VQA challenge compares."""
    text = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(WHOLE.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(reply: str, truths: list[str]) -> float:
    """VQA challenge: for each truth a third for each of the others that agrees, at most 1."""
    reply = vqa_words(reply)
    agree = [vqa_words(truth) == reply for truth in truths]
    return sum(min(1, (sum(agree) - own) / 3) for own in agree) / len(truths)


def anls(reply: str, truths: list[str]) -> float:
    """DocVQA: 1 - the least edit distance, as a share of the longer text; below 0.5 nothing.

    Case and the number of blanks do not matter, but the length is that with all blanks.
    """
    shares = []
    for truth in truths:
        texts = [" ".join(text.lower().split()) for text in (truth, reply)]
        length = max(len(truth.upper()), len(reply.upper()))
        shares.append(edit_distance(*texts) / length if length else 0.0)
    score = 1 - min(shares)
    return score if score >= 0.5 else 0.0


def relaxed(reply: str, truths: list[str], rules: str = "upstream") -> float:
    """ChartQA: the best over the truths: a number within 5 % of it, else the same text.

    keye measures the 5 % by the reply.
    """
    reply = reply.strip()
    pairs = [(truth, reply) if rules == "keye" else (reply, truth) for truth in truths]
    return float(any(is_near(got, wanted) for got, wanted in pairs))


def is_near(got, wanted):
    a, b = number_of(got), number_of(wanted)
    if a is not None and b:
        return abs(a - b) / abs(b) <= 0.05
    return got.lower() == wanted.lower()


def number_of(text):
    """ChartQA: a percentage as a share; None for what Python reads as no number ("1,000")."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


HANDWRITTEN = "Handwritten Mathematical Expression Recognition"


def ocr_hit(reply: str, truths: list[str], category: str) -> float:
    """OCRBench: any truth inside the reply; of formulas by hand without their blanks."""

    def plain(text):
        if category == HANDWRITTEN:
            return text.strip().replace("\n", "").replace(" ", "")
        return text.lower().strip().replace("\n", " ")

    return float(any(plain(truth) in plain(reply) for truth in truths))


def mathvista_value(reply: str, row: dict, rules: str = "upstream"):
    """VLMEvalKit, post_check: what it takes a reply to a question of MathVista for; None: nothing.

    A letter, an int or a float, by the columns of the row. Lists and free texts are never read.
    """
    if row["question_type"] == "multi_choice":
        options = {chr(65 + i): str(text) for i, text in enumerate(parsed_list(row["choices"]))}
        return choice(reply, options, rules) or None
    kind = {"integer": int, "float": float}.get(row["answer_type"])
    try:
        return kind(reply) if kind else None
    except ValueError:
        return None


def mathvista_hit(value, row: dict) -> bool:
    """Whether that value is the truth: as letters or as numbers, without tolerance."""
    if row["question_type"] == "multi_choice":
        return value == row["answer_option"]
    kind = {"integer": int, "float": float}.get(row["answer_type"])
    if kind is None:
        return row["answer"] == "None"  # the comparison is with the text of nothing
    try:
        return value is not None and value == kind(row["answer"])
    except ValueError:
        return False


# --------------------------------------------------------------------------------------------------
# clips

LEAD_INS = (
    "The best answer is", "The correct answer is", "The answer is", "The answer", "Answer:",
    "Option:",
)


def first_capital(reply: str, letters: str = "ABCD") -> str:
    """VLMEvalKit, extract_characters_regex, of Video-MME: the first of the letters, even in a word.

    The lead-ins are deleted wherever they stand. A long reply without any capital is not read.
    """
    reply = reply.strip()
    for lead_in in LEAD_INS:
        reply = reply.replace(lead_in, "")
    found = re.search(f"[{letters}]", reply)
    return found[0] if found else ""


def mvbench_first_word(reply: str, truth: str) -> bool:
    """VLMEvalKit, check_ans, of MVBench: the reply's first word in "(a)", or "(a)" in it.

    truth: a letter. "a", "A)", "(a)" are right, and so are "(" and nothing at all.
    """
    first = reply.lower().strip().split(" ")[0]
    option = f"({truth.lower()})"
    return first.replace(".", "") in option or option in first


def tempcompass_choice(reply: str, answer: str) -> bool | None:
    """TempCompass, multi-choice: the line itself, or its letter as "A", "A." or "A)"; None: no."""
    if reply == answer:
        return True
    if re.fullmatch("[A-D]", reply) or re.match(r"[A-D][.)]", reply):
        return reply[0] == answer[0]
    return None


def tempcompass_caption(reply: str, answer: str, lines: list[str]) -> bool | None:
    """TempCompass, caption matching: a line "Caption A: ..", or a part of it; None: no such.

    A part is the sentence, also behind ") ", the name "Caption A", or its last word, "A".
    """
    for line in [answer, *lines]:
        if not re.match(r"\S+ [^:]+: ", line):
            raise ValueError(f"{line[:40]!r} has not the form 'Caption A: ..'")
    bare = reply.replace(".", "")
    behind = reply.split(") ")[1] if ") " in reply else reply
    names = [line.split(": ")[0] for line in lines]
    sentences = [line.split(": ")[1] for line in lines]
    marks = [re.sub("Sentence |Option |Caption ", "", name) for name in names]
    found = [line for line in lines if line == reply]
    found += [sentence for sentence in sentences if sentence in (reply, behind)]
    found += [name for name in names + marks if name in (reply, bare)]
    name, sentence = answer.split(": ")[:2]
    right = (answer, name, answer.split(":")[0], sentence, name.split()[1])
    return found[-1] in right if found else None


def tempcompass_yes_no(reply: str, answer: str) -> bool | None:
    """TempCompass, yes or no: how the reply begins, so "Nothing" is a no; None: neither."""
    said = re.match("yes|no", reply.lower())
    return said[0] == answer if said else None


# --------------------------------------------------------------------------------------------------
# what Keye's own wrapper makes of a reply


def last_box(text: str) -> str | None:
    r"""What the last \boxed{ holds, its braces balanced; all that follows where it never ends."""
    _, box, inside = text.rpartition("\\boxed{")
    depth = 1
    for at, sign in enumerate(inside):
        depth += (sign == "{") - (sign == "}")
        if not depth:
            return inside[:at]
    return inside if box else None


def final_answer(reply: str) -> str:
    """keye, class KeyeChat: a reply as it is stored, without analysis, thinking and tags.

    Thinking that was cut off before </think> stays, and so does an <answer> without an end.
    """
    reply = reply.rpartition("</analysis>")[2].rpartition("</think>")[2].strip()
    answers = re.findall("<answer>(.*?)</answer>", reply, flags=re.DOTALL)
    if "<answer>" in reply and not answers:
        return reply
    said = answers[-1].strip() if answers else reply
    box = last_box(said)
    return said if box is None else box


# --------------------------------------------------------------------------------------------------
# tables: of Scored answers, with the names and units of the official ones


@dataclass
class Scored:
    """A question whose answer was measured. read: what was read of it, None where nothing was.

    by: "rules", "judge"; "fallback", what official code takes where neither can read an answer; or
    "no reply", the same where the judge was asked and did not answer; "": it could not be asked.
    """

    row: object  # a benchmarks.Row
    read: object
    hit: float
    more: dict = field(default_factory=dict)
    by: str = ""


def mean_hit(scored, scale=1.0):
    """None where there is none: official tables have NaN, which JSON has not."""
    return sum(s.hit for s in scored) / len(scored) * scale if scored else None


def groups(scored, column):
    """{value: answers} by a column, sorted; rows without it are in none."""
    found = defaultdict(list)
    for s in scored:
        if column in s.row.cells:
            found[s.row.text(column)].append(s)
    return dict(sorted(found.items()))


ABBREVIATED = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def choice_table(scored):
    """VLMEvalKit, report_acc: shares of 1, a line for each split; of a single one that line."""
    splits = groups(scored, "split") or {"none": scored}
    lines = {}
    for split, part in splits.items():
        line = {"split": split, "Overall": mean_hit(part)}
        for column in ("l2-category", "category"):
            for name in groups(scored, column):
                among = [s for s in part if s.row.text(column) == name]
                line[ABBREVIATED.get(name, name)] = mean_hit(among)
        lines[split] = line
    return lines if len(lines) > 1 else lines.popitem()[1]


MAIN = 1_000_000  # indices from here on are rotations of index % MAIN


def main_index(row) -> int:
    if not row.index.isdigit():
        raise ValueError(f"{row.where}: index {row.index} is no whole number")
    return int(row.index) % MAIN


def circular_table(scored):
    """MMBench: a question counts where it is answered right in every rotation of its options."""
    rotations = defaultdict(list)
    for s in scored:
        rotations[main_index(s.row)].append(s.hit)
    main = [s for s in scored if int(s.row.index) < MAIN]
    for s in main:
        s.more["group_hit"] = min(rotations[int(s.row.index)])
    if not main:
        raise ValueError("all answers are to rotated questions, with an index of 1000000 or more")
    return choice_table([Scored(s.row, s.read, s.more["group_hit"]) for s in main])


def percent_table(scored):
    """VLMEvalKit, default_rating."""
    table = {"Overall": mean_hit(scored, 100)}
    for column in ("category", "l2-category"):
        for name, part in groups(scored, column).items():
            table[name] = mean_hit(part, 100)
    return table


def overall_table(scored):
    return {"Overall": mean_hit(scored)}


def pope_table(scored):
    """VLMEvalKit, POPE_rating: Overall is F1. A row of several categories counts once in each."""
    by_category = defaultdict(list)
    for s in scored:
        for name in s.row.text("category").split(","):
            by_category[name].append(s)
    copies = list(chain(*by_category.values()))
    by_category.pop("nan", None)  # rows without one count in Overall alone
    return {name: f1_line(part) for name, part in [("Overall", copies), *by_category.items()]}


def f1_line(scored):
    said = Counter((s.row.text("answer") == "Yes", s.read == "Yes") for s in scored)
    right = said[True, True]
    precision = right / (right + said[False, True]) if right else 0.0
    recall = right / (right + said[True, False]) if right else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {
        "Overall": 100 * f1,
        "acc": mean_hit(scored, 100),
        "precision": 100 * precision,
        "recall": 100 * recall,
    }


MME = {
    "perception": "OCR artwork celebrity color count existence landmark position posters scene",
    "reasoning": "code_reasoning commonsense_reasoning numerical_calculation text_translation",
}


def mme_table(scored):
    """MME: a category has 100 points for its rows, 100 for pictures with both of theirs right."""
    points = {}
    for name, part in groups(scored, "category").items():
        pairs = []
        for picture, both in groups(part, "image_path").items():
            if len(both) < 2:
                where = both[0].row.where
                raise ValueError(f"{where}: {picture} has one answer, and must have two")
            pairs.append(both[0].hit * both[1].hit)
        if not pairs:
            raise ValueError(f"{part[0].row.where}: no image_path, nor in others of {name}")
        points[name] = mean_hit(part, 100) + 100 * sum(pairs) / len(pairs)
    table = {}
    for name, categories in MME.items():
        missing = set(categories.split()) - points.keys()
        if missing:
            raise ValueError(f"no answer of MME's category {min(missing)!r}")
        table[name] = sum(points[category] for category in categories.split())
    return table | points


def hallusion_table(scored):
    """HallusionBench, percent of questions, of figures and of pairs that are wholly right."""
    parts = {"Overall": scored, **groups(scored, "category"), **groups(scored, "l2-category")}
    return {name: hallusion_line(part) for name, part in parts.items()}


def hallusion_pieces(row) -> list[str]:
    """Of an index its numbers of set, figure and question."""
    pieces = row.index.split("_")[3:6]
    if len(pieces) < 3:
        raise ValueError(f"{row.where}: index {row.index}: no set, figure and question")
    return pieces


def hallusion_set(row) -> tuple[str, str]:
    return row.text("l2-category"), hallusion_pieces(row)[0]


def hallusion_line(scored):
    figures, questions = defaultdict(list), defaultdict(list)
    for s in scored:
        _, figure, question = hallusion_pieces(s.row)
        figures[*hallusion_set(s.row), figure].append(s.hit)
        questions[*hallusion_set(s.row), question].append(s.hit)
    line = {"aAcc": mean_hit(scored, 100)}
    for name, hits in [("fAcc", figures), ("qAcc", questions)]:
        line[name] = 100 * sum(map(all, hits.values())) / len(hits)
    return line


def open_table(scored):
    """VLMEvalKit, ImageVQADataset: percent by split, or where there is none by category."""
    parts = groups(scored, "split") or groups(scored, "category")
    table = {name: mean_hit(part, 100) for name, part in parts.items()}
    return {"Overall": mean_hit(scored, 100)} | table


# How OCRBench's table sums its categories.
OCR_KINDS = {
    "Text Recognition": [
        "Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition",
        "Handwriting Recognition", "Digit String Recognition", "Non-Semantic Text Recognition",
    ],
    "Scene Text-centric VQA": ["Scene Text-centric VQA"],
    "Doc-oriented VQA": ["Doc-oriented VQA"],
    "Key Information Extraction": ["Key Information Extraction"],
    HANDWRITTEN: [HANDWRITTEN],
}


def ocr_table(scored):
    """OCRBench: points; the whole benchmark has 1000."""
    table = {}
    for kind, categories in OCR_KINDS.items():
        table[kind] = sum(int(s.hit) for s in scored if s.row.text("category") in categories)
    total = sum(table.values())
    return table | {"Final Score": total, "Final Score Norm": total / 10}


def mathvista_table(scored):
    """MathVista: answers, those that rules read, hits, and both in percent, by skill and task."""
    parts = defaultdict(list)
    for s in scored:
        skills = parsed_list(s.row.text("skills"))
        skills = [s.row.text("skills")] if skills is None else skills
        for name in ["Overall", *skills, s.row.text("task")]:
            parts[name].append(s)
    table = {}
    for name, part in parts.items():
        fetched = sum(s.more.get("prefetch", 0) for s in part)
        table[name] = {
            "tot": len(part),
            "prefetch": fetched,
            "hit": sum(s.hit for s in part),
            "prefetch_rate": 100 * fetched / len(part),
            "acc": mean_hit(part, 100),
        }
    return table


# Video-MME's values, of which every one has a line.
DURATIONS = ["short", "medium", "long"]
VIDEO_MME_COLUMNS = {
    "domain": "Knowledge|Film & Television|Sports Competition|Artistic Performance|Life Record"
    "|Multilingual",
    "sub_category": "Humanity & History|Literature & Art|Biology & Medicine|Finance & Commerce"
    "|Astronomy|Geography|Law|Life Tip|Technology|Animation|Movie & TV Show|Documentary"
    "|News Report|Esports|Basketball|Football|Athletics|Other Sports|Stage Play|Magic Show"
    "|Variety Show|Acrobatics|Handicraft|Food|Fashion|Daily Life|Travel|Pet & Animal|Exercise"
    "|Multilingual",
    "task_type": "Temporal Perception|Spatial Perception|Attribute Perception|Action Recognition"
    "|Object Recognition|OCR Problems|Counting Problem|Temporal Reasoning|Spatial Reasoning"
    "|Action Reasoning|Object Reasoning|Information Synopsis",
}
LONG_DURATIONS = ["15", "60", "600", "3600"]
LONG_VIDEO_COLUMNS = {
    "question_category": "S2E|S2O|S2A|E2O|O2E|T2E|T2O|T2A|E3E|O3O|SSS|SOS|SAA|T3E|T3O|TOS|TAA"
}


def three_decimals(scored):
    return f"{mean_hit(scored):.3f}" if scored else "nan"


def video_table(scored, column, durations, columns):
    """Shares as texts of 3 decimals, for each duration and over all: of all, and by column."""
    for s in scored:
        for name, values in {column: "|".join(durations), **columns}.items():
            if s.row.text(name) not in values.split("|"):
                raise ValueError(f"{s.row.where}: {name} {s.row.text(name)!r} is none of {values}")
    table = {}
    for duration in [*durations, "overall"]:
        part = [s for s in scored if duration in ("overall", s.row.text(column))]
        table[duration] = {"overall": three_decimals(part)}
        for name, values in columns.items():
            table[duration][name] = {
                value: three_decimals([s for s in part if s.row.text(name) == value])
                for value in values.split("|")
            }
    return table


def video_mme_table(scored):
    return video_table(scored, "duration", DURATIONS, VIDEO_MME_COLUMNS)


def long_video_table(scored):
    return video_table(scored, "duration_group", LONG_DURATIONS, LONG_VIDEO_COLUMNS)


def mvbench_table(scored):
    """MVBench: [right, asked, "50.00%"] of each task and of all."""
    tasks = defaultdict(list)
    for s in scored:
        tasks[s.row.text("task_type")].append(s.hit)
    tasks["overall"] = [s.hit for s in scored]
    return {
        name: [sum(hits), len(hits), f"{sum(hits) / len(hits) * 100:.2f}%"]
        for name, hits in tasks.items()
    }


def tempcompass_table(scored):
    """TempCompass: right, asked, percent by dimension and task; then by each of them, and all."""
    lines = defaultdict(list)
    sums = defaultdict(list)
    for s in scored:
        dim, task = s.row.text("dim"), s.row.text("task_type")
        lines[f"{dim}. {task}"].append(s.hit)
        for name in (dim, task, "overall"):
            sums[name].append(s.hit)
    return {
        name: {
            "success": sum(hits),
            "overall": len(hits),
            "acc": round(sum(hits) / len(hits) * 100, 2),
        }
        for name, hits in [*lines.items(), *sums.items()]
    }
