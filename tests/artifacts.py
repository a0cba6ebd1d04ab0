"""Tiny artifacts made in the test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_rank import Ranker
from dpo_rank.export.pair import export_pair
from dpo_rank.scoring.prompt_format import PassageFormat
from tests.models import tiny
from tests.toks import tokenizer


def tiny_pair(name: str = "llama", tok: Any = None, **changes: Any) -> tuple[Any, Any, Any]:
    """Policy, reference and tokenizer."""
    tok = tok or tokenizer()
    size = {"vocab_size": len(tok), **changes}
    return tiny(name, **size), tiny(name, seed=1, **size), tok


def export_tiny(path: Path, name: str = "llama", precisions: tuple[str, ...] = ("fp32", "int8")) -> Path:
    """An artifact of a tiny pair, both models and a passage format in it."""
    policy, reference, tok = tiny_pair(name)
    ranker = Ranker.from_models(policy, reference, tokenizer=tok)
    manifest = replace(ranker.manifest, name="tiny", passage_format=PassageFormat())
    return export_pair((policy, reference), ranker._encoder, manifest, path, precisions=precisions, keep_models=True)
