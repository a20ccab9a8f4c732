import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra flower")
pytest.importorskip("cryptography", reason="needs the extra flower")

import numpy as np
from safetensors.numpy import save_file

from scripts.outages import same_bytes
from scripts.processes import LoopbackError
from tests.edge.test_federation import ROOT, ended, living

CASES = ("site-kill", "link-kill")
"""The cheap ones; `make outages` runs them all."""


def written(out: Path, value: float) -> Path:
    (out / "final").mkdir(parents=True)
    save_file({"a": np.full(3, value, dtype=np.float32)}, out / "final" / "adapter_model.safetensors")
    return out


@pytest.mark.slow
@pytest.mark.timeout(660)
@pytest.mark.skipif(not Path("/proc/net/unix").exists(), reason="looks at processes and sockets in /proc")
def test_a_site_and_a_link_are_killed_in_a_round_and_every_run_ends_with_the_same_bytes():
    with tempfile.TemporaryDirectory(prefix="fedpact-") as scratch:  # other users can enter it, tmp_path they cannot
        cases = [word for case in CASES for word in ("--case", case)]
        command = [sys.executable, "-m", "scripts.outages", "--keep", scratch, *cases]
        began = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        printed = ended(began, 590)
        assert began.returncode == 0, printed
        assert printed.count("bytes equal; nobody missing") == len(CASES)
        runs = Path(scratch) / "server" / "project" / "runs"
        finals = {(out / "final" / "adapter_model.safetensors").read_bytes() for out in runs.iterdir()}
        assert len(list(runs.iterdir())) == len(CASES) + 1 and len(finals) == 1
        asked = [json.loads(line) for line in (runs / "link-kill" / "ledger.jsonl").read_text().splitlines()]
        assert {one.get("decision") for one in asked} == {"asked", "admitted", "committed"}
        assert living(Path(scratch)) == []


def test_adapters_that_differ_by_one_bit_of_one_number_do_not_hold(tmp_path):
    reference = written(tmp_path / "undisturbed", 1.0)
    assert same_bytes(written(tmp_path / "equal", 1.0), reference) == "bytes equal"
    other = written(tmp_path / "site-kill", float(np.nextafter(np.float32(1.0), np.float32(2.0))))
    with pytest.raises(LoopbackError, match=r"^site-kill: the final adapters differ by up to 1\.19e-07$"):
        same_bytes(other, reference)
