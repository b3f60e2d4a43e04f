"""tools/run_docs.py finds the commands of a page, runs them, and notices what is not as written."""

import pytest

from conftest import ROOT
from tools.run_docs import agrees, all_commands, main, missing_line, run_all

PAGE = """# A page

```sh
echo one
printf 'loss %s after 12 s\\n' 0.501; echo last
```

```text
loss 0.50 after ... s
```

    echo "indented: no command"

```sh eight GPUs
torchrun --nproc_per_node=8 pretrain.py
```

```python
raise SystemExit(1)
```

```sh
cat > a.txt <<'END'
kept for the next command
END
```
Words between: what follows is no output.

```text
something else
```

```sh
cat a.txt
```
"""


def write(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    return all_commands(tmp_path)


def test_commands_are_found_as_they_stand(tmp_path):
    found = write(tmp_path, PAGE)
    assert [command.where for command in found] == [f"README.md:{n}" for n in (4, 15, 23, 34)]
    assert [command.reason for command in found] == ["", "eight GPUs", "", ""]
    assert found[0].expected == ["loss 0.50 after ... s"]
    assert [command.expected for command in found[1:]] == [[], [], []]
    assert found[2].script == "cat > a.txt <<'END'\nkept for the next command\nEND\n"


def test_a_page_that_is_right(tmp_path, capsys):
    assert run_all(write(tmp_path, PAGE), tmp_path) == 0
    said = capsys.readouterr().out
    assert "README.md:15: torchrun" in said and "not run: eight GPUs" in said
    assert said.endswith("3 commands run, 0 of them wrong; 1 not run\n")


@pytest.mark.parametrize("before, after, why", [
    ("echo last", "false; echo last", "exit code 1"),
    ("echo last", "ls /nowhere/at/all", "/nowhere/at/all"),
    ("loss 0.50", "loss 0.60", "does not print 'loss 0.60 after ... s'"),
    ("loss 0.50", "lost 0.50", "does not print 'lost 0.50 after ... s'"),
    ("cat a.txt", "cat b.txt", "b.txt"),
])
def test_a_wrong_command_is_noticed(tmp_path, capsys, before, after, why):
    write(tmp_path, PAGE.replace(before, after))
    with pytest.raises(SystemExit) as end:
        main(["--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert end.value.code == 1 and why in said
    assert said.endswith("3 commands run, 1 of them wrong; 1 not run\n")


def test_lines_are_compared_by_words_and_numbers():
    assert agrees("a  0.50 b 3", "a 0.51 b 3")
    assert agrees("took ... s, 100.0 %", "took 7 s, 99.0 %")
    assert not agrees("a 3", "a 4")
    assert not agrees("a 1.50", "a 1.60")
    assert not agrees("(a.b)", "(axb)")
    assert missing_line(["b", "d"], "a\nb\nc\nd\n") is None
    assert missing_line(["d", "b"], "a\nb\nc\nd\n") == "b"


def test_list_and_only(tmp_path, capsys):
    write(tmp_path, PAGE)
    main(["--folder", str(tmp_path), "--list"])
    said = capsys.readouterr().out
    assert "README.md:15  (not run: eight GPUs)\ntorchrun" in said
    with pytest.raises(SystemExit, match="no command in docs/none.md"):
        main(["--folder", str(tmp_path), "--only", "docs/none.md"])


def test_our_pages_have_commands():
    pages = {command.where.split(":")[0] for command in all_commands(ROOT)}
    assert {"README.md", "docs/lessons/1-attention.md"} <= pages
