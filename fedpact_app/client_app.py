"""The shim: a Flower ClientApp that passes one message to the site service beside it, and one back.

It holds no data, no model and no reward, and loads neither torch nor FedPact. The node's configuration says where the
service listens: `--node-config 'site-socket="/run/fedpact/north/site.sock"'`. Under Flower's simulation there is no
such entry; there the server's process keeps the members' services in a folder of its own.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpact_app.frames import Code, ask
from fedpact_app.records import carried, uncarried
from fedpact_app.simulation import simulated_socket

app = ClientApp()


@app.query("fedpact")
def answer(message: Message, context: Context) -> Message:
    """The member's answer, or a fixed code: an exception's text would travel to the server."""
    try:
        found = _ask(message, context)
    except Exception:
        found = Code.FAILED
    return Message(carried(found), reply_to=message)


def _ask(message: Message, context: Context) -> bytes | Code:
    envelope = uncarried(message.content)
    if isinstance(envelope, Code):
        return envelope
    configured = context.node_config.get("site-socket")
    path = configured or simulated_socket(message.metadata.run_id, context.node_id)
    return Code.UNAVAILABLE if path is None else ask(str(path), envelope)
