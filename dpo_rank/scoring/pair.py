"""A policy and its reference through transformers: loading, saving, and what belongs to them (tokenizer, template, limits)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_rank.errors import ArtifactError, DataError, ModelError, UnavailableError
from dpo_rank.scoring import derive
from dpo_rank.scoring.encode import Encoder
from dpo_rank.scoring.engine import Engine
from dpo_rank.scoring.prompt_format import Renderer, StringPrompt
from dpo_rank.scoring.torch_engine import TorchEngine, pick_device, plain_models

logger = logging.getLogger(__name__)

DEFAULT_POSITIONS = 2048
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LoadedPair:
    """A pair ready to score."""

    engine: Engine
    models: tuple[Any, Any] | None
    tokenizer: Any
    max_positions: int
    vocabulary: int
    name: str


def load_pair(
    policy: Any,
    reference: Any | None,
    *,
    tokenizer: Any | None,
    revision: str | None,
    reference_revision: str | None,
    token: str | bool | None,
    local_files_only: bool,
    device: str,
    dtype: Any,
    model_kwargs: Mapping[str, Any],
) -> LoadedPair:
    """Load what is given by path or id, and check that the two are a pair.

    Raises:
        DataError: model objects without a tokenizer.
        ModelError: no pair; the message says why.

    """
    if model_kwargs.get("trust_remote_code"):
        raise DataError("trust_remote_code=True is refused: code from a model repository is never run")
    by_name = isinstance(policy, (str, os.PathLike))
    hub = {"token": token, "local_files_only": local_files_only}
    if tokenizer is None:
        if not by_name:
            raise DataError("tokenizer is required when models are given: pass the one that the policy was trained with")
        tokenizer = load_tokenizer(policy, revision=revision, **hub)
    name = str(policy) if by_name else str(getattr(policy.config, "_name_or_path", "") or type(policy).__name__)
    if by_name and is_onnx_decoder(Path(policy)):
        from dpo_rank.scoring.optimum_engine import OptimumEngine

        if reference is None or not is_onnx_decoder(Path(reference)):
            raise ModelError("the policy is an exported ONNX decoder: its reference must be one too")
        decoders = OptimumEngine(Path(policy), Path(reference))
        return LoadedPair(decoders, None, tokenizer, positions(decoders.config), int(decoders.config.vocab_size), name)
    where = pick_device(device)
    kwargs = {**hub, **model_kwargs}
    policy = load_model(policy, where, dtype, revision=revision, **kwargs)
    reference = None if reference is None else load_model(reference, where, dtype, revision=reference_revision, **kwargs)
    engine = TorchEngine(policy, reference)
    config = plain_models(policy, reference)[0].config
    return LoadedPair(engine, (policy, reference), tokenizer, positions(config), int(config.vocab_size), name)


def is_onnx_decoder(path: Path) -> bool:
    """Whether ``path`` is a directory of a plain decoder exported to ONNX."""
    return path.is_dir() and any(path.glob("*.onnx")) and not any(path.glob("*.safetensors"))


def load_model(model: Any, device: torch.device, dtype: Any, **kwargs: Any) -> Any:
    """A model by path or id (safetensors only, no remote code), or the given one as it is."""
    if not isinstance(model, (str, os.PathLike)):
        return model
    path = os.fspath(model)
    try:
        if Path(path, "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            loaded = AutoPeftModelForCausalLM.from_pretrained(path, dtype=DTYPES.get(dtype, dtype), **kwargs)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES.get(dtype, dtype), use_safetensors=True, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"model {path} cannot be loaded: {error}") from error
    return loaded.to(device).eval()


def load_tokenizer(path: Any, **kwargs: Any) -> Any:
    """The fast tokenizer of a path or id.

    Raises:
        ModelError: there is none.

    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(path), **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"tokenizer of {path} cannot be loaded: {error}") from error
    tokenizer_json(tokenizer)
    return tokenizer


def tokenizer_json(tokenizer: Any) -> str:
    """The ``tokenizer.json`` of a transformers tokenizer.

    Raises:
        ModelError: it is a slow one, which has none.

    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise ModelError(f"{type(tokenizer).__name__} is no fast tokenizer: convert it with AutoTokenizer.from_pretrained(...)")
    return str(backend.to_str())


def renderer(tokenizer: Any, string: StringPrompt | None) -> Renderer:
    """The tokenizer's format as data, or its own template where no data equals it."""
    try:
        return derive.prompt_format(tokenizer, string)
    except derive.CannotExpressError as error:
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(str(error)) from None
        logger.warning("the chat template is used as it is, by the torch engine only (no save, no export): %s", error)
        return derive.TemplateRenderer(tokenizer, string or "user_turn", reason=str(error))


def positions(config: Any) -> int:
    """How many positions a model reads: learned embeddings or the length its rotary embedding was made for."""
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 1:
            return value
    return DEFAULT_POSITIONS


def write_models(root: Path, models: tuple[Any, Any | None], encoder: Encoder) -> None:
    """``policy/`` (or, for a peft policy alone, ``adapter/``), ``reference/`` and the tokenizer, as `load_from_artifact` reads them."""
    policy, reference = models
    if reference is None and hasattr(policy, "peft_config"):
        policy.save_pretrained(root / "adapter")
        (root / "adapter" / "README.md").unlink(missing_ok=True)  # the artifact has its own
        settings = root / "adapter" / "adapter_config.json"
        content = json.loads(settings.read_text(encoding="utf-8")) | {"base_model_name_or_path": "../reference"}
        settings.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
        policy, reference = None, merged(models)[1]
    else:
        policy, reference = merged(models)
    for name, model in (("policy", policy), ("reference", reference)):
        if model is not None:
            model.save_pretrained(root / name)
    (root / "tokenizer.json").write_text(encoder.tokenizer.to_str(), encoding="utf-8")


def merged(models: tuple[Any, Any | None]) -> tuple[Any, Any]:
    """Two plain models: adapters of a peft policy merged into a copy of its base."""
    policy, reference = models
    if not hasattr(policy, "peft_config"):
        if reference is None:
            raise ModelError("a reference is needed")
        return policy, reference
    import copy

    base = copy.deepcopy(policy).unload() if reference is None else reference
    return copy.deepcopy(policy).merge_and_unload(), base


def load_from_artifact(root: Path, device: torch.device | None = None, dtype: Any = "auto") -> tuple[Any, Any | None]:
    """The models of an artifact that was loaded (and so checked) from ``root``: two, or a peft policy over its base.

    Raises:
        ArtifactError: it holds none.

    """
    where = device or torch.device("cpu")
    if not (root / "reference" / "config.json").is_file():
        raise ArtifactError("reference/config.json: is missing")
    reference = load_model(root / "reference", where, dtype)
    if (root / "adapter" / "adapter_model.safetensors").is_file():
        from peft import PeftModel

        return PeftModel.from_pretrained(reference, root / "adapter").eval(), None
    if not (root / "policy" / "config.json").is_file():
        raise ArtifactError("policy/config.json: is missing")
    return load_model(root / "policy", where, dtype), reference


def engine_from_artifact(root: Path, device: str, precision: str) -> Engine:
    """The torch engine over an artifact's models."""
    if precision not in ("auto", *DTYPES):
        raise UnavailableError(f"precision {precision!r} is unknown to the torch engine; it has {', '.join(DTYPES)}")
    return TorchEngine(*load_from_artifact(root, pick_device(device), DTYPES.get(precision, "auto")))
