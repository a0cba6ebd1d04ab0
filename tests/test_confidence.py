"""What a ranker knows of its errors: kept in the artifact, told by every ranking, the same through every way of ranking."""

import math
import pickle

import numpy as np
import pytest

from dpo_rank import DataError, Ranker
from dpo_rank.confidence import Confidence, Level
from dpo_rank.data.synthetic import lists
from dpo_rank.errors import UnavailableError
from dpo_rank.ranking import Candidate, make_ranking


@pytest.fixture(scope="module")
def calibrated(tiny_artifact, tmp_path_factory):
    ranker = Ranker.load(tiny_artifact)
    report = ranker.calibrate(list(lists(60)), correction=True)
    path = ranker.save(tmp_path_factory.mktemp("calibrated") / "ranker")
    return path, report


def test_it_survives_the_disk_and_a_pickle(calibrated):
    path, report = calibrated
    loaded = Ranker.load(path)
    for ranker in (loaded, pickle.loads(pickle.dumps(loaded))):
        assert ranker.manifest.confidence == report.confidence
        assert ranker.manifest.familiarity == report.familiarity
        assert ranker.manifest.correction == report.correction
    assert report.confidence.num_prompts == 60
    assert report.confidence.num_candidates == 5


def test_what_was_fitted_after_loading_survives_a_pickle(tiny_artifact):
    ranker = Ranker.load(tiny_artifact)
    ranker.calibrate(list(lists(30)), correction=True)
    again = pickle.loads(pickle.dumps(ranker))
    assert again.manifest == ranker.manifest
    assert len(pickle.dumps(ranker)) < 6000  # a path and what was fitted, no files
    assert again.rank("a", ["x", "y"]).confident(0.99) == ranker.rank("a", ["x", "y"]).confident(0.99)


def test_a_ranking_is_confident_where_its_margin_is():
    sure = Confidence((Level(2.0, 50, 0), Level(1.0, 100, 30)), 100, 2)
    candidates = [Candidate("a"), Candidate("b")]

    def ranked(*scores):
        return make_ranking(candidates, scores, [1, 1], [False, False], temperature=1, calibrated=True, confidence=sure)

    assert sure.threshold(0.1) == 2.0
    assert ranked(3.0, 0.5).confident(0.1)
    assert not ranked(2.0, 0.5).confident(0.1)
    assert ranked(2.0, 0.5).confident(0.5)
    assert not ranked(9.0, 0.0).confident(0.01)
    assert ranked(9.0, 0.0).margin == 9.0
    with pytest.raises(DataError, match="between 0 and 1"):
        ranked(1, 0).confident(2)
    plain = make_ranking(candidates, [1, 0], [1, 1], [False, False], temperature=1, calibrated=False)
    with pytest.raises(DataError, match="dpo-rank calibrate"):
        plain.confident()


def test_top_k_does_not_change_the_margin(calibrated):
    ranker = Ranker.load(calibrated[0])
    whole, first = (ranker.rank("a", ["x", "y z", "z"], top_k=k) for k in (None, 1))
    assert first.margin == whole.margin == pytest.approx(whole[0].score - whole[1].score)
    assert ranker.rank("a", ["x"]).margin == math.inf
    assert ranker.rank("a", ["x"]).to_dict()["margin"] is None


def test_the_correction_is_off_unless_asked_for(calibrated, tiny_artifact):
    path, report = calibrated
    plain, fixed = Ranker.load(path), Ranker.load(path, correction=True)
    answers = ["x", "y z z y x x y", "z " * 40]
    tokens = [c.num_tokens for c in sorted(plain.rank("a", answers), key=lambda c: c.index)]
    expected = plain.score("a", answers) - report.correction.of(np.array(tokens))
    assert fixed.score("a", answers) == pytest.approx(expected, abs=1e-5)
    assert fixed.temperature == report.correction.temperature
    assert fixed.confidence == report.correction.confidence
    assert plain.confidence == report.confidence
    with pytest.raises(UnavailableError, match="calibrate --correction"):
        Ranker.load(tiny_artifact, correction=True)


def test_every_way_of_ranking_is_corrected_alike(calibrated):
    fixed = Ranker.load(calibrated[0], correction=True)
    answers = ["x", "y z z y x x y", "z " * 40]
    scores = fixed.score("a", answers)
    with fixed.session("a") as session:
        session.add(answers)
        for prune in (None, 0.01):
            ranking = session.rank(top_k=3, prune=prune)
            assert {c.index: c.score for c in ranking}[ranking.best.index] == pytest.approx(scores[ranking.best.index], abs=1e-5)
            assert ranking.best.index == int(np.argmax(scores))
            assert ranking.unfamiliar is not None
    for index, answer in enumerate(answers):
        assert sum(token.contribution for token in fixed.explain("a", answer)) == pytest.approx(scores[index], abs=1e-5)
    assert fixed.compare("a", answers[0], answers[1]) == pytest.approx(
        1 / (1 + np.exp(-(scores[0] - scores[1]) / fixed.temperature)), abs=1e-5
    )


def test_saving_a_corrected_ranker_keeps_both_temperatures(calibrated, tmp_path):
    path, report = calibrated
    fixed = Ranker.load(path, correction=True)
    again = Ranker.load(fixed.save(tmp_path / "again"))
    assert again.temperature == report.temperature
    assert again.manifest.correction == report.correction


def test_without_measurement_it_says_nothing(tiny_artifact):
    ranking = Ranker.load(tiny_artifact).rank("a", ["x", "y"])
    assert ranking.unfamiliar is None
    assert ranking.confidence is None
    assert ranking.to_dict()["unfamiliar"] is None


def test_the_card_says_what_was_measured(tiny_artifact, calibrated):
    before, after = ((path / "README.md").read_text(encoding="utf-8") for path in (tiny_artifact, calibrated[0]))
    assert "| sure enough | not measured |" in before
    assert "not measured" not in after
    assert "of 60 held-out rankings" in after
    assert after.count("| sure enough |") == after.count("| temperature |") == 1
