"""Prefix-shared attention over a padding-free row, as an attention function of transformers' registry.

A prompt attends causally to itself. The run of a prompt's candidates meets the prompt's keys as one matrix product
(Hydragen, Juravsky et al. 2024, arXiv 2402.05099, section 3.1); a candidate's attention to itself runs on a padded view.
The two partial results are merged by their log-sum-exp. Grouped queries, sliding windows, soft-capping and sinks are
computed exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_rank.scoring.pack import Layout

NAME = "dpo_rank_prefix_shared"
QUERY_BLOCK = 1024
"""Prompt queries per block outside an exported graph: the score matrix is ``[heads, QUERY_BLOCK, keys]`` at most."""

_MASKED = -1e30  # finite: a row without any visible key must not become NaN, it is merged with weight 0


class CallCounter:
    """Counts the attention calls of one forward pass; the caller compares them with the model's layers."""

    def __init__(self) -> None:
        self.calls = 0


class _Partial(NamedTuple):
    """Attention over part of the keys: ``weighted / total`` is the output, ``top`` the scores' maximum it is relative to."""

    weighted: Tensor  # [batch, kv_heads, rep * queries, head_dim]
    top: Tensor  # [batch, kv_heads, rep * queries, 1]
    total: Tensor  # same


def register() -> None:
    """Make the attention known to transformers under `NAME`; repeated calls do nothing new."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, prefix_shared_attention)


def prefix_shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    layout: Layout[Tensor] | None = None,
    counter: CallCounter | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over the row that ``layout`` describes.

    Args:
        module: the model's attention module; unused.
        query: ``[1, heads, T, head_dim]``; ``key`` and ``value``: ``[1, kv_heads, T, head_dim]``.
        attention_mask: unused: masks come from the layout. (Some architectures build one of their own all the same.)
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sliding_window: a token sees itself and the ``sliding_window - 1`` tokens before it.
        s_aux: ``[heads]`` attention sinks: one more logit per head in the softmax's denominator.
        layout: tensors of `dpo_rank.scoring.pack.Layout`.
        counter: told of this call.

    Returns:
        ``([1, T, heads, head_dim], None)``.

    """
    if layout is None or counter is None:
        raise RuntimeError("the packed layout did not reach the attention: this architecture drops its keyword arguments")
    if dropout:
        raise RuntimeError("attention dropout is not supported on a packed row: set it to 0")
    counter.calls += 1
    heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[3]
    scale = dim**-0.5 if scaling is None else scaling
    attend = _Attend(heads // kv_heads, scale, softcap, sliding_window)
    # [T, kv_heads, rep, dim] and [T, kv_heads, dim]: gathers of whole tokens, then heads to the front where they are used.
    q = query[0].transpose(0, 1).reshape(-1, kv_heads, heads // kv_heads, dim)
    k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)
    num_prompt = layout.prompt_slot.shape[0]

    prompt_q, prompt_k, prompt_v = (x[layout.prompt_index] for x in (q, k, v))
    own = layout.own_index + num_prompt
    own_partial = attend.causal(q[own], k[own], v[own])
    run_q = q[layout.run_index + num_prompt]
    run_positions = layout.positions[layout.run_index + num_prompt]
    run_partial = attend.prefix(run_q, prompt_k, prompt_v, run_positions, layout.prompt_length)
    sinks = None if s_aux is None else s_aux.to(torch.float32).view(kv_heads, heads // kv_heads)

    prompt_out = attend.prompt(prompt_q, prompt_k, prompt_v, sinks).flatten(0, 1)[layout.prompt_slot]
    own_rows = [attend.rows(part).flatten(0, 1)[layout.own_slot] for part in own_partial]
    run_rows = [attend.rows(part).flatten(0, 1)[layout.run_slot] for part in run_partial]
    run_out = _normalise(_merge(_Partial(*own_rows), _Partial(*run_rows)), sinks)
    out = torch.cat([prompt_out, run_out]).to(query.dtype)  # [T, kv_heads, rep, dim]
    return out.flatten(1, 2)[None], None


class _Attend:
    """The attention products of one layer; queries are ``[batch, queries, kv_heads, rep, dim]``."""

    def __init__(self, rep: int, scale: float, softcap: float | None, window: int | None) -> None:
        self.rep, self.scale, self.softcap, self.window = rep, scale, softcap, window

    def causal(self, q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> _Partial:
        """Queries at places ``start...`` of a padded view, keys at places ``0...``; padding stands behind every real token."""
        query_at = torch.arange(q.shape[1], device=q.device)[:, None] + start
        key_at = torch.arange(k.shape[1], device=q.device)[None, :]
        visible = key_at <= query_at
        if self.window is not None:
            visible = visible & (key_at > query_at - self.window)
        return self._partial(q, k, v, visible[None])

    def prefix(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, lengths: Tensor) -> _Partial:
        """Candidate tokens at ``positions`` [batch, queries] over their prompt's keys, ``lengths`` [batch] of them real."""
        key_at = torch.arange(k.shape[1], device=q.device)[None, None, :]
        visible = key_at < lengths[:, None, None]
        if self.window is not None:
            visible = visible & (key_at > positions[:, :, None] - self.window)
        return self._partial(q, k, v, visible)

    def prompt(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        """Causal attention of the prompts to themselves, ``[batch, places, kv_heads, rep, dim]``, a block of queries at a time."""
        if torch.compiler.is_exporting() or q.shape[1] <= QUERY_BLOCK:
            return _normalise(_Partial(*(self.rows(part) for part in self.causal(q, k, v))), sinks)
        blocks = []
        for start in range(0, q.shape[1], QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, q.shape[1])
            partial = self.causal(q[:, start:end], k[:, :end], v[:, :end], start)
            blocks.append(_normalise(_Partial(*(self.rows(part) for part in partial)), sinks))
        return torch.cat(blocks, dim=1)

    def rows(self, part: Tensor) -> Tensor:
        """``[batch, kv_heads, rep * queries, d]`` -> ``[batch, queries, kv_heads, rep, d]``."""
        batch, heads, _, width = part.shape
        return part.view(batch, heads, self.rep, -1, width).permute(0, 3, 1, 2, 4)

    def _partial(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> _Partial:
        """``visible`` is ``[batch or 1, queries, keys]``."""
        q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [batch, kv_heads, rep * queries, dim]
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # [batch, kv_heads, keys, dim]
        scores = (q @ k.transpose(2, 3)).to(torch.float32) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        hidden = torch.where(visible, 0.0, _MASKED)[:, None, None]
        batch, heads, _, keys = scores.shape
        scores = (scores.view(batch, heads, self.rep, -1, keys) + hidden).flatten(2, 3)
        top = scores.amax(dim=-1, keepdim=True).detach()
        weights = torch.exp(scores - top)
        return _Partial((weights.to(v.dtype) @ v).to(torch.float32), top, weights.sum(dim=-1, keepdim=True))


def _merge(a: _Partial, b: _Partial) -> _Partial:
    """Two partial results over disjoint keys as one over both."""
    top = torch.maximum(a.top, b.top)
    a_weight, b_weight = torch.exp(a.top - top), torch.exp(b.top - top)
    return _Partial(a.weighted * a_weight + b.weighted * b_weight, top, a.total * a_weight + b.total * b_weight)


def _normalise(partial: _Partial, sinks: Tensor | None) -> Tensor:
    """``[..., kv_heads, rep, dim]``; ``sinks`` ``[kv_heads, rep]`` take part in the denominator only."""
    if sinks is None:
        return partial.weighted / partial.total
    logits = sinks[..., None]
    top = torch.maximum(partial.top, logits).detach()
    weight = torch.exp(partial.top - top)
    return partial.weighted * weight / (partial.total * weight + torch.exp(logits - top))
