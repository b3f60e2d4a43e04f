"""common/failures.py: how much may fail, and what is said of it."""

import pytest

from common.failures import leave_out, lines_or_exit, refuse_many, say_failures, too_many
from phases import FakeRun


@pytest.mark.parametrize("tried, most", [
    (0, 0), (1, 0), (3, 0), (4, 1), (7, 1), (12, 3), (20, 5), (60, 5), (100, 5), (101, 5),
    (120, 6), (1000, 50),
])
def test_so_many_may_fail(tried, most):
    assert not too_many(most, tried)
    assert too_many(most + 1, tried)


def test_all_of_any_set_are_too_many():
    assert all(too_many(n, n) for n in range(1, 200))


def test_another_share_can_be_allowed():
    assert not too_many(50, 100, 0.5) and too_many(51, 100, 0.5)
    assert not too_many(7, 7, 1.0)


def test_the_line_names_the_number_and_the_first(tmp_path):
    with pytest.raises(SystemExit) as error:
        refuse_many([f"{i}.png: missing" for i in range(6)], 60, "pairs")
    line = "6 of 60 pairs cannot be used, the first: 0.png: missing; more than 5% end a run"
    assert error.value.code == line
    refuse_many([], 0, "pairs")


def test_failures_are_those_of_all_ranks(tmp_path):
    run = FakeRun(tmp_path, rank=1, world=3)
    leave_out(run, ["a.png: empty"], 60, "prompts")
    say_failures(run, [], 60, "prompts")
    assert run.said == ["skipped: 3 of 60 prompts cannot be used, the first: a.png: empty"]
    with pytest.raises(SystemExit, match="6 of 60 prompts"):
        leave_out(run, ["a.png: empty"] * 2, 60, "prompts")
    say_failures(run, ["a.png: empty"] * 2, 60, "samples")
    assert run.said[1:] == ["skipped: 6 of 60 samples cannot be used, the first: a.png: empty"]


def test_a_file_of_bad_lines_or_none_at_all_ends_a_run(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(SystemExit, match="a.jsonl"):
        lines_or_exit(path, None)
    path.write_text("{}\n" * 19 + "no\n")
    assert len(lines_or_exit(path, None)) == 19
    path.write_text("{}\n" * 18 + "no\n")
    with pytest.raises(SystemExit, match="a.jsonl:19: "):
        lines_or_exit(path, None)
