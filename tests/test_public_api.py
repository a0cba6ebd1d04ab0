"""Every public name and signature: a change here is a change for users, and needs an entry in CHANGELOG.md."""

import inspect

import dpo_rank
from dpo_rank import Candidate, Ranker, Ranking, Session
from dpo_rank.ranking import RankedCandidate

NAMES = [
    "ArtifactError",
    "Candidate",
    "DataError",
    "DpoRankError",
    "EmptyRankingError",
    "EncodingError",
    "MissingExtraError",
    "ModelError",
    "NonFiniteScoreError",
    "RankedCandidate",
    "Ranker",
    "Ranking",
    "Session",
    "TokenContribution",
    "UnavailableError",
]

SIGNATURES = {
    "load": (
        "path_or_hub_id=None, *, revision=None, token=None, cache_dir=None, local_files_only=False, engine='auto', device='auto', "
        "precision='auto', threads=None, providers=None, token_budget=None, correction=False"
    ),
    "from_models": (
        "policy, reference=None, *, tokenizer=None, beta=0.1, reward='sum', string_prompt=None, boundary='split', revision=None, "
        "reference_revision=None, token=None, local_files_only=False, device='auto', dtype='auto', model_kwargs=None"
    ),
    "rank": "self, prompt, candidates, *, top_k=None, passages=None",
    "rank_many": "self, prompts, candidate_lists, *, top_k=None, passages=None",
    "score": "self, prompt, candidates, *, passages=None",
    "score_many": "self, prompts, candidate_lists, *, passages=None",
    "compare": "self, prompt, a, b",
    "best_of_n": "self, prompt, generate, n=8",
    "abest_of_n": "self, prompt, agenerate, n=8",
    "arank": "self, prompt, candidates, *, top_k=None, passages=None",
    "ascore": "self, prompt, candidates, *, passages=None",
    "session": "self, prompt, passages=None",
    "explain": "self, prompt, candidate, *, passages=None",
    "calibrate": "self, rows, *, correction=False",
    "save": "self, path, overwrite=False",
    "export": "self, path, precisions=('fp32', 'int8'), *, overwrite=False",
    "push_to_hub": "self, repo_id, private=True, token=None",
}


def plain(function):
    signature = inspect.signature(function)
    parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))[1:-1]


def test_names():
    assert sorted(dpo_rank.__all__) == sorted(NAMES)
    assert all(getattr(dpo_rank, name) is not None for name in NAMES)
    errors = [getattr(dpo_rank, name) for name in NAMES if name.endswith("Error")]
    assert all(issubclass(error, dpo_rank.DpoRankError) for error in errors)


def test_signatures_of_the_ranker():
    assert {name: plain(getattr(Ranker, name)) for name in SIGNATURES} == SIGNATURES
    for name in ("engine", "device", "precision", "beta"):
        assert isinstance(inspect.getattr_static(Ranker, name), property)


def test_signatures_of_a_session():
    expected = {
        "add": "self, candidates",
        "extend": "self, index, more_text",
        "finish": "self, index",
        "rank": "self, top_k=None, prune=None",
    }
    assert {name: plain(getattr(Session, name)) for name in expected} == expected


def test_value_types():
    assert plain(Candidate) == "text, *, id=None, metadata=None, finished=True"
    assert RankedCandidate.__slots__ == ("index", "id", "text", "metadata", "score", "probability", "num_tokens", "truncated", "finished")
    for name in ("best", "order", "calibrated", "near_tie", "to_dict"):
        assert hasattr(Ranking, name)


def test_everything_is_documented_and_typed():
    for name in SIGNATURES:
        method = getattr(Ranker, name)
        assert method.__doc__
        assert inspect.signature(method).return_annotation is not inspect.Signature.empty
