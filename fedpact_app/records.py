"""An envelope, an answer or a failure as Flower carries it: bytes in an array, which Flower cuts into chunks."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedpact_app.frames import Code

MESSAGE_TYPE = "query.fedpact"
_RECORD, _STYPE = "fedpact", "fedpact.bytes"


def carried(data: bytes | Code) -> RecordDict:
    """A record of an envelope or an answer; or of the code that stands for the answer."""
    if isinstance(data, Code):
        return RecordDict({_RECORD: ConfigRecord({"failure": str(data)})})
    return RecordDict({_RECORD: ArrayRecord({"bytes": Array("uint8", (len(data),), _STYPE, data)})})


def uncarried(record: RecordDict) -> bytes | Code:
    """What `carried` was given. A record of another shape is Code.MALFORMED; nothing is decoded."""
    found = record.get(_RECORD)
    if isinstance(found, ArrayRecord) and set(found) == {"bytes"}:
        return found["bytes"].data
    try:
        return Code(str(found["failure"])) if isinstance(found, ConfigRecord) else Code.MALFORMED
    except (KeyError, ValueError):
        return Code.MALFORMED
