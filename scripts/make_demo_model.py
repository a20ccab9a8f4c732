"""Make the embedded demo's base model again, or check that it can be made: `make_demo_model.py [--check]`.

`--check` trains into a temporary folder and compares hashes. They are promised to be equal on the same machine with the
same versions only; where they differ, both models are measured, and a figure that differs by more than TOLERANCE fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from fedpact.tasks import warmstart

FOLDER = Path(__file__).parents[1] / "src" / "fedpact" / "tasks" / "opchain_model"
TOLERANCE = 0.08
COMPARED = ("accuracy", "greedy", "format", "forbidden", "accuracy/reasoned", "accuracy/direct")


def main() -> int:
    """0: made, or the check passed; 6: the check failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the shipped model and write nothing")
    if not parser.parse_args().check:
        warmstart.train(FOLDER)
        print_figures(warmstart.measure(FOLDER, samples=8))
        return 0
    warmstart.verify(FOLDER)
    with TemporaryDirectory() as temporary:
        warmstart.train(Path(temporary))
        shipped, made = (set((f / warmstart.MANIFEST).read_text().splitlines()) for f in (FOLDER, Path(temporary)))
        if shipped == made:
            print("the same bytes")
            return 0
        print("other bytes:", *sorted(line.split()[1] for line in made - shipped))
        old, new = warmstart.measure(FOLDER, samples=8), warmstart.measure(Path(temporary), samples=8)
    for name in COMPARED:
        print(f"{name:20} shipped {old[name]:.3f}  made {new[name]:.3f}")
    return 0 if all(abs(old[name] - new[name]) <= TOLERANCE for name in COMPARED) else 6


def print_figures(figures: dict[str, float]) -> None:
    """One figure a line."""
    for name, value in figures.items():
        print(f"{name:20} {value:.3f}")


if __name__ == "__main__":
    sys.exit(main())
