"""The embedded demo's base model: 84,032 parameters, trained from nothing on op chains in half a minute.

The trained model is shipped with the hash of its files, so that the demo starts at once and everybody starts from the
same bytes; `scripts/make_demo_model.py` makes it. Training again gives the same bytes only on the same machine with the
same versions and one thread; elsewhere it gives a model that `measure` tells apart by a few points at most.

The corpus is a mixture on purpose, so that four rewards have something to improve: half of its completions answer
without reasoning, a quarter lack the tags, and a quarter end in a word that a reward may forbid, independently.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedpact.errors import StoreError
from fedpact.seeding import generator, key, uniforms
from fedpact.tasks import opchains

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
FORBIDDEN = "lol"
WORDS: tuple[str, ...] = (
    *(PAD, EOS, UNKNOWN, "<|user|>", "<|assistant|>", "<think>", "</think>", "<answer>", "</answer>"),
    *map(str, range(10)),
    *opchains.OPS,
    FORBIDDEN,
)
"""The vocabulary, in the order of the token ids."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '' if loop.first else ' ' }}<|{{ message['role'] }}|> {{ message['content'] }}"
    "{{ ' <eos>' if message['role'] == 'assistant' else '' }}"
    "{% endfor %}"
    "{{ ' <|assistant|>' if add_generation_prompt else '' }}"
)
MANIFEST = "MANIFEST"
"""Lists the SHA-256 of every other file of the folder, as `sha256sum` writes it."""

STEPS = 850
MAX_COMPLETION_LENGTH = 12
"""The longest completion of the corpus has 10 tokens."""

_IDS = {word: i for i, word in enumerate(WORDS)}
BATCH = 64
"""Rows of a training step."""
_LEARNING_RATE = 5e-3
_PROMPT = 7  # tokens of every prompt
_ROW = _PROMPT + 10
_WELL_FORMED = re.compile(rf"<think>(?: \d)* </think> <answer> \d </answer>(?: {FORBIDDEN})?")


def model_folder() -> Path:
    """The folder of the shipped model, its files checked against MANIFEST.

    Raises StoreError if a file is missing or is not the one that was shipped.
    """
    folder = Path(str(resources.files("fedpact.tasks") / "opchain_model"))
    verify(folder)
    return folder


def verify(folder: Path) -> None:
    """Raise StoreError unless every file that MANIFEST lists has the hash that it lists."""
    remedy = "reinstall fedpact, or make the model again with scripts/make_demo_model.py"
    try:
        lines = (folder / MANIFEST).read_text().splitlines()
        if not lines:
            raise StoreError(f"{folder / MANIFEST}: empty, expected the hashes of the demo model; {remedy}")
        for line in lines:
            expected, _, name = line.partition("  ")
            found = _sha256(folder / name)
            if found != expected:
                raise StoreError(f"{folder / name}: SHA-256 {found[:12]}, expected {expected[:12]}; {remedy}")
    except OSError as error:
        raise StoreError(f"{error.filename}: {error.strerror}, expected a file of the demo model; {remedy}") from error


def train(out: Path, *, seed: int = 0, steps: int = STEPS) -> list[float]:
    """Train a model from nothing and write it to `out` as a transformers folder with a MANIFEST.

    Returns the loss of every step. Runs on one thread; the caller's threads and random state are restored.
    """
    with one_thread():
        model = new_model(seed=seed)
        losses = fit(model, corpus(steps * BATCH, seed=seed), steps)
    save(model, out)
    return losses


def new_model(*, seed: int) -> Any:
    """A model that knows nothing yet; the caller's random state is restored."""
    from transformers import LlamaConfig, LlamaForCausalLM  # here, because importing transformers costs seconds

    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=_IDS[PAD],
        eos_token_id=_IDS[EOS],
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "opchains", "init"))
        return LlamaForCausalLM(config)


def corpus(size: int, *, seed: int) -> Tensor:
    """`size` training prompts with a completion each, padded on the right: [size, 17] int64."""
    pairs = [(op, digits) for op in opchains.OPS for digits in opchains.pool(op)]
    drawn = torch.randint(len(pairs), (size,), generator=generator(seed, "opchains", "corpus")).tolist()
    styles = uniforms(key(seed, "opchains", "styles"), size, 3) >= torch.tensor([0.5, 0.25, 0.75])  # [size, 3]
    rows = []
    for i, (reasoned, tagged, forbidden) in zip(drawn, styles.tolist(), strict=True):
        op, digits = pairs[i]
        said = completion(op, digits, reasoned=reasoned, tagged=tagged, forbidden=forbidden)
        rows.append(row(op, digits, said))
    return torch.tensor(rows)


def row(op: str, digits: Sequence[int], said: str) -> list[int]:
    """The token ids of one training example, padded on the right to 17."""
    words = f"<|user|> {opchains.question(op, digits)} <|assistant|> {said} {EOS}".split()
    return [_IDS[word] for word in words] + [_IDS[PAD]] * (_ROW - len(words))


def completion(op: str, digits: Sequence[int], *, reasoned: bool, tagged: bool, forbidden: bool) -> str:
    """One way to answer: with or without the running states, the tags, and the forbidden word at the end."""
    states, answer = opchains.solve(op, digits)
    chain = [str(state) for state in states] if reasoned else []
    words = ["<think>", *chain, "</think>", "<answer>", str(answer), "</answer>"] if tagged else [*chain, str(answer)]
    return " ".join([*words, FORBIDDEN] if forbidden else words)


def measure(model_path: Path, *, size: int = 96, samples: int = 1, seed: int = 0) -> dict[str, float]:
    """What the model at `model_path` does on held-out prompts, `size` an operation.

    Of `samples` completions a prompt at temperature 1, PAD excluded: `accuracy`, `format` (well formed), `forbidden`
    (has the forbidden word), `tokens` (mean length, end token included), `reasoned` (more than one digit),
    `accuracy/reasoned`, `accuracy/direct`, and `solved` (share of prompts that at least one sample got right). Of one
    greedy completion a prompt: `greedy`. `accuracy`, `solved` and `greedy` also by operation: `accuracy/add`.
    The answer is the last digit, tags or not. NaN: there was no such completion.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokens = AutoModelForCausalLM.from_pretrained(model_path).eval(), AutoTokenizer.from_pretrained(model_path)
    cases = [opchains.heldout(op, size) for op in opchains.OPS]
    answers = [answer for case in cases for answer in case.columns["answer"]]
    chats = [tokens.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for c in cases for t in c.text]
    prompt_ids = tokens(chats, return_tensors="pt")["input_ids"]  # [p, 7]
    draws = uniforms(key(seed, "opchains", "measure"), len(answers) * samples, MAX_COMPLETION_LENGTH)
    with one_thread():
        drawn = _complete(model, prompt_ids.repeat_interleave(samples, 0), draws)  # [p * samples, t]
        best = _complete(model, prompt_ids, None)  # [p, t]

    said = tokens.batch_decode(drawn, skip_special_tokens=True)
    right = _right(said, [answer for answer in answers for _ in range(samples)])  # [p * samples]
    reasoned = torch.tensor([len(_digits(text)) > 1 for text in said])
    by_case = {
        "accuracy": right.view(-1, samples).mean(-1),
        "solved": right.view(-1, samples).amax(-1),
        "greedy": _right(tokens.batch_decode(best, skip_special_tokens=True), answers),
    }
    figures = {
        "format": torch.tensor([float(_WELL_FORMED.fullmatch(text) is not None) for text in said]),
        "forbidden": torch.tensor([float(FORBIDDEN in text.split()) for text in said]),
        "tokens": (drawn != _IDS[PAD]).sum(-1).float(),
        "reasoned": reasoned.float(),
        "accuracy/reasoned": right[reasoned],
        "accuracy/direct": right[~reasoned],
    }
    for name, values in by_case.items():
        figures[name] = values
        figures |= {f"{name}/{op}": part for op, part in zip(opchains.OPS, values.view(-1, size), strict=True)}
    return {name: values.mean().item() for name, values in figures.items()}


def fit(model: Any, rows: Tensor, steps: int) -> list[float]:
    """Train on `rows` ([steps * 64, 17]) in their order, in place; returns the loss of every step.

    Cross-entropy of the completions only; the learning rate rises for 50 steps and falls to a tenth at the end.
    """
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    losses = []
    for step, batch in enumerate(rows.view(steps, BATCH, _ROW)):
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * min(1.0, (step + 1) / 50) * (1 - 0.9 * step / steps)
        logits = model(batch).logits[:, _PROMPT - 1 : -1]  # [64, 10, vocabulary]
        loss = cross_entropy(logits.flatten(0, 1), batch[:, _PROMPT:].flatten(), ignore_index=_IDS[PAD])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def _complete(model: Any, prompt_ids: Tensor, draws: Tensor | None) -> Tensor:
    # Completions, PAD after the end token: [p, t]. One draw a token by inversion; None is greedy.
    cache, new, tokens = None, prompt_ids, []
    running = torch.ones(len(prompt_ids), dtype=torch.bool)
    for t in range(MAX_COMPLETION_LENGTH):
        state = model(new, past_key_values=cache, use_cache=True)
        cache, logits = state.past_key_values, state.logits[:, -1]
        logits[:, _IDS[PAD]] = float("-inf")
        cumulated = logits.softmax(-1).cumsum(-1)  # [p, vocabulary]
        chosen = logits.argmax(-1) if draws is None else (cumulated <= draws[:, t : t + 1]).sum(-1)
        # The cumulated sum may end a rounding error below 1, and a draw above it would be no token at all.
        chosen = chosen.clamp(max=len(WORDS) - 1).where(running, _IDS[PAD])
        running &= chosen != _IDS[EOS]
        tokens.append(chosen)
        new = chosen[:, None]
    return torch.stack(tokens, -1)


def _digits(text: str) -> list[str]:
    return [word for word in text.split() if word.isdigit()]


def _right(said: Sequence[str], answers: Sequence[str]) -> Tensor:
    return torch.tensor([float(_digits(text)[-1:] == [answer]) for text, answer in zip(said, answers, strict=True)])


def save(model: Any, out: Path) -> None:
    """Write `model` and its tokenizer to `out` as a transformers folder with a MANIFEST."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    # Tags are ordinary words: decoding without special tokens must keep them for the rewards to see.
    words = Tokenizer(models.WordLevel(_IDS, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([PAD, EOS, UNKNOWN])
    words.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    names = sorted(path.name for path in out.iterdir() if path.name != MANIFEST)
    (out / MANIFEST).write_text("".join(f"{_sha256(out / name)}  {name}\n" for name in names))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread within: the order of floating-point sums depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
