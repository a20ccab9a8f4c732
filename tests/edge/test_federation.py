import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra flower")
pytest.importorskip("cryptography", reason="needs the extra flower")

import numpy as np
from cryptography import x509
from safetensors.numpy import save_file

from scripts.certificates import write_certificates
from scripts.federation import compared
from scripts.loopback import Federation
from scripts.processes import LoopbackError

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/net/unix").exists(), reason="looks at processes and sockets in /proc"),
]


def living(folder: Path) -> list[str]:
    """The command lines of processes that name `folder`, the dying ones left out."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(folder).encode() in (text := entry.read_bytes()):
                found.append(text.replace(b"\0", b" ").decode())
    return found


def ended(process: subprocess.Popen[str], timeout_s: float) -> str:
    """What a process printed; past its time it is told to take everything down."""
    try:
        return process.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        process.terminate()
        return process.communicate(timeout=60)[0]


@pytest.mark.timeout(660)
def test_three_sites_over_a_superlink_train_the_adapter_that_their_simulation_does():
    with tempfile.TemporaryDirectory(prefix="fedpact-") as scratch:  # other users can enter it, tmp_path they cannot
        command = [sys.executable, "-m", "scripts.federation", "--keep", scratch]
        began = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        printed = ended(began, 590)
        assert began.returncode == 0, printed
        assert "final adapters are equal" in printed
        assert living(Path(scratch)) == []


def test_an_error_within_takes_everything_down(tmp_path):
    with pytest.raises(ZeroDivisionError), Federation(tmp_path / "f", tmp_path) as federation:
        federation.open()
        assert federation.superlink.running and federation.superexec.running
        raise ZeroDivisionError
    assert living(tmp_path) == []


def test_nothing_outlives_a_driver_that_is_killed(tmp_path):
    program = (
        "import sys; from pathlib import Path; from scripts.loopback import Federation\n"
        "with Federation(Path(sys.argv[1]), Path(sys.argv[1])) as federation:\n"
        "    federation.open(); print('open', flush=True); input()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "f")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == "open\n"
        assert len(living(tmp_path)) == 3
        driver.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while living(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert living(tmp_path) == []


def test_a_part_that_ends_early_is_reported_with_the_end_of_its_log(tmp_path):
    with Federation(tmp_path / "f", tmp_path) as federation:
        part = federation.part("wrong", ["flower-superlink", "--no-such-option"], federation.superlink.user)
        with pytest.raises(LoopbackError, match=r"^wrong: not listening .*ended with 2.*no-such-option") as error:
            part.start().wait(lambda: False, "listening")
    assert "\n" not in str(error.value)


def test_the_certificate_holds_for_this_machine_and_its_key_is_its_owners_alone(tmp_path):
    write_certificates(tmp_path)
    ca, server = (x509.load_pem_x509_certificate((tmp_path / f"{name}.crt").read_bytes()) for name in ("ca", "server"))
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(one.value) for one in names] == ["127.0.0.1", "localhost"]
    assert (tmp_path / "server.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("change", "code"), [(0.0, 0), (0.9e-5, 0), (1.1e-5, 6)])
def test_adapters_that_differ_by_more_than_the_tolerance_are_an_error(tmp_path, capsys, change, code):
    for name, shift in (("sites", change), ("local", 0.0)):
        for below in ("rounds/0000", "final"):
            (tmp_path / name / below).mkdir(parents=True)
            adapter = {"a": np.full(3, 0.25), "b": np.array([0.5, 0.5 + shift])}
            save_file(adapter, tmp_path / name / below / "adapter_model.safetensors")
        for mark in ("run.json", "rounds/0000/MANIFEST"):
            (tmp_path / name / mark).touch()
    assert compared(tmp_path / "sites", tmp_path / "local") == code
    printed = capsys.readouterr().out
    assert ("final adapters are equal" in printed) == (code == 0)
    assert ("bytes equal" in printed) == ("the same bytes" in printed) == (change == 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts processes of other users")
def test_members_share_a_user_where_strangers_cannot_enter_and_the_reason_is_told(tmp_path):
    tmp_path.chmod(0o700)
    with Federation(tmp_path / "f", tmp_path) as federation:
        assert not federation.separate
        assert str(tmp_path / "f") in federation.reason
