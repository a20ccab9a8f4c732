from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedpact.errors import ConfigError, FedPactError, RewardError
from fedpact.rewards.load import RewardSet, load_reward
from fedpact.rewards.reward_model import RewardModel
from fedpact.tasks import opchains, warmstart
from fedpact.types import Prompts

WHERE = "clients/north.toml: rewards.helpful"


def rows(tagged=True, count=12):
    """Op-chain questions with two ways to answer each; preferred is the one in tags, or the one without."""
    found = []
    for op in opchains.OPS:
        for i, (prompt, digits) in enumerate(zip(opchains.heldout(op, count).text, opchains.pool(op), strict=False)):
            said = {
                tags: warmstart.completion(op, digits, reasoned=i % 2 == tags, tagged=tags, forbidden=i % 3 == 0)
                for tags in (True, False)
            }
            found.append({"prompt": prompt, "chosen": said[tagged], "rejected": said[not tagged]})
    return [
        {**row, **{name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}}
        for row in found
    ]


def write(folder, pairs):
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))


def judge(folder, **settings):
    settings = {"model": str(warmstart.model_folder()), "preferences": "pairs.jsonl", "learning_rate": 1e-2} | settings
    settings = {"heldout_share": 0.25, "lora_r": 4, "device": "cpu"} | settings
    return RewardModel(**settings, folder=folder, home=folder / "home")


def scores(reward):
    pairs = rows()[:8]
    return reward(
        prompts=[row["prompt"] for row in pairs for _ in range(2)],
        completions=[row[name] for row in pairs for name in ("chosen", "rejected")],
        answer=["0"] * 16,
    )


def weights(folder):
    file = folder / "home" / "reward-model" / "adapter_model.safetensors"
    return file.stat().st_ino, file.read_bytes()


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, rows())
    return tmp_path


def test_answers_in_tags_are_learned_from_a_hundred_pairs(folder):
    reward = judge(folder)
    assert reward.fit() > 0.9
    found = scores(reward)
    assert all(better > worse for better, worse in zip(found[::2], found[1::2], strict=True))


def test_a_member_that_prefers_the_opposite_learns_the_opposite(folder):
    write(folder, rows(tagged=False))
    reward = judge(folder)
    assert reward.fit() > 0.9
    found = scores(reward)
    assert all(tagged < bare for tagged, bare in zip(found[::2], found[1::2], strict=True))


def test_a_fit_is_found_again_and_gives_the_same_scores_to_the_last_bit(folder):
    first, second = judge(folder), judge(folder)
    accuracy, found, kept = first.fit(), scores(first), weights(folder)
    assert second.fit() == accuracy and scores(second) == found
    assert weights(folder) == kept


@pytest.mark.slow
def test_another_process_finds_the_fit_and_gives_the_same_scores(folder):
    reward = judge(folder)
    reward.fit()
    code = (
        "import json, sys, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from tests.rewards.test_reward_model import judge, scores\n"
        "print(json.dumps(scores(judge(Path(sys.argv[1])))))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == scores(reward)


def test_changed_pairs_are_fitted_anew(folder):
    judge(folder).fit()
    kept = weights(folder)
    write(folder, rows()[:-1])
    with pytest.raises(RewardError, match="has not been fitted yet"):
        scores(judge(folder))
    judge(folder).fit()
    assert weights(folder)[1] != kept[1]


@pytest.mark.parametrize("change", [{"learning_rate": 2e-2}, {"seed": 1}, {"max_length": 9}, {"heldout_share": 0.5}])
def test_changed_settings_are_fitted_anew(folder, change):
    judge(folder, lora_r=0).fit()
    kept = weights(folder)
    judge(folder, lora_r=0, **change).fit()
    assert weights(folder)[1] != kept[1]


def test_another_base_model_is_fitted_anew(folder):
    shutil.copytree(warmstart.model_folder(), folder / "base")
    judge(folder, model="base").fit()
    kept = weights(folder)
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    judge(folder, model="base").fit()
    assert weights(folder)[1] != kept[1]


def test_a_fit_that_was_damaged_is_made_again(folder):
    judge(folder).fit()
    kept = weights(folder)
    (folder / "home" / "reward-model" / "adapter_model.safetensors").write_bytes(kept[1][:-1])
    judge(folder).fit()
    assert weights(folder)[1] == kept[1]


def test_two_judges_of_one_member_are_kept_apart(folder):
    judge(folder, lora_r=0, name="first").fit()
    judge(folder, lora_r=0, name="second", seed=1).fit()
    assert sorted(path.name for path in (folder / "home").iterdir()) == ["first", "second"]
    assert len(scores(judge(folder, lora_r=0, name="first"))) == 16


def test_a_judge_that_was_not_fitted_says_so(folder):
    with pytest.raises(
        RewardError, match=r"^reward model 'reward-model' has not been fitted yet to pairs.jsonl [^\n]*$"
    ):
        scores(judge(folder))


def test_without_a_held_out_pair_the_accuracy_is_nan_now_and_later(folder):
    assert math.isnan(judge(folder, heldout_share=0.0, lora_r=0).fit())
    kept = weights(folder)
    assert math.isnan(judge(folder, heldout_share=0.0, lora_r=0).fit())
    assert weights(folder) == kept


def test_no_prompt_is_trained_on_and_measured_on(folder):
    judge(folder, lora_r=0).fit()
    facts = json.loads((folder / "home" / "reward-model" / "reward_model.json").read_text())
    assert facts["train_pairs"] + facts["heldout_pairs"] == len(rows()) and facts["heldout_pairs"] > 8


def test_a_folder_that_was_trained_elsewhere_needs_no_fit(folder):
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(warmstart.model_folder(), num_labels=1)
    model.save_pretrained(folder / "trained")
    AutoTokenizer.from_pretrained(warmstart.model_folder()).save_pretrained(folder / "trained")
    reward = judge(folder, model="trained", preferences=None)
    assert math.isnan(reward.fit())
    assert len(set(scores(reward))) > 8 and not (folder / "home").exists()


def test_the_loader_gives_it_its_folders_and_calls_it_as_any_reward(folder):
    kwargs = {"model": str(warmstart.model_folder()), "preferences": "pairs.jsonl", "lora_r": 0, "device": "cpu"}
    use = "fedpact.rewards.reward_model:RewardModel"
    loaded = load_reward(use, kwargs, where=WHERE, folder=folder, home=folder / "private")
    loaded.function.fit()
    row = rows()[0]
    prompts = Prompts([row["prompt"]] * 2, torch.zeros(2, dtype=torch.long), {"answer": ["1", "1"]})
    values = RewardSet({"helpful": loaded}).measure(
        prompts, [row[name][0]["content"] for name in ("chosen", "rejected")]
    )
    assert values.shape == (1, 2) and values.isfinite().all() and values[0, 0] != values[0, 1]
    assert (folder / "private" / "reward-model" / "reward_model.json").is_file()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"learning_rate": -1.0}, "learning_rate: found -1.0; Input should be greater than 0"),
        ({"num_train_epochs": 0}, "num_train_epochs: found 0"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size: found 2.5"),
        ({"heldout_share": 1.0}, "heldout_share: found 1.0; expected at least 0 and below 1"),
        ({"lora_r": -1}, "lora_r -1"),
        ({"dtype": "int8"}, "dtype: found 'int8'"),
        ({"name": "../elsewhere"}, "name: found '../elsewhere'; expected a plain folder name"),
        ({"name": ".."}, "name: found '..'"),
    ],
)
def test_a_setting_that_cannot_be_is_named_in_one_line(folder, settings, expected):
    with pytest.raises(ConfigError) as caught:
        judge(folder, **settings)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"model": "./absent"}, {"model": "."}, {"preferences": "absent.jsonl"}])
def test_a_model_or_a_file_that_is_not_there_is_named_in_one_line(folder, settings):
    with pytest.raises(FedPactError, match=r"^reward model 'reward-model': [^\n]*$"):
        judge(folder, **settings).fit()
