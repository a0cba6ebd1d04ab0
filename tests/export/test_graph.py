"""Exported graphs against torch, at every size of every axis; 8-bit scores do not depend on the batch."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from dpo_rank import Ranker
from dpo_rank.errors import ModelError
from dpo_rank.export import graph, verify
from dpo_rank.export.pair import write_graphs
from dpo_rank.export.precision import PRECISIONS
from dpo_rank.scoring import logps
from dpo_rank.scoring.engine import score
from dpo_rank.scoring.onnx_engine import OnnxEngine
from dpo_rank.scoring.pack import Group
from dpo_rank.scoring.torch_engine import TorchEngine
from tests.models import FALLBACK, PACKED, VOCABULARY, on_this_major, tiny

pytestmark = pytest.mark.models
EXPORTED = [name for name in PACKED if name not in ("gpt-oss", "llama-one-kv-head", "qwen2-window", "starcoder2")]


FUSED = {"llama": (7, 6), "qwen3": (13, 6), "gemma3": (19, 6), "olmo2": (13, 6), "gpt2": (0, 0)}
"""Operators for norms (two a layer and the last; more where queries and keys have their own) and for rotary embeddings."""


@pytest.mark.parametrize("name", on_this_major(EXPORTED))
def test_a_graph_is_fused_scores_as_torch_and_takes_other_weights(name, tmp_path, monkeypatch):
    monkeypatch.setattr(logps, "VOCABULARY_SLICE", 30)  # 67 entries: two whole slices and a rest
    policy, reference = tiny(name), tiny(name, seed=1)
    traced = graph.trace(policy)
    if name in FUSED:
        found = Counter(node.op_type for node in traced.graph)
        assert (found["RMSNormalization"], found["RotaryEmbedding"]) == FUSED[name]
        assert not (FUSED[name][0] and found["Reciprocal"]) and not (FUSED[name][1] and found["Neg"])  # noqa: PT018
    both = {"policy": traced, "reference": graph.with_weights(traced, reference)}
    write_graphs(both, tmp_path / "fp32")
    engine = OnnxEngine(tmp_path / "fp32", "fp32")
    assert verify.check_against(TorchEngine(policy, reference), engine, VOCABULARY, 128) <= 1e-4
    if name in ("llama-tied-biased", "gpt2", "gemma3"):
        groups = [g for row in verify.check_groups(VOCABULARY, 128) for g in row]
        for precision, least in (("int8", 0.95), ("fp16", 0.999)):
            write_graphs({role: PRECISIONS[precision](model) for role, model in both.items()}, tmp_path / precision)
            report = verify.compare_precisions(engine, OnnxEngine(tmp_path / precision, precision), groups, 0.1, "sum", 4096)
            assert report.spearman > least
            assert 0 < report.margin_noise < 0.2


@pytest.mark.parametrize("name", [*FALLBACK, "gpt-oss"])
def test_what_cannot_be_exported_is_refused_by_name(name):
    model = tiny(name)
    with pytest.raises(ModelError, match=f"{type(model).__name__} cannot be exported"):
        graph.trace(model)


def test_a_graph_that_scores_otherwise_is_not_accepted(tmp_path):
    traced = graph.trace(tiny("llama"))
    write_graphs({"policy": traced, "reference": traced}, tmp_path / "fp32")
    with pytest.raises(ModelError, match="not accepted"):
        verify.check_against(TorchEngine(tiny("llama"), tiny("llama", seed=1)), OnnxEngine(tmp_path / "fp32", "fp32"), VOCABULARY, 128)


def test_lower_precisions_are_smaller_by_their_bits(tmp_path):
    traced = graph.trace(tiny("llama", hidden_size=128, intermediate_size=256, tie_word_embeddings=True))
    for name in ("fp32", "fp16", "int8"):
        write_graphs({"policy": PRECISIONS[name](traced)}, tmp_path / name)
    sizes = {name: (tmp_path / name / "policy.onnx.data").stat().st_size for name in ("fp32", "fp16", "int8")}
    assert sizes["int8"] < 0.28 * sizes["fp32"]
    assert sizes["fp16"] < 0.52 * sizes["fp32"]


def test_nothing_of_the_machine_that_traced_it_is_in_a_graph(tiny_artifact):
    from pathlib import Path

    for path in tiny_artifact.rglob("*.onnx"):
        data = path.read_bytes()
        assert b"stack_trace" not in data
        assert str(Path.home()).encode() not in data
        assert b"dpo_rank/scoring" not in data
        assert not any(node.metadata_props for node in ir.load(path).graph)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_score_does_not_depend_on_what_else_is_in_the_batch(tiny_artifact, precision):
    ranker = Ranker.load(tiny_artifact, precision=precision)
    engine = ranker._engine
    rng = np.random.default_rng(0)

    def tokens(count, high=ranker.manifest.vocabulary):
        return rng.integers(0, high, count).tolist()

    groups = [Group(tokens(9), [tokens(n) for n in (3, 11, 6, 1)]) for _ in range(6)]
    beta = ranker.beta
    alone = [[score(engine, [Group(g.prompt, [c])])[0][0].reward(beta, "sum") for c in g.candidates] for g in groups]
    exact = score(Ranker.load(tiny_artifact, precision="fp32")._engine, groups)
    noise = np.median(
        [abs(a - e.reward(beta, "sum")) for items, es in zip(alone, exact, strict=True) for a, e in zip(items, es, strict=True)]
    )
    extreme = [int(np.argmax([np.abs(row).max() for row in rng.normal(size=(50, 4))]))] * 60
    for budget in (32, 8192):
        crowded = [Group(g.prompt, [extreme, *g.candidates, tokens(70)]) for g in groups]
        for lone, items, group in zip(alone, score(engine, crowded, budget), groups, strict=True):
            for a, b, candidate in zip(lone, items[1:-1], group.candidates, strict=True):
                allowed = beta * 1e-5 * len(candidate) if precision == "fp32" else noise
                assert abs(a - b.reward(beta, "sum")) <= allowed
