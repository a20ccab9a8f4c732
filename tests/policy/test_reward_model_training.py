from __future__ import annotations

import json
import math
import stat
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedpact.errors import ConfigError, DataError, StoreError
from fedpact.policy.reward_model import FitSettings, ScalarModel, pairwise_loss, stored_facts
from fedpact.tasks import opchains, warmstart
from tests.conftest import tokenizer

SETTINGS = FitSettings(learning_rate=1e-2, per_device_train_batch_size=4)


def pairs(count=24):
    """Op-chain questions; the answer in tags is preferred to the bare digit."""
    prompts = [text for op in opchains.OPS for text in opchains.heldout(op, 6).text][:count]
    digits = [str(i % 10) for i in range(len(prompts))]
    return (
        prompts,
        [f"<think> </think> <answer> {digit} </answer>" for digit in digits],
        list(digits),
    )


def fresh(lora_r=4, **options):
    return ScalarModel.fresh(warmstart.model_folder(), where="test", lora_r=lora_r, dtype="float32", **options)


def fitted(lora_r=4, settings=SETTINGS):
    model = fresh(lora_r)
    model.fit(*pairs(), settings)
    return model


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    """A reward model as TRL's trainer saves one: a decoder with a `score` head and its tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(warmstart.model_folder(), num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(warmstart.model_folder()).save_pretrained(folder)
    return folder


def test_the_loss_is_the_negative_log_of_the_sigmoid_of_the_margin():
    chosen, rejected = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    by_hand = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    assert_close(pairwise_loss(chosen, rejected).item(), by_hand, rtol=1e-15, atol=0)


def test_a_margin_of_minus_a_thousand_costs_a_thousand():
    assert pairwise_loss(torch.tensor([-1000.0]), torch.tensor([0.0])).item() == 1000.0


def test_tokens_scores_and_loss_are_those_of_trls_reward_trainer(trained_folder, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    prompts, better, worse = ["add 1 2 3 ", "sub 4 5 ", "max 7 8 9 1 "], ["6", "1 <eos>", "9 lol"], ["5", "2 3", "1"]
    rows = [{"prompt": p, "chosen": y, "rejected": z} for p, y, z in zip(prompts, better, worse, strict=True)]
    trainer = trl.RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(trained_folder),
        args=trl.RewardConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_dropout=True),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(trained_folder),
    )
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model.eval(), inputs).item()
    model = ScalarModel.trained(trained_folder, where="test", dtype="float32")
    scores = torch.tensor(model.scores(prompts * 2, better + worse))
    assert_close(pairwise_loss(scores[:3], scores[3:]).item(), theirs, rtol=1e-5, atol=0)


def test_a_fresh_model_finds_everything_equally_good():
    prompts, better, _ = pairs(3)
    assert fresh().scores(prompts, better) == [0.0, 0.0, 0.0]


def test_adams_first_step_moves_a_head_alone_by_the_rate_along_the_sign_of_the_mean_difference():
    prompts, better, worse = pairs(6)
    model, inner = fresh(lora_r=0), fresh(lora_r=0).base

    def last_state(prompt, said):
        chat = [*prompt, {"role": "assistant", "content": said}]
        ids = inner.tokenizer.apply_chat_template(chat, return_dict=False)
        with torch.no_grad():
            return inner.model.model(torch.tensor([ids])).last_hidden_state[0, -1]

    model.fit(prompts, better, worse, FitSettings(learning_rate=0.5, per_device_train_batch_size=6))
    differences = [last_state(p, y) - last_state(p, z) for p, y, z in zip(prompts, better, worse, strict=True)]
    expected = 0.5 * torch.stack(differences).mean(0).sign()
    assert_close(model.head.weight[0], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_swapping_chosen_and_rejected_negates_what_is_learned(lora_r):
    prompts, better, worse = pairs()
    model, swapped = fitted(lora_r), fresh(lora_r)
    swapped.fit(prompts, worse, better, SETTINGS)
    ours, theirs = (torch.tensor(m.scores(prompts, better)) for m in (model, swapped))
    assert (ours > torch.tensor(model.scores(prompts, worse))).float().mean() > 0.75
    assert_close(theirs, -ours, rtol=1e-3, atol=1e-3)


def test_fitting_again_starts_again_and_gives_the_same_bytes():
    prompts, better, worse = pairs()
    model = fitted()
    scores = model.scores(prompts, better)
    model.fit(prompts, worse, better, SETTINGS.model_copy(update={"seed": 1}))
    assert model.scores(prompts, better) != scores
    model.fit(prompts, better, worse, SETTINGS)
    assert model.scores(prompts, better) == scores


def test_half_an_epoch_of_two_batches_is_one_step():
    model = fresh(lora_r=0)
    model.fit(*pairs(8), SETTINGS.model_copy(update={"num_train_epochs": 0.5}))
    assert_close(model.head.weight.abs(), torch.full((1, 64), 1e-2), rtol=1e-4, atol=0)  # Adam's first step
    model.fit(*pairs(8), SETTINGS)
    assert 1.4e-2 < model.head.weight.abs().max() < 1.51e-2  # the second has half the rate


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_a_score_does_not_depend_on_what_else_is_scored(model_folders, kind):
    model = ScalarModel.fresh(model_folders[kind], where="test", lora_r=4, dtype="float64")
    model.base = replace(model.base, tokenizer=tokenizer())
    prompts = ["w1 w2 w3 ", "w4 ", "w5 w6 w7 w8 w9 w10 " * 4, "w11 w12 "]
    completions = ["w1", "w2 w3 w4", "w5 w6", "w7 w8 w9 w10 w11 w12 w13"]
    model.fit(prompts, completions, ["w20"] * 4, SETTINGS)
    alone = [model.scores([p], [said])[0] for p, said in zip(prompts, completions, strict=True)]
    assert len(set(alone)) == 4
    assert_close(model.scores(prompts, completions), alone, rtol=0, atol=1e-5)


def test_in_single_precision_a_score_depends_on_the_others_by_rounding_alone():
    prompts, better, worse = pairs()
    model = fitted()
    said = [y if i % 2 else z for i, (y, z) in enumerate(zip(better, worse, strict=True))]
    alone = [model.scores([p], [text])[0] for p, text in zip(prompts, said, strict=True)]
    assert_close(model.scores(prompts, said), alone, rtol=0, atol=1e-5)


def test_of_a_long_text_the_end_is_kept():
    model = fresh(lora_r=0, max_length=4)
    torch.nn.init.ones_(model.head.weight)
    first, same_end, other_end = model.scores(["1 2 3 ", "9 2 3 ", "1 2 3 "], ["4 5", "4 5", "4 6"])
    assert first == same_end != other_end


def test_no_more_tokens_are_read_than_the_model_has_positions_for():
    assert fresh(max_length=512).max_length == 64


def test_peft_opens_the_folder_and_gives_the_same_scores(tmp_path):
    model = fitted()
    model.save(tmp_path / "kept", {})
    base = AutoModelForSequenceClassification.from_pretrained(warmstart.model_folder(), num_labels=1)
    theirs = PeftModel.from_pretrained(base, tmp_path / "kept").eval()
    with torch.no_grad():
        scores = [theirs(torch.tensor([model._tokens(p, y)])).logits.item() for p, y in zip(*pairs(4)[:2], strict=True)]
    assert_close(model.scores(*pairs(4)[:2]), scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_what_was_saved_scores_the_same_to_the_last_bit(tmp_path, lora_r):
    model, again = fitted(lora_r), fresh(lora_r)
    model.save(tmp_path / "kept", {"accuracy": 0.5})
    again.load(tmp_path / "kept")
    assert again.scores(*pairs()[:2]) == model.scores(*pairs()[:2])
    assert stored_facts(tmp_path / "kept")["accuracy"] == 0.5


def test_only_the_owner_can_read_what_was_saved(tmp_path):
    fitted().save(tmp_path / "home" / "kept", {})
    files = list((tmp_path / "home" / "kept").iterdir())
    assert {file.name for file in files} == {"adapter_config.json", "adapter_model.safetensors", "reward_model.json"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "home" / "kept").stat().st_mode) == 0o700


def test_facts_beside_the_weights_of_another_save_do_not_count(tmp_path):
    fitted().save(tmp_path, {})
    facts = (tmp_path / "reward_model.json").read_bytes()
    fitted(settings=SETTINGS.model_copy(update={"seed": 1})).save(tmp_path, {})
    assert stored_facts(tmp_path) is not None
    (tmp_path / "reward_model.json").write_bytes(facts)  # as if the second save had been killed half-way
    assert stored_facts(tmp_path) is None


@pytest.mark.parametrize("damage", [b"", b"not safetensors"])
def test_damaged_weights_are_refused_in_one_line(tmp_path, damage):
    model = fitted()
    model.save(tmp_path, {})
    (tmp_path / "adapter_model.safetensors").write_bytes(damage)
    with pytest.raises(StoreError, match=r"adapter_model\.safetensors: not a reward model on [^\n]*$"):
        model.load(tmp_path)


def test_weights_of_another_rank_are_refused(tmp_path):
    fitted(lora_r=2).save(tmp_path, {})
    with pytest.raises(StoreError, match="adapter does not fit the model"):
        fresh(lora_r=4).load(tmp_path)


def test_a_trained_folder_gives_the_scores_of_transformers(trained_folder):
    theirs = AutoModelForSequenceClassification.from_pretrained(trained_folder).eval()
    model = ScalarModel.trained(trained_folder, where="test", dtype="float32")
    prompts, better, _ = pairs(3)
    with torch.no_grad():
        ids = [model._tokens(p, y)[:-1] for p, y in zip(prompts, better, strict=True)]
        expected = [theirs(torch.tensor([row])).logits.item() for row in ids]
    assert_close([model._rewards([row]).item() for row in ids], expected, rtol=1e-5, atol=1e-6)


def test_a_causal_model_is_no_trained_reward_model():
    with pytest.raises(ConfigError, match=r"has no score\.weight; expected a decoder with a trained `score` head"):
        ScalarModel.trained(warmstart.model_folder(), where="test", dtype="float32")


def test_a_head_of_two_outputs_is_no_reward(tmp_path):
    AutoModelForSequenceClassification.from_pretrained(warmstart.model_folder(), num_labels=2).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(warmstart.model_folder()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="out_features=2"):
        ScalarModel.trained(tmp_path, where="test", dtype="float32")


def test_a_chat_needs_a_template(model_folders):
    model = ScalarModel.fresh(model_folders["llama"], where="test", dtype="float32")
    with pytest.raises(DataError, match="the reward model has no chat template; give it plain texts"):
        model.scores([[{"role": "user", "content": "w1"}]], ["w2"])


def test_a_rate_that_is_far_too_high_is_named():
    with pytest.raises(DataError, match=r"training is not finite at step \d of 6; lower learning_rate"):
        fitted(lora_r=0, settings=SETTINGS.model_copy(update={"learning_rate": 1e37}))


def test_no_pair_is_no_training_set():
    with pytest.raises(DataError, match="no preference pair to train on"):
        fresh().fit([], [], [], SETTINGS)


def test_the_facts_are_json_that_people_can_read(tmp_path):
    fitted().save(tmp_path, {"accuracy": 1.0})
    facts = json.loads((tmp_path / "reward_model.json").read_text())
    assert facts["lora_r"] == 4 and len(facts["sha256"]) == 64
