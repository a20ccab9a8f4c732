"""Submitting a run: the app that is sent, and the end that is told, by a `flwr` that answers as written here."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedpact.edge.submit import app_files, resumed, submit
from fedpact.errors import CheckFailedError, ConfigError, FedPactError, TooFewRepliesError
from fedpact.runtime.config import RunConfig, load_run
from fedpact.runtime.files import write_folder
from fedpact.runtime.launch import _digest

RUN = """\
rounds = 2
objectives = { right = { primary = true } }
policy = { model = "model" }
algorithm = { name = "fedavg" }
"""
FLWR = '''\
"""Answers each call with the next of the files 0, 1, ... beside it, the last one for ever, and notes the call."""
import json, os, sys, tomllib
from pathlib import Path
here = Path(__file__).parent
calls = here / "calls.jsonl"
number = len(calls.read_text().splitlines()) if calls.exists() else 0
told = {"arguments": sys.argv[1:], "telemetry": os.environ.get("FLWR_TELEMETRY_ENABLED")}
if sys.argv[1] == "run":
    app = Path(sys.argv[5])
    told["files"] = sorted(str(path.relative_to(app)) for path in app.rglob("*") if path.is_file())
    told["config"] = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
with calls.open("a") as file:
    file.write(json.dumps(told) + "\\n")
answers = sorted((here / "answers").iterdir())
text = answers[min(number, len(answers) - 1)].read_text()
print(text)
sys.exit(3 if text.startswith("Error") else 0)
'''


@dataclass
class Stage:
    """A run file, a `flwr`, and what was said."""

    folder: Path
    said: list[str] = field(default_factory=list)
    patience_s: float = 60.0

    @property
    def out(self) -> Path:
        return self.folder / "runs" / "demo"

    @property
    def config(self) -> RunConfig:
        return load_run(self.folder / "run.toml")

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "flwr" / "calls.jsonl").read_text().splitlines()]

    def answering(self, *answers: Any) -> None:
        """What `flwr` says: text as it is, all else as JSON."""
        for i, answer in enumerate(answers):
            text = answer if isinstance(answer, str) else json.dumps(answer, indent=2)
            (self.folder / "flwr" / "answers" / f"{i:02d}").write_text(text)

    def submit(self, superlink: str | None = None, *, out: Path | None = None) -> None:
        flwr = [sys.executable, str(self.folder / "flwr" / "flwr.py")]
        options: dict[str, Any] = {"flwr": flwr, "poll_s": 0.01, "patience_s": self.patience_s}
        submit(
            self.config,
            self.folder / "run.toml",
            out or self.out,
            superlink=superlink,
            say=self.said.append,
            **options,
        )

    def resume(self) -> None:
        flwr = [sys.executable, str(self.folder / "flwr" / "flwr.py")]
        resumed(self.out, None, say=self.said.append, flwr=flwr, poll_s=0.01)

    def began(self, config: RunConfig | None = None) -> None:
        """The run's folder, without a round."""
        dump = (config or self.config).dump()
        self.out.mkdir(parents=True)
        about = {"config": dump, "config_sha256": _digest(dump), "folder": str(self.folder)}
        (self.out / "run.json").write_text(json.dumps(about))

    def reached(self, *rounds: int, final: bool = False) -> None:
        for round in rounds:
            folder = self.out / "rounds" / f"{round:04d}"
            folder.parent.mkdir(exist_ok=True)
            write_folder(folder, {"metrics.jsonl": b'{"who": "all", "key": "heldout/right", "value": 0.5}\n'})
        if final:
            write_folder(self.out / "final", {"adapter_model.safetensors": b"weights"})


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "flwr" / "answers").mkdir(parents=True)
    (tmp_path / "flwr" / "flwr.py").write_text(FLWR)
    return Stage(tmp_path)


STARTED = {"success": True, "run-id": "12", "federation-id": "@none/default"}


def row(status: str, details: str = "N/A") -> dict[str, Any]:
    return {"success": True, "runs": [{"run-id": "12", "status": status, "status-details": details}]}


def test_the_app_carries_the_configuration_and_our_code_and_no_more(stage: Stage) -> None:
    stage.answering(STARTED, row("finished:completed"))
    stage.submit("lab")
    first, second = stage.calls
    assert first["arguments"][:4] == ["run", "--format", "json", "--"] and first["arguments"][5] == "lab"
    assert second["arguments"] == ["ls", "--run-id", "12", "--format", "json", "--", "lab"]
    code = ("__init__", "client_app", "frames", "records", "server_app", "simulation")
    assert first["files"] == [*(f"fedpact_app/{name}.py" for name in code), "pyproject.toml"]
    assert first["config"] == {"run-name": "demo", "run-file": "", "run": json.dumps(stage.config.dump()), "rounds": 0}
    assert [one["telemetry"] for one in stage.calls] == ["0", "0"]
    assert not Path(first["arguments"][4]).exists()


@pytest.mark.parametrize(
    "text", ['a"b\\c', "tab\tline\n", "\x7f\x00", "é", "\U0001f600", "\u2028", "'''", '"""', "{run}"]
)
def test_any_configuration_survives_its_way_through_toml(stage: Stage, text: str) -> None:
    config = stage.config.model_copy(update={"policy": stage.config.policy.model_copy(update={"model": text})})
    written = tomllib.loads(app_files(config, "demo")["pyproject.toml"])["tool"]["flwr"]["app"]["config"]["run"]
    assert json.loads(written)["policy"]["model"] == text


def test_the_app_is_the_repositorys_own(stage: Stage) -> None:
    ours = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    sent = tomllib.loads(app_files(stage.config, "demo")["pyproject.toml"])["tool"]["flwr"]["app"]
    assert {**sent, "config": None} == {**ours, "config": None}
    assert sent["config"].keys() == ours["config"].keys()


def test_a_folder_whose_name_is_no_run_name_is_refused_before_anything_is_sent(stage: Stage) -> None:
    with pytest.raises(ConfigError, match="run-name: found 'My Run'"):
        stage.submit(out=stage.folder / "My Run")
    assert not (stage.folder / "flwr" / "calls.jsonl").exists()


def test_a_run_that_lies_here_already_is_refused(stage: Stage) -> None:
    stage.began()
    with pytest.raises(ConfigError, match="exists already; continue it with `fedpact resume "):
        stage.submit()


def test_where_the_folder_is_elsewhere_flowers_word_has_to_do(stage: Stage) -> None:
    stage.answering(STARTED, row("pending"), row("running"), row("running"), row("finished:completed"))
    stage.submit()
    assert stage.said == [
        "submitted as run 12",
        "run is pending",
        "run is running",
        "run is finished:completed",
        "run 12 completed; its folder is runs/demo in FEDPACT_FOLDER of the ServerApp",
    ]


def test_completed_without_a_whole_result_here_is_a_failure(stage: Stage) -> None:
    stage.began()
    stage.reached(0, 1, final=True)  # round 2 is not there
    stage.answering(STARTED, row("finished:completed"))
    with pytest.raises(CheckFailedError, match="Flower says that run 12 completed, but its files are not; `fedpact re"):
        stage.resume()


def test_a_changed_adapter_is_no_whole_result(stage: Stage) -> None:
    stage.began()
    stage.reached(0, 1, 2, final=True)
    (stage.out / "final" / "adapter_model.safetensors").write_bytes(b"Weights")
    stage.answering(STARTED, row("finished:completed"))
    with pytest.raises(CheckFailedError):
        stage.resume()


def test_a_whole_result_is_success_whatever_flower_says(stage: Stage) -> None:
    stage.began()
    stage.reached(0)
    stage.answering(STARTED, row("running"))
    write_in_a_while(stage, lambda: stage.reached(1, 2, final=True))
    stage.resume()
    assert stage.said[-3:] == [
        "round 1 of 2; held out: right 0.500",
        "round 2 of 2; held out: right 0.500",
        f"adapter: {stage.out / 'final'}",
    ]
    assert not any("round 0" in line for line in stage.said)  # from before


def write_in_a_while(stage: Stage, write: Callable[[], None]) -> None:
    """Writes as soon as the run has been called running."""
    before = stage.said

    class Said(list[str]):
        def append(self, line: str) -> None:
            super().append(line)
            if line == "run is running":
                write()

    stage.said = Said(before)


def test_a_result_of_another_configuration_is_not_this_runs(stage: Stage) -> None:
    stage.answering(STARTED, row("running"), row("finished:failed", "fedpact exit 2: another began here"))

    def another() -> None:
        stage.began(stage.config.model_copy(update={"seed": 5}))
        stage.reached(0, 1, 2, final=True)

    write_in_a_while(stage, another)
    with pytest.raises(ConfigError, match="another began here"):
        stage.submit()


def test_a_finished_run_is_not_submitted_again(stage: Stage) -> None:
    stage.began()
    stage.reached(0, 1, 2, final=True)
    stage.resume()
    assert stage.said == [f"{stage.out}: finished already"]
    assert not (stage.folder / "flwr" / "calls.jsonl").exists()


def test_the_server_apps_error_comes_back_with_its_exit_code(stage: Stage) -> None:
    stage.answering(
        STARTED, row("finished:failed", "ServerApp failed with exception: fedpact exit 5: 1 of 3 said hello")
    )
    with pytest.raises(TooFewRepliesError) as caught:
        stage.submit()
    assert (str(caught.value), caught.value.exit_code) == ("1 of 3 said hello", 5)


@pytest.mark.parametrize(
    ("status", "details", "expected"),
    [
        ("finished:stopped", "", "run 12: was stopped (`flwr stop`); submit it again to go on"),
        ("finished:failed", "No heart\nbeat", "run 12: finished:failed: No heart beat; submit it again to go on"),
        ("finished:failed", "\x1b[31mred", "run 12: finished:failed: \ufffd[31mred; submit it again to go on"),
    ],
)
def test_any_other_end_is_an_error_in_one_line(stage: Stage, status: str, details: str, expected: str) -> None:
    stage.answering(STARTED, row(status, details))
    with pytest.raises(FedPactError) as caught:
        stage.submit()
    assert (str(caught.value), caught.value.exit_code) == (expected, 1)


def test_a_superlink_that_is_away_for_a_while_is_asked_again_and_named_once(stage: Stage) -> None:
    away = {"success": False, "error-message": "Connection to the SuperLink\nis unavailable"}
    stage.answering(STARTED, row("running"), away, away, "Error: x", "", "[]", row("finished:completed"))
    stage.submit()
    assert [line for line in stage.said if "again" in line] == [
        "flwr: Connection to the SuperLink is unavailable; asking again"
    ]


def test_a_superlink_that_stays_away_ends_the_following(stage: Stage) -> None:
    stage.answering(STARTED, "Error: no connection")
    stage.patience_s = 0.1
    with pytest.raises(FedPactError, match=r"flwr: Error: no connection; for 0.1 s now. The run may go on: `flwr ls`"):
        stage.submit()


@pytest.mark.parametrize(
    "answer", ["Error: bad key", {"success": False, "error-message": "bad key"}, {"success": True}]
)
def test_what_flower_does_not_take_is_an_error(stage: Stage, answer: Any) -> None:
    stage.answering(answer)
    with pytest.raises(FedPactError, match=r"bad key|found no run-id"):
        stage.submit()
    assert len(stage.calls) == 1


def test_words_around_the_answer_do_no_harm(stage: Stage) -> None:
    stage.answering("Created a configuration.\n" + json.dumps(STARTED) + "\nNote: { }", row("finished:completed"))
    stage.submit()
    assert stage.said[0] == "submitted as run 12"


def test_without_flower_it_says_how_to_get_it(stage: Stage) -> None:
    with pytest.raises(
        FedPactError, match=r"flwr: FileNotFoundError when it was called; pip install 'fedpact\[flower\]'"
    ):
        submit(stage.config, stage.folder / "run.toml", stage.out, superlink=None, say=print, flwr=["/no/such/program"])


def test_a_model_beside_the_run_file_is_looked_for_at_the_server_app(stage: Stage) -> None:
    (stage.folder / "model").mkdir()
    stage.answering(STARTED, row("finished:completed"))
    stage.submit()
    assert stage.said[0].endswith("policy.model: model is looked for below FEDPACT_FOLDER of the ServerApp")


def test_whoever_was_missing_is_named_before_the_round_with_its_first_reason(stage: Stage) -> None:
    stage.began()
    stage.reached(0)
    stage.answering(STARTED, row("running"))

    def rest() -> None:
        exchanges = [{"failures": {"north": "no reply within 9 s"}}, {"failures": {"north": "not connected"}}]
        state = json.dumps({"exchanges": exchanges}).encode()
        (stage.out / "rounds").mkdir(exist_ok=True)
        write_folder(stage.out / "rounds" / "0001", {"state.json": state, "metrics.jsonl": b""})
        stage.reached(2, final=True)

    write_in_a_while(stage, rest)
    stage.resume()
    assert stage.said[-4:-1] == [
        "round 1: dropped north: no reply within 9 s",
        "round 1 of 2",
        "round 2 of 2; held out: right 0.500",
    ]
