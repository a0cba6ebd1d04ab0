"""The ranker: a prompt and candidates in, the one that people would prefer first."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpo_rank import artifact as artifacts
from dpo_rank.artifact import Artifact, Manifest
from dpo_rank.confidence import Confidence, LengthCorrection
from dpo_rank.errors import ArtifactError, DataError, MissingExtraError, ModelError, UnavailableError
from dpo_rank.loading import locate, open_engine, pair_module, say_what_the_starter_is
from dpo_rank.ranking import Candidate, Ranking, make_ranking, preference
from dpo_rank.scoring.encode import Boundary, Encoded, Encoder, Limits, Passage, Prompt, load_tokenizer
from dpo_rank.scoring.engine import Engine, RewardForm, TokenScores, score
from dpo_rank.scoring.pack import DEFAULT_TOKEN_BUDGET, GPU_TOKEN_BUDGET
from dpo_rank.scoring.prompt_format import PromptFormat, StringPrompt
from dpo_rank.session import Session

if TYPE_CHECKING:
    from dpo_rank.evaluation.calibration import CalibrationReport

logger = logging.getLogger(__name__)

MISFIT_NATS = 2.5
"""Mean |log-ratio| per token beyond which policy and reference are hardly a pair (measured; see docs/pairs.md)."""
_LOGITS_BUDGET = 2**27  # logits of a row, which the first exported graphs held at once: 512 MiB in float32

Answer = str | Candidate | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TokenContribution:
    """One token's part in a score.

    Attributes:
        text: the token, decoded on its own.
        policy, reference: its log-probs in nats.
        contribution: what it adds to the score.

    """

    text: str
    policy: float
    reference: float
    contribution: float


class Ranker:
    """Ranks candidate answers by the implicit reward of a DPO-trained policy against its reference.

    Made by `Ranker.load` or `Ranker.from_models`. May be used from several threads at once.

    Attributes:
        temperature: divides scores before they become probabilities.
        calibrated: whether it was fitted on held-out preferences.
        token_budget: tokens of one packed row at most; bounds memory.
        correction: taken off every score for its answer's length; None where it is off.

    """

    def __init__(
        self,
        engine: Engine,
        encoder: Encoder,
        manifest: Manifest,
        *,
        artifact: Artifact | None = None,
        models: tuple[Any, Any] | None = None,
        token_budget: int | None = None,
        correction: bool = False,
        reload: Callable[[], Ranker] | None = None,
    ) -> None:
        if token_budget is not None and token_budget < 1:
            raise DataError(f"token_budget must be at least 1, not {token_budget}")
        self._engine, self._encoder, self._manifest = engine, encoder, manifest
        self._artifact, self._models, self._reload = artifact, models, reload
        self.temperature, self.calibrated = manifest.temperature, manifest.calibrated
        self.correction: LengthCorrection | None = None
        if correction:
            if manifest.correction is None:
                raise UnavailableError("this ranker has no correction for length: `dpo-rank calibrate --correction` fits one")
            self.correction, self.temperature = manifest.correction, manifest.correction.temperature
        default = DEFAULT_TOKEN_BUDGET if engine.device == "cpu" else GPU_TOKEN_BUDGET
        self.token_budget = token_budget or max(256, min(default, _LOGITS_BUDGET // manifest.vocabulary))
        self._misfit_checked = False
        self._lock = threading.Lock()

    # -- making one ------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        path_or_hub_id: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        engine: str = "auto",
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        providers: Sequence[Any] | None = None,
        token_budget: int | None = None,
        correction: bool = False,
    ) -> Ranker:
        """Load a ranker from a directory or the Hugging Face hub.

        Args:
            path_or_hub_id: a directory, an ``owner/name`` on the hub, or None / ``"starter"``: the embedded starter.
            revision, token, cache_dir, local_files_only: of the hub.
            engine: ``"onnx"``, ``"torch"`` or ``"auto"``: the first usable of ONNX on a GPU, torch on CUDA, ONNX on the CPU,
                torch on the CPU.
            device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:N"``.
            precision: one that the artifact holds; ``"auto"``: fp32 where it is there.
            threads: of the CPU engine; None: the CPUs that this process may use.
            providers: onnxruntime execution providers by name.
            token_budget: tokens of one packed row at most; bounds memory; None: chosen by device and vocabulary.
            correction: take off every score what the artifact knows of its lean on length; its temperature is then the correction's.

        Raises:
            ArtifactError: the artifact is missing, damaged or of a newer format.
            UnavailableError: what was asked for by name cannot be used here.

        """
        if threads is not None and threads < 1:
            raise DataError(f"threads must be at least 1, not {threads}")
        if path_or_hub_id is None:
            say_what_the_starter_is()
        root = locate(path_or_hub_id, revision, token, cache_dir, local_files_only)
        artifact = artifacts.load(root)
        manifest = artifact.manifest
        chosen = open_engine(artifact, engine, device, precision, threads, providers)
        encoder = Encoder(
            load_tokenizer(artifact.tokenizer()), manifest.prompt_format, manifest.limits, manifest.passage_format, manifest.boundary
        )
        arguments = {
            "revision": revision,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "engine": engine,
            "device": device,
            "precision": precision,
            "threads": threads,
            "providers": providers,
            "token_budget": token_budget,
            "correction": correction,
        }
        # A child with another working directory must find it too; a hub id stays one.
        given = "starter" if path_or_hub_id is None else path_or_hub_id
        source = root.resolve() if Path(given).expanduser().exists() else given
        again = functools.partial(Ranker.load, source, **arguments)  # type: ignore[arg-type]
        return cls(chosen, encoder, manifest, artifact=artifact, token_budget=token_budget, correction=correction, reload=again)

    @classmethod
    def from_models(
        cls,
        policy: Any,
        reference: Any | None = None,
        *,
        tokenizer: Any | None = None,
        beta: float = 0.1,
        reward: RewardForm = "sum",
        string_prompt: StringPrompt | None = None,
        boundary: Boundary = "split",
        revision: str | None = None,
        reference_revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        device: str = "auto",
        dtype: Any = "auto",
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Ranker:
        """A ranker from a DPO-trained policy and the reference it was trained against. Needs ``dpo-rank[torch]``.

        Args:
            policy: a transformers model, a peft model, a path or a hub id; also a directory of an ONNX decoder exported by optimum.
            reference: likewise; None for a peft policy (the base with the adapter off).
            tokenizer: required when models are given; by default the policy's.
            beta: of the training run.
            reward: ``"sum"``, or ``"mean"`` where the loss compared means (IPO, length-normalised DPO).
            string_prompt: whether a ``str`` prompt is one user turn or verbatim text; by default a turn where there is a
                chat template.
            boundary: ``"joint"`` for pairs that were trained on jointly tokenised prompt + completion.
            revision, reference_revision, token, local_files_only, model_kwargs: for loading by path or id.
            device, dtype: where and in which precision models loaded by path run.

        Raises:
            ModelError: the two are no pair that can be scored.

        """
        if not (beta > 0 and np.isfinite(beta)):
            raise DataError(f"beta must be a number above 0, not {beta}")
        if reward not in ("sum", "mean"):
            raise DataError(f"reward is 'sum' or 'mean', not {reward!r}")
        if boundary not in ("split", "joint"):
            raise DataError(f"boundary is 'split' or 'joint', not {boundary!r}")
        pair = pair_module("Ranker.from_models")
        loaded = pair.load_pair(
            policy,
            reference,
            tokenizer=tokenizer,
            revision=revision,
            reference_revision=reference_revision,
            token=token,
            local_files_only=local_files_only,
            device=device,
            dtype=dtype,
            model_kwargs=model_kwargs or {},
        )
        renderer = pair.renderer(loaded.tokenizer, string_prompt)
        manifest = Manifest(
            beta=beta,
            reward=reward,
            prompt_format=renderer if isinstance(renderer, PromptFormat) else PromptFormat(chat=True, string=renderer.string),
            limits=Limits.of_positions(loaded.max_positions),
            vocabulary=loaded.vocabulary,
            boundary=boundary,
            name=loaded.name,
        )
        encoder = Encoder(load_tokenizer(pair.tokenizer_json(loaded.tokenizer)), renderer, manifest.limits, boundary=boundary)
        again = None
        if isinstance(policy, (str, os.PathLike)) and isinstance(reference, (str, os.PathLike, type(None))) and tokenizer is None:
            again = functools.partial(
                Ranker.from_models,
                policy,
                reference,
                beta=beta,
                reward=reward,
                string_prompt=string_prompt,
                boundary=boundary,
                revision=revision,
                reference_revision=reference_revision,
                local_files_only=local_files_only,
                device=device,
                dtype=dtype,
                model_kwargs=model_kwargs,
            )
        return cls(loaded.engine, encoder, manifest, models=loaded.models, reload=again)

    # -- ranking ---------------------------------------------------------------------------------------------------

    def rank(
        self,
        prompt: Prompt,
        candidates: Sequence[Answer],
        *,
        top_k: int | None = None,
        passages: Sequence[Passage] | None = None,
    ) -> Ranking:
        """Candidates of ``prompt``, best first.

        Args:
            prompt: a text or chat messages.
            candidates: texts, `Candidate` objects or mappings with ``text``.
            top_k: keep the first so many (probabilities are over all candidates all the same).
            passages: texts the answers should rest on, for a ranker with a passage format.

        Raises:
            DataError: input that cannot be ranked; the message says which and why.
            NonFiniteScoreError: a score came out as NaN or infinite.

        """
        return self.rank_many([prompt], [candidates], top_k=top_k, passages=None if passages is None else [passages])[0]

    def rank_many(
        self,
        prompts: Sequence[Prompt],
        candidate_lists: Sequence[Sequence[Answer]],
        *,
        top_k: int | None = None,
        passages: Sequence[Sequence[Passage] | None] | None = None,
    ) -> list[Ranking]:
        """A `Ranking` for each prompt; any number of candidates each, batched by the token budget.

        Args:
            prompts, candidate_lists: one list of candidates a prompt.
            top_k: see `rank`.
            passages: one list (or None) a prompt.

        """
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0):
            raise DataError(f"top_k is a number of candidates or None, not {top_k!r}")
        lists, encoded, scores = self._scored(prompts, candidate_lists, passages)
        return [
            self.conclude(
                candidates,
                [self.reward(item) for item in items],
                items,
                [len(item.policy) for item in items],
                group.truncated,
                top_k=top_k,
                prompt_truncated=group.prompt_truncated,
                dropped_passages=group.dropped_passages,
            )
            for candidates, group, items in zip(lists, encoded, scores, strict=True)
        ]

    def score(self, prompt: Prompt, candidates: Sequence[Answer], *, passages: Sequence[Passage] | None = None) -> npt.NDArray[np.float32]:
        """Raw rewards, float32 ``[N]``, in the order of ``candidates``."""
        return self.score_many([prompt], [candidates], passages=None if passages is None else [passages])[0]

    def score_many(
        self,
        prompts: Sequence[Prompt],
        candidate_lists: Sequence[Sequence[Answer]],
        *,
        passages: Sequence[Sequence[Passage] | None] | None = None,
    ) -> list[npt.NDArray[np.float32]]:
        """`score` for several prompts, batched by the token budget."""
        scores = self.log_probs_many(prompts, candidate_lists, passages=passages)
        return [np.array([self.reward(item) for item in items], dtype=np.float32) for items in scores]

    def log_probs_many(
        self,
        prompts: Sequence[Prompt],
        candidate_lists: Sequence[Sequence[Answer]],
        *,
        passages: Sequence[Sequence[Passage] | None] | None = None,
    ) -> list[list[TokenScores]]:
        """What `score_many` adds up: each candidate's token log-probs in nats under policy and reference."""
        return self._scored(prompts, candidate_lists, passages)[2]

    def compare(self, prompt: Prompt, a: Answer, b: Answer) -> float:
        """Probability that ``a`` is preferred to ``b`` (Bradley-Terry at the fitted temperature)."""
        _, _, [[first, second]] = self._scored([prompt], [[a, b]], None)
        return preference(self.reward(first) - self.reward(second), self.temperature)

    def best_of_n(self, prompt: Prompt, generate: Callable[[Any, int], Sequence[Answer]], n: int = 8) -> Ranking:
        """Rank the candidates that ``generate(prompt, n)`` returns.

        Raises:
            TypeError: ``generate`` is a coroutine function; use `abest_of_n`.

        """
        if inspect.iscoroutinefunction(generate) or inspect.iscoroutinefunction(getattr(generate, "__call__", None)):  # noqa: B004
            raise TypeError("generate is a coroutine function: use `await ranker.abest_of_n(prompt, generate, n)`")
        return self.rank(prompt, _generated(generate(prompt, n)))

    async def abest_of_n(self, prompt: Prompt, agenerate: Callable[[Any, int], Awaitable[Sequence[Answer]]], n: int = 8) -> Ranking:
        """`best_of_n` with a coroutine function; the event loop is never blocked."""
        return await self.arank(prompt, _generated(await agenerate(prompt, n)))

    async def arank(
        self,
        prompt: Prompt,
        candidates: Sequence[Answer],
        *,
        top_k: int | None = None,
        passages: Sequence[Passage] | None = None,
    ) -> Ranking:
        """`rank` in a thread, for use in an event loop."""
        return await asyncio.to_thread(self.rank, prompt, candidates, top_k=top_k, passages=passages)

    async def ascore(
        self, prompt: Prompt, candidates: Sequence[Answer], *, passages: Sequence[Passage] | None = None
    ) -> npt.NDArray[np.float32]:
        """`score` in a thread, for use in an event loop."""
        return await asyncio.to_thread(self.score, prompt, candidates, passages=passages)

    def session(self, prompt: Prompt, passages: Sequence[Passage] | None = None) -> Session:
        """Read ``prompt`` once, and score candidates as they arrive or grow.

        ``with ranker.session(prompt) as session: session.add(...); session.extend(index, more_text); session.rank()``
        """
        return Session(self, self._engine, prompt, passages)

    def explain(self, prompt: Prompt, candidate: Answer, *, passages: Sequence[Passage] | None = None) -> list[TokenContribution]:
        """Each token's part in the candidate's score; the contributions add up to it.

        With a correction for length on, what it takes off is shared equally by the tokens.
        """
        _, [encoded], [[scores]] = self._scored([prompt], [[candidate]], None if passages is None else [passages])
        ids = encoded.group.candidates[0]
        share = self.beta / (len(ids) if self._manifest.reward == "mean" else 1)
        each = self.offset(len(ids)) / max(1, len(ids))
        decode = functools.partial(self._encoder.tokenizer.decode, skip_special_tokens=False)
        return [
            TokenContribution(decode([token]), float(policy), float(reference), share * (float(policy) - float(reference)) + each)
            for token, policy, reference in zip(ids, scores.policy, scores.reference, strict=True)
        ]

    def calibrate(self, rows: Iterable[Any], *, correction: bool = False) -> CalibrationReport:
        """Fit on labelled rows that the ranker was not trained on what it says of its own scores; `save` keeps it.

        That is the temperature behind probabilities, how often the best is wrong at which margin (`Ranking.confident`), and how
        candidates usually read (`Ranking.unfamiliar`).

        Args:
            rows: in any format of `dpo_rank.data.formats`; candidates and prompts like those that will be ranked.
            correction: fit the correction for length too, which ``Ranker.load(..., correction=True)`` applies. One that the ranker
                has already is fitted anew in any case.

        Raises:
            DataError: a bad row, or no pair that the labels tell apart.

        """
        from dpo_rank.data.formats import Example, parse
        from dpo_rank.evaluation.agreement import log_probs_of
        from dpo_rank.evaluation.calibration import fit

        examples = [row if isinstance(row, Example) else parse(row, f"row {index}") for index, row in enumerate(rows)]
        examples = [example for example in examples if example.pairs()]
        scores = log_probs_of(self, examples)
        self._manifest, report = fit(self.manifest, examples, scores, correction=correction or self._manifest.correction is not None)
        self.temperature, self.calibrated = report.temperature, True
        if self.correction is not None and self._manifest.correction is not None:
            self.correction = self._manifest.correction
            self.temperature = self.correction.temperature
        return report

    # -- keeping one -----------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write the ranker as an artifact, its current temperature included.

        A ranker of `from_models` is saved with its models' weights (the torch engine reads them); `export` adds the graphs.

        Raises:
            ArtifactError: ``path`` exists and ``overwrite`` is False.

        """
        from dpo_rank.export.card import recalibrated

        if self._artifact is not None:
            artifact, manifest = self._artifact, self.manifest

            def write(root: Path) -> None:
                artifact.copy_files(root)
                if (card := root / "README.md").is_file():
                    card.write_text(recalibrated(card.read_text(encoding="utf-8"), manifest), encoding="utf-8")

            return artifacts.save(path, manifest, write, overwrite=overwrite)
        pair, models = self._pair(), self._models
        self._storable()
        return artifacts.save(path, self.manifest, lambda root: pair.write_models(root, models, self._encoder), overwrite=overwrite)

    def export(self, path: str | os.PathLike[str], precisions: Sequence[str] = ("fp32", "int8"), *, overwrite: bool = False) -> Path:
        """Write an artifact that runs without torch. Needs ``dpo-rank[export]`` and the models' weights.

        Raises:
            ModelError: the architecture cannot be exported, or the graph does not score as torch does.

        """
        try:
            from dpo_rank.export.pair import export_pair
        except ImportError:
            raise MissingExtraError("Ranker.export", "export") from None
        models = self._models
        if models is None and self._artifact is not None and self._artifact.manifest.has_models:
            models = self._pair().load_from_artifact(self._artifact.root)
        if models is None:
            raise ModelError("this ranker holds no model weights that could be exported; use `save` to copy it")
        self._storable()
        return export_pair(models, self._encoder, self.manifest, path, precisions=tuple(precisions), overwrite=overwrite)

    def push_to_hub(self, repo_id: str, private: bool = True, token: str | bool | None = None) -> str:
        """Upload the ranker to the Hugging Face hub; returns the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as directory:
            saved = self.save(Path(directory) / "ranker")
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=saved, commit_message="Upload ranker"))

    # -- from log-probs to a ranking ---------------------------------------------------------------------------------

    def reward(self, scores: TokenScores) -> float:
        """The score of a candidate with these log-probs."""
        return scores.reward(self._manifest.beta, self._manifest.reward) + self.offset(len(scores.policy))

    def offset(self, num_tokens: int) -> float:
        """What the correction adds to the score of an answer of ``num_tokens``; 0 where it is off."""
        return 0.0 if self.correction is None else -float(self.correction.of(num_tokens))

    def conclude(
        self,
        candidates: Sequence[Candidate],
        rewards: Sequence[float],
        scores: Sequence[TokenScores],
        num_tokens: Sequence[int],
        truncated: Sequence[bool],
        *,
        top_k: int | None,
        prompt_truncated: bool,
        dropped_passages: tuple[int, ...],
    ) -> Ranking:
        """A ranking from rewards, with everything that the ranker knows of itself."""
        familiarity = self._manifest.familiarity
        return make_ranking(
            candidates,
            rewards,
            num_tokens,
            truncated,
            temperature=self.temperature,
            calibrated=self.calibrated,
            noise=self.noise,
            top_k=top_k,
            prompt_truncated=prompt_truncated,
            dropped_passages=dropped_passages,
            unfamiliar=None if familiarity is None else familiarity.unfamiliar([item.reference for item in scores]),
            confidence=self.confidence,
        )

    # -- facts -----------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> str:
        """``"onnx"`` or ``"torch"``."""
        return self._engine.name

    @property
    def device(self) -> str:
        """Where it runs."""
        return self._engine.device

    @property
    def precision(self) -> str:
        """In which precision it runs."""
        return self._engine.precision

    @property
    def noise(self) -> float:
        """Standard deviation of a margin in this precision around its fp32 value, as the export measured it; 0 where it did not."""
        return float(self._manifest.training.get("export", {}).get(self.precision, {}).get("margin_noise", 0.0))

    @property
    def confidence(self) -> Confidence | None:
        """How often the ranker is wrong at which margin, as it scores now; None where that was not measured."""
        return self._manifest.confidence if self.correction is None else self.correction.confidence

    @property
    def beta(self) -> float:
        """The beta of the reward."""
        return self._manifest.beta

    @property
    def manifest(self) -> Manifest:
        """What `save` would write, the current temperature included."""
        if self.correction is not None:
            correction = replace(self.correction, temperature=self.temperature)
            return replace(self._manifest, correction=correction, calibrated=self.calibrated)
        return replace(self._manifest, temperature=self.temperature, calibrated=self.calibrated)

    @property
    def name(self) -> str:
        """What the ranker calls itself in outputs."""
        return self._manifest.name

    @property
    def num_truncated(self) -> int:
        """Prompts or answers that were too long so far."""
        return self._encoder.num_truncated

    def __repr__(self) -> str:
        return f"Ranker({self.name or 'unnamed'}, engine={self.engine}, device={self.device}, precision={self.precision})"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._reload is None:
            raise TypeError("a Ranker made from model objects cannot be pickled: save it and load it by path")
        manifest = self.manifest
        fitted = {name: getattr(manifest, name) for name in ("confidence", "familiarity", "correction")}
        return _restore, (self._reload, fitted, self.temperature, self.calibrated, self.token_budget)

    # -- inside ----------------------------------------------------------------------------------------------------

    def encode(self, prompt: Prompt, candidates: Sequence[Candidate], passages: Sequence[Passage] | None = None) -> Encoded:
        """Token ids as this ranker reads them."""
        return self._encoder.encode(prompt, [c.text for c in candidates], [c.finished for c in candidates], passages)

    def _scored(
        self,
        prompts: Sequence[Prompt],
        candidate_lists: Sequence[Sequence[Answer]],
        passages: Sequence[Sequence[Passage] | None] | None,
    ) -> tuple[list[list[Candidate]], list[Encoded], list[list[TokenScores]]]:
        for name, value in (("prompts", prompts), ("candidate_lists", candidate_lists), ("passages", passages)):
            if isinstance(value, (str, bytes)) or (value is not None and not isinstance(value, (Sequence, np.ndarray))):
                raise DataError(f"{name} is a list with one entry a prompt, not {type(value).__name__}")
        if len(prompts) != len(candidate_lists) or (passages is not None and len(passages) != len(prompts)):
            counts = f"{len(prompts)} prompts, {len(candidate_lists)} candidate lists"
            raise DataError(f"{counts}{'' if passages is None else f', {len(passages)} passage lists'}: one of each a prompt")
        lists = [_candidates(candidates) for candidates in candidate_lists]
        encoded = []
        for index, (prompt, candidates) in enumerate(zip(prompts, lists, strict=True)):
            try:
                encoded.append(self.encode(prompt, candidates, passages[index] if passages is not None else None))
            except DataError as error:
                if len(prompts) == 1:
                    raise
                raise type(error)(f"prompt {index}: {error}") from None
        scores = score(self._engine, [item.group for item in encoded], self.token_budget)
        if not self._misfit_checked:
            self._check_pair(scores)
        return lists, encoded, scores

    def _check_pair(self, scores: list[list[TokenScores]]) -> None:
        """Once enough tokens were seen: does the reference look like the one that the policy was trained against?"""
        ratios = [np.abs(item.policy - item.reference) for group in scores for item in group]
        tokens = sum(map(len, ratios))
        if tokens < 20:
            return
        with self._lock:
            if self._misfit_checked:
                return
            self._misfit_checked = True
        mean = sum(float(r.sum()) for r in ratios) / tokens
        if mean > MISFIT_NATS:
            logger.warning(
                "policy and reference differ by %.1f nats a token; a policy and its own reference differ by far less than %.1f. "
                "Likely the reference is another model than the policy was trained against (or a base model instead of the SFT "
                "checkpoint), or the chat template is not the training one: the order may mean nothing.",
                mean,
                MISFIT_NATS,
            )

    def _storable(self) -> None:
        """Raise an `ArtifactError` if the prompt format is a tokenizer's template, which an artifact never holds."""
        renderer = self._encoder.renderer
        if not isinstance(renderer, PromptFormat):
            raise ArtifactError(f"the tokenizer's chat template cannot be stored in an artifact: {getattr(renderer, 'reason', '')}")

    def _pair(self) -> Any:
        pair = pair_module("this")
        if self._artifact is None and self._models is None:
            raise ModelError("this ranker holds no model weights")
        return pair


def _restore(reload: Callable[[], Ranker], fitted: dict[str, Any], temperature: float, calibrated: bool, token_budget: int) -> Ranker:
    ranker = reload()
    ranker._manifest = replace(ranker._manifest, **fitted)
    if ranker.correction is not None:
        ranker.correction = fitted["correction"]
    ranker.temperature, ranker.calibrated, ranker.token_budget = temperature, calibrated, token_budget
    return ranker


def _candidates(values: Any) -> list[Candidate]:
    if isinstance(values, (str, bytes, Mapping, Candidate)) or not isinstance(values, Iterable):
        raise DataError(f"candidates are a list of answers, not {type(values).__name__}")
    return [Candidate.of(value, index) for index, value in enumerate(values)]


def _generated(values: Any) -> Sequence[Answer]:
    if inspect.isawaitable(values):
        close = getattr(values, "close", None)
        if close is not None:
            close()
        raise TypeError("generate returned an awaitable: use `await ranker.abest_of_n(prompt, generate, n)`")
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise DataError(f"generate returned {type(values).__name__}, expected a list of candidates")
    return list(values)
