"""Who is refused between real sites: one line at the member, and one at the coordinator."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra flower")

from scripts.certificates import write_certificates
from scripts.federation import NAMES, join, write_run
from scripts.loopback import LINK, Federation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not Path("/proc/net/unix").exists(), reason="looks at sockets in /proc"),
]


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    with tempfile.TemporaryDirectory(prefix="fedpact-") as scratch:  # other users can enter it, tmp_path they cannot
        folder = Path(scratch)
        folder.chmod(0o711)
        (folder / "server" / "project").mkdir(parents=True)
        demo = write_run(folder / "demo", rounds=1).parent
        (folder / "server" / "project" / "run.toml").write_bytes((demo / "run.toml").read_bytes())
        with Federation(folder, folder / "server" / "project") as made:
            made.open()
            yield made


def lines(text: str, about: str) -> list[str]:
    return [line for line in text.splitlines() if about in line]


def test_a_site_that_has_not_accepted_the_contract_is_left_out_until_it_has(federation: Federation) -> None:
    member = join(federation, NAMES[0], federation.folder / "demo", None)
    member.serve()
    member.link.start()
    federation.wait_online(member.name)
    run = ["fedpact", "run", str(federation.project / "run.toml"), "--transport", "flower", "--superlink", LINK]

    code, said = federation.run(run)
    assert code == 5, said
    assert len(lines(said, "has not accepted this run's contract; there: `fedpact site accept`")) == 1, said
    assert len(lines(member.site.text(), "no contract is accepted; this run's contract is")) == 1
    assert not (federation.project / "runs" / "run" / "run.json").exists()

    words = subprocess.run(
        [federation.folder / "bin" / "fedpact", "site", "accept", str(member.client)],
        env=federation.env_of(member.site.user),
        cwd=member.site.user.home,
        input="y\n",
        capture_output=True,
        text=True,
        **member.site.user.run_as(),
    )
    assert words.returncode == 0 and lines(words.stdout, "hash of this contract: "), words
    code, said = federation.run(run)  # no restart in between
    assert code == 0, said
    state = json.loads((federation.project / "runs" / "run" / "rounds" / "0001" / "state.json").read_bytes())
    assert state["members"] == [member.name]


def test_a_key_that_is_not_registered_and_a_certificate_of_another_authority_are_refused(
    federation: Federation,
) -> None:
    federation.join(NAMES[1], lambda folder, service: folder / "none.toml", register=False)
    link = federation.members[NAMES[1]].link
    before = federation.superlink.text()
    code, said = federation.run(["fedpact", *link.command[1:]], link.user)
    assert code == 3 and said.count("\n") == 1 and "is not registered there" in said, said
    logged = federation.superlink.text().removeprefix(before)
    assert len(lines(logged, "412")) == 1, logged

    other = federation.folder / "other"
    other.mkdir()
    write_certificates(other)
    other.chmod(0o711)
    command = [str(other / "ca.crt") if part == str(federation.ca) else part for part in link.command[1:]]
    code, said = federation.run(["fedpact", *command], link.user)
    assert code == 3 and said.count("\n") == 1 and "its certificate is not trusted" in said, said
