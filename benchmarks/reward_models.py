"""How well small reward models learn real preferences: held-out pairwise accuracy beside trivial baselines.

    python -m benchmarks.reward_models --data DIR --model DIR [--seeds 3] [--epochs 1] [--learning-rate 2e-3]

DIR of the data holds `pandalm_helpful_pairs/testset-v1.jsonl` (PandaLM: three annotators, the majority counts, ties are
dropped), `llmbar/llmbar.jsonl` (only tested on, by the model of PandaLM) and
`hh_rlhf_harmless/harmless_base_test.jsonl`. DIR of the model is a causal language model.

Every seed draws another held-out set and another start. The accuracy is the mean over the seeds; its 95 % interval is
Wilson's for a single held-out set of that size, and the range is that of the seeds. PandaLM's 697 pairs share 126
prompts, so that its interval is somewhat too narrow. `longer` and `shorter` prefer by the number of characters.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.timing import surroundings
from fedpact.rewards.preferences import Pairs, load_pairs, pairwise_accuracy, split_heldout
from fedpact.rewards.reward_model import RewardModel

_Z_95 = 1.959964
_HELDOUT = 0.2


@dataclass
class Row:
    """One line of the table; one entry a seed."""

    train: list[int] = field(default_factory=list)
    heldout: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    longer: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a helpful and a harmless reward model for every seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--lora-r", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name, value in surroundings("cpu").items():
        print(f"{name}: {value}")
    helpful, llmbar, harmless = Row(), Row(), Row()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, (file, pair) in SOURCES.items():
            rows = (pair(json.loads(line)) for line in (options.data / file).open(encoding="utf-8"))
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row))
        for seed in range(options.seeds):
            judge = _fitted("pandalm", folder, options, seed, helpful)
            _fitted("harmless", folder, options, seed, harmless)
            pairs = load_pairs("llmbar.jsonl", folder=folder, where="llmbar")
            _test(judge, pairs, llmbar)
    llmbar.train = helpful.train  # LLMBar itself is only tested on
    print(table({"helpful: PandaLM": helpful, "helpful: PandaLM, tested on LLMBar": llmbar, "harmless: HH": harmless}))


def table(rows: dict[str, Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| preference | pairs trained on | held out | accuracy | 95 % | seeds | longer | shorter | CPU seconds a fit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        low, high = wilson(mean(row.accuracy), round(mean(row.heldout)))
        longer = mean(row.longer)
        seconds = f"{mean(row.seconds):.0f}" if row.seconds else ""
        cells = [name, round(mean(row.train)), round(mean(row.heldout)), f"{mean(row.accuracy):.3f}"]
        cells += [f"{low:.3f} to {high:.3f}"]
        cells += [f"{min(row.accuracy):.3f} to {max(row.accuracy):.3f}", f"{longer:.3f}", f"{1 - longer:.3f}", seconds]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` independent trials. Wilson 1927."""
    z = _Z_95**2 / count
    centre = (share + z / 2) / (1 + z)
    half = _Z_95 / (1 + z) * (share * (1 - share) / count + z / (4 * count)) ** 0.5
    return centre - half, centre + half


def _fitted(name: str, folder: Path, options: argparse.Namespace, seed: int, row: Row) -> RewardModel:
    judge = RewardModel(
        model=str(options.model.resolve()),
        preferences=f"{name}.jsonl",
        heldout_share=_HELDOUT,
        lora_r=options.lora_r,
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        max_length=options.max_length,
        seed=seed,
        name=f"{name}-{seed}",
        device="cpu",
        folder=folder,
        home=folder / "home",
    )
    start = time.process_time()
    row.accuracy.append(judge.fit())
    row.seconds.append(time.process_time() - start)
    train, heldout = split_heldout(load_pairs(f"{name}.jsonl", folder=folder, where=name), _HELDOUT, seed)
    row.train.append(len(train))
    row.heldout.append(len(heldout))
    row.longer.append(_longer(heldout))
    print(f"{name}, seed {seed}: {row.accuracy[-1]:.3f}", flush=True)
    return judge


def _test(judge: RewardModel, pairs: Pairs, row: Row) -> None:
    chosen, rejected = judge(pairs.prompts, pairs.chosen), judge(pairs.prompts, pairs.rejected)
    row.accuracy.append(pairwise_accuracy(chosen, rejected))
    row.heldout.append(len(pairs))
    row.longer.append(_longer(pairs))


def _longer(pairs: Pairs) -> float:
    """The accuracy of preferring the completion of more characters."""
    return pairwise_accuracy([len(said) for said in pairs.chosen], [len(said) for said in pairs.rejected])


def _pandalm(row: dict[str, Any]) -> dict[str, str] | None:
    votes = Counter(row[f"annotator{i}"] for i in (1, 2, 3))
    winner, count = votes.most_common(1)[0]
    if count < 2 or winner == 0:
        return None
    asked = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
    return _pair(asked, row["response1"], row["response2"], winner)


def _llmbar(row: dict[str, Any]) -> dict[str, str] | None:
    return _pair(row["input"], row["output_1"], row["output_2"], row["label"])


def _pair(asked: str, first: str, second: str, winner: int) -> dict[str, str] | None:
    """In HH-RLHF's form, so that all judges read one form; None where the two do not differ."""
    better, worse = (first, second) if winner == 1 else (second, first)
    prompt = f"\n\nHuman: {asked}\n\nAssistant:"
    return None if better == worse else {"prompt": prompt, "chosen": f" {better}", "rejected": f" {worse}"}


SOURCES: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, str] | None]]] = {
    "pandalm": ("pandalm_helpful_pairs/testset-v1.jsonl", _pandalm),
    "llmbar": ("llmbar/llmbar.jsonl", _llmbar),
    "harmless": ("hh_rlhf_harmless/harmless_base_test.jsonl", dict),
}


if __name__ == "__main__":
    main()
