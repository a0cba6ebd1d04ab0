"""Settings of a run from a file and from the command line."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_rank.errors import DataError
from dpo_rank.training.config import DPOConfig


def read_settings(file: Path | None, assignments: Iterable[str], options: Mapping[str, Any]) -> DPOConfig:
    """The settings of a TOML or YAML file, ``NAME=VALUE`` assignments and options; the later win.

    Raises:
        DataError: the file cannot be read, or holds a name that is no setting.

    """
    found: dict[str, Any] = {} if file is None else dict(_content(file))
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise DataError(f"--set {text!r}: expected NAME=VALUE")
        found[name.strip()] = _value(value.strip())
    found |= options
    known = {item.name for item in dataclasses.fields(DPOConfig) if item.init}
    if unknown := sorted(found.keys() - known):
        raise DataError(f"{unknown[0]!r} is no setting; DPOConfig and transformers.TrainingArguments name those there are")
    try:
        return DPOConfig(**found)
    except (TypeError, ValueError) as error:
        raise DataError(f"settings: {error}") from error


def _content(file: Path) -> Mapping[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    try:
        if file.suffix == ".toml":
            content: Any = tomllib.loads(text)
        elif file.suffix in (".yaml", ".yml"):
            import yaml

            content = {name: _value(value) if isinstance(value, str) else value for name, value in (yaml.safe_load(text) or {}).items()}
        else:
            raise DataError(f"{file}: settings are .toml, .yaml or .yml")
    except DataError:
        raise
    except Exception as error:  # tomllib and yaml raise errors of their own, and a list has no items
        raise DataError(f"{file}: {error}") from error
    return dict(content)


def _value(text: str) -> Any:
    """A number, true, false, null, a list or an object as JSON writes it, else the text. (YAML takes 1e-4 for a text.)"""
    try:
        return json.loads(text)
    except ValueError:
        return text


def adapter(rank: int) -> Any:
    """LoRA on every linear layer of the trunk.

    Raises:
        DataError: no rank.

    """
    from peft import LoraConfig

    if rank < 1:
        raise DataError(f"lora is the adapters' rank, at least 1, not {rank}")
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
