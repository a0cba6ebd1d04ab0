"""A whole evaluation: what it holds, what its report shows, the baselines and the changes that should not matter."""

import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from dpo_rank import DataError, Ranker
from dpo_rank.data.formats import parse
from dpo_rank.data.synthetic import lists
from dpo_rank.data.synthetic import pairs as synthetic_pairs
from dpo_rank.evaluation.baselines import ClassifierScorer, CrossEncoderScorer, Scored, bm25, by_name, by_parts, by_rules
from dpo_rank.evaluation.ensemble import Ensemble
from dpo_rank.evaluation.evaluate import assemble, evaluate
from dpo_rank.evaluation.report import headline, summary, write_report
from dpo_rank.evaluation.robustness import robustness


@pytest.fixture(scope="module")
def ranker(tiny_artifact):
    return Ranker.load(tiny_artifact)


@pytest.fixture(scope="module")
def rows():
    return [parse({**row, "subset": str(n % 2)}, f"rows:{n}") for n, row in enumerate(lists(34))]


@pytest.fixture(scope="module")
def found(ranker, rows):
    return evaluate(ranker, rows, "rows", others=["tests.evaluation.test_evaluate:prefer_a", "no.such.module:f"], train=rows[:2])


def prefer_a(prompts, candidate_lists, *, passages=None):
    return [[text.count("a") for text in candidates] for candidates in candidate_lists]


def test_the_scores_are_the_rankers(found, ranker, rows):
    direct = ranker.score_many([r.prompt for r in rows], [r.candidates for r in rows])
    for ours, theirs in zip(found.scores, direct, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_baselines_stand_beside_it(found):
    names = [report.name for report in found.reports]
    assert names[0] == "tiny"
    assert {
        "longest",
        "shortest",
        "random",
        "policy log-prob, sum",
        "reference log-prob, sum",
        "tests.evaluation.test_evaluate:prefer_a",
    } <= set(names)
    [missing] = [item for item in found.scored if item.problem]
    assert missing.name == "no.such.module:f"
    assert "imported" in missing.problem
    assert all(item.ms_a_prompt is not None for item in found.scored[:5])
    for comparison, report in zip(found.comparisons, found.reports[1:], strict=True):
        assert comparison.agreement.value == pytest.approx(found.reports[0].agreement.value - report.agreement.value)


def test_policy_and_reference_log_probs_differ_by_the_reward(ranker, rows):
    tokens = ranker.log_probs_many([r.prompt for r in rows], [r.candidates for r in rows])
    parts = {item.name: item.scores for item in by_parts(rows, tokens, ranker.beta, "sum")}
    for row, items in enumerate(tokens):
        gap = ranker.beta * (parts["policy log-prob, sum"][row] - parts["reference log-prob, sum"][row])
        assert gap == pytest.approx([ranker.reward(item) for item in items], abs=1e-6)


def test_leaked_rows_and_few_rows_are_said(found, ranker, rows):
    assert found.leaked == ["rows:0", "rows:1"]
    assert "trained on" in found.warnings[0]
    small = evaluate(ranker, rows[:3], "rows", perturb=False)
    assert "too few" in small.warnings[0]


def test_order_and_batch_move_nothing(found):
    moved = {movement.name: movement for movement in found.movements}
    assert moved["order of the candidates"].moved < 1e-4
    assert moved["order of the candidates"].same_best == 1
    assert moved["scored alone, not in a batch"].moved < 1e-4
    assert moved["a bold lead"].moved > 0


def test_paraphrases_of_a_row_are_tried(ranker, rows):
    told = [parse({**row.raw, "paraphrases": [c.text for c in row.candidates]}) for row in rows[:3]]
    [*_, last] = robustness(ranker, told)
    assert (last.name, last.moved, last.same_best) == ("a paraphrase", 0.0, 1.0)
    with pytest.raises(DataError, match="paraphrases"):
        robustness(ranker, [parse({**rows[0].raw, "paraphrases": ["x"]})])


class Tags(HTMLParser):
    """Checks that tags close in order, and collects addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_page_that_needs_no_network(found, ranker, tmp_path):
    hostile = replace(found, source="<script>alert(1)</script>")
    page = write_report(hostile, tmp_path / "out", lambda e, i: ranker.explain(e.prompt, e.candidates[i]), "dpo-rank evaluate")
    text = page.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert all(address.startswith("data:") for address in tags.addresses)
    assert len(tags.addresses) >= 5
    assert "<script>" not in text
    shown = "".join(tags.text)
    for words in ("Beside what could embarrass it", "Is it only counting words?", "How sure is it?", "Where it disagrees most", "Lists"):
        assert words in shown
    assert f"{found.reports[0].agreement.value:.1%}" in shown
    data = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert data["reports"][0]["agreement"]["value"] == found.reports[0].agreement.value
    assert len(data["facts"]["artifact"]) == 64
    lines = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["where"] for line in lines] == [row.where for row in found.examples]
    assert headline(hostile) in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")


def test_rankings_without_a_model_get_the_same_agreement(found, rows):
    given = assemble(Scored("given", found.scores), by_rules(rows), rows, "rows")
    assert given.reports[0].agreement == found.reports[0].agreement
    assert given.sureness is None
    assert given.name in summary(given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "no rows"),
        ([{"prompt": "p", "completion": "a", "label": True}], "single answer"),
        ([{"prompt": "p", "completions": ["a", "b"], "scores": [1, 1]}], "tied"),
    ],
)
def test_rows_that_measure_nothing_say_why(ranker, given, words):
    with pytest.raises(DataError, match=words):
        evaluate(ranker, [parse(row) for row in given], "rows")


def test_bm25_by_hand():
    [scores] = bm25([parse({"prompt": "red river", "completions": ["the red river", "the blue sky", "red"], "scores": [1, 0, 0]})])
    assert scores[1] == 0
    assert scores[0] > scores[2] > 0
    # "red" occurs in two of three answers, "river" in one; lengths 3, 3 and 1 of a mean of 7/3.
    red, river = np.log(1 + 1.5 / 2.5), np.log(1 + 2.5 / 1.5)
    assert scores[0] == pytest.approx((red + river) * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 3 / (7 / 3))), rel=1e-5)


def test_an_ensemble_is_cautious_where_its_members_differ(ranker):
    from tests.artifacts import tiny_pair

    policy, reference, tok = tiny_pair("gpt2")
    other = Ranker.from_models(policy, reference, tokenizer=tok)
    other.temperature = 0.5
    prompts, answers = ["a", "b c"], [["x", "y z"], ["z", "x x x", "y"]]
    both = [r.score_many(prompts, answers) for r in (ranker, other)]
    cautious, mean = (Ensemble([ranker, other], k).score_many(prompts, answers) for k in (2.0, 0.0))
    spread = Ensemble([ranker, other]).disagreement_many(prompts, answers)
    for row in range(2):
        centred = np.stack([(s[row] - s[row].mean()) / r.temperature for s, r in zip(both, (ranker, other), strict=True)])
        assert mean[row] == pytest.approx(centred.mean(axis=0), abs=1e-5)
        assert spread[row] == pytest.approx(centred.std(axis=0), abs=1e-5)
        assert cautious[row] == pytest.approx(mean[row] - 2 * spread[row], abs=1e-5)
    with pytest.raises(DataError, match="two members"):
        Ensemble([ranker])


@pytest.mark.models
def test_a_classifier_scores_one_text_at_a_time_as_in_a_batch():
    transformers = pytest.importorskip("transformers", reason="the dev extra installs transformers")
    from tests.models import tiny
    from tests.toks import tokenizer

    tok = tokenizer()
    tok.pad_token = tok.pad_token or tok.eos_token
    config = tiny("llama", vocab_size=len(tok)).config
    config.num_labels, config.pad_token_id = 1, tok.pad_token_id
    scorer = ClassifierScorer(transformers.AutoModelForSequenceClassification.from_config(config).eval(), tok)
    rows = [parse(row) for row in synthetic_pairs(4)]
    together = scorer.score_many([r.prompt for r in rows], [r.candidates for r in rows])
    for row, scores in zip(rows, together, strict=True):
        for candidate, score in zip(row.candidates, scores, strict=True):
            [[alone]] = scorer.score_many([row.prompt], [[candidate]])
            assert score == pytest.approx(alone, abs=1e-5)
    config.num_labels = 2
    with pytest.raises(DataError, match="2 outputs"):
        ClassifierScorer(transformers.AutoModelForSequenceClassification.from_config(config), tok)


def test_a_cross_encoder_gets_prompt_and_answer():
    class Model:
        def predict(self, pairs, show_progress_bar):
            return np.array([len(prompt) + 100 * len(answer) for prompt, answer in pairs])

    rows = [parse({"prompt": "ab", "completions": ["x", "yy"], "scores": [1, 0], "passages": [{"text": "cd"}]})]
    [scores] = CrossEncoderScorer(Model()).score_many(["ab"], [rows[0].candidates], passages=[rows[0].passages])
    assert scores.tolist() == [105, 205]


def test_specs_of_baselines():
    with pytest.raises(DataError, match="expected cross-encoder:ID"):
        by_name("longest", [])
    rows = [parse(row) for row in synthetic_pairs(2)]
    assert by_name("reward-model:/no/such/model", rows).problem
    assert by_name("ranker:/no/such/ranker", rows).problem == "/no/such/ranker: no such directory (a hub id has the form owner/name)"
    assert by_name("ensemble:starter", rows).problem == "an ensemble has at least two members"
    one, twice = by_name("ranker:starter", rows), by_name("ensemble:starter,starter", rows)
    for alone, both in zip(one.scores, twice.scores, strict=True):  # no disagreement: the scores in other units
        assert both == pytest.approx((alone - alone.mean()) / Ranker.load("starter").temperature, abs=1e-5)
