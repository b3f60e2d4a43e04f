"""Replay: lines of an earlier phase, learnt on beside a policy's loss so that none is forgotten.

    replay = Replay(run, model.config, processor, [("think.jsonl", 4), ("keep.jsonl", 2)])
    loss = replay.backward(model, weight=1.0)       adds its gradient; then the optimizer's step

Where rewards or preferences alone pull at a small model, what they do not ask about drifts off.
"""

from functools import partial
from pathlib import Path

import torch

from common.failures import say_failures
from common.loader import Loader
from common.packing import packing
from common.run import Run
from data import Processor
from model import Config, sample_flops


class Replay:
    """Packs of the lines of `mix`, files and weights, one size's micro-batches a call, without end.

    state: where a run that was stopped goes on, as self.state was. batches: what the last call has
    learnt, this rank's.
    """

    def __init__(
        self, run: Run, cfg: Config, processor: Processor, mix: list[tuple[Path, float]], state=None
    ):
        self.run = run
        self.state = state
        self.loader = Loader(
            mix, processor, *packing(run), run.rank, run.world, run.args.seed,
            flops=partial(sample_flops, cfg), workers=run.args.workers, state=state,
        )
        self.steps = iter(self.loader)

    def say_failures(self):
        tried = self.run.sum(self.loader.tried)
        say_failures(self.run, self.loader.failures, tried, "replayed samples")

    def backward(self, model, weight: float) -> float:
        """Adds the gradient of weight * the mean loss of the next packs' targets; -> that mean."""
        run = self.run
        batches, info = next(self.steps)
        self.state = info["state"]
        self.batches = batches
        targets = run.sum(sum(int((batch["labels"] != -100).sum()) for batch in batches))
        loss = torch.zeros((), device=run.device)
        for batch in batches:
            with run.autocast():
                loss_sum, _ = model.loss(run.to(batch))
            (weight * loss_sum / max(1, targets)).backward()
            loss += loss_sum.detach() / max(1, targets)
        return float(run.sum(loss))
