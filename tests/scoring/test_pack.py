"""The packed row: every index leads back to the token it stands for."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_rank.scoring.pack import Group, pack, rows

groups_strategy = st.lists(
    st.builds(
        Group,
        st.lists(st.integers(0, 99), min_size=1, max_size=9),
        st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=7), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=4,
)


@given(groups_strategy)
@settings(max_examples=100, deadline=None)
def test_each_target_is_predicted_from_the_token_before_it(groups):
    row = pack(groups)
    layout = row.layout
    place = 0
    for group in groups:
        for candidate in group.candidates:
            whole = [*group.prompt, *candidate]
            for offset, token in enumerate(candidate):
                source = layout.source[place]
                assert layout.targets[place] == token
                assert layout.input_ids[source] == whole[len(group.prompt) + offset - 1]
                assert layout.positions[source] == len(group.prompt) + offset - 1
                place += 1
    assert place == len(layout.targets)


@given(groups_strategy)
@settings(max_examples=100, deadline=None)
def test_the_row_holds_each_prompt_once_and_no_last_token(groups):
    inputs = sum(len(candidate) - 1 for group in groups for candidate in group.candidates)
    prompts = sum(len(group.prompt) for group in groups)
    assert pack(groups).num_tokens == prompts + max(inputs, 1)


@given(groups_strategy)
@settings(max_examples=100, deadline=None)
def test_padded_views_and_their_inverses_fit(groups):
    layout = pack(groups).layout
    count = len(layout.prompt_slot)
    assert (layout.prompt_index.ravel()[layout.prompt_slot] == np.arange(count)).all()
    for index, slot in ((layout.run_index, layout.run_slot), (layout.own_index, layout.own_slot)):
        assert (index.ravel()[slot] == np.arange(len(layout.input_ids) - count)).all()


@given(groups_strategy, st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_rows_hold_every_candidate_once_within_the_budget(groups, budget):
    seen = []
    for row in rows(groups, budget):
        seen += row.owners
        assert row.num_tokens <= budget or len(row.owners) == 1
        start = 0
        for (g, c), length in zip(row.owners, row.lengths, strict=True):
            assert row.layout.targets[start : start + length].tolist() == list(groups[g].candidates[c])
            start += length
    assert sorted(seen) == [(g, c) for g, group in enumerate(groups) for c in range(len(group.candidates))]


@given(groups_strategy, st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_keys_are_the_past_and_the_prompt(groups, num_past):
    groups = [replace(group, past=range(n % (num_past + 1))) for n, group in enumerate(groups)]
    layout = pack(groups, num_past=num_past).layout
    space = [("past", n) for n in range(num_past)] + list(layout.input_ids)
    for g, group in enumerate(groups):
        keys = [space[place] for place in layout.key_index[g, : layout.key_length[g]]]
        assert keys == [("past", n) for n in group.past] + list(group.prompt)
        assert layout.past_length[g] == len(group.past)
        assert layout.positions[layout.prompt_index[g, 0]] == len(group.past)


def test_lengths_far_apart_do_not_share_a_row():
    short, long = [[1] * 40] * 40, [[1] * 900] * 4
    found = [sorted(row.lengths) for row in rows([Group([5], short + long)], 8192)]
    assert found == [[40] * 40, [900] * 4]


def test_a_hand_made_row():
    layout = pack([Group([10, 11], [[20, 21, 22], [30]]), Group([12], [[40, 41]])]).layout
    assert layout.input_ids.tolist() == [10, 11, 12, 20, 21, 40]
    assert layout.positions.tolist() == [0, 1, 0, 2, 3, 1]
    assert layout.source.tolist() == [1, 3, 4, 1, 2, 5]
    assert layout.targets.tolist() == [20, 21, 22, 30, 40, 41]


@pytest.mark.parametrize("count", [1, 3])
def test_one_token_candidates_alone_keep_a_candidate_token_in_the_row(count):
    assert pack([Group([5, 6], [[7]] * count)]).layout.input_ids.tolist() == [5, 6, 7]
