"""Groups of token ids into one padding-free row, with the index arrays that say where everything lies.

A row of ``T`` tokens holds real tokens only::

    [ prompt 0 | prompt 1 | ... | run of prompt 0's candidates | run of prompt 1's candidates | ... ]
      <----------- P ---------->  <------------------------------ S ---------------------------->

Every prompt stands once. A candidate's positions continue from its prompt; its last token is a target and never an
input, so a candidate of ``n`` tokens takes ``n - 1`` places of its run. Padded views exist for attention alone, as index
arrays into the row; masks are computed from lengths and positions where they are used.

The keys and values of tokens that were read before (``past``, ``Q`` of them) stand in front of the row's own: the key space
is ``[ past | row ]``. A group names the past tokens that its prompt begins with, so several groups can share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Array = TypeVar("Array")
"""A numpy array while a row is packed, a tensor once an engine has taken it."""


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its candidates as token ids; neither a prompt nor a candidate may be empty.

    Attributes:
        prompt: the prompt's tokens that are to be read; those that were read before are left out.
        candidates: the candidates' tokens.
        past: places in the past of the tokens before ``prompt``, in the order of their positions.

    """

    prompt: Sequence[int]
    candidates: Sequence[Sequence[int]]
    past: Sequence[int] = ()

    @property
    def num_keys(self) -> int:
        """Tokens before the candidates."""
        return len(self.past) + len(self.prompt)


class Layout(NamedTuple, Generic[Array]):
    """What a model needs to read a row; numpy arrays here, tensors once an engine has taken them.

    | field         | shape    | meaning                                                             |
    |---------------|----------|---------------------------------------------------------------------|
    | input_ids     | [T]      | the row                                                             |
    | positions     | [T]      | position of each token in its own prompt + candidate                |
    | prompt_index  | [G, Pm]  | padded view of the prompts: places in the row                       |
    | prompt_slot   | [P]      | inverse: where each prompt token stands in the flattened view       |
    | key_index     | [G, Km]  | padded view of each prompt's keys, its past included: [ past , row ]|
    | key_length    | [G]      | keys of each prompt                                                 |
    | past_length   | [G]      | how many of them are past                                           |
    | run_index     | [G, Rm]  | padded view of the runs: places among the S candidate tokens        |
    | run_slot      | [S]      | inverse                                                             |
    | own_index     | [B, Cm]  | padded view of the candidates: places among the S candidate tokens  |
    | own_slot      | [S]      | inverse                                                             |
    | source        | [M]      | place in the row whose hidden state predicts each target            |
    | targets       | [M]      | token ids to score, candidate after candidate                       |
    """

    input_ids: Array
    positions: Array
    prompt_index: Array
    prompt_slot: Array
    key_index: Array
    key_length: Array
    past_length: Array
    run_index: Array
    run_slot: Array
    own_index: Array
    own_slot: Array
    source: Array
    targets: Array


@dataclass(frozen=True, slots=True)
class Row:
    """A packed row and where its results belong.

    Attributes:
        layout: what the model reads.
        lengths: number of targets of each candidate, in the order of ``layout.targets``.
        owners: ``(group, candidate)`` indices of each candidate in the list that `rows` was given.

    """

    layout: Layout[IntArray]
    lengths: tuple[int, ...]
    owners: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return len(self.layout.input_ids)


def pack(groups: Sequence[Group], owners: Sequence[Sequence[tuple[int, int]]] | None = None, num_past: int = 0) -> Row:
    """Pack ``groups`` into one row.

    Args:
        groups: prompts with their candidates, at least one of each.
        owners: where each candidate's result belongs; by default its place in ``groups``.
        num_past: tokens whose keys and values stand before the row's.

    """
    inputs = [[list(candidate[:-1]) for candidate in group.candidates] for group in groups]
    if not any(tokens for run in inputs for tokens in run):
        # Every candidate is one token long: no candidate token is an input. A row without any is a zero-sized axis that
        # not every runtime takes, so one token is read whose hidden state nobody asks for.
        inputs[0][0] = [groups[0].candidates[0][-1]]
    prompt_lengths = [len(group.prompt) for group in groups]
    run_lengths = [sum(map(len, run)) for run in inputs]
    own_lengths = [len(tokens) for run in inputs for tokens in run]
    num_prompt_tokens = sum(prompt_lengths)

    positions, source = [len(group.past) + np.arange(len(group.prompt)) for group in groups], []
    prompt_end, place = 0, num_prompt_tokens
    for group, run in zip(groups, inputs, strict=True):
        prompt_end += len(group.prompt)
        for candidate, tokens in zip(group.candidates, run, strict=True):
            positions.append(group.num_keys + np.arange(len(tokens)))
            source.append(np.array([prompt_end - 1]))
            source.append(place + np.arange(len(candidate) - 1))
            place += len(tokens)

    prompt_index, prompt_slot = _padded_view(prompt_lengths)
    run_index, run_slot = _padded_view(run_lengths)
    own_index, own_slot = _padded_view([n for n in own_lengths if n])
    key_lengths = [group.num_keys for group in groups]
    key_places, _ = _padded_view(key_lengths)
    prompt_ends = np.cumsum(prompt_lengths)
    keys = np.concatenate(
        [
            part
            for group, end in zip(groups, prompt_ends, strict=True)
            for part in (np.array(group.past, dtype=np.int64), num_past + np.arange(end - len(group.prompt), end))
        ]
    )
    layout = Layout(
        input_ids=np.array(
            [token for group in groups for token in group.prompt] + [token for run in inputs for tokens in run for token in tokens],
            dtype=np.int64,
        ),
        positions=np.concatenate(positions).astype(np.int64),
        prompt_index=prompt_index,
        prompt_slot=prompt_slot,
        key_index=keys[key_places],
        key_length=np.array(key_lengths, dtype=np.int64),
        past_length=np.array([len(group.past) for group in groups], dtype=np.int64),
        run_index=run_index,
        run_slot=run_slot,
        own_index=own_index,
        own_slot=own_slot,
        source=np.concatenate(source).astype(np.int64),
        targets=np.array([token for group in groups for candidate in group.candidates for token in candidate], dtype=np.int64),
    )
    if owners is None:
        owners = [[(g, c) for c in range(len(group.candidates))] for g, group in enumerate(groups)]
    return Row(
        layout=layout,
        lengths=tuple(len(candidate) for group in groups for candidate in group.candidates),
        owners=tuple(owner for group in owners for owner in group),
    )


def _padded_view(lengths: Sequence[int]) -> tuple[IntArray, IntArray]:
    """Index ``[len(lengths), max]`` of consecutive spans, padded with their first place, and its inverse ``[sum]``."""
    sizes = np.array(lengths, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    columns = np.arange(max(1, int(sizes.max())))
    inside = columns[None, :] < sizes[:, None]
    index = np.where(inside, starts[:, None] + columns[None, :], np.minimum(starts, sizes.sum() - 1)[:, None])
    return index, np.flatnonzero(inside)


DEFAULT_TOKEN_BUDGET = 1536
"""On a CPU larger rows are no faster: the activations of a layer leave the cache."""
GPU_TOKEN_BUDGET = 4096
_AREA = 1024
"""Padded places of the attention's score matrix that a token of the budget stands for."""
_WASTE, _FULL_ENOUGH = 32, 256
"""A row of `_FULL_ENOUGH` tokens is not widened where that pads more than `_WASTE` places a token."""


@dataclass(slots=True)
class _Size:
    """What a row takes, kept up to date while candidates are put into it."""

    prompt_max: int = 0
    key_max: int = 0
    run_max: int = 0
    own_max: int = 0
    groups: int = 0
    owns: int = 0
    prompt_tokens: int = 0
    run_tokens: int = 0
    real_area: int = 0

    def with_group(self, group: Group) -> _Size:
        prompt = len(group.prompt)
        return replace(
            self,
            prompt_max=max(self.prompt_max, prompt),
            key_max=max(self.key_max, group.num_keys),
            groups=self.groups + 1,
            prompt_tokens=self.prompt_tokens + prompt,
            real_area=self.real_area + prompt * group.num_keys,
        )

    def with_candidate(self, group: Group, run: int, length: int) -> _Size:
        """``run`` tokens of the group's candidates stand in the row already."""
        return replace(
            self,
            run_max=max(self.run_max, run + length),
            own_max=max(self.own_max, length),
            owns=self.owns + 1,
            run_tokens=self.run_tokens + length,
            real_area=self.real_area + length * (group.num_keys + length),
        )

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return self.prompt_tokens + max(1, self.run_tokens)

    @property
    def area(self) -> int:
        """Places of the padded score matrices."""
        return self.groups * (self.prompt_max + self.run_max) * self.key_max + self.owns * self.own_max**2

    def within(self, token_budget: int) -> bool:
        """Whether a row may be so large."""
        return self.tokens <= token_budget and self.area <= token_budget * _AREA

    @property
    def wasteful(self) -> bool:
        return self.tokens > _FULL_ENOUGH and self.area - self.real_area > _WASTE * self.tokens


Plan = tuple[list[Group], list[list[tuple[int, int]]]]
"""The first two arguments of `pack`."""


def rows(groups: Sequence[Group], token_budget: int = DEFAULT_TOKEN_BUDGET) -> Iterator[Row]:
    """The rows of `plan`, packed."""
    return (pack(members, owners) for members, owners in plan(groups, token_budget))


def plan(groups: Sequence[Group], token_budget: int = DEFAULT_TOKEN_BUDGET) -> Iterator[Plan]:
    """Cut ``groups`` into rows that stay within ``token_budget``, each prompt's candidates together where they fit.

    The budget bounds a row's tokens and, at 1,024 places a token, the area of its padded attention views, so that peak memory
    depends on it and not on the number of candidates. A prompt whose candidates do not fit one row stands in several; one
    candidate alone may exceed the budget. Prompts and candidates of like length share a row.
    """
    members: list[Group] = []
    owners: list[list[tuple[int, int]]] = []
    size = _Size()
    for g in sorted(range(len(groups)), key=lambda g: groups[g].num_keys):
        group = groups[g]
        # Candidates of like length share a row: their padded views waste less, and order does not matter to a score.
        pending = sorted(range(len(group.candidates)), key=lambda c: len(group.candidates[c]))
        while pending:
            taken, larger = _fitting(size, group, pending, token_budget, bool(members))
            if not taken:
                yield members, owners
                members, owners, size = [], [], _Size()
                continue
            members.append(replace(group, candidates=[group.candidates[c] for c in pending[:taken]]))
            owners.append([(g, c) for c in pending[:taken]])
            pending, size = pending[taken:], larger
    if members:
        yield members, owners


def _fitting(size: _Size, group: Group, pending: Sequence[int], token_budget: int, optional: bool) -> tuple[int, _Size]:
    """How many of ``pending`` (shortest first) fit, and what the row takes then; where it is not ``optional``, at least one."""
    size = size.with_group(group)
    run = 0
    for taken, c in enumerate(pending):
        length = len(group.candidates[c]) - 1
        larger = size.with_candidate(group, run, length)
        if (optional or taken) and (not larger.within(token_budget) or larger.wasteful):
            return taken, size
        size, run = larger, run + length
    return len(pending), size


def fits_one_row(group: Group, token_budget: int) -> bool:
    """Whether ``group`` takes a single row of its own."""
    order = sorted(range(len(group.candidates)), key=lambda c: len(group.candidates[c]))
    taken, size = _fitting(_Size(), group, order, token_budget, optional=False)
    return taken == len(order) and size.within(token_budget)


def pieces(num_tokens: int, token_budget: int) -> Iterator[slice]:
    """Cut a long prompt into pieces, each of which is read behind those before it within ``token_budget``."""
    start = 0
    while start < num_tokens:
        size = min(num_tokens - start, token_budget)
        while size > 1 and size * (start + size) > token_budget * _AREA:
            size = (size + 1) // 2
        yield slice(start, start + size)
        start += size
