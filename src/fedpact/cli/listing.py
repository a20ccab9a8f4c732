"""`fedpact algorithms`: from the table alone, without loading any of them."""

from __future__ import annotations

import json
from dataclasses import asdict

from fedpact.algorithms import table


def algorithms(*, as_json: bool) -> None:
    """Print the table."""
    if as_json:
        print(json.dumps({name: asdict(entry) for name, entry in table().items()}, indent=2))
        return
    rows = [("name", "exchanges", "leaves a member", "what it does")]
    rows += [(name, entry.exchanges, entry.leaves, entry.summary) for name, entry in table().items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3], sep="  ")
