"""sft.py: what the filter drops, what a step does, and the command as a user starts it."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import sft
from common.questions import read_questions
from common.rollout import Prompt
from common.rollout import Response
from common.rollout import Rollout
from conftest import toy_processor
from data import Processor
from miniature import curve
from miniature import run_small
from model import KeyeVL
from phases import FakeRun
from phases import Loaded
from phases import Loop
from phases import Phase
from phases import change
from phases import first_model
from phases import flags
from phases import read
from phases import run_script
from phases import sums
from phases import talk
from phases import world
from phases import write

TOKENIZER = toy_processor().tokenizer


def lines_of(path):
    return [record["messages"][0]["content"] for record in read(path)]


# ----------------------------------------------------------------------------------------------
# the filter: questions are asked


class Sampler:
    """Stands for sample_groups: each question gets the responses that `says` returns for it."""

    def __init__(self, monkeypatch, says):
        self.says = says
        self.prompts = []
        self.calls = []
        self.loaded = Loaded(SimpleNamespace(processor=SimpleNamespace(tokenizer=TOKENIZER)))
        monkeypatch.setattr(sft, "Generator", self.loaded)
        monkeypatch.setattr(sft, "sample_groups", self.sample_groups)

    def sample_groups(self, generator, prompts, group, max_tokens, temperature=1.0, **how):
        self.prompts += prompts
        self.calls.append((generator, group, list(max_tokens), temperature, how))
        groups = []
        for prompt in prompts:
            groups.append([self.rollout(prompt, text) for text in self.says(prompt)])
            prompt.failure = "" if groups[-1] else "a.png: missing"
        return groups

    def rollout(self, prompt, text):
        ids = TOKENIZER.encode(text)
        response = Response(ids=[*ids, 0], finished=not text.endswith(".."))
        return Rollout(prompt, {}, response, [{"type": "text", "text": text, "loss": True}])


def test_questions_are_asked_bare_several_times_each_from_its_own_seed(tmp_path, monkeypatch):
    questions = read_questions(sums(tmp_path / "q.jsonl", 3))
    sampler = Sampler(monkeypatch, lambda prompt: ["1", "2", "3", "4"])
    sft.attempts(FakeRun(tmp_path), tmp_path / "model", questions, samples=4, seed=7)
    assert sampler.loaded.folders == [tmp_path / "model"]
    assert sampler.prompts == [
        Prompt(question.record, tmp_path, "plain", f"7/{i}") for i, question in enumerate(questions)
    ]
    ((generator, group, max_tokens, temperature, how),) = sampler.calls
    assert generator is sampler.loaded.thing
    assert (group, temperature, how) == (4, 1.0, {"keep_pixels": False})
    # Twice the true answer, and a little: enough to see that an answer is longer.
    assert max_tokens == [2 * len(TOKENIZER.encode(str(i))) + 4 for i in range(3)]


def test_ranks_share_the_questions_and_all_know_all_answers(tmp_path, monkeypatch):
    questions = read_questions(sums(tmp_path / "q.jsonl", 5))
    sampler = Sampler(monkeypatch, lambda prompt: [prompt.seed])
    local = {}
    one = FakeRun(tmp_path, rank=1, world=2, local=local)
    with pytest.raises(KeyError):  # the other rank's answers are not there yet
        sft.attempts(one, tmp_path, questions, 1, 0)
    assert [prompt.seed for prompt in sampler.prompts] == ["0/1", "0/3"]
    zero = FakeRun(tmp_path, rank=0, world=2, local=local)
    answers = sft.attempts(zero, tmp_path, questions, 1, 0)
    assert [tries[0].text for tries in answers] == [f"0/{i}" for i in range(5)]


def test_an_attempt_is_judged_by_its_words_and_knows_its_length(tmp_path, monkeypatch):
    questions = read_questions(sums(tmp_path / "q.jsonl", 2))
    Sampler(monkeypatch, lambda prompt: ["1", "0", "2 or .."])
    zero, one = sft.attempts(FakeRun(tmp_path), tmp_path, questions, 3, 0)
    assert [attempt.right for attempt in zero] == [0.0, 1.0, 0.0]
    assert [attempt.right for attempt in one] == [1.0, 0.0, 0.0]
    assert [attempt.outcome for attempt in one] == [1.0, 0.0, 0.0]
    assert [attempt.text for attempt in one] == ["1", "0", "2 or .."]
    assert [attempt.finished for attempt in one] == [True, True, False]
    assert one[0].tokens == len(TOKENIZER.encode("1")) + 1
    assert one[1].tokens == len(TOKENIZER.encode("0")) + 1


def test_an_answer_may_be_worth_something_and_yet_be_wrong(tmp_path, monkeypatch):
    meta = {"answer": "a red ring", "verifier": "text"}
    path = write(tmp_path / "q.jsonl", [talk("What?", "a red ring", meta=meta)])
    questions = read_questions(path)
    Sampler(monkeypatch, lambda prompt: ["a red cross"])
    ((attempt,),) = sft.attempts(FakeRun(tmp_path), tmp_path, questions, 1, 0)
    assert 0 < attempt.outcome < 1 and attempt.right == 0


def test_questions_that_cannot_be_asked_are_few_or_the_run_ends(tmp_path, monkeypatch):
    questions = read_questions(sums(tmp_path / "q.jsonl", 40))
    broken = {"0/7", "0/9"}
    Sampler(monkeypatch, lambda prompt: [] if prompt.seed in broken else ["1"])
    run = FakeRun(tmp_path)
    answers = sft.attempts(run, tmp_path, questions, 1, 0)
    assert [i for i, tries in enumerate(answers) if not tries] == [7, 9]
    first = f"{tmp_path}/q.jsonl:8: a.png: missing"
    assert run.said == [f"skipped: 2 of 40 questions cannot be used, the first: {first}"]
    broken |= {f"0/{i}" for i in range(20, 24)}
    with pytest.raises(SystemExit, match=r"6 of 40 questions .*q.jsonl:8: a.png: missing; more"):
        sft.attempts(run, tmp_path, questions, 1, 0)


def test_of_a_few_questions_most_must_be_there(tmp_path, monkeypatch):
    questions = read_questions(sums(tmp_path / "q.jsonl", 3))
    Sampler(monkeypatch, lambda prompt: ["1"] if prompt.seed == "0/0" else [])
    with pytest.raises(SystemExit, match="2 of 3 questions"):
        sft.attempts(FakeRun(tmp_path), tmp_path, questions, 1, 0)


def test_a_models_attempts_differ_from_each_other(tmp_path):
    questions = read_questions(sums(tmp_path / "q.jsonl", 2))
    run = FakeRun(tmp_path)
    answers = sft.attempts(run, first_model(), questions, 3, 0)
    texts = [[attempt.text for attempt in tries] for tries in answers]
    assert len({text for of_one in texts for text in of_one}) == 6
    again = sft.attempts(run, first_model(), questions, 3, 0)
    assert [[attempt.text for attempt in tries] for tries in again] == texts


# ----------------------------------------------------------------------------------------------
# the filter: what is easy goes


def attempt(right, tokens):
    return sft.Attempt("x", right, right, tokens, True)


def drop_easy(monkeypatch, tmp_path, source, answers, filtered=100):
    """drop_easy with these answers -> (the lines that stay, the questions asked, what was said)."""
    asked = []

    def attempts(run, folder, questions, samples, seed):
        assert (folder, samples, seed) == (first_model(), 2, 5)
        asked.extend(question.record["messages"][0]["content"] for question in questions)
        return answers[: len(questions)]

    monkeypatch.setattr(sft, "attempts", attempts)
    run = FakeRun(tmp_path)
    target = tmp_path / "kept" / "kept.jsonl"
    plan = {"filtered": filtered, "samples": 2}
    sft.drop_easy(run, first_model(), source, target, plan, 5)
    return lines_of(target), asked, " ".join(run.said)


def test_easy_is_what_is_always_right_and_no_longer_than_the_reference(tmp_path, monkeypatch):
    source = sums(tmp_path / "q.jsonl", 6)
    lines = lines_of(source)
    end = len(TOKENIZER.encode("1")) + 1  # of the reference, with the end of turn
    answers = [
        [attempt(1.0, end), attempt(1.0, end)],  # easy
        [attempt(1.0, end), attempt(1.0, end + 1)],  # longer on the whole
        [attempt(1.0, end - 1), attempt(1.0, end + 1)],  # not longer on the whole
        [attempt(0.0, end), attempt(1.0, end)],  # not always right
        [],  # unreadable
        [attempt(0.0, 1), attempt(0.0, 1)],
    ]
    kept, _, said = drop_easy(monkeypatch, tmp_path, source, answers)
    assert kept == [lines[1], lines[3], lines[5]]
    assert "6 of 6 lines were asked, 70% of the answers are right" in said
    assert "2 lines are easy and dropped, 1 cannot be read" in said


def test_lines_that_were_not_asked_stay(tmp_path, monkeypatch):
    """What limits the filter does not limit what is trained on; its choice is even."""
    source = sums(tmp_path / "q.jsonl", 9)
    lines = lines_of(source)
    easy = [[attempt(1.0, 1)] * 2] * 3
    kept, asked, said = drop_easy(monkeypatch, tmp_path, source, easy, filtered=3)
    assert asked == [lines[0], lines[3], lines[6]]
    assert kept == [lines[i] for i in (1, 2, 4, 5, 7, 8)]
    assert "3 of 9 lines were asked" in said and "3 lines are easy" in said


def test_a_file_may_be_easy_altogether(tmp_path, monkeypatch):
    source = sums(tmp_path / "q.jsonl", 2)
    assert drop_easy(monkeypatch, tmp_path, source, [[attempt(1.0, 1)]] * 2)[0] == []


def with_pictures(folder, count, missing=()):
    """Questions about pictures, some of which are not there."""
    lines = []
    for i in range(count):
        item = {"type": "image", "image": f"pictures/{i}.png"}
        meta = {"answer": str(i), "verifier": "number"}
        lines.append(talk([item, {"type": "text", "text": f"Which {i}?"}], str(i), meta=meta))
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        if i not in missing:
            Image.new("RGB", (56, 56), (i, 0, 0)).save(folder / f"pictures/{i}.png")
    return write(folder / "q.jsonl", lines)


def test_pictures_come_along_and_few_may_be_missing(tmp_path, monkeypatch):
    """Also those of lines that nobody has asked."""
    source = with_pictures(tmp_path / "data", 40, missing=(3, 21))
    wrong = [[attempt(0.0, 1)] * 2]
    kept, _, said = drop_easy(monkeypatch, tmp_path, source, wrong, filtered=1)
    assert len(kept) == 38
    first = f"{tmp_path / 'data'}: pictures/3.png: missing"
    assert f"skipped: 2 of 40 lines cannot be used, the first: {first}" in said
    for content in kept:
        assert (tmp_path / "kept" / content[0]["image"]).is_file()
    assert kept[0][0]["image"] == "media/pictures/0.png"
    noted = json.loads((tmp_path / "kept" / "media.json").read_text())  # see common/sources.py
    assert len(noted) == 38 and "pictures/0.png" in noted

    (tmp_path / "kept" / "kept.jsonl").unlink()
    for i in range(5, 9):
        (tmp_path / f"data/pictures/{i}.png").unlink()
    with pytest.raises(SystemExit, match="6 of 40 lines cannot be used, .*pictures/3.png"):
        drop_easy(monkeypatch, tmp_path, source, wrong, filtered=1)
    assert not (tmp_path / "kept" / "kept.jsonl").exists()


def test_one_rank_writes_for_all(tmp_path):
    for rank in (1, 0):
        target = tmp_path / "kept.jsonl"
        assert not target.exists()
        sft.write_linked(FakeRun(tmp_path, rank=rank, world=2), target, [talk("Q", "A")], tmp_path)
    assert lines_of(target) == ["Q"]


def test_a_line_that_is_no_question_is_named(tmp_path):
    write(tmp_path / "q.jsonl", [talk("1 + 1?", "2")])
    with pytest.raises(SystemExit, match="q.jsonl:1: .*meta"):
        sft.drop_easy(FakeRun(tmp_path), first_model(), tmp_path / "q.jsonl", tmp_path, {}, 0)


# ----------------------------------------------------------------------------------------------
# the mixture


def test_the_filter_asks_its_files_once_and_the_others_are_trained_on_as_they_are(
    tmp_path, monkeypatch
):
    train = tmp_path / "data" / "train"
    for name in (*sft.MIX, "pairs", "think"):
        sums(train / f"{name}.jsonl", 1)
    filtered = []

    def drop_easy(run, init, source, target, plan, seed):
        assert (init, plan, seed) == ("init", "plan", 0)
        filtered.append(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)

    monkeypatch.setattr(sft, "drop_easy", drop_easy)
    run = FakeRun(tmp_path / "run")
    mix = sft.build_mixture(run, "init", tmp_path / "data", "plan")
    data = tmp_path / "run" / "data"
    assert dict(mix) == {
        train / "caption.jsonl": 0.5,
        train / "grounding.jsonl": 0.1,
        data / "instruct.jsonl": 4,
        data / "questions.jsonl": 2,
        train / "text.jsonl": 0.1,
        train / "video.jsonl": 0.5,
        train / "vqa.jsonl": 2,
    }
    assert filtered == [train / "instruct.jsonl", train / "questions.jsonl"]

    # Killed in training, it goes on with what was kept. Where all was easy, a file is left out.
    (data / "questions.jsonl").write_text("")
    again = sft.build_mixture(run, "init", tmp_path / "data", "plan")
    assert again == [pair for pair in mix if pair[0] != data / "questions.jsonl"]
    assert len(filtered) == 2


def test_a_folder_without_any_file_of_the_mixture_is_said(tmp_path):
    sums(tmp_path / "data" / "train" / "pairs.jsonl", 1)
    said = "one of instruct, questions, vqa, .*.jsonl in .*train, which has pairs"
    with pytest.raises(SystemExit, match=said):
        sft.build_mixture(FakeRun(tmp_path), tmp_path, tmp_path / "data", {})


# ----------------------------------------------------------------------------------------------
# the loop


def finetune(monkeypatch, tmp_path, steps, begin=0, world=1, lr=3.0, size="toy", rank=0):
    loop = Loop(monkeypatch, sft, FakeRun(tmp_path, rank, world), begin)
    loop.processors = Loaded("the processor")
    monkeypatch.setattr(sft, "Processor", loop.processors)
    loop.run.args.size = size
    sft.finetune(loop.run, Path("init"), "the mixture", lr, steps)
    return loop


def test_a_step_adds_up_its_micro_batches_before_the_weights_move(tmp_path, monkeypatch):
    loop = finetune(monkeypatch, tmp_path, steps=2, world=2)
    loop.check_order(steps=2)
    loop.check_numbers()
    assert [record["share_of_tokens/vqa"] for record in loop.run.logged] == [0.25, 0.25]


def test_the_rate_rises_stays_and_falls_in_the_last_part(tmp_path, monkeypatch):
    loop = finetune(monkeypatch, tmp_path, steps=40, lr=3.0)
    rates = [step.lr for step in loop.steps]
    falling = [3.0 * (12 - i) / 12 for i in range(12)]  # 30 % of the steps
    assert rates == pytest.approx([1.5, 3.0, *[3.0] * 26, *falling])
    assert [record["lr"] for record in loop.run.logged] == rates
    assert min(rates) > 0


def test_everything_learns_and_starts_from_init(tmp_path, monkeypatch):
    loop = finetune(monkeypatch, tmp_path, steps=1, lr=3.0)
    assert loop.made["shapes"] == (Path("init"), {})
    assert loop.processors.folders == [loop.model.loaded] == [Path("init")]
    (model, rates), named = loop.made["make_optimizer"]
    assert model is loop.model and named == {"muon": 2, "moments": "as fits"}
    assert rates == {"vit": 3.0, "projector": 3.0, "decoder": 3.0}
    assert loop.made["step_work"] == ((loop.model.config, loop.BATCHES), {})
    assert loop.made["export"] == ((loop.run, loop.model, "the processor"), {})


@pytest.mark.parametrize("size, pack", [("toy", 4096), ("8b", 8192)])
def test_its_memory_is_planned_before_it_has_any(tmp_path, monkeypatch, size, pack):
    """All parts learn, a whole pack at a time, and nothing stands beside the model."""
    loop = finetune(monkeypatch, tmp_path, steps=1, size=size)
    parts = ("vit", "projector", "decoder")
    assert loop.made["fit"] == ((loop.run, loop.model, parts, pack, 0), {})


def test_released_sizes_step_by_adamw(tmp_path, monkeypatch):
    loop = finetune(monkeypatch, tmp_path, steps=1, size="8b")
    assert loop.made["make_optimizer"][1] == {"muon": 0, "moments": "as fits"}
    assert loop.made["Loader"][0][2:4] == (8192, 64)


def test_the_loader_gives_each_rank_its_packs(tmp_path, monkeypatch):
    loop = finetune(monkeypatch, tmp_path, steps=1, rank=2, world=3)
    args, named = loop.made["Loader"]
    flops = named.pop("flops")
    assert args == ("the mixture", "the processor", 4096 // 3, 3, 2, 3, 0)
    assert named == {"workers": 3, "state": {"place": 0}}
    assert flops.func is sft.sample_flops and flops.args == (loop.model.config,)


def test_a_resumed_loop_goes_on_with_the_next_step_and_the_next_sample(tmp_path, monkeypatch):
    loop = finetune(monkeypatch, tmp_path, steps=20, begin=17)
    assert [record["step"] for record in loop.run.logged] == [17, 18, 19]
    assert [step.lr for step in loop.steps] == pytest.approx([3 * 3 / 6, 3 * 2 / 6, 3 * 1 / 6])
    assert loop.made["Loader"][1]["state"] == {"place": 17}
    assert loop.made["save"][0] == (loop.run, 20, 20, loop.model, loop, {"place": 20})
    assert loop.events.count("draw") == 3, "a sample that no step took would be lost"


def test_a_loop_that_was_done_only_exports(tmp_path, monkeypatch):
    loop = finetune(monkeypatch, tmp_path, steps=5, begin=5)
    assert loop.events == ["shard", "make_optimizer", "resume", "Loader", "export"]


@pytest.mark.parametrize("size, dtype", [("toy", torch.float32), ("8b", torch.bfloat16)])
def test_a_model_that_is_only_asked_learns_nothing(tmp_path, size, dtype):
    """Of released sizes in the dtype it computes with, and nothing has to be cast."""
    run = FakeRun(tmp_path)
    run.args.size = size
    run.dtype = torch.bfloat16
    run.needs_autocast = False
    model = sft.frozen(run, first_model())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(p.requires_grad for p in model.parameters())
    assert run.needs_autocast == (size == "toy")
    for name, tensor in KeyeVL.from_pretrained(first_model(), dtype).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


# ----------------------------------------------------------------------------------------------
# the command


class Sft(Phase):
    """The command with doubles for the mixture, the loop and the score."""

    def __init__(self, monkeypatch, tmp_path):
        super().__init__(monkeypatch, tmp_path, sft)
        monkeypatch.setattr(sft, "build_mixture", self.build_mixture)

    def build_mixture(self, run, init, folder, plan):
        self.done.append(("mixture", run.folder, init, folder, plan["lr"]))
        return "the mixture"


@pytest.fixture
def phase(monkeypatch, tmp_path):
    return Sft(monkeypatch, tmp_path)


def test_it_trains_on_the_mixture_then_scores(phase):
    shutil.copytree(phase.init, phase.out / "toy" / "pretrain" / "model")
    phase("--eval-limit", 3)
    before = phase.out / "toy" / "pretrain" / "model"
    assert phase.done == [
        ("mixture", phase.out / "toy" / "sft", before, phase.data, 6e-4),
        ("finetune", phase.out / "toy" / "sft", before, "the mixture", 6e-4, 200),
        ("score", phase.data / "heldout", ["plain"], 3),
    ]
    phase()
    assert phase.done == [], "what is trained and scored is passed over"


def test_steps_and_plan_follow_the_flags(phase):
    phase("--init", phase.init, "--steps", 7)
    assert phase.done[1][-2:] == (6e-4, 7)
    phase("--init", phase.init, "--size", "8b")
    assert phase.done[1][-2:] == (1e-5, 2000)


def test_without_a_model_to_start_from_it_says_so(phase):
    with pytest.raises(SystemExit, match="pretrain/model holds no model; run pretrain first"):
        phase()
    assert phase.done == []


def test_another_init_is_refused_where_a_run_has_begun(phase):
    phase.failing = "finetune"
    with pytest.raises(RuntimeError, match="out of disk"):
        phase("--init", phase.init)
    phase.failing = None
    other = phase.init.with_name("other")
    shutil.copytree(phase.init, other)
    with pytest.raises(SystemExit, match="sft was made with init .*init, not with .*other; --fres"):
        phase("--init", other)
    assert phase.done == []
    phase("--init", phase.init)
    assert len(phase.done) == 3
    with pytest.raises(SystemExit, match="--fresh starts over"):
        phase("--init", other)
    phase("--init", other, "--fresh")
    assert [what for what, *_ in phase.done] == ["mixture", "finetune", "score"]
    assert phase.done[1][2] == other


def test_a_changed_model_of_the_same_name_counts_as_another(phase):
    phase("--init", phase.init)
    change(phase.init)
    with pytest.raises(SystemExit, match="was made with weights "):
        phase("--init", phase.init)


def test_corrected_data_are_learnt_by_a_run_that_was_killed(phase, capsys):
    path = sums(phase.data / "train" / "questions.jsonl", 3)
    sums(phase.data / "train" / "pairs.jsonl", 3)
    kept = phase.out / "toy" / "sft" / "data" / "questions.jsonl"
    phase.failing = "finetune"
    with pytest.raises(RuntimeError):
        phase("--init", phase.init)
    phase.failing = None
    for correct in (
        lambda: sums(path, 4),
        lambda: sums(phase.data / "train" / "vqa.jsonl", 1),  # is learnt as it is
    ):
        kept.write_text("of the old lines")
        (phase.out / "toy" / "sft" / "done.json").unlink(missing_ok=True)
        correct()
        phase("--init", phase.init)
        assert [what for what, *_ in phase.done] == ["mixture", "finetune", "score"]
        assert not kept.exists()
        assert ".jsonl changed since" in capsys.readouterr().err

    sums(phase.data / "train" / "pairs.jsonl", 4)  # is not learnt here
    phase("--init", phase.init)
    assert phase.done == [] and "changed" not in capsys.readouterr().err
    sums(path, 5)
    phase("--init", phase.init)
    assert phase.done == [], "a model that is finished stays"
    assert "questions.jsonl changed" in capsys.readouterr().err
    phase("--init", phase.init, "--fresh")
    assert [what for what, *_ in phase.done] == ["mixture", "finetune", "score"]


def test_the_numbers_of_the_filter_count_too(phase, capsys):
    sums(phase.data / "train" / "questions.jsonl", 3)
    phase.failing = "finetune"
    for plan in ("filtered=9", "filtered=8", "lr=3"):
        with pytest.raises(RuntimeError):
            phase("--init", phase.init, "--plan", plan)
    said = capsys.readouterr().err.replace("\n", " ").split("sft: cpu")
    assert ["filtered changed" in start for start in said[1:]] == [False, True, True]


def test_a_model_beyond_the_machines_memory_is_refused_before_it_is_asked(phase, monkeypatch):
    with monkeypatch.context() as little:
        little.setattr("common.fit.free_memory", lambda: 1e6)
        with pytest.raises(SystemExit, match="^sft does not fit on cpu: "):
            phase("--init", phase.init)
        assert phase.done == []
    phase("--init", phase.init)
    with monkeypatch.context() as little:  # what is trained is only scored
        little.setattr("common.fit.free_memory", lambda: 1e6)
        phase("--init", phase.init)


def test_a_failing_scorer_does_not_undo_the_training(phase, capsys):
    phase.failing = "score"
    phase("--init", phase.init)
    said = capsys.readouterr().err
    assert "no memory left" in said and "WARNING: sft is trained and saved, but scoring" in said
    assert (phase.out / "toy/sft/done.json").exists()
    assert not (phase.out / "toy/sft/score.json").exists()
    phase.failing = None
    phase("--init", phase.init)
    assert [what for what, *_ in phase.done] == ["score"]
    assert json.loads((phase.out / "toy/sft/score.json").read_text()) == {"plain": {}}


def test_an_unreadable_heldout_line_ends_the_run_before_it_begins(phase):
    with open(phase.data / "heldout" / "q.jsonl", "a") as file:
        file.write('{"messages": [\n')
    with pytest.raises(SystemExit, match="heldout/q.jsonl:2: "):
        phase("--init", phase.init)
    assert phase.done == [] and not (phase.out / "toy" / "sft").exists()


def test_a_killed_run_learns_what_was_corrected(tmp_path):
    """From the first step on, in processes of its own."""
    path = sums(tmp_path / "train" / "questions.jsonl", 12)
    args = ["--data", tmp_path, "--init", first_model(), "--out", tmp_path, "--device", "cpu"]
    args += ["--steps", 4, "--save-every", 2, "--workers", 0]
    run_small("sft.py", *args, kill=3, code=-9)
    folder = tmp_path / "toy" / "sft"
    assert (folder / "checkpoint" / "step-2").exists()
    path.write_text(path.read_text().replace("+ 0?", "+ 00?"))
    said = run_small("sft.py", *args)
    assert "questions.jsonl changed" in said and "resumed" not in said
    assert all("+ 00?" in line for line in lines_of(folder / "data" / "questions.jsonl"))
    assert [record["step"] for record in curve(folder)] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["missing", "cut"])
def test_pictures_that_cannot_be_read_are_few_or_there_is_no_model(kind, tmp_path):
    """Found by the filter, when they are linked, or as late as in training."""
    train = tmp_path / "train"
    with_pictures(train, 60).rename(train / "vqa.jsonl")
    spoil = {
        "missing": lambda path: path.unlink(),
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    }[kind]
    args = flags(tmp_path, "--data", tmp_path, "--init", first_model(), "--steps", 12)
    for name in ("vqa.jsonl", "questions.jsonl"):
        spoil(train / "pictures" / "7.png")
        said = run_script("sft.py", *args)
        first = r"skipped: \d+ of \d+ (samples|questions) cannot be used, the first: .*7.png: "
        assert re.search(first, said)
        for path in (train / "pictures").iterdir():
            if path.stem != "7":
                spoil(path)
        said = run_script("sft.py", *args, "--fresh", "--steps", 2, code=1)
        assert re.search(r"\n\d+ of \d+ \w+ cannot be used, the first: .*; more than 5% end", said)
        assert "Traceback" not in said and not (tmp_path / "toy" / "sft" / "done.json").exists()
        shutil.rmtree(train)
        shutil.rmtree(tmp_path / "toy")
        with_pictures(train, 60).rename(train / "questions.jsonl")


def test_the_whole_command(tmp_path):
    data = tmp_path / "data"
    shutil.copytree(world(), data)
    broken = read(data / "heldout" / "vqa.jsonl")[0]["messages"][0]["content"][0]["image"]
    (data / "heldout" / broken).write_bytes(b"no picture")
    args = flags(tmp_path, "--data", data, "--init", first_model(), "--steps", 3)
    said = run_script("sft.py", *args)
    folder = tmp_path / "toy" / "sft"
    assert "lines were asked" in said and f"the model is in {folder / 'model'}" in said
    assert [record["step"] for record in read(folder / "metrics.jsonl")] == [0, 1, 2]
    kept = read(folder / "data" / "instruct.jsonl")
    assert len(kept) == len(read(data / "train" / "instruct.jsonl"))
    Processor.from_pretrained(folder / "model")
    score = json.loads((folder / "score.json").read_text())["plain"]
    assert [failure["reason"] for failure in score["failed"]]
    assert "answers to held-out questions" in (folder / "samples.md").read_text()
