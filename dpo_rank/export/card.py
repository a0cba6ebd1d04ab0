"""The model card of an artifact: what the manifest knows, in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dpo_rank.artifact import Manifest


def model_card(manifest: Manifest, precisions: Sequence[str]) -> str:
    """``README.md`` of an artifact, with the hub's metadata on top."""
    facts = manifest.training
    base = facts.get("base_model", "")
    head = ["---", "pipeline_tag: text-ranking", "library_name: dpo-rank"]
    head += [f"base_model: {base}"] if isinstance(base, str) and base.count("/") == 1 and not base.startswith((".", "/")) else []
    head += [f"license: {facts['license']}"] if facts.get("license") else []
    name = manifest.name or "A preference ranker"
    lines = [*head, "---", "", f"# {name}", ""]
    lines += [
        "A DPO-trained policy and its reference, used as a ranker: it puts the candidate answer that people would prefer first.",
        "",
        "```python",
        "from dpo_rank import Ranker",
        "",
        'ranker = Ranker.load("path/or/hub-id")',
        'print(ranker.rank("a prompt", ["an answer", "another"]).best.text)',
        "```",
        "",
    ]
    lines += [str(text) + "\n" for text in facts.get("description", [])]
    lines += [
        "| fact | value |",
        "|---|---|",
        f"| score | beta x {manifest.reward} of the log-ratios, beta = {manifest.beta:g} |",
        _temperature(manifest),
        _promise(manifest),
        f"| reads at most | {manifest.limits.max_prompt_tokens} prompt and {manifest.limits.max_completion_tokens} answer tokens |",
        f"| precisions | {', '.join(precisions)} |",
        *([f"| default precision | {manifest.default_precision} ({manifest.default_precision_reason}) |"] if precisions else []),
        f"| passages | {'yes' if manifest.passage_format else 'no passage format'} |",
    ]
    lines += [
        f"| {key.replace('_', ' ')} | {value} |"
        for key, value in facts.items()
        if isinstance(value, (str, int, float)) and key != "license"
    ]
    lines += ["", *_export_section(facts.get("export", {})), *_held_out_section(facts.get("held_out", {}))]
    return "\n".join(lines).rstrip() + "\n"


def recalibrated(card: str, manifest: Manifest) -> str:
    """``card`` with the lines of what calibrating fits as the manifest has them now; the rest is its owner's."""
    card = re.sub(r"^\| sure enough \|.*\n", "", card, flags=re.MULTILINE)
    return re.sub(r"^\| temperature \|.*$", f"{_temperature(manifest)}\n{_promise(manifest)}", card, count=1, flags=re.MULTILINE)


def _temperature(manifest: Manifest) -> str:
    return f"| temperature | {manifest.temperature:.4g} ({'fitted on held-out preferences' if manifest.calibrated else 'not fitted'}) |"


def _promise(manifest: Manifest) -> str:
    sure = manifest.confidence
    if sure is None:
        return "| sure enough | not measured |"
    kept = [f"{sure.coverage(risk):.0%} at max_risk {risk:g}" for risk in (0.1, 0.2, 0.3) if sure.threshold(risk) is not None]
    said = ", ".join(kept) or f"never below max_risk {sure.smallest_risk:.2f}"
    return f"| sure enough | {said} (share of {sure.num_prompts} held-out rankings that are `confident`) |"


def _export_section(export: dict[str, Any]) -> list[str]:
    if "largest_difference_nats" not in export:
        return []
    lines = [f"The fp32 graph differs from the torch models by at most {export['largest_difference_nats']:.1e} nats a token.", ""]
    for name, report in export.items():
        if isinstance(report, dict):
            noise = report.get("margin_noise")  # not in artifacts of the first versions
            marked = "" if noise is None else f", a margin off by {noise:.3g} (one standard deviation; a near tie within that)"
            lines += [
                f"{name} against fp32 on {report['num_prompts']} prompts ({report['rows']}): Spearman {report['spearman']:.3f}, the same "
                f"best candidate in {report['same_best']:.1%}, median |difference| {report['median_difference']:.3g}{marked}.",
                "",
            ]
    return lines


def _held_out_section(held_out: dict[str, Any]) -> list[str]:
    if not held_out:
        return []
    lines = [
        "## Held-out agreement",
        "",
        "| rows | prompts | agreement (95 % interval) | shorter is better | longer is better |",
        "|---|---|---|---|---|",
    ]
    for name, figures in held_out.items():
        low, high = figures["interval"]
        lines.append(
            f"| {name} | {figures['num_prompts']} | {figures['agreement']:.3f} ({low:.3f} to {high:.3f}) "
            f"| {figures['shortest']:.3f} | {figures['longest']:.3f} |"
        )
    return [*lines, ""]
