"""Keys and tokens are masked by their shape, and by the name that the environment keeps them under."""

from __future__ import annotations

import base64
import json

import pytest

from fedpact.secrets import masked

JWT = ".".join(
    base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in ('{"alg":"HS256"}', '{"sub":"1"}', "sign")
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("token hf_AbCdEfGhIjKlMnOpQrSt ends", "token *** ends"),
        ("key=sk-proj-abc_DEF-1234567890", "key=***"),
        ("AKIAIOSFODNN7EXAMPLE.", "***."),
        (f"jwt {JWT}, and more", "jwt ***, and more"),
        ("https://north:pa55@judge.example/v1", "https://***@judge.example/v1"),
        ("postgres://u:p@ss@host/db", "postgres://***@host/db"),
        ("https://token@host", "https://***@host"),
        ("Authorization: Bearer abcdefgh12345", "Authorization: Bearer ***"),
        ("two: hf_AbCdEfGhIjKl and sk-1234567890abc", "two: *** and ***"),
    ],
)
def test_a_secret_is_known_by_its_shape(text, expected):
    assert masked(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a task-oriented risk-averse member",
        "hf_home and sk-learn",
        "https://judge.example/v1/chat@completions",
        "mail somebody@example.org",
        "rounds/0007/adapter_model.safetensors",
        "adapter of 1,081,344 parameters; contract c0ffeec0ffee",
    ],
)
def test_what_is_no_secret_stays(text):
    assert masked(text) == text


@pytest.mark.parametrize("name", ["HF_TOKEN", "judge_secret", "OPENAI_API_KEY", "DB_PASSWORD", "MY_PASSPHRASE"])
def test_what_the_environment_keeps_as_a_secret_is_masked_anywhere(monkeypatch, name):
    monkeypatch.setenv(name, "correct horse")
    assert masked("the judge said: correct horse!") == "the judge said: ***!"


def test_a_short_value_and_another_name_are_no_secrets(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "short12")
    monkeypatch.setenv("GREETING", "good morning")
    assert masked("short12, good morning") == "short12, good morning"


def test_a_secret_within_another_leaves_nothing_of_the_longer_one(monkeypatch):
    monkeypatch.setenv("A_KEY", "abcdefgh")
    monkeypatch.setenv("B_KEY", "xx-abcdefgh-yy")
    assert masked("xx-abcdefgh-yy abcdefgh") == "*** ***"


@pytest.mark.parametrize("value", ['quote" and \\ back', "größe/mit?zeichen", "line one is long\nline two is long"])
@pytest.mark.parametrize("write", [str, repr, json.dumps, lambda text: " ".join(text.split())])
def test_a_secret_is_known_however_it_was_written(monkeypatch, value, write):
    monkeypatch.setenv("SITE_SECRET", value)
    found = masked(f"failed: {write(value)} ")
    assert found.strip("\"' ") in ("failed: ***", "failed: '***", 'failed: "***', "failed: ***\n***")


def test_an_empty_secret_masks_nothing(monkeypatch):
    monkeypatch.setenv("EMPTY_TOKEN", "")
    monkeypatch.setenv("BLANK_TOKEN", " " * 12)
    assert masked("a " + " " * 20 + "b") == "a " + " " * 20 + "b"
