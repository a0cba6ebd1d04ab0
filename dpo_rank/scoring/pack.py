"""Groups of token ids into one padding-free row, with the index arrays that say where everything lies.

A row of ``T`` tokens holds real tokens only::

    [ prompt 0 | prompt 1 | ... | run of prompt 0's candidates | run of prompt 1's candidates | ... ]
      <----------- P ---------->  <------------------------------ S ---------------------------->

Every prompt stands once. A candidate's positions continue from its prompt; its last token is a target and never an
input, so a candidate of ``n`` tokens takes ``n - 1`` places of its run. Padded views exist for attention alone, as index
arrays into the row; masks are computed from lengths and positions where they are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Array = TypeVar("Array")
"""A numpy array while a row is packed, a tensor once an engine has taken it."""


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its candidates as token ids; neither a prompt nor a candidate may be empty."""

    prompt: Sequence[int]
    candidates: Sequence[Sequence[int]]


class Layout(NamedTuple, Generic[Array]):
    """What a model needs to read a row; numpy arrays here, tensors once an engine has taken them.

    | field         | shape    | meaning                                                             |
    |---------------|----------|---------------------------------------------------------------------|
    | input_ids     | [T]      | the row                                                             |
    | positions     | [T]      | position of each token in its own prompt + candidate                |
    | prompt_index  | [G, Pm]  | padded view of the prompts: places in the row                       |
    | prompt_slot   | [P]      | inverse: where each prompt token stands in the flattened view       |
    | prompt_length | [G]      | tokens of each prompt                                               |
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
    prompt_length: Array
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


def pack(groups: Sequence[Group], owners: Sequence[Sequence[tuple[int, int]]] | None = None) -> Row:
    """Pack ``groups`` into one row.

    Args:
        groups: prompts with their candidates, at least one of each.
        owners: where each candidate's result belongs; by default its place in ``groups``.

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

    positions, source = [np.arange(n) for n in prompt_lengths], []
    prompt_end, place = 0, num_prompt_tokens
    for group, run in zip(groups, inputs, strict=True):
        prompt_end += len(group.prompt)
        for candidate, tokens in zip(group.candidates, run, strict=True):
            positions.append(len(group.prompt) + np.arange(len(tokens)))
            source.append(np.array([prompt_end - 1]))
            source.append(place + np.arange(len(candidate) - 1))
            place += len(tokens)

    prompt_index, prompt_slot = _padded_view(prompt_lengths)
    run_index, run_slot = _padded_view(run_lengths)
    own_index, own_slot = _padded_view([n for n in own_lengths if n])
    layout = Layout(
        input_ids=np.array(
            [token for group in groups for token in group.prompt] + [token for run in inputs for tokens in run for token in tokens],
            dtype=np.int64,
        ),
        positions=np.concatenate(positions).astype(np.int64),
        prompt_index=prompt_index,
        prompt_slot=prompt_slot,
        prompt_length=np.array(prompt_lengths, dtype=np.int64),
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


DEFAULT_TOKEN_BUDGET = 4096


def rows(groups: Sequence[Group], token_budget: int = DEFAULT_TOKEN_BUDGET) -> Iterator[Row]:
    """Cut ``groups`` into rows that stay within ``token_budget``, each prompt's candidates together where they fit.

    The budget bounds a row's tokens and, at 1,024 keys a token, the area of its padded attention views, so that peak memory
    depends on it and not on the number of candidates. A prompt whose candidates do not fit one row stands in several; one
    candidate alone may exceed the budget. Prompts of like length share a row.
    """
    area_budget = token_budget * 1024
    members: list[Group] = []
    owners: list[list[tuple[int, int]]] = []
    for g in sorted(range(len(groups)), key=lambda g: len(groups[g].prompt)):
        group = groups[g]
        # Candidates of like length share a row: their padded views waste less, and order does not matter to a score.
        pending = sorted(range(len(group.candidates)), key=lambda c: len(group.candidates[c]))
        while pending:
            taken = _fitting(members, group, pending, token_budget, area_budget)
            if not taken and members:
                yield pack(members, owners)
                members, owners = [], []
                continue
            taken = max(taken, 1)
            members.append(Group(group.prompt, [group.candidates[c] for c in pending[:taken]]))
            owners.append([(g, c) for c in pending[:taken]])
            pending = pending[taken:]
    if members:
        yield pack(members, owners)


def _fitting(members: list[Group], group: Group, pending: list[int], token_budget: int, area_budget: int) -> int:
    """How many of ``pending`` (shortest first) fit beside ``members``."""
    prompt_max = max([len(m.prompt) for m in members] + [len(group.prompt)])
    prompt_tokens = sum(len(m.prompt) for m in members) + len(group.prompt)
    run_max = max((sum(len(c) - 1 for c in m.candidates) for m in members), default=0)
    run_tokens = sum(sum(len(c) - 1 for c in m.candidates) for m in members)
    count = sum(len(m.candidates) for m in members)
    own_max = max((len(c) for m in members for c in m.candidates), default=0)
    run, taken = 0, 0
    for c in pending:
        length = len(group.candidates[c])
        run += length - 1
        own_max = max(own_max, length)
        area = (len(members) + 1) * prompt_max * (prompt_max + max(run_max, run)) + (count + taken + 1) * own_max**2
        alone = not members and not taken
        if not alone and (prompt_tokens + max(1, run_tokens + run) > token_budget or area > area_budget):
            break
        taken += 1
    return taken
