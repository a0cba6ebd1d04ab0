"""Pairs exported as plain ONNX decoders by optimum, scored by the padded batch."""

import numpy as np
import pytest

from dpo_rank import Ranker
from tests.artifacts import tiny_pair
from tests.cases import ANSWERS, PROMPT

pytestmark = pytest.mark.models
ort = pytest.importorskip(
    "optimum.onnxruntime", reason="optimum-onnx needs transformers below 4.58; .ci/run has it in its second environment"
)


@pytest.mark.parametrize("cache", [True, False])
def test_exported_decoders_score_as_the_models(tmp_path, cache):
    policy, reference, tok = tiny_pair()
    for name, model in (("policy", policy), ("reference", reference)):
        model.save_pretrained(tmp_path / "torch" / name)
        exported = ort.ORTModelForCausalLM.from_pretrained(tmp_path / "torch" / name, export=True, use_cache=cache, use_io_binding=False)
        exported.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
    ranker = Ranker.from_models(tmp_path / "policy", tmp_path / "reference")
    assert ranker.engine == "onnx"
    expected = Ranker.from_models(policy, reference, tokenizer=tok).score(PROMPT, ANSWERS)
    np.testing.assert_allclose(ranker.score(PROMPT, ANSWERS), expected, atol=1e-4)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    np.testing.assert_allclose(
        ranker.score(messages, ANSWERS[:1]), Ranker.from_models(policy, reference, tokenizer=tok).score(messages, ANSWERS[:1]), atol=1e-4
    )
