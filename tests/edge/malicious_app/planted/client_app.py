"""Tries everything that the server has thought of, as the user of the SuperNode, and sends home what it got."""

from __future__ import annotations

import json
import os

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from . import attempts, requests

app = ClientApp()


@app.query("planted")
def answer(message: Message, context: Context) -> Message:
    if os.getuid() == 0:
        raise PermissionError("not as root: it would succeed")
    wanted = message.content["wanted"]
    targets = json.loads(str(wanted["targets"]))
    envelopes = {name: data for name, data in message.content["envelopes"].items() if isinstance(data, bytes)}
    report = {
        "site-socket": str(context.node_config["site-socket"]),
        "reading": attempts.reading(targets),
        "tampering": attempts.tampering(targets),
        "planting": attempts.planting(targets),
        "asking": requests.asking(targets["socket"], envelopes),
    }
    return Message(RecordDict({"report": ConfigRecord({"json": json.dumps(report)})}), reply_to=message)
