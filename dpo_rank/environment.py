"""What is installed here and what of it can be used, for ``dpo-rank info``."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dpo_rank import __version__

PACKAGES = ("onnxruntime", "tokenizers", "numpy", "huggingface-hub", "torch", "transformers", "peft", "onnx", "onnxscript", "datasets")
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")


def describe() -> dict[str, Any]:
    """Versions, usable engines, and problems with their repair."""
    import onnxruntime

    from dpo_rank.scoring.graph_engine import available_cpus

    found = [name for name in ONNXRUNTIMES if _version(name)]
    problems = []
    if len(found) > 1:
        problems.append(
            f"{' and '.join(found)} overwrite each other's files. Repair: pip uninstall -y {' '.join(found)} && pip install {found[-1]}"
        )
    engines = {
        "onnx": ", ".join(onnxruntime.get_available_providers()),
        "torch": "installed" if importlib.util.find_spec("torch") else "pip install 'dpo-rank[torch]'",
        "cpus": available_cpus(),
    }
    packages = {"dpo-rank": __version__, **{name: _version(name) or "not installed" for name in PACKAGES}}
    return {"packages": packages, "engines": engines, "problems": problems}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
