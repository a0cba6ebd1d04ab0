"""Equal bottom layers are found from the weights and computed once, with the scores of two whole models."""

import copy
import re

import numpy as np
import pytest
import torch

from dpo_rank import Ranker
from dpo_rank.artifact import load
from dpo_rank.export import verify
from dpo_rank.export.pair import _trace, write_graphs
from dpo_rank.export.precision import PRECISIONS
from dpo_rank.scoring.engine import score
from dpo_rank.scoring.onnx_engine import OnnxEngine
from dpo_rank.scoring.torch_engine import TorchEngine
from tests.artifacts import tiny_pair
from tests.models import VOCABULARY, tiny

pytestmark = pytest.mark.models


def top_changed(model, layers):
    """A copy whose top ``layers`` and final norm are other ones."""
    twin = copy.deepcopy(model)
    stack = twin.model.layers if hasattr(twin, "model") else twin.transformer.h
    with torch.no_grad():
        for layer in stack[len(stack) - layers :]:
            for weight in layer.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())), alpha=0.1)
    return twin


@pytest.mark.parametrize("name", ["llama-tied-biased", "gpt2", "gemma3"])
def test_torch_and_one_graph_score_as_two_models(name, tmp_path):
    policy = tiny(name)
    reference = top_changed(policy, 1)
    engine = TorchEngine(policy, reference)
    assert engine.shared_layers == 2
    groups = [group for row in verify.check_groups(VOCABULARY, 128) for group in row]
    plain = TorchEngine(policy, reference, packed=False)
    assert plain.shared_layers == 0
    for budget in (4096, 16):
        for found, expected in zip(score(engine, groups, budget), score(plain, groups), strict=True):
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a.policy, b.policy, atol=1e-4)
                np.testing.assert_allclose(a.reference, b.reference, atol=1e-4)

    traced = _trace(policy, reference)
    assert list(traced) == ["pair"]
    write_graphs(traced, tmp_path / "fp32")
    assert verify.check_against(plain, OnnxEngine(tmp_path / "fp32", "fp32"), VOCABULARY, 128) <= 1e-4
    twice = [name for name in traced["pair"].graph.initializers if name.endswith("_reference")]
    assert {match[1] for name in twice if (match := re.search(r"\.(\d+)\.", name))} == {"2"}
    write_graphs({"pair": PRECISIONS["int8"](traced["pair"])}, tmp_path / "int8")
    report = verify.compare_precisions(
        OnnxEngine(tmp_path / "fp32", "fp32"), OnnxEngine(tmp_path / "int8", "int8"), groups, 0.1, "sum", 4096
    )
    assert report.spearman > 0.8


def test_the_models_that_were_passed_in_keep_their_layers():
    policy = tiny("llama")
    reference = top_changed(policy, 2)
    before = [list(model.model.layers) for model in (policy, reference)]
    assert TorchEngine(policy, reference).shared_layers == 1
    assert [list(model.model.layers) for model in (policy, reference)] == before


@pytest.mark.parametrize("change", ["embedding", "first layer", "nothing", "all"])
def test_no_layer_is_shared_where_none_can_be(change):
    policy = tiny("llama")
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        if change == "embedding":
            reference.model.embed_tokens.weight[3] += 0.5
            reference.model.layers[2].mlp.up_proj.weight += 0.1
        elif change == "first layer":
            reference.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
        elif change == "all":
            reference = tiny("llama", seed=1)
    assert TorchEngine(policy, reference).shared_layers == 0
    assert sorted(_trace(policy, reference)) == ["policy", "reference"]


def test_an_adapter_on_the_top_layers_shares_the_base_below_them():
    from peft import LoraConfig, get_peft_model

    base = tiny("llama")
    policy = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[2], init_lora_weights=False)
    )
    engine = TorchEngine(policy.eval())
    assert engine.shared_layers == 2
    merged = copy.deepcopy(policy).merge_and_unload()
    groups = verify.check_groups(VOCABULARY, 128)[2]
    for found, expected in zip(score(engine, groups), score(TorchEngine(merged, base, packed=False), groups), strict=True):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a.policy, b.policy, atol=1e-4)
            np.testing.assert_allclose(a.reference, b.reference, atol=1e-4)


def test_an_artifact_with_one_graph(tmp_path):
    policy, _, tok = tiny_pair()
    reference = top_changed(policy, 1)
    whole = Ranker.from_models(policy, reference, tokenizer=tok)
    path = whole.export(tmp_path / "ranker")
    assert load(path).manifest.precisions == ("fp32", "int8")
    assert b'"shared_trunk"' in (path / "dpo_rank.json").read_bytes()
    ranker = Ranker.load(path, precision="fp32")
    texts = ["In water.", "No, no and no.", "Egg"]
    np.testing.assert_allclose(ranker.score("How?", texts), whole.score("How?", texts), atol=1e-5)
    with ranker.session("How?") as session:
        session.add(texts)
        found = {candidate.index: candidate.score for candidate in session.rank()}
    np.testing.assert_allclose([found[index] for index in range(3)], whole.score("How?", texts), atol=1e-5)
