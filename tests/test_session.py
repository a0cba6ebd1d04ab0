"""A session ranks as `Ranker.rank` does, however its candidates arrived or grew."""

import numpy as np
import pytest

from dpo_rank import Candidate, DataError, Ranker
from tests.artifacts import tiny_pair

pytestmark = pytest.mark.models
PROMPT = "How do I boil an egg, and how long does it take?"
TEXTS = ["Put it in water for seven minutes.", "No.", "Boil it. Then cool it under cold water, peel it and eat it with salt."]


@pytest.fixture(scope="module")
def torch_ranker():
    policy, reference, tok = tiny_pair()
    return Ranker.from_models(policy, reference, tokenizer=tok)


@pytest.fixture(scope="module")
def fallback_ranker():
    policy, reference, tok = tiny_pair("gpt-neo")
    return Ranker.from_models(policy, reference, tokenizer=tok)


@pytest.fixture(params=["onnx", "torch", "fallback"])
def ranker(request, tiny_artifact, torch_ranker, fallback_ranker):
    return {"onnx": lambda: Ranker.load(tiny_artifact), "torch": lambda: torch_ranker, "fallback": lambda: fallback_ranker}[request.param]()


def same(left, right):
    assert left.order == right.order
    np.testing.assert_allclose([c.score for c in left], [c.score for c in right], atol=2e-5)
    np.testing.assert_allclose([c.probability for c in left], [c.probability for c in right], atol=2e-5)
    assert [c.num_tokens for c in left] == [c.num_tokens for c in right]


def test_candidates_that_arrive_later(ranker):
    with ranker.session(PROMPT) as session:
        assert session.add(TEXTS[:2]) == [0, 1]
        same(session.rank(), ranker.rank(PROMPT, TEXTS[:2]))
        assert session.add([TEXTS[2]]) == [2]
        same(session.rank(), ranker.rank(PROMPT, TEXTS))
        assert len(session.rank(top_k=1)) == 1
        assert len(session) == 3


@pytest.mark.parametrize("seed", range(4))
def test_answers_that_grow_equal_the_whole_text_so_far(ranker, seed):
    rng = np.random.default_rng(seed)
    with ranker.session(PROMPT, passages=None) as session:
        session.add([Candidate(whole[:1], finished=False) for whole in TEXTS])
        texts = [whole[:1] for whole in TEXTS]
        while any(len(text) < len(whole) for text, whole in zip(texts, TEXTS, strict=True)):
            for index, whole in enumerate(TEXTS):
                more = whole[len(texts[index]) :][: rng.integers(0, 9)]
                session.extend(index, more)
                texts[index] += more
            same(session.rank(), ranker.rank(PROMPT, [Candidate(text, finished=False) for text in texts]))
        session.finish(1)
        mixed = [Candidate(text, finished=index == 1) for index, text in enumerate(texts)]
        same(session.rank(), ranker.rank(PROMPT, mixed))
        session.finish(0)
        session.finish(2)
        session.add(["Another answer."])
        same(session.rank(), ranker.rank(PROMPT, [*TEXTS, "Another answer."]))


def test_a_small_budget_changes_nothing(tiny_artifact):
    small, large = Ranker.load(tiny_artifact, token_budget=24), Ranker.load(tiny_artifact)
    with small.session(PROMPT) as session:
        session.add([Candidate(text, finished=False) for text in TEXTS])
        session.rank()
        for index in range(3):
            session.extend(index, " And one more sentence.")
        whole = [Candidate(text + " And one more sentence.", finished=False) for text in TEXTS]
        same(session.rank(), large.rank(PROMPT, whole))


def test_growing_costs_the_new_tokens_only(tiny_artifact, monkeypatch):
    ranker = Ranker.load(tiny_artifact)
    read = []
    engine = ranker._engine
    monkeypatch.setattr(
        engine, "continued", lambda row, past, keep=None: read.append(row.num_tokens) or type(engine).continued(engine, row, past, keep)
    )
    with ranker.session(PROMPT) as session:
        session.add([Candidate(TEXTS[2], finished=False)])
        session.rank()
        first = sum(read)
        read.clear()
        session.extend(0, " More.")
        session.rank()
        assert 0 < sum(read) < first / 3
        read.clear()
        session.rank()
        assert not read


def test_passages_and_an_empty_session(tiny_artifact):
    ranker = Ranker.load(tiny_artifact)
    with ranker.session(PROMPT, passages=["Seven minutes."]) as session:
        assert len(session.rank()) == 0
        session.add(TEXTS)
        same(session.rank(), ranker.rank(PROMPT, TEXTS, passages=["Seven minutes."]))


@pytest.mark.parametrize(
    "misuse",
    [
        lambda s: s.extend(0, "x"),
        lambda s: s.extend(7, "x"),
        lambda s: s.extend(-1, "x"),
        lambda s: s.finish(True),
        lambda s: s.finish(0),
        lambda s: s.extend(1, 5),
        lambda s: s.add("text"),
        lambda s: s.add(["fine", 5]),
    ],
)
def test_misuse_is_an_error_and_changes_nothing(tiny_artifact, misuse):
    ranker = Ranker.load(tiny_artifact)
    with ranker.session(PROMPT) as session:
        session.add(["done", Candidate("growing", finished=False)])
        before = session.rank()
        with pytest.raises(DataError):
            misuse(session)
        same(session.rank(), before)


def test_joint_tokenisation_refuses_where_the_prompt_differs():
    policy, reference, tok = tiny_pair()
    ranker = Ranker.from_models(policy, reference, tokenizer=tok, boundary="joint", string_prompt="verbatim")
    with ranker.session("abc") as session:
        try:
            session.add(["def"])
        except DataError as error:
            assert "joint" in str(error)
        else:
            same(session.rank(), ranker.rank("abc", ["def"]))


def random_texts(count, shortest, longest):
    rng = np.random.default_rng(3)
    return [
        " ".join(rng.choice(["egg", "water", "boil", "seven", "cold", "salt", "no"], rng.integers(shortest, longest))) for _ in range(count)
    ]


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_first_places_of_a_pruned_ranking_are_those_of_the_whole(ranker, top_k):
    texts = random_texts(12, 2, 40)
    whole = ranker.rank(PROMPT, texts)
    with ranker.session(PROMPT) as session:
        session.add(texts)
        kept = session.rank(top_k=top_k, prune=1e-6)
        assert len(kept) == top_k
        exact = {candidate.index: candidate.score for candidate in whole}
        for candidate in kept:
            assert candidate.score == pytest.approx(exact[candidate.index], abs=2e-5)
        assert kept.order == whole.order[:top_k]
        bold = session.rank(top_k=top_k, prune=0.45)
        assert [exact[c.index] for c in bold] == pytest.approx([c.score for c in bold], abs=2e-5)
        same(session.rank(), whole)  # what was dropped is read when all are asked for


def test_pruning_reads_fewer_tokens(tiny_artifact, monkeypatch):
    ranker = Ranker.load(tiny_artifact, precision="fp32")
    engine, read = ranker._engine, []
    monkeypatch.setattr(
        engine, "continued", lambda row, past, keep=None: read.append(row.num_tokens) or type(engine).continued(engine, row, past, keep)
    )
    texts = random_texts(24, 15, 20)
    counts = []
    for prune in (None, 0.45):
        read.clear()
        with ranker.session(PROMPT) as session:
            session.add(texts)
            session.rank(top_k=1, prune=prune)
        counts.append(sum(read))
    assert counts[1] < 0.8 * counts[0]


@pytest.mark.parametrize(("top_k", "prune"), [(None, 0.01), (0, 0.01), (1, 0.0), (1, 0.5), (1, True), (1, "0.1")])
def test_a_prune_that_cannot_be_meant(tiny_artifact, top_k, prune):
    with Ranker.load(tiny_artifact).session(PROMPT) as session:
        session.add(TEXTS)
        with pytest.raises(DataError, match="prune"):
            session.rank(top_k=top_k, prune=prune)
