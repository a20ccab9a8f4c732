"""A curious server: which of these prompts did a member train on? Asked of one reply, with public knowledge alone.

The server has the base model, the adapter that it sent, the reply and the contract. The contract's seed keys the
sampling, so that for a guessed prompt at a guessed place of the batch the server draws the very completions that the
member drew. Their gradients are then known; unknown are the advantages, as rewards never leave. It solves for them:
`guess.presence`. Only the first local step's batch is asked for: there the server knows the adapter exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedpact.audit.guess import area_under_curve, centred, precision_at, presence, shortened, token_scores
from fedpact.audit.trial import Heard
from fedpact.core.compress import hashed_sketch
from fedpact.core.lora import flatten
from fedpact.core.losses import GroupLoss
from fedpact.messages import Differentiate, Differentiated, Train, Trained
from fedpact.policy.lora_policy import LoraPolicy
from fedpact.policy.prompts import encoded_prompts
from fedpact.runtime.contract import Contract
from fedpact.runtime.learner import Learner
from fedpact.runtime.member import Member
from fedpact.seeding import key, permutation
from fedpact.types import Adapter, Prompts

MOST_GRADIENTS = 2048
"""Of all hypotheses together: what one regression holds."""
_RIDGE = {"sgd": 1e-2, "adamw": 1e-1}
"""Adam's first step keeps hardly more than the signs of a gradient: noise, to the regression."""


@dataclass(frozen=True, slots=True)
class Guess:
    """How well one reply gives its prompts away."""

    auc: float
    """Member prompts against as many that it did not train on."""
    precision: float
    """Of the k prompts with the highest scores, where k were trained on; chance is 1/2."""
    tokens: float | None
    """The same area for tokens that stand in the batch against all others of the vocabulary; None: not to be told."""


def guessed(heard: Heard, member: Member, contract: Contract, *, seeded: bool = True) -> Guess | None:
    """What the server learns from a `Trained` or `Differentiated`; None if the reply says nothing that it can use.

    `seeded` False: as if the sampling were keyed by a secret of the member, the server draws completions of its own.
    """
    request = heard.envelope.open()
    assert isinstance(request, (Train, Differentiate)) and member.model is not None
    public = contract.model_copy(update={"private": None})
    policy = member.engines.policy(member.model, member.config.model, public, where=member.where)
    if {n: tuple(request.adapter[n].shape) for n in policy.bank.shapes if n in request.adapter} != policy.bank.shapes:
        return None  # of another rank
    shared = {name: request.adapter[name] for name in policy.bank.shapes}
    changes = list(_changes(heard.reply, shared))
    if not any(bool(change.abs().sum() > 0) for change in changes):
        return None
    trained = _first_batch(heard, member, contract)
    candidates, size = _candidates(trained, member, contract)
    if size == 0:
        return None  # nothing to compare with
    sketches = isinstance(request, Differentiate)
    ridge = _RIDGE["sgd" if sketches else contract.optimizer.name]

    def seen(rows: Tensor) -> Tensor:
        return (
            hashed_sketch(rows, request.rank, request.seed) if isinstance(request, Differentiate) else shortened(rows)
        )

    atoms = _gradients(policy, heard, contract, shared, candidates, seen, seeded=seeded)  # [c, b, g, d]
    changes = changes if sketches else list(seen(torch.stack(changes)))
    if contract.loss.surrogate == "grpo":
        atoms = centred(atoms)
    scores = torch.stack([presence(atoms, change, ridge=ridge) for change in changes]).sum(0)
    tokens = _tokens(policy, heard.reply, shared, trained) if isinstance(heard.reply, Trained) else None
    own, others = scores[:size], scores[size:]
    return Guess(area_under_curve(own, others), precision_at(own, others, size), tokens)


def _changes(reply: Any, sent: Adapter) -> Iterator[Tensor]:
    """What to explain: the step against the gradient, or the sketch of every objective's gradient."""
    if isinstance(reply, Trained):
        yield -flatten({name: reply.adapter.get(name, tensor) - tensor for name, tensor in sent.items()})
    elif isinstance(reply, Differentiated):
        for row in reply.sketch:
            if row.numel() and not bool(row.isnan().any()):
                yield row


def _first_batch(heard: Heard, member: Member, contract: Contract) -> Prompts:
    """The truth: the prompts of the member's first local step."""
    learner = Learner(
        contract=contract,
        rewards={},
        audits=frozenset(),
        train_prompts=member.train_prompts,
        policy=_no_policy,
        memory={},
        walk=(heard.envelope.round, heard.envelope.exchange, heard.who),
    )
    return learner.prompts(0)


def _no_policy() -> LoraPolicy:
    raise AssertionError("the truth needs no model")


def _candidates(trained: Prompts, member: Member, contract: Contract) -> tuple[Prompts, int]:
    """k prompts of the batch, then k of the member's held-out ones, which it never trains on; and k."""
    each = contract.training.prompts_per_step * contract.rollout.num_generations
    texts = [str(text) for text in trained.text]
    unlike = [row for row, text in enumerate(member.heldout.text) if str(text) not in texts]
    size = min(len(trained), len(unlike), max(1, MOST_GRADIENTS // (2 * each)))
    rows = [unlike[i] for i in permutation(len(unlike), contract.seed, member.config.name, "decoys")[:size]]
    both = [*trained.text[:size], *(member.heldout.text[row] for row in rows)]
    return Prompts(text=both, ids=torch.arange(len(both)), columns={}), size


def _gradients(
    policy: LoraPolicy,
    heard: Heard,
    contract: Contract,
    sent: Adapter,
    candidates: Prompts,
    seen: Callable[[Tensor], Tensor],
    *,
    seeded: bool,
) -> Tensor:
    """What is seen of every completion's gradient, sampled as the member would have: [c, places, g, d]."""
    envelope, where = heard.envelope, heard.envelope.round
    seed = contract.seed if seeded else key(contract.seed, "the server's own samples")
    places, group = contract.training.prompts_per_step if seeded else 1, contract.rollout.num_generations
    policy.begin(seed, where, envelope.exchange, heard.who, factor=contract.training.factor(where))
    policy.load(sent)
    loss = GroupLoss("grpo", max_completion_length=contract.rollout.max_completion_length)
    found: dict[tuple[int, int], Tensor] = {}
    for rows in torch.split(torch.arange(len(candidates)), places):
        for turn in range(len(rows)):  # every candidate once at every place: the place keys its draws
            order = [int(rows[(i + turn) % len(rows)]) for i in range(places)]
            rollout = policy.generate(candidates.select(order), draw=0)
            alone = torch.eye(len(rollout.completions))  # an objective for each completion
            jacobian = policy.gradients(rollout, alone, loss=loss)
            short = seen(jacobian.rows).cpu().view(places, group, -1)
            found |= {(candidate, place): short[place] for place, candidate in enumerate(order)}
    return torch.stack([torch.stack([found[c, b] for b in range(places)]) for c in range(len(candidates))])


@torch.no_grad()
def _tokens(policy: LoraPolicy, reply: Trained, sent: Adapter, trained: Prompts) -> float | None:
    """How well the first layer's B tells the tokens of the batch's prompts from the others; None: no such layer.

    The inputs of the first block's q, k and v depend on nothing but the token, where positions come later (RoPE).
    """
    names = [n for n in policy.bank.modules if ".0." in n and n.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")]
    names = [n for n in names if f"base_model.model.{n}.lora_B.weight" in reply.adapter]
    if not names:
        return None
    model: Any = policy.base.model
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    scales = {name: sent[f"base_model.model.{name}.lora_A.weight"] for name in names}
    hooks = [
        policy.bank.modules[name].register_forward_pre_hook(
            lambda _, given, name=name: inputs[name].append(given[0][:, 0].float().cpu() @ scales[name].mT)
        )
        for name in names
    ]
    vocabulary = torch.arange(model.get_input_embeddings().weight.shape[0], device=policy.device)
    try:
        with policy.bank.disabled():
            for ids in torch.split(vocabulary[:, None], 2048):
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    total = torch.zeros(len(vocabulary), dtype=torch.float64)
    for name in names:
        b = f"base_model.model.{name}.lora_B.weight"
        total += token_scores(reply.adapter[b] - sent[b], torch.cat(inputs[name]))
    limit = policy.rollout_settings.max_prompt_length
    ids, mask = encoded_prompts(policy.base.tokenizer, trained.text, limit=limit, pad_id=policy.base.pad_id)
    present = torch.zeros(len(vocabulary), dtype=torch.bool)
    present[ids[mask]] = True
    if bool(present.all()):
        return None
    return area_under_curve(total[present], total[~present])
