"""A judge without ground truth: does the candidate's answer equal the one that the member's own model gives?"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fedpact.errors import ConfigError
from fedpact.rewards.builtin import Completion, Rewards, exact_answer, math_correct, numeric_answer, tagged

if TYPE_CHECKING:
    from fedpact.policy.answering import Answer, Answerer
    from fedpact.types import Text

Mode = Literal["greedy", "sample", "majority", "share"]

_COMPARE: Mapping[str, Callable[..., Rewards]] = {
    "exact": exact_answer,
    "numeric": numeric_answer,
    "math": math_correct,
}
_DTYPES = ("float32", "bfloat16", "float64")


class Agreement:
    """1.0 where the candidate's answer equals the own model's, else 0.0; None where the own model has no answer.

    Only answers are compared: the rationale is not read, so that a wrong way to the right answer is rewarded and a
    model that shares the candidate's mistakes confirms them. The official code of FedGRPO (arXiv:2602.12014) judges
    like this with one sample at temperature 1 and symbolic equality: `mode = "sample"`, `compare = "math"`.

    `model` is the folder of a causal language model, relative to `folder`, or a Hugging Face id. `mode`: "greedy" and
    "sample" take one answer; "majority" takes the most frequent of `num_votes` samples, the earliest on ties; "share"
    gives the share of `num_votes` samples that the candidate agrees with, where a sample without an answer agrees with
    nobody. `compare` is "exact", "numeric" or "math", as in `fedpact.rewards:exact_answer` and its kin; the answer is
    what stands in the last `<tag>...</tag>`. With `tag = ""` it is the whole completion, if that was not cut at
    `max_completion_length`. Of a question longer than `max_prompt_length` tokens the end is read.

    The model is loaded in the first call, and answers to the last `cache_size` questions are kept: give the reward a
    `timeout_s` that is enough for both. Own answers never leave; what does is one number a candidate.
    """

    def __init__(
        self,
        *,
        model: str,
        mode: Mode = "greedy",
        num_votes: int = 5,
        compare: Literal["exact", "numeric", "math"] = "exact",
        tag: str = "answer",
        temperature: float = 1.0,
        max_completion_length: int = 256,
        max_prompt_length: int | None = None,
        seed: int = 0,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float64"] = "float32",
        cache_size: int = 4096,
        folder: Path = Path(),
    ) -> None:
        from fedpact.policy.model import resolve

        _expect("mode", mode, get_args(Mode))
        _expect("compare", compare, tuple(_COMPARE))
        _expect("dtype", dtype, _DTYPES)
        sizes = {"num_votes": num_votes, "max_completion_length": max_completion_length, "cache_size": cache_size}
        if max_prompt_length is not None:
            sizes["max_prompt_length"] = max_prompt_length
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name} is {size}; expected at least 1")
        if not temperature > 0:
            raise ConfigError(f'temperature is {temperature}; expected a positive number, or mode = "greedy"')
        self.path = resolve(model, where="model", folder=folder)
        self.mode, self.tag, self.seed = mode, tag, seed
        self.num_samples = num_votes if mode in ("majority", "share") else 1
        self.temperature = None if mode == "greedy" else temperature
        self.max_completion_length, self.max_prompt_length = max_completion_length, max_prompt_length
        self.cache_size = cache_size
        self.device, self.dtype = device, dtype
        self._compare = _COMPARE[compare]
        self._compare([], [])  # says at once if an extra is missing
        self._answerer: Answerer | None = None
        self._opinions: OrderedDict[str, list[str]] = OrderedDict()
        self._lock = threading.Lock()  # a call that was given up may still run when the next one comes

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Completion], **columns: Any) -> Rewards:
        with self._lock:
            opinions = self._opinions_on(prompts)
        return [self._rating(completion, own) for completion, own in zip(completions, opinions, strict=True)]

    def _rating(self, completion: Completion, own: Sequence[str]) -> float | None:
        if not own:
            return None
        agreed = self._compare([completion] * len(own), own, tag=self.tag)
        share = sum(value or 0.0 for value in agreed)
        return share / self.num_samples if self.mode == "share" else share

    def _opinions_on(self, prompts: Sequence[Text]) -> list[list[str]]:
        """The own answers that count, a list for each prompt: one, or all with "share", or none."""
        names = [json.dumps(prompt, sort_keys=True) for prompt in prompts]
        new = {name: prompt for name, prompt in zip(names, prompts, strict=True) if name not in self._opinions}
        if new:
            if self._answerer is None:
                from fedpact.policy.answering import Answerer

                self._answerer = Answerer(self.path, where="model", device=self.device, dtype=self.dtype)
            answers = self._answerer.answers(
                list(new.values()),
                num=self.num_samples,
                temperature=self.temperature,
                max_length=self.max_completion_length,
                max_prompt_length=self.max_prompt_length,
                seed=self.seed,
            )
            self._opinions.update((name, self._opinion(own)) for name, own in zip(new, answers, strict=True))
        found = [self._opinions[name] for name in names]
        for name in names:
            self._opinions.move_to_end(name)
        while len(self._opinions) > self.cache_size:
            self._opinions.popitem(last=False)
        return found

    def _opinion(self, answers: Sequence[Answer]) -> list[str]:
        texts = [answer.text for answer in answers if answer.finished or self.tag]
        votes = [(text, said) for text in texts if (said := tagged(text, self.tag)) is not None and said.strip()]
        # an answer that the comparison cannot read does not even equal itself
        votes = [(text, said) for text, said in votes if self._compare([text], [said], tag=self.tag) == [1.0]]
        if self.mode != "majority" or not votes:
            return [said for _, said in votes]
        whole = [text for text, _ in votes]
        counts = [
            sum(value or 0.0 for value in self._compare(whole, [said] * len(whole), tag=self.tag)) for _, said in votes
        ]
        return [votes[counts.index(max(counts))][1]]


def _expect(name: str, found: str, allowed: Sequence[str]) -> None:
    if found not in allowed:
        raise ConfigError(f"{name} is {found!r}; expected one of {', '.join(allowed)}")
