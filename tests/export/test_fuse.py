"""The rewrites find what they look for, and leave alone what they do not know; `test_graph` holds the result to torch."""

from collections import Counter

import pytest

from dpo_rank.export import graph
from dpo_rank.scoring.attention import OWN_BLOCKS
from tests.models import tiny

pytestmark = pytest.mark.models


def test_a_layer_has_few_transposes():
    layers = 3
    found = Counter(node.op_type for node in graph.trace(tiny("llama")).graph)
    outside = 1  # the table of rotary angles, which transformers 4 makes transposed
    # 13 and, for each further block of a candidate's own attention, those of its queries, keys, values and two results
    assert found["Transpose"] <= (13 + 5 * (OWN_BLOCKS - 1)) * layers + outside
