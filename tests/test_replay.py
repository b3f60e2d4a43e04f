"""common/replay.py: the gradient it adds, by its formula, and where it goes on."""

import pytest
import torch

from common.loader import Loader
from common.replay import Replay
from common.run import arguments, start
from data import Processor
from model import KeyeVL
from phases import first_model, kept_process, sums


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    flags = ["--out", str(tmp_path_factory.mktemp("run")), "--device", "cpu", "--threads", "1"]
    with kept_process():
        return start(arguments("").parse_args([*flags, "--workers", "0", "--packs", "2"]), "grpo")


def replay_of(run, path, state=None):
    model = KeyeVL.from_pretrained(first_model())
    processor = Processor.from_pretrained(first_model())
    return model, Replay(run, model.config, processor, [(path, 1)], state)


def test_its_gradient_is_that_of_the_mean_over_all_targets(tmp_path, run):
    """Of all packs together, a short one's targets count no more; it is added to what is there."""
    path = sums(tmp_path / "sums.jsonl", 400)
    model, replay = replay_of(run, path)
    processor = replay.loader.processor
    batches, _ = next(iter(Loader([(path, 1)], processor, 4096, 2)))
    targets = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    mean = sum(model.loss(batch)[0] for batch in batches) / targets
    mean.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert replay.backward(model, 0.5) == pytest.approx(mean.item(), rel=1e-5)
    for name, p in model.named_parameters():
        if name in expected:
            assert torch.allclose(p.grad, 1.5 * expected[name], atol=1e-6), name


def test_it_goes_on_where_it_was(tmp_path, run):
    path = sums(tmp_path / "sums.jsonl", 3000)
    model, replay = replay_of(run, path)
    first, second = [replay.backward(model, 0.0) for _ in range(2)]
    _, again = replay_of(run, path)
    assert again.backward(model, 0.0) == first and isinstance(first, float)
    _, rest = replay_of(run, path, again.state)
    assert rest.backward(model, 0.0) == second != first
