"""A ranker on disk: a directory with a manifest that lists every other file by size and SHA-256.

Saving is atomic (a temporary directory beside the target, renamed when complete). Loading opens nothing that the manifest
does not list, and refuses what is missing, changed, a symbolic link, or outside the directory, by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dpo_rank.confidence import Confidence, Familiarity, LengthCorrection
from dpo_rank.errors import ArtifactError
from dpo_rank.scoring.encode import Boundary, Limits
from dpo_rank.scoring.engine import RewardForm
from dpo_rank.scoring.prompt_format import PassageFormat, PromptFormat

FORMAT_VERSION = 1
MANIFEST = "dpo_rank.json"
TOKENIZER = "tokenizer.json"
MAX_MANIFEST_BYTES = 4 * 2**20
_NO_SELF = "0" * 64
_SHARED_TRUNK = "shared_trunk"
_FEATURES = frozenset({_SHARED_TRUNK})  # names that a manifest's "requires" may hold


@dataclass(frozen=True)
class Manifest:
    """The contents of ``dpo_rank.json``.

    Attributes:
        beta: of the reward.
        reward: ``"sum"`` or ``"mean"`` of the log-ratios.
        temperature: divides scores before they become probabilities.
        calibrated: whether the temperature was fitted on held-out preferences.
        prompt_format, passage_format: how a prompt is written.
        limits: tokens read at most.
        vocabulary: number of token ids, which bounds the memory of a row.
        boundary: how an answer is tokenised behind its prompt.
        ranks: ``"answers"`` to a prompt, or ``"passages"`` for a question.
        name: what the ranker is called in outputs.
        training: facts of the run that made it, and its measured figures.
        default_precision: what ``precision="auto"`` means; empty where there are no graphs.
        default_precision_reason: why, in words.
        confidence: how often it is wrong at which margin, where that was measured.
        familiarity: what its reference is used to read, likewise.
        correction: for its lean on length, likewise.
        files: size and SHA-256 of every other file.

    """

    beta: float
    reward: RewardForm
    prompt_format: PromptFormat
    limits: Limits
    vocabulary: int
    temperature: float = 1.0
    calibrated: bool = False
    passage_format: PassageFormat | None = None
    boundary: Boundary = "split"
    ranks: Literal["answers", "passages"] = "answers"
    name: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    default_precision: str = ""
    default_precision_reason: str = ""
    confidence: Confidence | None = None
    familiarity: Familiarity | None = None
    correction: LengthCorrection | None = None
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions that have graphs, in alphabetical order."""
        found = {PurePosixPath(name).parts[1] for name in self.files if re.fullmatch(r"onnx/[^/]+/(policy|pair)\.onnx", name)}
        return tuple(sorted(found))

    @property
    def has_models(self) -> bool:
        """Whether the artifact holds both models' weights for torch: two models, or one base (the reference) and an adapter."""
        return "reference/config.json" in self.files and ("policy/config.json" in self.files or self.has_adapter)

    @property
    def has_adapter(self) -> bool:
        """Whether the policy is an adapter over the reference."""
        return "adapter/adapter_config.json" in self.files and "adapter/adapter_model.safetensors" in self.files


@dataclass(frozen=True)
class Artifact:
    """A checked artifact on disk."""

    root: Path
    manifest: Manifest

    def tokenizer(self) -> str:
        """Text of ``tokenizer.json``."""
        return (self.root / TOKENIZER).read_text(encoding="utf-8")

    def copy_files(self, target: Path, skip: frozenset[str] = frozenset()) -> None:
        """Copy every listed file but those in ``skip`` under ``target``."""
        for name in self.manifest.files:
            if name not in skip:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.root / name, target / name)


def save(target: str | os.PathLike[str], manifest: Manifest, write: Callable[[Path], None], *, overwrite: bool = False) -> Path:
    """Write an artifact; either all of it is there afterwards or nothing has changed.

    Args:
        target: the directory to make.
        manifest: its ``files`` are filled in here.
        write: puts every other file under the directory that it is given.
        overwrite: replace an existing target (moved aside first, removed last).

    Raises:
        ArtifactError: the target exists.

    """
    path = Path(target)
    if not overwrite and (path.exists() or path.is_symlink()):
        raise ArtifactError(f"{path} exists already: choose another place or pass overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        building.chmod(0o755)
        write(building)
        files = {}
        for file in sorted(building.rglob("*")):
            if file.is_file():
                sync(file)
                files[file.relative_to(building).as_posix()] = (file.stat().st_size, sha256(file))
        (building / MANIFEST).write_bytes(manifest_bytes(manifest, files))
        sync(building / MANIFEST)
        for directory in [*(item for item in building.rglob("*") if item.is_dir()), building]:
            sync(directory)
        if path.exists() or path.is_symlink():
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent)) / "old"
            path.rename(aside)
            try:
                building.rename(path)
            except OSError:
                aside.rename(path)
                raise
            _remove(aside)
            aside.parent.rmdir()
        else:
            building.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return path


def manifest_bytes(manifest: Manifest, files: Mapping[str, tuple[int, str]]) -> bytes:
    """The manifest's file contents, its own SHA-256 included."""
    from dpo_rank import __version__

    data = {
        "format_version": FORMAT_VERSION,
        "written_by": f"dpo_rank {__version__}",
        "requires": [_SHARED_TRUNK] if any(name.endswith("/pair.onnx") for name in files) else [],
        "name": manifest.name,
        "ranks": manifest.ranks,
        "beta": manifest.beta,
        "reward": manifest.reward,
        "temperature": manifest.temperature,
        "calibrated": manifest.calibrated,
        "prompt_format": manifest.prompt_format.to_dict(),
        "passage_format": manifest.passage_format.to_dict() if manifest.passage_format else None,
        "boundary": manifest.boundary,
        "limits": {
            "max_prompt_tokens": manifest.limits.max_prompt_tokens,
            "max_completion_tokens": manifest.limits.max_completion_tokens,
        },
        "vocabulary": manifest.vocabulary,
        "default_precision": {"name": manifest.default_precision, "why": manifest.default_precision_reason},
        "training": dict(manifest.training),
        "confidence": manifest.confidence.to_dict() if manifest.confidence else None,
        "familiarity": manifest.familiarity.to_dict() if manifest.familiarity else None,
        "correction": manifest.correction.to_dict() if manifest.correction else None,
        "files": {name: {"size": size, "sha256": digest} for name, (size, digest) in sorted(files.items())},
        "self_sha256": _NO_SELF,
    }
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    # The field stands last, so its zeros are the last ones in the text.
    head, _, tail = text.rpartition(f'"self_sha256": "{_NO_SELF}"')
    return f'{head}"self_sha256": "{digest}"{tail}'.encode()


def load(path: str | os.PathLike[str]) -> Artifact:
    """Check an artifact, every listed file included.

    Raises:
        ArtifactError: what is wrong, with the file's name.

    """
    root = Path(path)
    if not root.is_dir():
        raise ArtifactError(f"{root}: no such directory")
    if not (root / MANIFEST).exists() and not (root / MANIFEST).is_symlink():
        raise ArtifactError(f"{root} is not a dpo_rank artifact: it has no {MANIFEST}")
    manifest = read_manifest(_read(root, MANIFEST, MAX_MANIFEST_BYTES))
    for name, (size, digest) in manifest.files.items():
        file = _inside(root, name)
        if file.stat().st_size != size:
            raise ArtifactError(f"{name}: has {file.stat().st_size} bytes where {MANIFEST} says {size}: it was cut short or replaced")
        if sha256(file) != digest:
            raise ArtifactError(f"{name}: its SHA-256 is not what {MANIFEST} says: the file was changed or damaged")
    if TOKENIZER not in manifest.files:
        raise ArtifactError(f"{MANIFEST} lists no {TOKENIZER}")
    for name in manifest.files:
        if name.endswith(".onnx"):
            _check_external_data(root, name, manifest)
    return Artifact(root, manifest)


def read_manifest(data: bytes) -> Manifest:
    """Parse and check the bytes of a manifest.

    Raises:
        ArtifactError: damaged, of a newer format, or with a field that cannot be used.

    """
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{MANIFEST}: is no JSON object ({error}): the file is damaged") from None
    version = content.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(f"{MANIFEST}: format_version is {version!r}: the file is damaged")
    writer = content.get("written_by", "an unknown version")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{MANIFEST}: format {version}, written by {writer}; this version reads up to {FORMAT_VERSION}: update dpo_rank"
        )
    own = content.get("self_sha256")
    blanked = data.replace(str(own).encode(), _NO_SELF.encode()) if isinstance(own, str) and len(own) == 64 else b""
    if hashlib.sha256(blanked).hexdigest() != own:
        raise ArtifactError(f"{MANIFEST}: self_sha256 does not match: the file was changed or damaged")
    if unknown := set(content.get("requires", [])) - _FEATURES:
        raise ArtifactError(f"{MANIFEST}: needs {', '.join(map(str, sorted(unknown)))} (written by {writer}): update dpo_rank")
    try:
        return _manifest(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{MANIFEST}: field {error} is missing or cannot be used (written by {writer})") from None


def _manifest(content: Mapping[str, Any]) -> Manifest:
    beta, temperature = float(content["beta"]), float(content["temperature"])
    if not (beta > 0 and math.isfinite(beta) and temperature > 0 and math.isfinite(temperature)):
        raise ValueError("'beta' or 'temperature' (a number above 0)")
    if content["reward"] not in ("sum", "mean") or content.get("boundary", "split") not in ("split", "joint"):
        raise ValueError("'reward' or 'boundary'")
    limits = Limits(int(content["limits"]["max_prompt_tokens"]), int(content["limits"]["max_completion_tokens"]))
    if min(limits.max_prompt_tokens, limits.max_completion_tokens) < 1:
        raise ValueError("'limits' (at least one token each)")
    passage_format = content.get("passage_format")
    confidence, familiarity, correction = (content.get(name) for name in ("confidence", "familiarity", "correction"))
    default = content.get("default_precision", {})
    manifest = Manifest(
        beta=beta,
        reward=content["reward"],
        prompt_format=PromptFormat.from_dict(content["prompt_format"]),
        limits=limits,
        vocabulary=int(content["vocabulary"]),
        temperature=temperature,
        calibrated=bool(content.get("calibrated", False)),
        passage_format=PassageFormat.from_dict(passage_format) if passage_format else None,
        boundary=content.get("boundary", "split"),
        ranks=content.get("ranks", "answers"),
        name=str(content.get("name", "")),
        training=dict(content.get("training", {})),
        default_precision=str(default.get("name", "")),
        default_precision_reason=str(default.get("why", "")),
        confidence=Confidence.from_dict(confidence) if confidence else None,
        familiarity=Familiarity.from_dict(familiarity) if familiarity else None,
        correction=LengthCorrection.from_dict(correction) if correction else None,
        files={_checked_name(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in content["files"].items()},
    )
    if manifest.precisions and not manifest.default_precision:  # written before manifests named it
        return replace(manifest, default_precision="fp32" if "fp32" in manifest.precisions else manifest.precisions[0])
    if manifest.default_precision and manifest.default_precision not in manifest.precisions:
        raise ValueError(f"'default_precision' ({manifest.default_precision!r}, which has no graphs here)")
    return manifest


def _checked_name(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or ":" in name or "\0" in name or PurePosixPath(name).as_posix() != name:
        raise ArtifactError(f"{MANIFEST}: lists {name!r}, which is no plain path inside the artifact")
    if any(part in ("..", ".") for part in parts) or name == MANIFEST:
        raise ArtifactError(f"{MANIFEST}: lists {name!r}, which is no plain path inside the artifact")
    return name


def _inside(root: Path, name: str) -> Path:
    """``root / name`` if it is a regular file and no part of the way to it is a symbolic link."""
    path = root
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            raise ArtifactError(f"{name}: is (or lies behind) a symbolic link; an artifact holds plain files only")
    if not path.exists():
        raise ArtifactError(f"{name}: is missing")
    if not path.is_file():
        raise ArtifactError(f"{name}: is no regular file")
    return path


def _read(root: Path, name: str, limit: int) -> bytes:
    path = _inside(root, name)
    if path.stat().st_size > limit:
        raise ArtifactError(f"{name}: has {path.stat().st_size} bytes, more than the {limit} that it may have")
    return path.read_bytes()


def _check_external_data(root: Path, name: str, manifest: Manifest) -> None:
    """A graph may name only listed files beside it as its weights: every ``location`` must be such an entry, in plain form."""
    data = (root / name).read_bytes()
    folder = PurePosixPath(name).parent
    plain = list(re.finditer(rb"\x0a\x08location\x12([\x00-\x7f])", data))
    if len(plain) != data.count(b"location"):
        raise ArtifactError(f"{name}: names external data in a form that is not read")
    for found in plain:
        length = found.group(1)[0]
        location = data[found.end() : found.end() + length].decode("utf-8", "replace")
        if "/" in location or (folder / location).as_posix() not in manifest.files:
            raise ArtifactError(f"{name}: names {location!r} as its external data, which {MANIFEST} does not list beside it")


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on the disk."""
    if path.is_file():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    elif os.name != "nt":  # Windows cannot open a directory
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)
