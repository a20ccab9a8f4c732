"""What places questions near each other: frozen, whatever is trained, and blind to padding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModel, BertConfig, BertModel

from fedpact.errors import ConfigError
from fedpact.policy.encoders import FolderEncoder, encoder
from fedpact.policy.lora_policy import LoraPolicy
from fedpact.types import Prompts
from tests.conftest import VOCABULARY, tokenizer
from tests.policy.helpers import make_policy

SHORT, LONG = "w1 w2", "w3 w4 w5 w6 w7 w8 w9 w10 w11"


def prompts(*texts: object) -> Prompts:
    return Prompts(text=texts, ids=torch.arange(len(texts)), columns={})


def no_policy() -> LoraPolicy:
    raise AssertionError("this encoder needs no policy")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=["policy llama", "policy gpt2", "policy qwen3", "tokens", "bert", "llama folder"])
def embed(
    request: pytest.FixtureRequest, model_folders: dict[str, Path], bert: Path
) -> Callable[[Prompts], torch.Tensor]:
    """Each encoder in turn."""
    kind, _, architecture = request.param.partition(" ")
    corpus = prompts(SHORT, LONG, "w1 w20")
    if kind == "policy":
        policy = make_policy(model_folders[architecture])
        found = encoder("policy", corpus, folder=Path(), where="")
        return lambda texts: found(texts, lambda: policy)
    name = {"tokens": "tokens", "bert": str(bert), "llama": str(model_folders["llama"])}[kind]
    found = encoder(name, corpus, folder=Path(), where="run.toml: server.encoder")
    return lambda texts: found(texts, no_policy)


def test_rows_have_length_one_and_equal_texts_have_cosine_one(embed):
    rows = embed(prompts(SHORT, LONG, SHORT, "w1 w20"))
    assert rows.dtype == torch.float32
    assert_close(rows.norm(dim=1), torch.ones(4))
    cosines = rows @ rows.mT
    assert cosines[0, 2] == pytest.approx(1, abs=1e-5)
    assert cosines[0, 1] < 0.999
    assert cosines[0, 3] < 0.999


def test_padding_does_not_matter(embed):
    together = embed(prompts(SHORT, LONG))
    assert_close(embed(prompts(SHORT))[0], together[0], atol=1e-5, rtol=0)
    assert_close(embed(prompts(LONG))[0], together[1], atol=1e-5, rtol=0)


def test_the_same_questions_get_the_same_bits(embed):
    assert torch.equal(embed(prompts(SHORT, LONG)), embed(prompts(SHORT, LONG)))


def test_an_encoder_that_is_the_policy_ignores_the_adapter_and_training(model_folders):
    policy = make_policy(model_folders["llama"])
    found = encoder("policy", prompts(SHORT), folder=Path(), where="")
    before = found(prompts(SHORT, LONG), lambda: policy)
    trained = {name: torch.full_like(tensor, 0.5) for name, tensor in policy.adapter().items()}
    policy.load(trained)
    rollout = policy.generate(prompts(SHORT), draw=0, num_generations=2)
    policy.step(policy.gradients(rollout, torch.tensor([[1.0, -1.0]])).combine(torch.ones(1)))
    moved = policy.adapter()
    assert any(not torch.equal(moved[name], trained[name]) for name in moved)
    assert torch.equal(found(prompts(SHORT, LONG), lambda: policy), before)
    assert all(torch.equal(tensor, moved[name]) for name, tensor in policy.adapter().items())  # and leaves it alone


def test_rare_words_weigh_more_than_common_ones():
    corpus = prompts(*[f"common word{i}" for i in range(20)])
    rows = encoder("tokens", corpus, folder=Path(), where="")(prompts("common word1", "common", "word1"), no_policy)
    assert rows[0] @ rows[2] > 0.9 > 0.4 > rows[0] @ rows[1]


def test_tokens_are_words_and_marks_of_any_case_and_a_chat_counts_as_its_messages():
    chat = [{"role": "system", "content": "Add up."}, {"role": "user", "content": "1+2?"}]
    rows = encoder("tokens", prompts("1+2?"), folder=Path(), where="")(
        prompts(chat, "ADD UP .  1 + 2 ?", "1+2?", ""), no_policy
    )
    assert rows[0] @ rows[1] == pytest.approx(1, abs=1e-6)
    assert rows[0] @ rows[2] < 1
    assert rows[3].norm() == 0  # nothing in it, and no NaN either


def test_a_folder_encoder_is_the_mean_of_the_last_states_or_the_first_token_where_its_files_say_so(bert, tmp_path):
    reference = AutoModel.from_pretrained(bert).eval()
    ids = tokenizer()(SHORT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = reference(input_ids=ids).last_hidden_state[0]
    mean = torch.nn.functional.normalize(states.mean(0), dim=0)
    first = torch.nn.functional.normalize(states[0], dim=0)
    embed = FolderEncoder(bert, where="")
    assert_close(embed(prompts(SHORT, LONG), no_policy)[0], mean, atol=1e-5, rtol=0)
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    embed = FolderEncoder(tmp_path, where="")
    assert_close(embed(prompts(SHORT, LONG), no_policy)[0], first, atol=1e-5, rtol=0)


def test_texts_longer_than_the_model_takes_are_cut(bert):
    embed = FolderEncoder(bert, where="")
    long = " ".join(["w5 w6"] * 100)
    cut = " ".join(["w5 w6"] * 16)
    rows = embed(prompts(long, cut), no_policy)
    assert_close(rows[0], rows[1])


def test_an_encoder_folder_is_relative_to_the_run_file(bert):
    found = encoder(bert.name, prompts(SHORT), folder=bert.parent, where="")
    assert found(prompts(SHORT), no_policy).shape == (1, 16)


@pytest.mark.parametrize("broken", ["empty", "no weights", "half a file", "other json"])
def test_a_folder_that_is_no_encoder_is_refused_in_one_line(bert, tmp_path, broken):
    if broken != "empty":
        for file in bert.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if broken == "no weights":
        (tmp_path / "model.safetensors").unlink()
    if broken == "half a file":
        (tmp_path / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes()[:500])
    if broken == "other json":
        (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ConfigError) as refused:
        encoder(str(tmp_path), prompts(SHORT), folder=Path(), where="run.toml: server.encoder")
    assert str(refused.value).startswith("run.toml: server.encoder: ")
    assert "\n" not in str(refused.value)


def test_a_pooling_file_that_is_not_understood_is_refused_in_one_line(bert, tmp_path):
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("not json")
    with pytest.raises(ConfigError, match=r"^here: .*1_Pooling"):
        FolderEncoder(tmp_path, where="here")
