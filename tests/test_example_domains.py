"""The example of three domains: what it writes, and that it runs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedpact.rewards import exact_answer, numeric_answer
from fedpact.runtime.client_config import load_client
from fedpact.runtime.config import load_run

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/domains"
PLACES = [os.environ.get("FEDPACT_MODELS", ""), str(ROOT.parent / "shared/models")]
MODELS = (Path(place, "stories260K") for place in PLACES if place)
STORIES = next((folder for folder in MODELS if (folder / "config.json").exists()), None)
needs_stories = pytest.mark.skipif(
    STORIES is None, reason="stories260K is not here; set FEDPACT_MODELS to the folder that it lies in"
)
DOMAINS = {"biomedicine": exact_answer, "finance": numeric_answer, "mathematics": numeric_answer}
SMALL = {
    "rounds": 2,
    "algorithm.server_steps": 2,
    "policy.lora.r": 2,
    "rollout.num_generations": 2,
    "rollout.max_completion_length": 8,
    "training.prompts_per_step": 9,
    "evaluation.num_prompts": 3,
    "evaluation.greedy": "false",
    "simulation.num_threads": 1,
}
NOTED = '''\
"""The reward that `how` names, and a list of what it was asked."""

import json

import fedpact.rewards


class Noted:
    def __init__(self, *, how, tag, path, folder):
        self.reward, self.tag, self.path = getattr(fedpact.rewards, how), tag, folder / path

    def __call__(self, prompts, completions, answer, id, **columns):
        values = self.reward(completions, answer, tag=self.tag)
        with self.path.open("a") as stream:
            for line in zip(id, answer, values):
                stream.write(json.dumps(line) + "\\n")
        return values
'''


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_domains", EXAMPLE / "prepare.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


prepare = script()


def model_folder(folder: Path, **tokenizer: str) -> Path:
    """As much of a model as the script reads."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """What the script writes from the excerpt."""
    assert prepare.main([str(tmp_path / "site"), "--model", str(model_folder(tmp_path / "model"))]) == 0
    return tmp_path / "site"


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_server_gets_no_answers_to_its_questions(site: Path) -> None:
    assert {name for row in rows(site / "server/questions.jsonl") for name in row} == {"id", "prompt", "domain"}
    for labelled in ("auxiliary", "heldout"):
        names = {name for row in rows(site / f"server/{labelled}.jsonl") for name in row}
        assert names == {"id", "prompt", "answer", "domain"}


def test_no_question_is_in_two_places_of_the_server(site: Path) -> None:
    asked = [row["prompt"] for part in prepare.Split._fields for row in rows(site / f"server/{part}.jsonl")]
    assert len(asked) == len(set(asked)) == 120


@pytest.mark.parametrize("name", DOMAINS)
def test_a_member_knows_three_fifths_of_its_own_domain_and_nothing_held_out(site: Path, name: str) -> None:
    known = {row["id"] for row in rows(site / f"answers/{name}.jsonl")}
    for part, share in {"questions": 0.6, "auxiliary": 0.6, "heldout": 0.0}.items():
        asked = rows(site / f"server/{part}.jsonl")
        own = {row["id"] for row in asked if row["domain"] == name}
        assert len(known & own) == share * len(own)
        assert known.isdisjoint({row["id"] for row in asked} - own)


def test_the_first_held_out_questions_are_of_all_domains(site: Path) -> None:
    assert [row["domain"] for row in rows(site / "server/heldout.jsonl")[:3]] == list(DOMAINS)


@pytest.mark.parametrize("name", DOMAINS)
def test_the_right_answer_earns_the_reward_of_its_domain(site: Path, name: str) -> None:
    known = rows(site / f"answers/{name}.jsonl")
    said = [f"<answer> {row['answer']} </answer>" for row in known]
    assert DOMAINS[name](said, [row["answer"] for row in known], tag="answer") == [1.0] * len(known)


def test_the_files_are_ones_that_a_run_takes(site: Path) -> None:
    config = load_run(site / "run.toml")
    assert config.objectives["correct"].weight == 8.0 and config.objectives["format"].weight == 1.0
    for name in DOMAINS:
        client = load_client(site / f"clients/{name}.toml")
        judge = client.rewards["correct"].otherwise
        assert client.task == name and judge and judge.use == "fedpact.rewards:Agreement"


@pytest.mark.parametrize("tokenizer, as_chat", [({}, False), ({"chat_template": "{{ messages }}"}, True)])
def test_prompts_are_chats_where_the_model_has_a_template(
    tmp_path: Path, tokenizer: dict[str, str], as_chat: bool
) -> None:
    prepare.prepare(tmp_path / "site", model=str(model_folder(tmp_path / "model", **tokenizer)))
    server = load_run(tmp_path / "site/run.toml").server
    assert server and server.auxiliary and server.prompts.as_chat == server.auxiliary.as_chat == as_chat


def test_a_template_in_a_file_of_its_own_counts(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    assert not prepare.has_chat_template(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert prepare.has_chat_template(folder)


def test_the_seed_decides_the_split(site: Path, tmp_path: Path) -> None:
    model = str(tmp_path / "model")
    prepare.prepare(tmp_path / "again", model=model, seed=0)
    prepare.prepare(tmp_path / "other", model=model, seed=1)
    assert files(tmp_path / "again") == files(site)
    assert files(tmp_path / "other")["server/heldout.jsonl"] != files(site)["server/heldout.jsonl"]


def test_a_folder_of_public_data_is_read_like_the_excerpt(site: Path, tmp_path: Path) -> None:
    for domain in prepare.DOMAINS.values():
        path = tmp_path / "data" / domain.path
        path.parent.mkdir(parents=True)
        shutil.copy(EXAMPLE / "excerpt" / f"{path.parent.name}.jsonl", path)
    prepare.prepare(tmp_path / "again", model=str(tmp_path / "model"), data=tmp_path / "data")
    assert files(tmp_path / "again") == files(site)


@pytest.mark.parametrize(
    "answer, number",
    [(-12.6, "-12.6"), (["$1,496.5"], "1496.5"), (["36%"], "36"), (["2018", "2019"], None), (["(12.6)"], None)],
)
def test_a_tatqa_answer_is_read_if_it_is_one_plain_number(answer: Any, number: str | None) -> None:
    assert prepare.plain_number(answer) == number


def test_a_row_may_hold_what_unicode_takes_for_a_line_end(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k/train.jsonl"
    path.parent.mkdir()
    asked = [{"question": f"{i} apples\u2028and {i} pears?", "answer": f"#### {2 * i}"} for i in range(8)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked), encoding="utf-8")
    assert len(prepare.load(prepare.DOMAINS["mathematics"], tmp_path)) == 8


def test_a_long_text_is_cut_between_words_and_says_so() -> None:
    assert prepare.cropped("word " * 400) == " ".join(["word"] * 239) + " ..."
    assert prepare.cropped("short") == "short"


@pytest.mark.parametrize(
    "more, said",
    [
        (["--model", "MODEL"], "site: not empty; give a new folder"),
        (["--model", "MODEL", "--data", "DATA"], "pqa_labeled.jsonl: not read"),
        (["--model", "./none"], "expected a model folder or a Hugging Face id"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    out = site if "give" in said else tmp_path / "new"
    words = [{"MODEL": str(tmp_path / "model"), "DATA": str(tmp_path)}.get(word, word) for word in more]
    assert prepare.main([str(out), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: ") and said in error and error.count("\n") == 1


# --- the whole example, on a model that writes children's stories: mechanics, no learning ----------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two small rounds; members list what they are asked in clients/asked-NAME.jsonl."""
    site = tmp_path_factory.mktemp("domains") / "site"
    command(EXAMPLE / "prepare.py", site, "--model", STORIES)
    (site / "clients/noted.py").write_text(NOTED)
    for name, reward in DOMAINS.items():
        path, how = site / f"clients/{name}.toml", reward.__name__
        text = path.read_text().replace("max_completion_length = 256", "max_completion_length = 8")
        text = text.replace(f'use = "fedpact.rewards:{how}"', 'use = "noted.py:Noted"')
        noted = f'kwargs = {{ tag = "answer", how = "{how}", path = "asked-{name}.jsonl" }}'
        path.write_text(text.replace('kwargs = { tag = "answer" }', noted))
    settings = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    command("-m", "fedpact", "run", site / "run.toml", *settings)
    return site


def command(*words: Any) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, *map(str, words)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@needs_stories
@pytest.mark.slow
@pytest.mark.parametrize("name", DOMAINS)
def test_members_are_asked_mostly_about_their_own_domain(finished: Path, name: str) -> None:
    domains = {row["id"]: row["domain"] for row in rows(finished / "server/questions.jsonl")}
    asked = [domains[id] for id, _, _ in rows(finished / f"clients/asked-{name}.jsonl") if id in domains]
    assert asked.count(name) > len(asked) / 2


@needs_stories
@pytest.mark.slow
@pytest.mark.parametrize("name", DOMAINS)
def test_the_truth_decides_just_where_it_is_known(finished: Path, name: str) -> None:
    known = {row["id"]: row["answer"] for row in rows(finished / f"answers/{name}.jsonl")}
    asked = rows(finished / f"clients/asked-{name}.jsonl")
    assert all(answer == known.get(id) for id, answer, _ in asked)
    assert all((value is None) == (id not in known) for id, _, value in asked)
    public = {row["id"] for row in rows(finished / "server/questions.jsonl")}
    assert any(id in known for id, _, _ in asked if id in public)


@needs_stories
@pytest.mark.slow
def test_bytes_both_ways_are_on_the_ledger(finished: Path) -> None:
    ledger = [row for row in rows(finished / "runs/run/ledger.jsonl") if row.get("verb") == "score"]
    for name in DOMAINS:
        sent = sum(row.get("bytes_out", 0) for row in ledger if row["peer"] == name)
        received = sum(row.get("bytes_in", 0) for row in ledger if row["peer"] == name)
        assert sent > 0 and received > 0


@needs_stories
@pytest.mark.slow
def test_peft_loads_the_final_adapter(finished: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert STORIES is not None
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(STORIES), finished / "runs/run/final")
    assert model.peft_config["default"].r == 2
