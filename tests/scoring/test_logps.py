"""The packed row against the plain forward pass of the untouched model, one candidate a row."""

import numpy as np
import pytest
import torch

from dpo_rank.errors import ModelError
from dpo_rank.scoring import logps
from dpo_rank.scoring.engine import score
from dpo_rank.scoring.logps import TokenLogProbs, cannot_pack, to_tensors
from dpo_rank.scoring.pack import Group, pack, pieces
from dpo_rank.scoring.torch_engine import TorchEngine
from tests.models import CONFIGS, FALLBACK, PACKED, VOCABULARY, tiny

pytestmark = pytest.mark.models


def tokens(rng, count):
    return rng.integers(3, VOCABULARY, count).tolist()


def cases():
    rng = np.random.default_rng(0)
    t = lambda count: tokens(rng, count)  # noqa: E731
    return {
        "ragged, several prompts": [Group(t(12), [t(9), t(1), t(4)]), Group(t(1), [t(3)]), Group(t(7), [t(1), t(1)])],
        "one token each": [Group(t(1), [t(1)])],
        "one candidate": [Group(t(20), [t(15)])],
        "one-token candidates": [Group(t(9), [t(1), t(1), t(1)])],
        "one-token prompts": [Group(t(1), [t(8), t(2)]), Group(t(1), [t(5)])],
        "many": [Group(t(5), [t(n % 7 + 1) for n in range(19)])],
    }


def plain_logps(model, groups):
    found = []
    for group in groups:
        for candidate in group.candidates:
            ids = torch.tensor([[*group.prompt, *candidate]])
            logps = model(ids).logits[0].float().log_softmax(-1)
            start = len(group.prompt) - 1
            found.append(logps[start:-1].gather(1, torch.tensor(candidate)[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_equal_the_plain_forward_pass(name):
    model = tiny(name)
    scorer = TokenLogProbs(model)
    assert scorer.packed == (name in PACKED)
    with torch.no_grad():
        for case, groups in cases().items():
            difference = (scorer(to_tensors(pack(groups).layout, "cpu")) - plain_logps(model, groups)).abs().max()
            assert difference < 1e-4, case


def test_a_model_whose_forward_a_trainer_replaced_scores_as_before():
    """TRL's fused head and accelerate put a forward on the instance, bound to that instance; a view must not run it."""
    model = tiny("llama")
    layout = to_tensors(pack(cases()["ragged, several prompts"]).layout, "cpu")
    with torch.no_grad():
        expected = TokenLogProbs(model)(layout)
        original = model.forward
        model.forward = lambda *args, **kwargs: original(*args, **kwargs)
        assert torch.equal(TokenLogProbs(model)(layout), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "granite", "opt", "cohere"])
def test_the_head_in_slices_of_the_vocabulary_is_the_head(name, monkeypatch):
    monkeypatch.setattr(logps, "VOCABULARY_SLICE", 30)
    scorer = TokenLogProbs(tiny(name))
    layout = to_tensors(pack(cases()["many"]).layout, "cpu")
    with torch.no_grad():
        hidden = scorer.hidden(layout)
        torch.testing.assert_close(
            scorer._vocabulary_slices(hidden, layout.targets), scorer.head(hidden, layout.targets), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 66, 129])
def test_own_attention_in_blocks_equals_the_plain_forward_pass(length):
    rng = np.random.default_rng(length)
    groups = [Group(tokens(rng, 5), [tokens(rng, length), tokens(rng, max(1, length - 3)), tokens(rng, 2)])]
    model = tiny("llama", max_position_embeddings=256)
    with torch.no_grad():
        difference = (TokenLogProbs(model)(to_tensors(pack(groups).layout, "cpu")) - plain_logps(model, groups)).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt-oss", "granite", "opt"])
def test_gradients_equal_the_plain_forward_pass(name):
    groups = cases()["ragged, several prompts"]
    weights = torch.linspace(-1, 1, sum(len(c) for g in groups for c in g.candidates))
    gradients = []
    for packed in (True, False):
        model = tiny(name)
        logps = TokenLogProbs(model, borrow=False)(to_tensors(pack(groups).layout, "cpu")) if packed else plain_logps(model, groups)
        (logps * weights).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][parameter], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_left_as_it_was_found(name):
    model = tiny(name).train()
    before = (dict(model.config.to_dict()), model.config._attn_implementation, {n: p.clone() for n, p in model.state_dict().items()})
    modules = [(n, type(m), m.training) for n, m in model.named_modules()]
    scorer = TokenLogProbs(model)
    with torch.no_grad():
        scorer(to_tensors(pack(cases()["one candidate"]).layout, "cpu"))
    assert model.config.to_dict() == before[0]
    assert model.config._attn_implementation == before[1]
    assert [(n, type(m), m.training) for n, m in model.named_modules()] == modules
    assert all(torch.equal(model.state_dict()[n], p) for n, p in before[2].items())


@pytest.mark.parametrize("form", ["sum", "mean"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt-neo"])
def test_rewards_do_not_depend_on_order_or_batch(name, form):
    engine = TorchEngine(tiny(name), tiny(name, seed=1))
    groups = [g for case in cases().values() for g in case]
    beta = 0.1
    alone = [score(engine, [Group(g.prompt, [c])])[0][0].reward(beta, form) for g in groups for c in g.candidates]
    lengths = [len(c) for g in groups for c in g.candidates]
    rng = np.random.default_rng(1)
    for budget in (8, 64, 8192):
        order = rng.permutation(len(groups))
        orders = [rng.permutation(len(groups[g].candidates)) for g in order]
        shuffled = [Group(groups[g].prompt, [groups[g].candidates[c] for c in cs]) for g, cs in zip(order, orders, strict=True)]
        results = score(engine, shuffled, budget)
        together = {
            (g, c): r.reward(beta, form) for g, cs, rs in zip(order, orders, results, strict=True) for c, r in zip(cs, rs, strict=True)
        }
        flat = [together[g, c] for g, group in enumerate(groups) for c in range(len(group.candidates))]
        for one, many, length in zip(alone, flat, lengths, strict=True):
            assert abs(one - many) <= beta * 1e-5 * (length if form == "sum" else 1)


@pytest.mark.parametrize("name", PACKED)
def test_a_prompt_read_in_pieces_before_its_candidates(name):
    model = tiny(name)
    engine = TorchEngine(model, model)
    assert engine.takes_past
    rng = np.random.default_rng(3)
    groups = [Group(tokens(rng, 23), [tokens(rng, n) for n in (6, 1, 9, 3)]), Group(tokens(rng, 1), [tokens(rng, 4), tokens(rng, 5)])]
    with torch.no_grad():
        expected = plain_logps(model, groups)
    for budget in (1, 4, 11, 30):
        got = np.concatenate([item.policy for items in score(engine, groups, budget) for item in items])
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_prompt_longer_than_the_score_matrix_may_be_is_cut_smaller(monkeypatch):
    monkeypatch.setattr("dpo_rank.scoring.pack._AREA", 2)
    parts = list(pieces(100, 32))
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert parts[-1].stop == 100
    assert all((part.stop - part.start) * part.stop <= 64 or part.stop - part.start == 1 for part in parts)


def test_a_long_prompt_in_blocks_of_queries(monkeypatch):
    monkeypatch.setattr("dpo_rank.scoring.attention.QUERY_BLOCK", 7)
    rng = np.random.default_rng(2)
    groups = [Group(tokens(rng, 40), [tokens(rng, 9), tokens(rng, 3)]), Group(tokens(rng, 33), [tokens(rng, 5)])]
    for name in ("mistral-window", "gpt-oss"):
        model = tiny(name)
        with torch.no_grad():
            got = TokenLogProbs(model)(to_tensors(pack(groups).layout, "cpu"))
            torch.testing.assert_close(got, plain_logps(model, groups), atol=1e-4, rtol=0)


def test_the_head_in_slices_gives_the_same_values_and_gradients(monkeypatch):
    groups = cases()["many"] * 2
    layout = to_tensors(pack(groups).layout, "cpu")
    results = []
    for elements in (2**24, 1):
        monkeypatch.setattr("dpo_rank.scoring.logps.SLICE_ELEMENTS", elements)
        model = tiny("llama")
        logps = TokenLogProbs(model, borrow=False)(layout)
        logps.sum().backward()
        results.append((logps.detach(), model.lm_head.weight.grad, model.model.embed_tokens.weight.grad))
    assert len(layout.targets) > 32
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "word"), [("gpt-neo", "registry"), ("bloom", "registry")])
def test_models_outside_the_registry_say_so(name, word):
    assert word in (cannot_pack(tiny(name)) or "")
    with pytest.raises(ModelError, match=word):
        TokenLogProbs(tiny(name), packed=True)
    assert name in FALLBACK


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_batch_takes_the_padded_batch(kind):
    scaling = {"rope_type": kind, "factor": 2.0}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    model = tiny("llama")
    model.config.rope_scaling = scaling
    assert "longest position" in (cannot_pack(model) or "")


def test_an_untested_architecture_is_compared_before_it_is_trusted(monkeypatch, caplog):
    monkeypatch.setattr("dpo_rank.scoring.logps.TESTED_MODEL_TYPES", frozenset())
    assert TokenLogProbs(tiny("llama")).packed
    model = tiny("qwen3")
    monkeypatch.setattr("dpo_rank.scoring.attention._MASKED", 0.0)  # an attention that masks nothing
    scorer = TokenLogProbs(model)
    assert not scorer.packed
    assert "differs from the plain forward pass" in str(scorer.reason)
    groups = cases()["ragged, several prompts"]
    with torch.no_grad():
        got = scorer(to_tensors(pack(groups).layout, "cpu"))
        torch.testing.assert_close(got, plain_logps(model, groups), atol=1e-4, rtol=0)


def test_an_attention_that_is_not_called_is_an_error():
    scorer = TokenLogProbs(tiny("llama"))
    scorer.model.config._attn_implementation = "eager"
    with pytest.raises(ModelError, match="packed attention ran 0 times in 3 layers"):
        scorer(to_tensors(pack(cases()["one candidate"]).layout, "cpu"))


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ModelError, match="decoder-only"):
        TokenLogProbs(model)


def test_a_peft_policy_brings_its_own_reference():
    import peft

    base = tiny("llama")
    groups = cases()["ragged, several prompts"]
    row = pack(groups)
    with torch.no_grad():
        reference = plain_logps(tiny("llama"), groups).numpy()
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"]))
        policy = plain_logps(model, groups).numpy()
    got = TorchEngine(model).logps(row)
    np.testing.assert_allclose(got[0], policy, atol=1e-4)
    np.testing.assert_allclose(got[1], reference, atol=1e-4)
    assert np.abs(got[0] - got[1]).max() > 0.01
    with torch.no_grad():  # the adapter is still on
        np.testing.assert_allclose(plain_logps(model, groups).numpy(), policy, atol=1e-6)
