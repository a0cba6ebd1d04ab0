"""One way of scoring candidates, timed in a process of its own: ``python benchmarks/ways.py WAY '{"shape": ..., ...}'`` prints JSON.

Every way gets token ids (a cross-encoder: words that are one token each) and gives one number a candidate.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MEMORY = 8 * 2**30
"""A way gets the largest sub-batch that fits."""
LONG_RUN = 20.0
PATIENCE = 40.0

Score = Callable[[list[int], list[list[int]]], Sequence[float]]


def padded(shape: str, cache: Path, dtype: str) -> Score:
    """What training libraries and evaluation scripts do: prompt + candidate a line, padded, full logits, a log-softmax over all."""
    import torch

    models = _torch_pair(shape, cache, dtype)

    def logps(model: Any, prompt: list[int], part: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, part))
        ids = torch.tensor([prompt + c + [0] * (longest - len(c)) for c in part])
        mask = torch.tensor([[1] * (len(prompt) + len(c)) + [0] * (longest - len(c)) for c in part])
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (found * mask[:, 1:])[:, len(prompt) - 1 :].sum(1)

    def score(prompt: list[int], candidates: list[list[int]]) -> list[float]:
        vocabulary, weights = models[0].config.vocab_size, 2 * models[0].get_memory_footprint()
        copies = 12 if dtype == "fp32" else 14  # bytes an element: logits, their shifted float32 copy and the log-softmax
        each = (len(prompt) + max(map(len, candidates))) * vocabulary * copies
        return _in_batches(models, logps, prompt, candidates, int((MEMORY - weights) // each))

    return score


def prompt_cache(shape: str, cache: Path, dtype: str) -> Score:
    """The prompt's keys and values computed once and repeated for every candidate; the head on candidate tokens alone."""
    import torch
    from transformers import DynamicCache

    models = _torch_pair(shape, cache, dtype)

    def logps(model: Any, prompt: list[int], part: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, part))
        ids = torch.tensor([c + [0] * (longest - len(c)) for c in part])
        real = torch.tensor([[1] * len(c) + [0] * (longest - len(c)) for c in part])
        past = DynamicCache(config=model.config)
        first = model(input_ids=torch.tensor([prompt]), past_key_values=past, use_cache=True, logits_to_keep=1).logits
        past.batch_repeat_interleave(len(part))
        mask = torch.cat([torch.ones(len(part), len(prompt), dtype=torch.long), real], dim=1)
        logits = model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True).logits
        logits = torch.cat([first.expand(len(part), 1, -1), logits[:, :-1]], dim=1).float()
        return ((logits.gather(2, ids[..., None])[..., 0] - logits.logsumexp(-1)) * real).sum(1)

    def score(prompt: list[int], candidates: list[list[int]]) -> list[float]:
        settings = models[0].config
        weights = 2 * models[0].get_memory_footprint()
        longest = max(map(len, candidates))
        each = longest * settings.vocab_size * 12 + (len(prompt) + longest) * settings.num_hidden_layers * settings.hidden_size * 8
        return _in_batches(models, logps, prompt, candidates, int((MEMORY - weights) // each))

    return score


def optimum(shape: str, cache: Path, _: str) -> Score:
    """Two decoders that optimum exported, through our engine for such pairs: the padded batch with full logits in onnxruntime."""
    from optimum.onnxruntime import ORTModelForCausalLM
    from shapes import ROLES, SHAPES, pair

    from dpo_rank.scoring.optimum_engine import OptimumEngine
    from dpo_rank.scoring.pack import Group, pack

    paths = {}
    for role, source in pair(shape, cache).items():
        paths[role] = cache / shape / f"optimum-{role}"
        if not paths[role].is_dir():
            ORTModelForCausalLM.from_pretrained(source, export=True, use_cache=False, use_io_binding=False).save_pretrained(paths[role])
    engine = OptimumEngine(*(paths[role] for role in ROLES))

    def score(prompt: list[int], candidates: list[list[int]]) -> list[float]:
        size = max(1, int(MEMORY // ((len(prompt) + max(map(len, candidates))) * SHAPES[shape]["vocab_size"] * 12)))
        rewards: list[float] = []
        for start in range(0, len(candidates), size):
            row = pack([Group(prompt, candidates[start : start + size])])
            policy, reference = engine.logps(row)
            rewards += [float(part.sum()) for part in np.split(policy - reference, np.cumsum(row.lengths)[:-1])]
        return rewards

    return score


def cross_encoder(shape: str, cache: Path, kind: str) -> Score:
    """A sentence-transformers cross-encoder of the shape: one model, one number a pair, no reference."""
    import torch
    from sentence_transformers import CrossEncoder
    from shapes import SHAPES
    from shapes import cross_encoder as path_of

    options: dict[str, Any] = {"device": "cpu", "max_length": 40960}
    if kind == "onnx":
        options |= {"backend": "onnx"}
    elif kind == "bf16":
        options |= {"model_kwargs": {"dtype": torch.bfloat16}}
    else:
        options |= {"model_kwargs": {"dtype": torch.float32}}
    model = CrossEncoder(str(path_of(shape, cache)), **options)
    heads = SHAPES[shape]["num_attention_heads"]

    def words(ids: list[int]) -> str:
        return " ".join(f"w{n}" for n in ids)

    def score(prompt: list[int], candidates: list[list[int]]) -> Any:
        question = words(prompt)
        # The exported graph holds about twelve copies of its attention scores at once; torch's attention holds none.
        copies = 48 * heads * (len(prompt) + max(map(len, candidates))) ** 2 if kind == "onnx" else 1
        size = max(1, min(16, MEMORY // copies))
        return model.predict([(question, words(c)) for c in candidates], batch_size=size, show_progress_bar=False).tolist()

    return score


def ours_torch(shape: str, cache: Path, dtype: str) -> Score:
    """Our torch engine."""
    from dpo_rank.scoring.torch_engine import TorchEngine

    return _engine(TorchEngine(*_torch_pair(shape, cache, dtype)), shape)


def ours(shape: str, cache: Path, kind: str) -> Score:
    """Our exported graphs; ``kind`` is ``engine-precision``."""
    from shapes import artifact

    from dpo_rank import Ranker

    engine, _, precision = kind.partition("-")
    ranker = Ranker.load(artifact(shape, cache, ("fp32", "int8")), engine=engine, precision=precision, device="cpu")
    return _engine(ranker._engine, shape, ranker.token_budget)


def ours_sharing(shape: str, cache: Path, precision: str) -> Score:
    """Our exported graph of a pair whose training changed only the top third of the layers: not the same models as the other ways'."""
    from shapes import artifact

    from dpo_rank import Ranker

    ranker = Ranker.load(artifact(shape, cache, ("fp32", "int8"), sharing=True), engine="onnx", precision=precision, device="cpu")
    return _engine(ranker._engine, shape, ranker.token_budget)


WAYS: dict[str, tuple[Callable[[str, Path, str], Score], str]] = {
    "padded batch, torch fp32": (padded, "fp32"),
    "padded batch, torch bf16": (padded, "bf16"),
    "prompt cache repeated, torch fp32": (prompt_cache, "fp32"),
    "prompt cache repeated, torch bf16": (prompt_cache, "bf16"),
    "optimum decoders, onnx fp32": (optimum, "fp32"),
    "cross-encoder (one model), torch fp32": (cross_encoder, "fp32"),
    "cross-encoder (one model), torch bf16": (cross_encoder, "bf16"),
    "cross-encoder (one model), onnx fp32": (cross_encoder, "onnx"),
    "dpo_rank, torch fp32": (ours_torch, "fp32"),
    "dpo_rank, torch bf16": (ours_torch, "bf16"),
    "dpo_rank, onnx fp32": (ours, "onnx-fp32"),
    "dpo_rank, onnx int8": (ours, "onnx-int8"),
    "dpo_rank, lower two thirds shared, onnx fp32": (ours_sharing, "fp32"),
    "dpo_rank, lower two thirds shared, onnx int8": (ours_sharing, "int8"),
    "dpo_rank, openvino fp32": (ours, "openvino-fp32"),
    "dpo_rank, openvino bf16": (ours, "openvino-bf16"),
}


def _torch_pair(shape: str, cache: Path, dtype: str) -> list[Any]:
    import torch
    from shapes import pair
    from transformers import AutoModelForCausalLM

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    return [AutoModelForCausalLM.from_pretrained(path, dtype=kind).eval() for path in pair(shape, cache).values()]


def _in_batches(
    models: Sequence[Any],
    logps: Callable[[Any, list[int], list[list[int]]], Any],
    prompt: list[int],
    candidates: list[list[int]],
    size: int,
) -> list[float]:
    """Differences of the pair's ``logps(model, prompt, part)``, at most ``size`` candidates a part."""
    import torch

    size = max(1, size)
    rewards: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(candidates), size):
            policy, reference = (logps(model, prompt, candidates[start : start + size]) for model in models)
            rewards += (policy - reference).tolist()
    return rewards


def _engine(engine: Any, shape: str, budget: int | None = None) -> Score:
    from dpo_rank.scoring.engine import score as score_groups
    from dpo_rank.scoring.pack import DEFAULT_TOKEN_BUDGET, Group

    def score(prompt: list[int], candidates: list[list[int]]) -> list[float]:
        [found] = score_groups(engine, [Group(prompt, candidates)], budget or DEFAULT_TOKEN_BUDGET)
        return [item.reward(1.0, "sum") for item in found]

    return score


def ids(prompt: int, lengths: Sequence[int], vocabulary: int) -> tuple[list[int], list[list[int]]]:
    """Random token ids of these lengths."""
    rng = np.random.default_rng(0)
    return rng.integers(1, vocabulary, prompt).tolist(), [rng.integers(1, vocabulary, n).tolist() for n in lengths]


def peak_mib() -> float:
    """This process's own peak: on Linux getrusage also counts what the parent held when it started this one."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    way, cell = sys.argv[1], json.loads(sys.argv[2])
    threads = cell["threads"]
    if "torch" in way or "cross" in way or "optimum" in way:
        import torch

        torch.set_num_threads(threads)
    from shapes import SHAPES

    make, kind = WAYS[way]
    score = make(cell["shape"], Path(cell["cache"]), kind)
    vocabulary = SHAPES[cell["shape"]]["vocab_size"]
    score(*ids(40, [7, 12], vocabulary))
    runs = []
    for lengths in cell["lengths"]:
        prompt, candidates = ids(cell["prompt"], lengths, vocabulary)
        seconds: list[float] = []
        while True:
            start = time.perf_counter()
            rewards = score(prompt, candidates)
            seconds.append(time.perf_counter() - start)
            short = seconds[0] < LONG_RUN
            enough = len(seconds) > cell["repeats"] or (sum(seconds) > PATIENCE and len(seconds) > 1 and not cell["always"])
            if enough or not (short or (cell["always"] and len(seconds) < 3)):
                break
        if short:
            del seconds[0]  # a warm-up at full size: some runtimes take their memory in the first run
        assert len(rewards) == len(candidates)
        assert np.isfinite(rewards).all()
        runs.append({"seconds": seconds, "rewards": [round(float(value), 4) for value in rewards]})
    sys.stdout.write(json.dumps({"runs": runs, "peak_mib": round(peak_mib())}) + "\n")
    sys.stdout.flush()
    os._exit(0)  # some runtimes hang or crash while they are torn down; the figures are out


if __name__ == "__main__":
    main()
