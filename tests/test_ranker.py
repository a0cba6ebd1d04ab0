"""The ranker's contract, on both engines."""

import asyncio
import math
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dpo_rank
from dpo_rank import Candidate, DataError, EmptyRankingError, ModelError, NonFiniteScoreError, Ranker, UnavailableError
from tests.artifacts import tiny_pair
from tests.cases import ANSWERS, PROMPT
from tests.models import tiny
from tests.toks import tokenizer

pytestmark = pytest.mark.models


@pytest.fixture(scope="module", params=["onnx", "torch"])
def ranker(request, tiny_artifact):
    return Ranker.load(tiny_artifact, engine=request.param, precision="fp32")


def test_scores_are_the_reward_of_the_plain_forward_pass(ranker):
    policy, reference, tok = tiny_pair()
    expected = []
    for answer in ANSWERS:
        chat = [{"role": "user", "content": PROMPT}]
        prompt = tok(tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))["input_ids"]
        whole = tok(tok.apply_chat_template([*chat, {"role": "assistant", "content": answer}], tokenize=False))["input_ids"]
        ids = torch.tensor([whole])
        targets = ids[:, len(prompt) :, None]
        with torch.no_grad():
            sums = [
                model(ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1).gather(2, targets).double().sum()
                for model in (policy, reference)
            ]
        expected.append(0.1 * float(sums[0] - sums[1]))
    np.testing.assert_allclose(ranker.score(PROMPT, ANSWERS), expected, atol=1e-4)


def test_engines_agree(tiny_artifact):
    onnx, torch_ = (Ranker.load(tiny_artifact, engine=name, precision="fp32") for name in ("onnx", "torch"))
    tokens = [c.num_tokens for c in sorted(onnx.rank(PROMPT, ANSWERS), key=lambda c: c.index)]
    difference = np.abs(onnx.score(PROMPT, ANSWERS) - torch_.score(PROMPT, ANSWERS))
    assert (difference <= 0.1 * 1e-5 * np.array(tokens) + 1e-7).all()


def test_a_ranking(ranker):
    answers = [
        "No.",
        Candidate("No.", id="twin", metadata={"k": 1}),
        {"content": "It depends", "id": 7, "finish_reason": "length", "model": "m"},
        "Put it in boiling water.",
    ]
    ranking = ranker.rank(PROMPT, answers)
    scores = ranker.score(PROMPT, answers)
    assert scores.dtype == np.float32
    assert len(ranking) == 4
    assert sorted(ranking.order) == [0, 1, 2, 3]
    assert ranking.order.index(0) < ranking.order.index(1)  # a tie keeps the input's order
    assert [c.score for c in ranking] == sorted((float(s) for s in scores), reverse=True) or ranking[0].score == pytest.approx(
        float(scores.max())
    )
    assert ranking.best is ranking[0]
    assert all(isinstance(c.score, float) and isinstance(c.probability, float) for c in ranking)
    assert sum(c.probability for c in ranking) == pytest.approx(1)
    by_index = {c.index: c for c in ranking}
    assert (by_index[1].id, by_index[1].metadata) == ("twin", {"k": 1})
    assert (by_index[2].id, by_index[2].metadata, by_index[2].finished) == ("7", {"model": "m"}, False)
    assert by_index[2].num_tokens == len(tokenizer()("It depends", add_special_tokens=False)["input_ids"])
    assert ranking.to_dict()["order"] == ranking.order


def test_top_k_keeps_probabilities_over_all(ranker):
    whole = ranker.rank(PROMPT, ANSWERS)
    for k in (0, 1, 3, 99):
        cut = ranker.rank(PROMPT, ANSWERS, top_k=k)
        assert cut.order == whole.order[:k]
        assert [c.probability for c in cut] == pytest.approx([c.probability for c in whole][:k])


def test_no_candidates(ranker):
    ranking = ranker.rank(PROMPT, [])
    assert len(ranking) == 0
    assert ranker.score(PROMPT, []).shape == (0,)
    with pytest.raises(EmptyRankingError):
        _ = ranking.best
    assert issubclass(EmptyRankingError, IndexError)


def test_many_equals_one_by_one(ranker):
    prompts = [PROMPT, "hello", [{"role": "user", "content": "What is 2 + 2?"}], "x"]
    lists = [ANSWERS, [], ["It is 4."], ANSWERS[:2]]
    for budget in (16, 8192):
        ranker.token_budget = budget
        many = ranker.rank_many(prompts, lists)
        for ranking, prompt, answers in zip(many, prompts, lists, strict=True):
            alone = ranker.rank(prompt, answers)
            assert ranking.order == alone.order
            np.testing.assert_allclose([c.score for c in ranking], [c.score for c in alone], atol=1e-5)


@given(st.lists(st.sampled_from([*ANSWERS, "", "Yes.", "x y z"]), min_size=1, max_size=8), st.randoms())
@settings(max_examples=25)
def test_order_of_candidates_does_not_matter(answers, rng):
    ranker = _shared()
    shuffled = answers[:]
    rng.shuffle(shuffled)
    one = dict(zip(answers, ranker.score(PROMPT, answers), strict=True))
    other = dict(zip(shuffled, ranker.score(PROMPT, shuffled), strict=True))
    for answer in answers:
        assert one[answer] == pytest.approx(other[answer], abs=1e-5)


_made = []


def _shared():
    if not _made:
        policy, reference, tok = tiny_pair()
        _made.append(Ranker.from_models(policy, reference, tokenizer=tok))
    return _made[0]


def test_compare_is_bradley_terry_at_the_temperature(ranker):
    a, b = ranker.score(PROMPT, ANSWERS[:2])
    assert ranker.compare(PROMPT, *ANSWERS[:2]) == pytest.approx(1 / (1 + math.exp(-float(a - b) / ranker.temperature)), abs=1e-6)
    assert ranker.compare(PROMPT, *ANSWERS[:2]) + ranker.compare(PROMPT, *ANSWERS[1::-1]) == pytest.approx(1)


def test_explanations_add_up(ranker):
    for answer in [*ANSWERS, {"text": "It depends", "finished": False}]:
        parts = ranker.explain(PROMPT, answer)
        assert sum(part.contribution for part in parts) == pytest.approx(float(ranker.score(PROMPT, [answer])[0]), abs=1e-5)
    assert "".join(part.text for part in ranker.explain(PROMPT, "It depends.")) == "It depends.<|end|>"


def test_best_of_n(ranker):
    assert ranker.best_of_n(PROMPT, lambda prompt, n: ANSWERS[:n], n=3).order == ranker.rank(PROMPT, ANSWERS[:3]).order

    async def agenerate(prompt, n):
        await asyncio.sleep(0)
        return ANSWERS[:n]

    with pytest.raises(TypeError, match="abest_of_n"):
        ranker.best_of_n(PROMPT, agenerate)
    with pytest.raises(TypeError, match="abest_of_n"):
        ranker.best_of_n(PROMPT, lambda prompt, n: agenerate(prompt, n))
    assert asyncio.run(ranker.abest_of_n(PROMPT, agenerate, n=3)).order == ranker.rank(PROMPT, ANSWERS[:3]).order


def test_the_event_loop_is_not_blocked(ranker):
    async def both():
        beats = 0

        async def heart():
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(heart())
        ranking = await ranker.arank(PROMPT, ANSWERS)
        scores = await ranker.ascore(PROMPT, ANSWERS)
        task.cancel()
        return beats, ranking, scores

    beats, ranking, scores = asyncio.run(both())
    assert beats > 2
    assert ranking.order[0] == int(np.argmax(scores))


def test_eight_threads_get_equal_scores(ranker):
    expected = ranker.score(PROMPT, ANSWERS)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: ranker.score(PROMPT, ANSWERS), range(32)):
            np.testing.assert_allclose(found, expected, atol=1e-6)


def _score(ranker, queue):
    queue.put(ranker.score(PROMPT, ANSWERS).tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_get_equal_scores(tiny_artifact, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip("this platform has no fork")
    ranker = Ranker.load(tiny_artifact)
    expected = ranker.score(PROMPT, ANSWERS)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_score, args=(ranker, queue))
    process.start()
    found = queue.get(timeout=120)
    process.join(60)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_pickling_reloads_by_path(tiny_artifact):
    ranker = Ranker.load(tiny_artifact, precision="int8")
    ranker.temperature = 3.0
    again = pickle.loads(pickle.dumps(ranker))
    assert (again.precision, again.temperature) == ("int8", 3.0)
    np.testing.assert_allclose(again.score(PROMPT, ANSWERS), ranker.score(PROMPT, ANSWERS), atol=1e-6)
    assert len(pickle.dumps(ranker)) < 2000
    with pytest.raises(TypeError, match="save it and load it by path"):
        pickle.dumps(_shared())


def test_calibration_is_kept(tiny_artifact, tmp_path):
    ranker = Ranker.load(tiny_artifact)
    best = ranker.rank(PROMPT, ANSWERS).order
    rows = [{"prompt": PROMPT, "chosen": ANSWERS[best[0]], "rejected": ANSWERS[best[1]]}] * 3
    rows += [{"prompt": PROMPT, "chosen": ANSWERS[best[1]], "rejected": ANSWERS[best[0]]}]
    report = ranker.calibrate(rows)
    assert ranker.calibrated
    assert ranker.compare(PROMPT, ANSWERS[best[0]], ANSWERS[best[1]]) == pytest.approx(0.75, abs=1e-3)
    assert report.agreement == 0.75
    assert report.nll_after < report.nll_before
    again = Ranker.load(ranker.save(tmp_path / "calibrated"))
    assert again.temperature == pytest.approx(ranker.temperature)
    assert again.rank(PROMPT, ANSWERS).calibrated
    card = (tmp_path / "calibrated" / "README.md").read_text()
    assert f"| temperature | {ranker.temperature:.4g} (fitted" in card


def test_passages_are_part_of_the_prompt(ranker):
    with_passages = ranker.score(PROMPT, ANSWERS, passages=["Boil it.", {"text": "Cool it.", "source": "book"}])
    prompt = f"Use these passages.\n[1] Boil it.\n[2] Cool it.\n\n{PROMPT}"
    np.testing.assert_allclose(with_passages, ranker.score(prompt, ANSWERS), atol=1e-6)
    assert not np.allclose(with_passages, ranker.score(PROMPT, ANSWERS), atol=1e-4)


def test_mean_rewards(tmp_path):
    policy, reference, tok = tiny_pair()
    total = Ranker.from_models(policy, reference, tokenizer=tok).rank(PROMPT, ANSWERS)
    mean = Ranker.from_models(policy, reference, tokenizer=tok, reward="mean", beta=2.0).rank(PROMPT, ANSWERS)
    means = {c.index: c.score for c in mean}
    for candidate in total:
        assert means[candidate.index] == pytest.approx(candidate.score / 0.1 * 2.0 / candidate.num_tokens, abs=1e-5)


@pytest.mark.parametrize("name", ["gpt-neo", "gpt-oss", "gemma2"])
def test_from_models_takes_any_decoder(name):
    policy, reference, tok = tiny_pair(name)
    ranking = Ranker.from_models(policy, reference, tokenizer=tok).rank(PROMPT, ANSWERS)
    assert sorted(ranking.order) == [0, 1, 2, 3]
    assert not ranking.calibrated


def test_from_models_by_path_saves_loads_and_pickles(tmp_path):
    policy, reference, tok = tiny_pair()
    for name, model in (("policy", policy), ("reference", reference)):
        model.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
    ranker = Ranker.from_models(str(tmp_path / "policy"), tmp_path / "reference", device="cpu")
    expected = ranker.score(PROMPT, ANSWERS)
    np.testing.assert_allclose(_shared().score(PROMPT, ANSWERS), expected, atol=1e-5)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(ranker)).score(PROMPT, ANSWERS), expected, atol=1e-6)
    saved = Ranker.load(ranker.save(tmp_path / "saved"))
    assert saved.engine == "torch"
    np.testing.assert_allclose(saved.score(PROMPT, ANSWERS), expected, atol=1e-5)
    exported = Ranker.load(saved.export(tmp_path / "exported", precisions=("fp32",)))
    assert exported.engine == "onnx"
    np.testing.assert_allclose(exported.score(PROMPT, ANSWERS), expected, atol=1e-4)


def test_an_adapter_is_its_own_pair(tmp_path):
    import peft

    base, _, tok = tiny_pair()
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    ranker = Ranker.from_models(model, tokenizer=tok)
    scores = ranker.score(PROMPT, ANSWERS)
    assert np.abs(scores).max() > 0.01
    exported = Ranker.load(ranker.export(tmp_path / "adapter", precisions=("fp32",)))
    np.testing.assert_allclose(exported.score(PROMPT, ANSWERS), scores, atol=1e-4)
    np.testing.assert_allclose(ranker.score(PROMPT, ANSWERS), scores, atol=1e-6)


def test_a_template_that_is_no_data_still_ranks_and_is_never_stored(tmp_path, caplog):
    policy, reference, tok = tiny_pair()
    tok = tokenizer()
    tok.chat_template = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"
    ranker = Ranker.from_models(policy, reference, tokenizer=tok)
    assert "used as it is" in caplog.text
    assert len(ranker.rank(PROMPT, ANSWERS)) == 4
    for method in (ranker.save, ranker.export):
        with pytest.raises(dpo_rank.ArtifactError, match="cannot be stored"):
            method(tmp_path / "x")


def test_a_reference_that_does_not_fit_is_called_out(caplog):
    policy, reference, tok = tiny_pair()
    _shared().rank(PROMPT, ANSWERS)
    assert "Likely the reference is another model" not in caplog.text
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(4)
    Ranker.from_models(policy, reference, tokenizer=tok).rank(PROMPT, ANSWERS)
    assert "Likely the reference is another model" in caplog.text


def test_broken_weights_are_an_error_and_never_a_rank():
    policy, reference, tok = tiny_pair()
    with torch.no_grad():
        policy.lm_head.weight[5] = float("nan")
    with pytest.raises(NonFiniteScoreError, match=r"candidate \d of prompt 0"):
        Ranker.from_models(policy, reference, tokenizer=tok).rank(PROMPT, ANSWERS)


BAD_CALLS = {
    "prompt is a number": lambda r: r.rank(5, ANSWERS),
    "prompt is None": lambda r: r.rank(None, ANSWERS),
    "prompt is bytes": lambda r: r.rank(b"x", ANSWERS),
    "prompt is an empty list": lambda r: r.rank([], ANSWERS),
    "prompt holds texts": lambda r: r.rank(["x"], ANSWERS),
    "message without role": lambda r: r.rank([{"content": "x"}], ANSWERS),
    "message without content": lambda r: r.rank([{"role": "user"}], ANSWERS),
    "unknown role": lambda r: r.rank([{"role": "wizard", "content": "x"}], ANSWERS),
    "image part": lambda r: r.rank([{"role": "user", "content": [{"type": "image"}]}], ANSWERS),
    "prompt ends with the assistant": lambda r: r.rank([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], ANSWERS),
    "surrogate in the prompt": lambda r: r.rank("\ud800", ANSWERS),
    "candidates are a text": lambda r: r.rank("x", "answer"),
    "candidates are a number": lambda r: r.rank("x", 5),
    "candidates are None": lambda r: r.rank("x", None),
    "candidates are a mapping": lambda r: r.rank("x", {"text": "y"}),
    "a candidate is a number": lambda r: r.rank("x", ["y", 5]),
    "a candidate is None": lambda r: r.rank("x", [None]),
    "a candidate mapping without text": lambda r: r.rank("x", [{"id": 1}]),
    "a candidate whose text is a number": lambda r: r.rank("x", [{"text": 4}]),
    "finished is a text": lambda r: r.rank("x", [{"text": "y", "finished": "no"}]),
    "an empty unfinished candidate": lambda r: r.rank("x", [Candidate("", finished=False)]),
    "surrogate in a candidate": lambda r: r.rank("x", ["\udfff"]),
    "top_k is negative": lambda r: r.rank("x", ANSWERS, top_k=-1),
    "top_k is a text": lambda r: r.rank("x", ANSWERS, top_k="2"),
    "top_k is a bool": lambda r: r.rank("x", ANSWERS, top_k=True),
    "passages are a text": lambda r: r.rank("x", ANSWERS, passages="p"),
    "a passage is a number": lambda r: r.rank("x", ANSWERS, passages=[5]),
    "a passage without text": lambda r: r.rank("x", ANSWERS, passages=[{"id": 1}]),
    "fewer lists than prompts": lambda r: r.rank_many(["x", "y"], [ANSWERS]),
    "fewer passages than prompts": lambda r: r.rank_many(["x", "y"], [ANSWERS, ANSWERS], passages=[None]),
    "prompts are a text": lambda r: r.rank_many("xy", [ANSWERS, ANSWERS]),
    "generate returns a text": lambda r: r.best_of_n("x", lambda p, n: "answer"),
    "generate returns None": lambda r: r.best_of_n("x", lambda p, n: None),
    "calibrate without rows": lambda r: r.calibrate([]),
    "calibrate without labels": lambda r: r.calibrate([{"prompt": "x", "completions": ["a", "b"]}]),
    "calibrate on ties": lambda r: r.calibrate([{"prompt": "x", "completions": ["a", "b"], "scores": [1, 1]}]),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_data_errors(ranker, name):
    before = ranker.temperature
    with pytest.raises(DataError) as caught:
        BAD_CALLS[name](ranker)
    assert len(str(caught.value)) > 10
    assert ranker.temperature == before
    assert len(ranker.rank(PROMPT, ANSWERS)) == 4


def test_bad_options_are_named(tiny_artifact):
    for options, error in [
        ({"engine": "magic"}, UnavailableError),
        ({"precision": "int3"}, UnavailableError),
        ({"engine": "torch", "precision": "int8"}, UnavailableError),
        ({"device": "cuda:9"}, UnavailableError),
        ({"engine": "torch", "device": "abacus"}, UnavailableError),
        ({"providers": ["NoSuchProvider"]}, UnavailableError),
        ({"threads": 0}, DataError),
        ({"token_budget": 0}, DataError),
    ]:
        with pytest.raises(error):
            Ranker.load(tiny_artifact, **options)


def test_bad_pairs_are_named():
    policy, reference, tok = tiny_pair()
    for call, error, words in [
        (lambda: Ranker.from_models(policy, reference), DataError, "tokenizer is required"),
        (lambda: Ranker.from_models(policy, None, tokenizer=tok), ModelError, "a reference is needed"),
        (lambda: Ranker.from_models(policy, tiny("llama", vocab_size=9), tokenizer=tok), ModelError, "share their token ids"),
        (lambda: Ranker.from_models(policy, reference, tokenizer=tok, beta=0), DataError, "beta"),
        (lambda: Ranker.from_models(policy, reference, tokenizer=tok, reward="max"), DataError, "reward"),
        (lambda: Ranker.from_models(policy, reference, tokenizer=tok, boundary="x"), DataError, "boundary"),
        (lambda: Ranker.from_models("/no/such/model", "/no/such/model"), ModelError, "/no/such/model"),
        (lambda: Ranker.from_models("x/y", "x/z", model_kwargs={"trust_remote_code": True}), DataError, "trust_remote_code"),
    ]:
        with pytest.raises(error, match=words):
            call()


def test_push_to_hub_uploads_what_save_writes(tiny_artifact, monkeypatch):
    import huggingface_hub

    seen = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            seen["private"] = private

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen["name"] = Ranker.load(folder_path).name
            return "address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert Ranker.load(tiny_artifact).push_to_hub("me/ranker") == "address"
    assert seen == {"private": True, "name": "tiny"}
