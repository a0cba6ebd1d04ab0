"""Two models and an encoder as an artifact: trace once, fill in both sets of weights, verify, save."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common

from dpo_rank import artifact as artifacts
from dpo_rank.artifact import Manifest
from dpo_rank.errors import DataError, ModelError
from dpo_rank.export import card, graph, verify
from dpo_rank.export.precision import PRECISIONS
from dpo_rank.export.share import share_trunk
from dpo_rank.scoring.encode import Encoder
from dpo_rank.scoring.graph_engine import PAIR, ROLES
from dpo_rank.scoring.onnx_engine import OnnxEngine
from dpo_rank.scoring.pack import Group
from dpo_rank.scoring.pair import merged, positions, write_models
from dpo_rank.scoring.shared_trunk import same_architecture
from dpo_rank.scoring.torch_engine import TorchEngine

logger = logging.getLogger(__name__)


def export_pair(
    models: tuple[Any, Any | None],
    encoder: Encoder,
    manifest: Manifest,
    path: str | os.PathLike[str],
    *,
    precisions: Sequence[str] = ("fp32", "int8"),
    keep_models: bool = False,
    sample: Sequence[Group] = (),
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """Export a pair and save it as an artifact.

    Args:
        models: policy and reference (or a peft policy and None).
        encoder: its tokenizer is stored; its prompt format is the manifest's.
        manifest: what the artifact says of itself; figures of the precisions are added to its ``training`` facts.
        precisions: keys of `dpo_rank.export.precision.PRECISIONS`; the first is the default of the artifact.
        keep_models: store both models' weights as well.
        sample: real groups that lower precisions are compared with fp32 on; random ids where there are none.
        overwrite: replace an existing artifact.
        progress: told what is being done.

    Raises:
        ModelError: the architecture cannot be exported, or a graph does not score as torch does.

    """
    if unknown := [name for name in precisions if name not in PRECISIONS]:
        raise DataError(f"precision {unknown[0]!r} is unknown; there are {', '.join(PRECISIONS)}")
    if not precisions:
        raise DataError("no precision to export")
    pair = tuple(model if model.dtype == torch.float32 else copy.deepcopy(model).float() for model in merged(models))
    engine = TorchEngine(*pair)
    limit = positions(pair[0].config)
    with tempfile.TemporaryDirectory() as scratch:
        exact = Path(scratch) / "fp32"
        progress("tracing the graph")
        traced = _trace(*pair)
        write_graphs(traced, exact)
        progress("checking it against torch")
        fp32 = OnnxEngine(exact, "fp32", device="cpu")
        worst = verify.check_against(engine, fp32, manifest.vocabulary, limit)
        facts: dict[str, Any] = {**manifest.training, "export": {"largest_difference_nats": worst}}
        stated = replace(manifest, default_precision=precisions[0], default_precision_reason=_reason(precisions))
        groups = list(sample) or [group for row in verify.check_groups(manifest.vocabulary, limit) for group in row]

        def write(root: Path) -> None:
            for name in precisions:
                progress(f"writing {name}")
                write_graphs({role: PRECISIONS[name](model) for role, model in traced.items()}, root / "onnx" / name)
                if name != "fp32":
                    lower = OnnxEngine(root / "onnx" / name, name, device="cpu")
                    report = verify.compare_precisions(fp32, lower, groups, manifest.beta, manifest.reward, 4096)
                    facts["export"][name] = {**report.to_dict(), "rows": "held-out" if sample else "random ids"}
                    logger.info("%s against fp32: %s", name, report)
            if keep_models:
                write_models(root, models if models[1] is None else pair, encoder)
            (root / artifacts.TOKENIZER).write_text(encoder.tokenizer.to_str(), encoding="utf-8")
            (root / "README.md").write_text(card.model_card(replace(stated, training=facts), precisions), encoding="utf-8")

        return artifacts.save(path, replace(stated, training=facts), write, overwrite=overwrite)


def _reason(precisions: Sequence[str]) -> str:
    """Why the first of the precisions is the default."""
    if len(precisions) == 1:
        return "the only one here"
    if precisions[0] == "fp32":
        return "scores as the trained models do; ask for a lower precision by name where its measured noise is small enough"
    return "the first that the export was asked for"


def _trace(policy: Any, reference: Any) -> dict[str, ir.Model]:
    """A graph for each role, or one for both where they share their bottom layers."""
    first = graph.trace(policy)
    if not same_architecture(policy, reference):
        return dict(zip(ROLES, (first, graph.trace(reference)), strict=True))
    second = graph.with_weights(first, reference)
    together = share_trunk(first, second)
    return dict(zip(ROLES, (first, second), strict=True)) if together is None else {PAIR: together}


def write_graphs(models: Mapping[str, ir.Model], directory: Path) -> None:
    """Graphs as ``<role>.onnx`` with their weights beside them; nothing of the machine that traced them is kept."""
    directory.mkdir(parents=True, exist_ok=True)
    for role, model in models.items():
        plain = model.clone()
        common.ClearMetadataAndDocStringPass()(plain)
        for value in plain.graph.initializers.values():
            value.metadata_props.clear()
        common.NameFixPass()(plain)
        plain.producer_name, plain.producer_version = "dpo_rank", ""
        ir.save(plain, directory / f"{role}.onnx", external_data=f"{role}.onnx.data", size_threshold_bytes=256)
        if not (directory / f"{role}.onnx.data").is_file():
            raise ModelError(f"{role}: the graph holds no weights")
