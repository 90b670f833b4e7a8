"""What a training step of the demo costs on this machine, part by part.

    python benchmarks/step.py                       # models/smollm2-135m, data/, specs/, ten steps
    python benchmarks/step.py --model models/other --steps 20

Prints medians in seconds: the whole step, the refresh of the quantised view in it, and a forward and backward pass over
the same rows packed and padded, each with the tokens that it computes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from alignment.cache import ReplyCache
from alignment.rows import base_rows, read_folder, target_rows
from alignment.suite import collect
from trainer.candidate import Candidate
from trainer.examples import batches
from trainer.fit import MICRO_TOKENS, Fit, FitConfig
from trainer.model import LanguageModel, load
from trainer.objective import BaseTraces, weighted_losses


def median(work: Callable[[], object], repeat: int) -> float:
    """Median wall-clock seconds, after one run that warms up."""
    work()
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def padded(lm: LanguageModel, fit: Fit, chosen: list[int]) -> tuple[int, Callable[[], None]]:
    """Tokens, and one forward and backward pass over the rows padded to the longest, opening included."""
    texts = [fit.rows[i].prompt_ids + fit.rows[i].completion_ids for i in chosen]
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[lm.pad_id] * (width - len(text))] for text in texts])
    where = torch.tensor(
        [[slot, len(fit.rows[i].prompt_ids) - 1] for slot, i in enumerate(chosen)]
    )  # one position a row: the output layer costs the same in both, so it is left out here

    def work() -> None:
        states = lm.module.get_submodule("model")(input_ids=ids, use_cache=False).last_hidden_state
        states[where[:, 0], where[:, 1]].float().square().sum().backward()

    return ids.numel(), work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    base, lm = (load(args.model / "base.dat") for _ in range(2))
    data, suite = read_folder(Path("data")), collect(Path("specs"))
    traces = BaseTraces(base, base_rows(base, data, "chat", ReplyCache(), suite=suite))
    candidate = Candidate(lm, dither=0.5)
    candidate.refresh()
    fit = Fit(candidate, target_rows(lm, data, "chat", suite), traces, FitConfig(), seed=0)
    fit.step()
    print(f"{'step':24}{median(fit.step, args.steps):8.2f} s")
    print(f"{'of which refresh':24}{median(candidate.refresh, args.steps):8.2f} s")
    chosen = fit.sample()
    (batch,) = batches(fit.rows, chosen, lm.device, MICRO_TOKENS)

    def packed() -> None:
        candidate.drop_gradients()  # as a step finds them
        total, _ = weighted_losses(lm, fit.rows, batch, traces, len(fit.targets), [1.0] * len(chosen))
        total.backward()  # type: ignore[no-untyped-call]

    tokens, work = padded(lm, fit, chosen)
    print(f"{'packed, output layer too':24}{median(packed, args.steps):8.2f} s  {len(batch.pack.ids)} tokens")
    print(f"{'padded, body alone':24}{median(work, args.steps):8.2f} s  {tokens} tokens")


if __name__ == "__main__":
    main()
