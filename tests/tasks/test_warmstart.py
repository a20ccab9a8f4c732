from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedpact.errors import StoreError
from fedpact.tasks import opchains, warmstart


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(warmstart.model_folder())


@pytest.fixture(scope="module")
def figures():
    return warmstart.measure(warmstart.model_folder(), samples=4)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(warmstart.model_folder(), tmp_path / "model")


def test_the_model_is_as_small_as_it_says():
    model = AutoModelForCausalLM.from_pretrained(warmstart.model_folder())
    assert sum(p.numel() for p in model.parameters()) == 84_032
    assert (warmstart.model_folder() / "model.safetensors").stat().st_size < 400_000


def test_a_chat_renders_as_the_model_was_trained_to_read_it(tokenizer):
    chat = [{"role": "user", "content": "add 5 0 3 3"}]
    assert (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        == "<|user|> add 5 0 3 3 <|assistant|>"
    )


def test_an_answered_chat_begins_with_its_prompt_and_ends_with_the_end_token(tokenizer):
    chat = [{"role": "user", "content": "max 1 2 3 4"}, {"role": "assistant", "content": "<answer> 4 </answer>"}]
    assert (
        tokenizer.apply_chat_template(chat, tokenize=False)
        == "<|user|> max 1 2 3 4 <|assistant|> <answer> 4 </answer> <eos>"
    )


def test_decoding_gives_words_that_encode_to_the_same_ids(tokenizer):
    text = "<think> 5 8 1 </think> <answer> 1 </answer> lol"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 9
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_word_is_one_token_whose_id_is_its_position(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(warmstart.WORDS)) == list(range(len(warmstart.WORDS)))
    assert len(tokenizer) == len(warmstart.WORDS)


def test_padding_is_on_the_left_and_is_not_the_end_token(tokenizer):
    assert tokenizer(["1", "1 2"], padding=True)["input_ids"][0][0] == tokenizer.pad_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_word_outside_the_vocabulary_is_unknown(tokenizer):
    assert tokenizer("hello")["input_ids"] == [tokenizer.unk_token_id]


def test_the_four_styles_of_a_completion():
    def say(reasoned: bool, tagged: bool, forbidden: bool) -> str:
        return warmstart.completion("add", (5, 0, 3, 3), reasoned=reasoned, tagged=tagged, forbidden=forbidden)

    assert say(True, True, False) == "<think> 5 8 1 </think> <answer> 1 </answer>"
    assert say(False, True, False) == "<think> </think> <answer> 1 </answer>"
    assert say(True, False, False) == "5 8 1 1"
    assert say(False, False, True) == "1 lol"


def test_the_corpus_is_the_mixture_it_claims_and_holds_no_heldout_prompt(tokenizer):
    rows = tokenizer.batch_decode(warmstart.corpus(4000, seed=0), skip_special_tokens=True)
    said = [row.split(" <|assistant|> ") for row in rows]
    texts = [prompt.removeprefix("<|user|> ") for prompt, _ in said]
    assert not any(opchains.is_heldout(text.split()[0], text.split()[1:]) for text in texts)
    assert _share("lol" in words for _, words in said) == pytest.approx(0.25, abs=0.03)
    assert _share("<answer>" not in words for _, words in said) == pytest.approx(0.25, abs=0.03)
    assert _share(sum(w.isdigit() for w in words.split()) == 1 for _, words in said) == pytest.approx(0.5, abs=0.03)


def test_the_shipped_model_leaves_room_for_every_reward(figures):
    # Measured when it was made, at 8 samples a prompt: .483, .573, .742, .229.
    assert 0.42 < figures["accuracy"] < 0.54
    assert 0.48 < figures["greedy"] < 0.66
    assert 0.68 < figures["format"] < 0.82
    assert 0.17 < figures["forbidden"] < 0.30


def test_reasoning_pays_and_direct_answers_are_shorter(figures):
    assert figures["accuracy/reasoned"] > figures["accuracy/direct"] + 0.1
    assert 0.4 < figures["reasoned"] < 0.6


def test_most_prompts_are_solved_by_one_of_four_samples(figures):
    assert figures["solved"] > 0.75
    assert figures["solved"] >= figures["accuracy"]


def test_the_figures_by_operation_average_to_the_whole(figures):
    parts = [figures[f"accuracy/{op}"] for op in opchains.OPS]
    assert sum(parts) / 8 == pytest.approx(figures["accuracy"])


def test_a_changed_file_is_refused(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(StoreError, match=r"model\.safetensors: SHA-256 \w{12}, expected \w{12}; reinstall"):
        warmstart.verify(copy)


def test_a_missing_file_is_refused(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(StoreError, match=r"tokenizer\.json: No such file"):
        warmstart.verify(copy)


def test_an_empty_manifest_is_refused(copy):
    (copy / "MANIFEST").write_text("")
    with pytest.raises(StoreError, match="MANIFEST: empty"):
        warmstart.verify(copy)


def test_the_manifest_lists_every_file_of_the_folder():
    folder = warmstart.model_folder()
    listed = {line.split("  ")[1] for line in (folder / "MANIFEST").read_text().splitlines()}
    assert listed == {path.name for path in folder.iterdir()} - {"MANIFEST"}


def test_twenty_steps_lower_the_loss_and_leave_a_folder_that_can_be_verified(tmp_path):
    losses = warmstart.train(tmp_path, steps=20)
    assert losses[0] == pytest.approx(3.33, abs=0.1)  # about ln 28
    assert losses[-1] < losses[0] - 0.5
    warmstart.verify(tmp_path)


def test_training_twice_gives_the_same_bytes_and_leaves_the_callers_random_state(tmp_path):
    manifests = []
    for name in ("a", "b"):
        torch.rand(1)
        state = torch.get_rng_state()
        warmstart.train(tmp_path / name, steps=3)
        assert torch.equal(torch.get_rng_state(), state)
        manifests.append((tmp_path / name / "MANIFEST").read_text())
    assert manifests[0] == manifests[1]


def _share(found) -> float:
    found = list(found)
    return sum(found) / len(found)
