"""From a path or hub id to an artifact's directory, and from an artifact to the engine that runs it."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_rank.artifact import Artifact
from dpo_rank.errors import ArtifactError, MissingExtraError, UnavailableError
from dpo_rank.scoring.engine import Engine

logger = logging.getLogger(__name__)

STARTER = Path(__file__).parent / "starter"


@functools.cache
def say_what_the_starter_is() -> None:
    """Warn once a process that the ranker without a name is a very small one."""
    logger.warning(
        "Ranker.load() uses the embedded starter: a very small model that tells broken answers (cut off, looping, off the "
        "topic, garbled, needless refusals) from whole ones and, a little, harmful from harmless. Between two good answers it "
        'knows little. Load or train a ranker of your own; Ranker.load("starter") does not say this.'
    )


def locate(
    path_or_hub_id: str | os.PathLike[str] | None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    """The artifact's directory; a hub snapshot is fetched as plain files."""
    if path_or_hub_id is None or path_or_hub_id == "starter":
        return STARTER
    path = Path(path_or_hub_id).expanduser()
    if path.exists():
        return path
    name = str(path_or_hub_id)
    parts = name.split("/")
    if not isinstance(path_or_hub_id, str) or len(parts) != 2 or not all(parts) or name.startswith((".", "~")):
        raise ArtifactError(f"{name}: no such directory (a hub id has the form owner/name)")
    from huggingface_hub import snapshot_download

    cache = Path(cache_dir) if cache_dir else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dpo_rank"
    target = cache / name.replace("/", "--") / (revision or "main").replace("/", "--")
    if local_files_only and not target.is_dir():
        raise ArtifactError(f"{name}: not in the cache ({target}), and local_files_only forbids to fetch it")
    try:
        snapshot_download(name, revision=revision, token=token, local_dir=target, local_files_only=local_files_only)
    except Exception as error:  # huggingface_hub raises its own, requests' and OS errors
        raise ArtifactError(f"{name}: no such directory, and the hub does not give it: {error}") from error
    return target


def open_engine(
    artifact: Artifact, engine: str, device: str, precision: str, threads: int | None, providers: Sequence[Any] | None
) -> Engine:
    """The engine asked for, or the first usable one."""
    if engine not in ("auto", "onnx", "openvino", "torch"):
        raise UnavailableError(f"engine {engine!r} is unknown: there are 'auto', 'onnx', 'openvino' and 'torch'")
    manifest = artifact.manifest
    if not manifest.precisions and not manifest.has_models:
        raise ArtifactError("the artifact holds neither graphs nor models")
    wants_torch = engine == "torch" or (engine == "auto" and not manifest.precisions)
    if engine == "auto" and manifest.has_models and device != "cpu" and providers is None and not wants_torch:
        wants_torch = _cuda_without_onnx(device)
    if wants_torch:
        if not manifest.has_models:
            raise UnavailableError("engine 'torch': this artifact holds no models for it, only graphs")
        pair = pair_module("the torch engine")
        chosen: Engine = pair.engine_from_artifact(artifact.root, device, precision)
        return chosen
    if not manifest.precisions:
        raise UnavailableError(f"engine {engine!r}: this artifact holds no graphs; `dpo-rank export` makes them")
    if engine == "openvino":
        return _openvino(artifact, device, precision, threads)
    from dpo_rank.scoring.onnx_engine import OnnxEngine

    if precision == "auto":
        precision = manifest.default_precision
    if precision not in manifest.precisions:
        raise UnavailableError(f"precision {precision!r} is not in this artifact; it holds {', '.join(manifest.precisions)}")
    return OnnxEngine(artifact.root / "onnx" / precision, precision, threads=threads, device=device, providers=providers)


def _openvino(artifact: Artifact, device: str, precision: str, threads: int | None) -> Engine:
    from dpo_rank.scoring.openvino_engine import PRECISIONS, OpenVinoEngine

    precision = "fp32" if precision == "auto" else precision
    if device not in ("auto", "cpu"):
        raise UnavailableError(f"device {device!r}: engine 'openvino' runs on the CPU")
    if precision not in PRECISIONS or "fp32" not in artifact.manifest.precisions:
        raise UnavailableError(f"precision {precision!r}: engine 'openvino' runs fp32 graphs in {' or '.join(PRECISIONS)}")
    return OpenVinoEngine(artifact.root / "onnx" / "fp32", precision, threads=threads)


def _cuda_without_onnx(device: str) -> bool:
    """Whether torch has a GPU and onnxruntime has none."""
    import onnxruntime

    from dpo_rank.scoring.onnx_engine import GPU_PROVIDERS

    if any(name in onnxruntime.get_available_providers() for name in GPU_PROVIDERS):
        return False
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available()) and (device == "auto" or device.startswith("cuda"))


def pair_module(what: str) -> Any:
    """`dpo_rank.scoring.pair`, which needs torch and transformers."""
    try:
        from dpo_rank.scoring import pair
    except ImportError:
        raise MissingExtraError(what, "torch") from None
    return pair
