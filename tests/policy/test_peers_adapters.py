"""Files that others made: an adapter folder is read, never obeyed; a model folder's own code is not run."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedpact.core.lora import LoraLayer, initial_adapter
from fedpact.errors import ConfigError, StoreError
from fedpact.policy.model import load_model, model_hash, read_peft_adapter, skeleton_layers
from fedpact.runtime.files import tensors_in
from fedpact.settings import LoraSettings

LAYERS = [LoraLayer("q_proj", 4, 6, r=2, scale=2.0), LoraLayer("v_proj", 4, 4, r=2, scale=2.0)]
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(PLAIN))
    save_file(initial_adapter(LAYERS, 3), path / "adapter_model.safetensors")
    return path


def read(folder: Path) -> dict[str, torch.Tensor]:
    return read_peft_adapter(folder, LAYERS, where="run.toml: policy.adapter")


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder)
    line = str(caught.value)
    assert line.startswith("run.toml: policy.adapter: ") and line.isprintable() and len(line) < 600
    return line


def configured(folder: Path, **changes: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | changes))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model_name_or_path": "evil/model"},
        {"base_model_name_or_path": "../../etc", "revision": "refs/pr/1"},
        {"base_model_name_or_path": {"a": 1}},
        {"revision": ["main"]},
        {"target_modules": 7},
        {"target_modules": ["../../x", "__class__", "\x00"]},
        {"target_modules": ".*"},
        {"peft_version": "999", "unknown": {"eval": "1"}},
        {"trust_remote_code": True},
        {"megatron_core": "os"},
    ],
)
def test_what_a_peers_configuration_says_beyond_rank_and_scale_changes_nothing(folder, monkeypatch, changes):
    monkeypatch.setattr("huggingface_hub.snapshot_download", forbidden)
    monkeypatch.setattr("importlib.import_module", forbidden)
    expected = load_file(folder / "adapter_model.safetensors")
    found = read(configured(folder, **changes))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def forbidden(*arguments: Any, **settings: Any) -> None:
    raise AssertionError(f"a peer's configuration had its way: {arguments}")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"auto_mapping": {"base_model_class": "Evil", "parent_library": "os"}}, "uses ['auto_mapping']"),
        ({"modules_to_save": ["lm_head"]}, "uses ['modules_to_save']"),
        ({"modules_to_save": "all"}, "uses ['modules_to_save']"),
        ({"target_parameters": ["x"]}, "uses ['target_parameters']"),
        ({"lora_bias": True}, "uses ['lora_bias']"),
        ({"peft_type": "IA3"}, "another PEFT method"),
        ({"peft_type": ["LORA"]}, "another PEFT method"),
        ({"r": 10**400}, "is no PEFT adapter folder"),
        ({"r": -2}, "has rank and scale"),
        ({"r": [2]}, "is no PEFT adapter folder"),
        ({"r": float("inf")}, "is no PEFT adapter folder"),
        ({"lora_alpha": float("nan")}, "has rank and scale"),
        ({"lora_alpha": 10**400}, "is no PEFT adapter folder"),
        ({"lora_alpha": "4; import os"}, "is no PEFT adapter folder"),
        ({"r": "\x1b[31m\u202e"}, "is no PEFT adapter folder"),
    ],
)
def test_a_crafted_configuration_is_refused_in_one_line(folder, changes, expected):
    assert expected in refusal(configured(folder, **changes))


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '{"r": 2', "null", "7", " " * 1_000_001, "\x00"])
def test_a_configuration_that_is_none_is_refused_in_one_line(folder, text):
    (folder / "adapter_config.json").write_text(text)
    assert "is no PEFT adapter folder" in refusal(folder)


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pkl"])
def test_a_pickle_is_refused_by_its_name(folder, tmp_path, name):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"q_proj": Bomb(tmp_path / "ran")}, folder / name)
    assert f"{name} is a pickle" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_the_safetensors_is_never_opened(folder, tmp_path):
    torch.save({"q_proj": Bomb(tmp_path / "ran")}, folder / "adapter_model.bin")
    assert len(read(folder)) == 4
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, None])
def test_a_pickle_under_another_name_is_known_by_its_first_bytes(folder, tmp_path, protocol):
    path, bomb = folder / "adapter_model.safetensors", {"q_proj": Bomb(tmp_path / "ran")}
    if protocol is None:
        torch.save(bomb, path)
    else:
        path.write_bytes(pickle.dumps(bomb, protocol=protocol))
    assert "is a pickle under another name" in refusal(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_as_long_as_a_pickle_begins_is_none(folder, length):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    plain = len(path.read_bytes()) - sum(t.numel() * t.element_size() for t in tensors.values()) - 8
    save_file(tensors, path, metadata={"x": "y" * (length - plain - 28)})
    assert path.read_bytes()[:2] == length.to_bytes(2, "little")
    assert read(folder).keys() == tensors.keys()


def test_no_mutation_of_the_tensors_gets_past_in_more_than_one_line(folder):
    path = folder / "adapter_model.safetensors"
    sound, chance = path.read_bytes(), random.Random(5)
    loaded = refused = 0
    for _ in range(200):
        data = bytearray(sound)
        for _ in range(chance.choice((1, 1, 4, 40))):
            data[chance.randrange(len(data) if chance.random() < 0.3 else 400)] = chance.randrange(256)
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            assert all(bool(tensor.isfinite().all()) for tensor in read(folder).values())
            loaded += 1
        except ConfigError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 600
        try:
            tensors_in(bytes(data), path)
        except StoreError as error:
            assert "not a safetensors file" in str(error)
    assert refused > 100 and loaded > 0  # a changed number is no error of the format: digests are there for that


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_tensors_that_are_no_usual_floats_are_refused(folder, dtype):
    tensors = {name: torch.zeros(tensor.shape).to(dtype) for name, tensor in initial_adapter(LAYERS, 3).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    assert "expected floats of 16 bits or more" in refusal(folder)


def test_a_file_much_longer_than_the_adapter_is_not_read(folder):
    with (folder / "adapter_model.safetensors").open("ab") as stream:
        stream.truncate(10_000_000_000)
    began = time.monotonic()
    assert "10,000,000,000 bytes" in refusal(folder)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    assert f"{name} leads out of the folder" in refusal(folder)


def test_a_link_within_the_folder_is_followed(folder):
    (folder / "adapter_config.json").rename(folder / "config")
    (folder / "adapter_config.json").symlink_to("config")
    assert len(read(folder)) == 4


@pytest.mark.parametrize("kind", ["pipe", "loop", "folder"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(folder, kind):
    path = folder / "adapter_config.json"
    path.unlink()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path.name)
        case "folder":
            path.mkdir()
    assert "is no PEFT adapter folder" in refusal(folder)


# --- a model folder with Python files of its own ---------------------------------------------------------------------


@pytest.fixture
def model_with_code(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder whose config.json asks for a class in a file beside it, which writes a file when it is run."""
    path = shutil.copytree(model_folders["llama"], tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoTokenizer": ["own.T", None]}
    (path / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    (path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    return path


@pytest.mark.parametrize("way", ["whole", "skeleton"])
def test_a_models_own_code_is_neither_run_nor_asked_about(model_with_code, tmp_path, monkeypatch, way):
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "no")  # transformers would ask for 15 s
    began = time.monotonic()
    with pytest.raises((ConfigError, ValueError)) as caught:
        if way == "whole":
            load_model(model_with_code, where="north.toml")
        else:
            skeleton_layers(model_with_code, LoraSettings())
    assert asked == [] and str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert time.monotonic() - began < 5


def test_code_beside_a_model_is_part_of_its_hash(model_with_code):
    before = model_hash(model_with_code)
    (model_with_code / "own.py").write_text("pass\n")
    assert model_hash(model_with_code) != before


def test_a_model_name_that_is_too_long_or_none_is_one_line(model_folders):
    from fedpact.policy.model import resolve

    for name in ("a" * 5000, "a/" * 300, "x\0y", "../" * 2000, "\ud800", "\x1b[31m"):
        with pytest.raises(ConfigError) as caught:
            resolve(name, where="run.toml: policy.model", folder=model_folders["llama"])
        assert "\n" not in str(caught.value)
