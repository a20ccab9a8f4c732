"""A fused decoder for models of the Llama layout: Llama, Mistral, Qwen 2, Qwen 3.

The adapter is merged into a scratch copy of the weights (in bfloat16 it is kept beside them), q, k and v are one
product, gate and up another, and attention reads only the live part of a preallocated cache. Log-probs equal the
model's own up to rounding; the policy checks that in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpact.policy.bank import Bank, LoraLinear

_ARCHITECTURES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_STATIC_ROPE = {"default", "linear", "llama3", "yarn"}


def supports(model: nn.Module) -> bool:
    """Whether `LlamaDecoder` computes what this model computes."""
    config: Any = model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    linears = (module.base if isinstance(module, LoraLinear) else module for module in model.modules())
    return (
        type(model).__name__ in _ARCHITECTURES
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in _STATIC_ROPE
        and not (getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None))
        and all(type(linear) is nn.Linear for linear in linears if hasattr(linear, "in_features"))
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Linear:
    """Some linear layers that read the same input, as one; `low_rank` is what could not be merged into `weight`."""

    weight: Tensor
    bias: Tensor | None
    low_rank: tuple[tuple[Tensor, Tensor, slice], ...] = ()  # A [r, d_in], scaled B [d_out, r], where it is added

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        for a, b, place in self.low_rank:
            y[..., place] += F.linear(F.linear(x.to(a.dtype), a), b).to(y.dtype)
        return y


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    qkv: _Linear
    o: _Linear
    gate_up: _Linear
    down: _Linear
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


class LlamaDecoder:
    """See the module. The scratch weights are rebuilt when the bank's adapter (or its being on) has changed."""

    def __init__(self, model: Any, bank: Bank) -> None:
        self.model, self.bank = model, bank
        config = model.config
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        self.eps = float(config.rms_norm_eps)
        self.layers: list[_Layer] = []
        self.merged: tuple[int, bool] | None = None
        self.keys: list[Tensor] = []  # per layer [rows, kv_heads, s + room, head_dim]
        self.values: list[Tensor] = []
        self.length = 0
        self.lengths = torch.zeros(0)  # [rows], tokens read without padding
        self.padding: Tensor | None = None  # [rows, s + room] bool, True: attend; None: nothing is padded
        self.rope: tuple[Tensor, Tensor] = (torch.zeros(0), torch.zeros(0))

    def prefill(self, prompt_ids: Tensor, prompt_mask: Tensor, room: int) -> Tensor:
        self._merge()
        rows, s = prompt_ids.shape
        decoder = self.model.model
        x: Tensor = decoder.embed_tokens(prompt_ids)
        self.lengths = prompt_mask.sum(-1)
        whole = bool(prompt_mask.all())
        self.padding = None if whole else F.pad(prompt_mask, (0, room), value=True)
        table = torch.arange(s + room, device=x.device)[None]
        cos, sin = decoder.rotary_emb(x, table)
        self.rope = cos[0], sin[0]  # [s + room, head_dim]
        shape = (rows, self.kv_heads, s + room, self.head_dim)
        self.keys = [x.new_empty(shape) for _ in self.layers]
        self.values = [x.new_empty(shape) for _ in self.layers]
        self.length = s
        positions = (prompt_mask.long().cumsum(-1) - 1).clamp(min=0)
        causal = torch.ones(s, s, dtype=torch.bool, device=x.device).tril()
        attend = causal[None, None]
        if not whole:
            # a padded row attends to itself, so that no softmax is empty; nothing reads its result
            own = torch.eye(s, dtype=torch.bool, device=x.device)
            attend = (causal & prompt_mask[:, None, :] | own)[:, None]
        return self._forward(x, positions, slice(0, s), attend)

    def keep(self, rows: Tensor) -> None:
        self.lengths = self.lengths[rows]
        self.padding = None if self.padding is None else self.padding[rows]
        live = self.length
        for cache in (self.keys, self.values):
            for i, old in enumerate(cache):
                new = old.new_empty(len(rows), *old.shape[1:])
                new[:, :, :live] = old[:, :, :live].index_select(0, rows)
                cache[i] = new

    def step(self, token_ids: Tensor) -> Tensor:
        decoder = self.model.model
        place = slice(self.length, self.length + 1)
        self.length += 1
        attend = None if self.padding is None else self.padding[:, None, None, : self.length]
        positions = self.lengths[:, None]
        self.lengths = self.lengths + 1
        return self._forward(decoder.embed_tokens(token_ids[:, None]), positions, place, attend)

    def _forward(self, x: Tensor, positions: Tensor, place: slice, attend: Tensor | None) -> Tensor:
        rows, q_len, _ = x.shape
        cos, sin = self.rope[0][positions][:, None], self.rope[1][positions][:, None]  # [rows, 1, q, head_dim]
        split = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            h = F.rms_norm(x, x.shape[-1:], layer.input_norm, self.eps)
            q, k, v = (
                part.view(rows, q_len, -1, self.head_dim).transpose(1, 2)
                for part in torch.split(layer.qkv(h), split, dim=-1)
            )
            if layer.q_norm is not None and layer.k_norm is not None:
                q = F.rms_norm(q, q.shape[-1:], layer.q_norm, self.eps)
                k = F.rms_norm(k, k.shape[-1:], layer.k_norm, self.eps)
            keys[:, :, place] = k * cos + _rotate_half(k) * sin
            values[:, :, place] = v
            q = q * cos + _rotate_half(q) * sin
            # with one new token a row, query heads become rows of their key head's attention: no key is repeated
            group = self.heads // self.kv_heads if q_len == 1 else 1
            attended = F.scaled_dot_product_attention(
                q.reshape(rows, self.kv_heads, group, self.head_dim) if group > 1 else q,
                keys[:, :, : place.stop],
                values[:, :, : place.stop],
                attn_mask=attend,
                enable_gqa=group == 1 and self.heads != self.kv_heads,
            ).reshape(rows, self.heads, q_len, self.head_dim)
            x = x + layer.o(attended.transpose(1, 2).reshape(rows, q_len, -1))
            h = F.rms_norm(x, x.shape[-1:], layer.post_norm, self.eps)
            gate, up = layer.gate_up(h).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        decoder = self.model.model
        last = F.rms_norm(x[:, -1], x.shape[-1:], decoder.norm.weight, self.eps)
        logits: Tensor = self.model.lm_head(last)
        return logits

    def _merge(self) -> None:
        state = (self.bank.version, self.bank.enabled)
        if self.merged == state:
            return
        decoder = self.model.model
        self.layers = []  # frees the old copy first
        for block in decoder.layers:
            attention, mlp = block.self_attn, block.mlp
            self.layers.append(
                _Layer(
                    _fused(attention.q_proj, attention.k_proj, attention.v_proj),
                    _fused(attention.o_proj),
                    _fused(mlp.gate_proj, mlp.up_proj),
                    _fused(mlp.down_proj),
                    block.input_layernorm.weight,
                    block.post_attention_layernorm.weight,
                    getattr(getattr(attention, "q_norm", None), "weight", None),
                    getattr(getattr(attention, "k_norm", None), "weight", None),
                )
            )
        self.merged = state


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _fused(*linears: Any) -> _Linear:
    """The stacked layers, adapters included: merged in full precision, where nothing is rounded away, else beside."""
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    low_rank: list[tuple[Tensor, Tensor, slice]] = []
    start = 0
    for linear in linears:
        base: Any = linear.base if isinstance(linear, LoraLinear) else linear
        weight: Tensor = base.weight
        stop = start + weight.shape[0]
        if isinstance(linear, LoraLinear) and linear.bank.enabled:
            a, b = linear.a[0], linear.b[0] * linear.scale[0]
            if weight.dtype == a.dtype:
                weight = weight + b @ a
            else:
                low_rank.append((a, b, slice(start, stop)))
        weights.append(weight)
        if base.bias is not None:
            biases.append(base.bias)
        start = stop
    bias = torch.cat(biases) if biases else None
    return _Linear(torch.cat(weights) if len(weights) > 1 else weights[0], bias, tuple(low_rank))
