"""Writes a run of FedGRPO over three domains: biomedicine (PubMedQA), finance (TAT-QA) and mathematics (GSM8K).

    python examples/domains/prepare.py OUT --model MODEL [--data FOLDER] [--seed N]

OUT gets the coordinator's files (run.toml, server/) and the members' (clients/, answers/). README.md says more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, Literal, NamedTuple

from fedpact.errors import ConfigError, DataError, FedPactError
from fedpact.policy.model import resolve
from fedpact.seeding import permutation

HERE = Path(__file__).parent
MAX_ROWS = 400
"""Questions of a domain, at the most."""
CONTEXT = 1200
"""Characters: a longer abstract is cropped, a report with a longer table is left out."""
KNOWN = 0.6
"""Share of a domain's questions whose answers its member knows."""
FORM = "Think inside <think> and </think>, then give the answer alone inside <answer> and </answer>."

Row = Mapping[str, Any]


class Question(NamedTuple):
    """A question that anybody may see, its public id, and what only some know."""

    id: str
    prompt: str
    answer: str


class Split(NamedTuple):
    """A domain's questions by what the server does with them."""

    questions: list[Question]
    auxiliary: list[Question]
    heldout: list[Question]


# --- three data sets -------------------------------------------------------------------------------------------------


def pubmedqa(rows: Sequence[Row]) -> Iterator[Question]:
    """Of each abstract the last section, which is nearly always the results; the answer is yes, no or maybe."""
    for row in rows:
        asked = f"Question: {row['QUESTION']}\nThe answer is yes, no or maybe."
        prompt = f"{cropped(row['CONTEXTS'][-1])}\n\n{asked} {FORM}\n"
        yield Question(f"pubmed:{row['PMID']}", prompt, row["final_decision"])


def tatqa(rows: Sequence[Row]) -> Iterator[Question]:
    """Of each report the first question about its table whose answer is a number; tables share no two questions."""
    for row in rows:
        table = "\n".join(" | ".join(cells) for cells in row["table"]["table"])
        asked = [question for question in row["questions"] if question["answer_from"] == "table"]
        known = [(question, number) for question in asked if (number := plain_number(question["answer"])) is not None]
        if known and len(table) <= CONTEXT:
            question, number = known[0]
            unit = {"": "", "percent": " in per cent"}.get(question["scale"], f" in {question['scale']}s")
            text = f"Question: {question['question']}\nThe answer is a number{unit}, with two decimals at the most."
            yield Question(f"tatqa:{question['uid']}", f"{table}\n\n{text} {FORM}\n", number)


def gsm8k(rows: Sequence[Row]) -> Iterator[Question]:
    """The number after `####` is the answer. The rows have no ids, so the question's hash is one."""
    for row in rows:
        digest = hashlib.sha256(row["question"].encode()).hexdigest()[:12]
        answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
        yield Question(f"gsm8k:{digest}", f"Question: {row['question']}\nThe answer is a number. {FORM}\n", answer)


def cropped(text: str) -> str:
    """`text`, cut between two words so that it has `CONTEXT` characters at the most; the cut shows as " ..."."""
    return text if len(text) <= CONTEXT else text[: CONTEXT - 3].rpartition(" ")[0] + " ..."


def plain_number(answer: Any) -> str | None:
    """The one number that a TAT-QA answer consists of, without currency, commas and per cent sign; None if none."""
    single = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    found = re.fullmatch(r"(-?)\$?\s*(\d[\d,]*(?:\.\d+)?)\s*%?", str(single).strip())
    return found[1] + found[2].replace(",", "") if found else None


class Domain(NamedTuple):
    """A data set, and how candidates are compared with answers."""

    path: str
    """In a folder of the public data."""
    read: Callable[[Sequence[Row]], Iterator[Question]]
    compare: Literal["exact", "numeric"]


DOMAINS = {
    "biomedicine": Domain("pubmedqa/pqa_labeled.jsonl", pubmedqa, "exact"),
    "finance": Domain("tatqa/dev.jsonl", tatqa, "numeric"),
    "mathematics": Domain("gsm8k/train.jsonl", gsm8k, "numeric"),
}


def load(domain: Domain, data: Path | None) -> list[Question]:
    """The domain's questions, each text once: from `data`, or from the excerpt. Raises DataError."""
    path = data / domain.path if data else HERE / "excerpt" / f"{domain.read.__name__}.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        found = list({question.prompt: question for question in domain.read(rows)}.values())
    except OSError as error:
        raise DataError(f"{path}: not read ({error.strerror}); expected the public file of that name") from error
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: {type(error).__name__}: {error}; expected the rows as published") from error
    if len(found) < 8:
        raise DataError(f"{path}: {len(found)} usable questions; expected at least 8")
    return found


def split(questions: Sequence[Question], *key: str | int) -> Split:
    """A quarter each for auxiliary (40 at the most) and held-out questions (60 at the most), the rest to train on."""
    chosen = [questions[row] for row in permutation(len(questions), *key)][:MAX_ROWS]
    quarter = len(chosen) // 4
    num_auxiliary, num_heldout = min(40, quarter), min(60, quarter)
    auxiliary, others = chosen[:num_auxiliary], chosen[num_auxiliary:]
    return Split(others[num_heldout:], auxiliary, others[:num_heldout])


# --- the files of a run ----------------------------------------------------------------------------------------------

RUN = Template("""\
# The coordinator's file: for an instruct model of about half a billion parameters on one GPU.
seed = $seed
rounds = 20                     # with 4 steps each

[objectives]
correct = { primary = true, weight = 8.0 }    # by the members
format = { weight = 1.0 }                     # by the server

[policy]
model = $model
lora = { r = 16, lora_alpha = 32 }

[rollout]
num_generations = 8             # candidates for each question
max_completion_length = 256     # tokens; more for a model that thinks long, since what is cut has no answer

[training]
prompts_per_step = 8            # 64 candidates in a step

[loss]
loss_type = "bnpo"
epsilon_high = 0.3
beta = 0.01

[optimizer]
learning_rate = 2e-5

[algorithm]
name = "fedgrpo"
server_steps = 4                # one exchange each
experts = "confidence"          # "oracle" asks the member whose task is the question's domain
num_experts = 1                 # the paper asks 2 of many; here the second best comes from another domain
num_neighbours = 8              # no more than there are auxiliary questions of one domain
competence_floor = 0.25         # a question near which nobody was right more often is skipped

[evaluation]
every = 5
greedy = true                   # sampled figures of so few held-out questions are noisy

[server]
encoder = "policy"
reference = "<answer> {answer} </answer>"
# The questions have ids and no answers. Held-out ones have answers, which only the audit below reads.
prompts = { path = "server/questions.jsonl", heldout = "server/heldout.jsonl", as_chat = $as_chat }
auxiliary = { path = "server/auxiliary.jsonl", as_chat = $as_chat }

[server.rewards.correct]        # a number if the answer is one, else a word
use = "fedpact.rewards:numeric_answer"
kwargs = { tag = "answer" }
otherwise = { use = "fedpact.rewards:exact_answer" }
audit = true

[server.rewards.format]
use = "fedpact.rewards:format_tags"
""")
CLIENT = Template("""\
# A member's file: it never leaves the member.
name = "$name"
task = "$name"

[answers]                       # what this member knows for sure; the rest is left to its judge
path = "../answers/$name.jsonl"
id = "id"

[rewards.correct]
use = "fedpact.rewards:${compare}_answer"
kwargs = { tag = "answer" }

[rewards.correct.otherwise]     # put a stronger private model here, or a judge behind an endpoint: see the README
use = "fedpact.rewards:Agreement"
kwargs = { model = $model, compare = "$compare", tag = "answer", max_completion_length = 256 }
timeout_s = 1800                # for loading the model, and its own answers to one request's questions
""")


def prepare(out: Path, *, model: str, data: Path | None = None, seed: int = 0) -> None:
    """Write everything below `out`. Raises ConfigError or DataError, one line."""
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out}: not empty; give a new folder")
    folder = resolve(model, where="--model")
    local = str(folder.resolve()) if Path(model).is_dir() else model
    names = {"model": json.dumps(local), "seed": str(seed), "as_chat": str(has_chat_template(folder)).lower()}
    splits = {name: split(load(domain, data), seed, "split", name) for name, domain in DOMAINS.items()}
    files = {"run.toml": RUN.substitute(names)}
    for name, domain in DOMAINS.items():
        files[f"clients/{name}.toml"] = CLIENT.substitute(names, name=name, compare=domain.compare)
        files[f"answers/{name}.jsonl"] = lines(asked._asdict() for asked in known(splits[name], seed, name))
    for part in Split._fields:
        rows = in_turn({name: getattr(found, part) for name, found in splits.items()})
        public = ("id", "prompt", "domain") if part == "questions" else ("id", "prompt", "domain", "answer")
        files[f"server/{part}.jsonl"] = lines({name: row[name] for name in public} for row in rows)
    for place, text in files.items():
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        (out / place).write_text(text, encoding="utf-8")


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in a model folder brings a template for chats."""
    settings = folder / "tokenizer_config.json"
    inside = settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    return inside or (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file()


def known(found: Split, seed: int, name: str) -> list[Question]:
    """What the domain's member has trusted answers to: a share of what the server trains on, and of its examples."""
    chosen: list[Question] = []
    for part, asked in (("questions", found.questions), ("auxiliary", found.auxiliary)):
        order = permutation(len(asked), seed, "known", name, part)
        chosen += [asked[row] for row in sorted(order[: round(KNOWN * len(asked))])]
    return chosen


def in_turn(questions: Mapping[str, Sequence[Question]]) -> list[dict[str, str]]:
    """Rows of all domains, taken in turn: whoever reads the first few reads of each."""
    rows = [(row, name, asked) for name, several in questions.items() for row, asked in enumerate(several)]
    return [{**asked._asdict(), "domain": name} for _, name, asked in sorted(rows, key=lambda place: place[:2])]


def lines(rows: Iterable[Row]) -> str:
    """The rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a run of FedGRPO over three domains.")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--model", required=True, help="a model folder, or a Hugging Face id")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="public data; without it the excerpt is taken")
    parser.add_argument("--seed", type=int, default=0, help="of the split, and of the run")
    chosen = parser.parse_args(arguments)
    try:
        prepare(chosen.out, model=chosen.model, data=chosen.data, seed=chosen.seed)
    except FedPactError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {chosen.out}: now `fedpact check {chosen.out / 'run.toml'}`")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
