"""Sends the targets and the envelopes that lie in FEDPACT_FOLDER/attack, and writes what comes back beside them."""

from __future__ import annotations

import os
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    folder = Path(os.environ["FEDPACT_FOLDER"]) / "attack"
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    content = RecordDict(
        {
            "wanted": ConfigRecord({"targets": (folder / "targets.json").read_text(encoding="utf-8")}),
            "envelopes": ConfigRecord({path.stem: path.read_bytes() for path in sorted(folder.glob("*.bin"))}),
        }
    )
    (sent,) = grid.push_messages([Message(content, nodes[0], "query.planted")])
    while not (replies := list(grid.pull_messages([sent]))):
        time.sleep(0.2)
    found = str(replies[0].error) if replies[0].has_error() else str(replies[0].content["report"]["json"])
    (folder / "report.tmp").write_text(found, encoding="utf-8")
    (folder / "report.tmp").rename(folder / "report.json")
