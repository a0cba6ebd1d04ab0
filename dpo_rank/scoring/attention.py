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
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from dpo_rank.scoring.pack import Layout

NAME = "dpo_rank_prefix_shared"
QUERY_BLOCK = 1024
"""Prompt queries per block outside an exported graph: the score matrix is ``[heads, QUERY_BLOCK, keys]`` at most."""

OWN_BLOCKS, LONG_OWN = 2, 64
"""Candidates longer than `LONG_OWN` attend to themselves in so many blocks of queries, each over the keys that it can see."""

_MASKED = -1e30  # finite: a row without any visible key must not become NaN, it is merged with weight 0


class Pass:
    """What one forward pass carries through its attention calls.

    Attributes:
        layout: where everything lies in the row.
        past: keys and values ``[Q, layers, 2, kv_heads, head_dim]`` of tokens that were read before, or None.
        keep: places in the row whose keys and values are wanted, or None.
        calls: attention calls so far; the caller compares them with the model's layers.
        kept: ``[K, 2, kv_heads, head_dim]`` of every layer so far, where ``keep`` is given.
        handed_on: what the last layer gave that the pair shares.

    """

    def __init__(self, layout: Layout[Tensor], past: Tensor | None = None, keep: Tensor | None = None) -> None:
        self.layout, self.past, self.keep = layout, past, keep
        self.calls = 0
        self.kept: list[Tensor] = []
        self.handed_on: Any = None

    def above(self, shared: int, past: Tensor | None) -> Pass:
        """The pass of a model that takes its first ``shared`` layers from this one."""
        upper = Pass(self.layout, past, self.keep)
        upper.calls, upper.kept, upper.handed_on = shared, self.kept[:shared], self.handed_on
        return upper

    def keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The key space ``[past | row]`` of the next layer, from its row's ``[T, kv_heads, head_dim]``."""
        layer, self.calls = self.calls, self.calls + 1
        if self.keep is not None:
            self.kept.append(torch.stack([key.index_select(0, self.keep), value.index_select(0, self.keep)], dim=1))
        if self.past is None:
            return key, value
        past = self.past.select(1, layer).to(key.dtype)
        return torch.cat([past.select(1, 0), key]), torch.cat([past.select(1, 1), value])


class _Partial(NamedTuple):
    """Attention over part of the keys."""

    out: Tensor  # [..., dim]: the weighted mean of the values
    lse: Tensor  # [..., 1]: log-sum-exp of the scores, the part's weight


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
    packed: Pass | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over a packed row.

    Args:
        module: the model's attention module; unused.
        query: ``[1, heads, T, head_dim]``; ``key`` and ``value``: ``[1, kv_heads, T, head_dim]``.
        attention_mask: unused: masks come from the layout. (Some architectures build one of their own all the same.)
        scaling: of the scores; by default ``head_dim ** -0.5``.
        dropout: must be 0.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sliding_window: a token sees itself and the ``sliding_window - 1`` tokens before it.
        s_aux: ``[heads]`` attention sinks: one more logit per head in the softmax's denominator.
        packed: the forward pass.

    Returns:
        ``([1, T, heads, head_dim], None)``.

    """
    if packed is None:
        raise RuntimeError("the packed layout did not reach the attention: this architecture drops its keyword arguments")
    if dropout:
        raise RuntimeError("attention dropout is not supported on a packed row: set it to 0")
    layout = packed.layout
    heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[3]
    attend = _Attend(heads // kv_heads, softcap, sliding_window)
    # Tokens first: gathers of whole tokens, then heads to the front where they are used. [T, kv_heads, rep, dim], [T, kv_heads, dim]
    q, row_k, row_v = (states.transpose(1, 2).squeeze(0) for states in (query, key, value))
    q = (q * (dim**-0.5 if scaling is None else scaling)).reshape(-1, kv_heads, heads // kv_heads, dim)
    k, v = packed.keys_and_values(row_k, row_v)
    sinks = None if s_aux is None else s_aux.to(torch.float32).view(kv_heads, heads // kv_heads, 1)
    inputs = (attend, layout, q, k, v, row_k, row_v, sinks, packed.past is None)
    if torch.is_grad_enabled() and q.requires_grad:  # the scores of one layer at a time: they are computed anew in the backward pass
        out = checkpoint(_whole, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        out = _whole(*inputs)
    return out.to(query.dtype).flatten(1, 2)[None], None


def _whole(
    attend: _Attend,
    layout: Layout[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_k: Tensor,
    row_v: Tensor,
    sinks: Tensor | None,
    no_past: bool,
) -> Tensor:
    """``[T, kv_heads, rep, dim]``: prompts over themselves, candidates over their prompt and themselves."""
    num_prompt = layout.prompt_slot.shape[0]
    prompt_k, prompt_v = _take(k, layout.key_index), _take(v, layout.key_index)
    own = layout.own_index + num_prompt
    run = layout.run_index + num_prompt
    asked = _take(q, layout.prompt_index)
    if no_past and sinks is None and attend.plain and not torch.compiler.is_exporting():
        prompts = _untake(attend.fused(asked, prompt_k, prompt_v), layout.prompt_slot)
    else:
        partial = attend.prompt(asked, prompt_k, prompt_v, layout.past_length, no_past)
        prompts = _with_sinks(_Partial(*(_untake(part, layout.prompt_slot) for part in partial)), sinks)
    owns = attend.own(_take(q, own), _take(row_k, own), _take(row_v, own))
    runs = attend.prefix(_take(q, run), prompt_k, prompt_v, _take(layout.positions, run), layout.key_length)
    own_part = _Partial(*(_untake(part, layout.own_slot) for part in owns))
    run_part = _Partial(*(_untake(part, layout.run_slot) for part in runs))
    return torch.cat([prompts, _with_sinks(_merged(own_part, run_part), sinks)])


def _take(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]`` for an index of any shape, as one gather of whole rows."""
    return values.index_select(0, index.flatten()).view(*index.shape, *values.shape[1:])


def _untake(values: Tensor, slot: Tensor) -> Tensor:
    """The real places ``slot`` of a padded view ``[rows, columns, ...]``."""
    return values.flatten(0, 1).index_select(0, slot)


class _Attend:
    """The attention products of one layer; queries are scaled, ``[batch, queries, kv_heads, rep, dim]``."""

    def __init__(self, rep: int, softcap: float | None, window: int | None) -> None:
        self.rep, self.softcap, self.window = rep, softcap, window

    def own(self, q: Tensor, k: Tensor, v: Tensor) -> _Partial:
        """Candidates' tokens over their own candidate; padding stands behind every real token."""
        size = q.shape[1]
        place = torch.arange(size, device=q.device)
        blocks = OWN_BLOCKS if torch.compiler.is_exporting() or size > LONG_OWN else 1
        ends = [(size * (block + 1) + blocks - 1) // blocks for block in range(blocks)]  # rounded up: the first is never empty
        parts = [
            self._partial(q[:, start:end], k[:, :end], v[:, :end], self._behind(place[start:end, None], place[None, :end])[None])
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        return _joined(parts)

    @property
    def plain(self) -> bool:
        """Neither a window nor a cap."""
        return self.window is None and self.softcap is None

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of prompts that are read from their start, by torch's own kernel: it keeps no scores. It gives no log-sum-exp
        either, which only a part that is merged needs.
        """
        keys, values = (part.repeat_interleave(self.rep, dim=2).transpose(1, 2) for part in (k, v))  # not every kernel groups queries
        out = scaled_dot_product_attention(q.flatten(2, 3).transpose(1, 2), keys, values, is_causal=True, scale=1.0)
        return out.transpose(1, 2).reshape(q.shape)

    def prompt(self, q: Tensor, k: Tensor, v: Tensor, past_length: Tensor, no_past: bool) -> _Partial:
        """Causal attention of the prompts' tokens; outside an exported graph a block of queries at a time."""
        key_at = torch.arange(k.shape[1], device=q.device)[None, None, :]
        query_at = torch.arange(q.shape[1], device=q.device)[None, :, None] + past_length[:, None, None]
        if torch.compiler.is_exporting() or q.shape[1] <= QUERY_BLOCK:
            return self._partial(q, k, v, self._behind(query_at, key_at))
        blocks = []
        for start in range(0, q.shape[1], QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, q.shape[1])
            keys = slice(0, end if no_past else None)
            visible = self._behind(query_at[:, start:end], key_at[:, :, keys])
            blocks.append(self._partial(q[:, start:end], k[:, keys], v[:, keys], visible))
        return _joined(blocks)

    def prefix(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, lengths: Tensor) -> _Partial:
        """Candidates' tokens at ``positions`` [batch, queries] over their prompt's keys, ``lengths`` [batch] of them real."""
        key_at = torch.arange(k.shape[1], device=q.device)
        real = key_at[None, :] < lengths[:, None]
        if self.plain:
            # Which keys are real does not depend on the query: one more component of the product says it, without another
            # pass over the scores.
            hidden = torch.where(real, 0.0, _MASKED).to(q.dtype)[:, :, None, None].expand(-1, -1, k.shape[2], 1)
            return self._partial(torch.cat([q, torch.ones_like(q[..., :1])], dim=-1), torch.cat([k, hidden], dim=-1), v, None)
        visible = real[:, None, :]
        if self.window is not None:
            visible = visible & (key_at[None, None, :] > positions[:, :, None] - self.window)
        return self._partial(q, k, v, visible)

    def _behind(self, query_at: Tensor, key_at: Tensor) -> Tensor:
        visible = key_at <= query_at
        return visible if self.window is None else visible & (key_at > query_at - self.window)

    def _partial(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> _Partial:
        """``visible`` is ``[batch or 1, queries, keys]``; the result ``[batch, queries, kv_heads, rep, ...]``."""
        q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [batch, kv_heads, rep * queries, dim]
        k, v = k.permute(0, 2, 3, 1), v.transpose(1, 2)  # [batch, kv_heads, dim, keys], [batch, kv_heads, keys, dim]
        scores = (q @ k).to(torch.float32)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if visible is not None:
            hidden = torch.where(visible, 0.0, _MASKED)[:, None, None]
            batch, heads, _, keys = scores.shape
            scores = (scores.view(batch, heads, self.rep, -1, keys) + hidden).flatten(2, 3)
        weights = torch.softmax(scores, dim=-1)
        # The largest weight is 1 / sum(exp(score - top)): the log-sum-exp without another pass of exponentials.
        lse = scores.amax(dim=-1, keepdim=True) - torch.log(weights.amax(dim=-1, keepdim=True))
        return _Partial(self._rows((weights.to(v.dtype) @ v).to(torch.float32)), self._rows(lse))

    def _rows(self, part: Tensor) -> Tensor:
        """``[batch, kv_heads, rep * queries, d]`` -> ``[batch, queries, kv_heads, rep, d]``."""
        batch, heads, _, width = part.shape
        return part.view(batch, heads, self.rep, -1, width).permute(0, 3, 1, 2, 4)


def _joined(blocks: list[_Partial]) -> _Partial:
    """Blocks of queries, one after the other."""
    return blocks[0] if len(blocks) == 1 else _Partial(*(torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True)))


def _merged(a: _Partial, b: _Partial) -> _Partial:
    """Two partial results over disjoint keys as one over both."""
    share = torch.sigmoid(a.lse - b.lse)
    return _Partial(b.out + share * (a.out - b.out), torch.logaddexp(a.lse, b.lse))


def _with_sinks(part: _Partial, sinks: Tensor | None) -> Tensor:
    """``[tokens, kv_heads, rep, dim]``; ``sinks`` ``[kv_heads, rep, 1]`` take part in the denominator only."""
    return part.out if sinks is None else part.out * torch.sigmoid(part.lse - sinks)
