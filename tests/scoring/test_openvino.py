"""OpenVINO runs the same graphs: fp32 as onnxruntime does, bf16 batch-invariant and near."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dpo_rank import ArtifactError, Ranker, UnavailableError

pytest.importorskip("openvino", reason="the openvino extra is not installed")
pytestmark = pytest.mark.models
PROMPT = "How do I boil an egg?"
ANSWERS = ["Put it in water for seven minutes.", "No.", "Boil it. Then cool it under cold water.", "Egg egg egg."]


def test_fp32_scores_as_onnxruntime(tiny_artifact):
    ours = Ranker.load(tiny_artifact, engine="openvino")
    assert (ours.engine, ours.precision, ours.device) == ("openvino", "fp32", "cpu")
    theirs = Ranker.load(tiny_artifact, engine="onnx", precision="fp32")
    prompts = [PROMPT, "x", "Why?"]
    for budget in (4096, 40):
        ours.token_budget = budget
        for a, b in zip(ours.score_many(prompts, [ANSWERS] * 3), theirs.score_many(prompts, [ANSWERS] * 3), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_bf16_does_not_depend_on_the_batch_by_more_than_its_own_noise(tiny_artifact):
    exact = Ranker.load(tiny_artifact, precision="fp32").score(PROMPT, ANSWERS)
    ranker = Ranker.load(tiny_artifact, engine="openvino", precision="bf16")
    together = ranker.score(PROMPT, ANSWERS)
    noise = np.median(np.abs(together - exact))
    assert 0 < noise < 0.1
    alone = [ranker.score(PROMPT, [answer])[0] for answer in ANSWERS]
    np.testing.assert_allclose(alone, together, atol=noise)


def test_sessions_and_threads(tiny_artifact):
    ranker = Ranker.load(tiny_artifact, engine="openvino")
    expected = ranker.score(PROMPT, ANSWERS)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: ranker.score(PROMPT, ANSWERS), range(16)):
            np.testing.assert_array_equal(found, expected)
    with ranker.session(PROMPT) as session:
        session.add(ANSWERS[:2])
        session.rank()
        session.add(ANSWERS[2:])
        found = {candidate.index: candidate.score for candidate in session.rank()}
    np.testing.assert_allclose([found[index] for index in range(4)], expected, atol=1e-5)


def test_what_it_cannot_run_is_refused_by_name(tiny_artifact, tmp_path):
    for options, word in (({"precision": "int8"}, "int8"), ({"device": "cuda"}, "cuda")):
        with pytest.raises(UnavailableError, match=word):
            Ranker.load(tiny_artifact, engine="openvino", **options)
    from dpo_rank.scoring.openvino_engine import OpenVinoEngine

    for role in ("policy", "reference"):
        (tmp_path / f"{role}.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match="OpenVINO cannot load it"):
        OpenVinoEngine(tmp_path, "fp32")
