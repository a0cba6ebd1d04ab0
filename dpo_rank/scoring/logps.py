"""Per-token log-probs of a causal language model over a packed row.

`TokenLogProbs` runs a transformers model's own trunk and its own head, so that logit scaling, soft-capping and whatever
else an architecture does around them is the model's code and not a copy. The head runs on the candidates' positions only,
a slice at a time, and keeps one number a target.
"""

from __future__ import annotations

import copy
import itertools
import logging
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo_rank.errors import ModelError
from dpo_rank.scoring import attention
from dpo_rank.scoring.pack import Group, IntArray, Layout, Row, pack

logger = logging.getLogger(__name__)

TESTED_MODEL_TYPES = frozenset(
    [
        "cohere",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "opt",
        "phi3",
        "qwen2",
        "qwen3",
        "starcoder2",
    ]
)
"""Architectures whose packed row is held to the plain forward pass by the tests; any other is compared on first use."""

SLICE_ELEMENTS = 2**24
"""Logits kept at once: a slice of the head's rows holds at most this many of them (64 MiB in float32)."""

VOCABULARY_SLICE = 2048
"""Columns of the head that an exported graph computes at a time: 8 MiB in float32 for 1,024 rows."""

_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})
_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}  # nats


class TokenLogProbs(nn.Module):
    """A causal language model that answers a packed row with the log-prob of every target.

    Args:
        model: a decoder of transformers (``...ForCausalLM``).
        borrow: leave ``model`` as it is and work on a view that shares its parameters; otherwise its attention
            implementation is set in place, as training wants it.
        packed: read the row as it is (True), expand it to a padded batch (False), or decide by architecture (None).

    Attributes:
        packed: whether rows are read without padding; if not, `reason` says why.

    """

    def __init__(self, model: Any, *, borrow: bool = True, packed: bool | None = None) -> None:
        super().__init__()
        if getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "get_output_embeddings"):
            raise ModelError(f"{type(model).__name__} is not a decoder-only language model; a DPO pair needs two of those")
        self.reason = "asked for" if packed is False else cannot_pack(model)
        if packed and self.reason:
            raise ModelError(f"{type(model).__name__} cannot read a packed row: {self.reason}")
        self.packed = self.reason is None
        self.num_layers = int(model.config.num_hidden_layers)
        self.model = view(model) if borrow else model
        if borrow:
            self.model.eval()
        self._head = (_head_view(self.model),)  # a tuple, so that the head's parameters are not registered twice
        if self.packed:
            original = self.model.config._attn_implementation
            _set_attention(self.model)
            if model.config.model_type not in TESTED_MODEL_TYPES and not self._agrees_with_plain(original):
                if packed:
                    raise ModelError(f"{type(model).__name__}: a packed row scores differently from the plain forward pass")
                logger.warning("%s takes the slower padded batch: %s", type(model).__name__, self.reason)

    def forward(self, layout: Layout[Tensor]) -> Tensor:
        """Log-probs in nats, float32 ``[M]``, of ``layout.targets``."""
        hidden = self.hidden(layout) if self.packed else self._expanded_hidden(layout)
        return self.head(hidden, layout.targets)

    def continued(self, layout: Layout[Tensor], past: Tensor | None, keep: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` behind tokens that were read before.

        Args:
            layout: the row.
            past: keys and values of the tokens before it, ``[Q, layers, 2, kv_heads, head_dim]``.
            keep: places in the row whose keys and values are wanted, ``[K]``.

        Returns:
            The log-probs ``[M]``, and keys and values ``[K, layers, 2, kv_heads, head_dim]``.

        """
        carried = attention.Pass(layout, past, keep)
        return self.scored(carried), torch.stack(carried.kept, dim=1)

    def scored(self, carried: attention.Pass) -> Tensor:
        """The log-probs ``[M]`` of a pass that its maker asks for more afterwards."""
        return self.head(self.hidden(carried.layout, carried), carried.layout.targets)

    def hidden(self, layout: Layout[Tensor], carried: attention.Pass | None = None) -> Tensor:
        """Final hidden states ``[M, width]`` at the places that predict the targets, from the packed row."""
        carried = carried or attention.Pass(layout)
        output = self._trunk(input_ids=layout.input_ids[None], position_ids=layout.positions[None], use_cache=False, packed=carried)
        if carried.calls < self.num_layers:
            raise ModelError(
                f"the packed attention ran {carried.calls} times in {self.num_layers} layers: this architecture does not "
                "take its attention from transformers' registry"
            )
        return cast("Tensor", output.last_hidden_state.squeeze(0).index_select(0, layout.source))

    def head(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probs ``[M]`` of ``targets`` [M] under the model's own head at ``hidden`` [M, width]."""
        if torch.compiler.is_exporting():
            return self._vocabulary_slices(hidden, targets)
        size = max(16, SLICE_ELEMENTS // int(self.model.config.vocab_size))
        if hidden.shape[0] <= size:
            return self._slice(hidden, targets)
        slices = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
        if hidden.requires_grad:  # recompute the logits in the backward pass instead of keeping them
            return torch.cat([cast("Tensor", checkpoint(self._slice, h, t, use_reentrant=False)) for h, t in slices])
        return torch.cat([self._slice(h, t) for h, t in slices])

    @property
    def _trunk(self) -> nn.Module:
        return cast("nn.Module", getattr(self.model, trunk_name(self.model)))

    def _slice(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = _logits(self._head[0], hidden)
        return _at(logits, targets) - torch.logsumexp(logits, dim=1)

    def _vocabulary_slices(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The head of an exported graph: logits of a slice of the vocabulary at a time, which stay in a processor's cache."""
        head = self._head[0]
        last = self.model.get_output_embeddings()
        if not isinstance(last, nn.Linear):
            return _at(logits := _logits(head, hidden), targets) - _log_sum_exp(logits)
        starts = range(0, last.out_features, VOCABULARY_SLICE)
        slices = [_logits(_replaced(head, last, _OutputSlice(last, slice(at, at + VOCABULARY_SLICE))), hidden) for at in starts]
        sums = torch.stack([_log_sum_exp(logits) for logits in slices], dim=1)
        return _logits(_replaced(head, last, _OutputAt(last, targets)), hidden)[:, 0] - _log_sum_exp(sums)

    def _expanded_hidden(self, layout: Layout[Tensor]) -> Tensor:
        """The same hidden states from the plain padded batch, prompt + candidate a line: the oracle, and the fallback."""
        sequences, spans = expand(layout)
        ids, mask = padded(sequences)
        states = self._trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return torch.cat([states[line, start:end] for line, (start, end) in enumerate(spans)])

    def _agrees_with_plain(self, original: str) -> bool:
        """Compare a small ragged batch with the plain forward; on any difference this model takes the padded batch."""
        device, dtype = self.model.device, self.model.dtype
        layout = to_tensors(_check_row(int(self.model.config.vocab_size)).layout, device)
        problem = None
        with torch.no_grad():
            try:
                packed = self.head(self.hidden(layout), layout.targets)
            except (RuntimeError, TypeError, ValueError, ModelError, AttributeError) as error:
                problem = f"its forward pass does not take a packed row ({error})"
            self.model.config._attn_implementation = original
            plain = self.head(self._expanded_hidden(layout), layout.targets)
        if problem is None:
            difference = float((packed - plain).abs().max())
            if difference > _CHECK_TOLERANCE.get(dtype, 1e-3):
                problem = f"a packed row differs from the plain forward pass by {difference:.2g} nats"
        if problem is None:
            _set_attention(self.model)
            return True
        self.packed, self.reason = False, problem
        return False


def _log_sum_exp(logits: Tensor) -> Tensor:
    """``[M]`` of ``logits`` [M, vocabulary], in an exported graph."""
    # Runtimes have a fast softmax and a slow log-sum-exp. The largest weight is 1 / sum(exp(logit - top)).
    return logits.amax(dim=1) - torch.log(torch.softmax(logits, dim=1).amax(dim=1))


def cannot_pack(model: Any) -> str | None:
    """Why ``model`` cannot read a packed row, as far as its class and config tell; None where nothing speaks against it."""
    config = model.config
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention is outside transformers' registry"
    layers = set(getattr(config, "layer_types", None) or ())
    if layers - _KNOWN_LAYERS:
        return f"it has layers of another kind ({', '.join(sorted(layers - _KNOWN_LAYERS))})"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi":
        return "it uses ALiBi"
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention is bidirectional"
    if getattr(config, "add_cross_attention", False):
        return "it has cross-attention"
    kinds = _rope_kinds(config)
    if kinds & {"dynamic", "longrope", "su"}:
        return "its rotary embedding depends on the batch's longest position"
    window = getattr(config, "sliding_window", None)
    if window and config.model_type not in TESTED_MODEL_TYPES:
        return "its sliding window is not covered by the tests of the packed row"
    return None


def key_value_shape(config: Any) -> tuple[int, int, int, int]:
    """``(layers, 2, kv_heads, head_dim)``: what one token's keys and values take."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return int(config.num_hidden_layers), 2, kv_heads, dim


def _rope_kinds(config: Any) -> set[str]:
    """The kinds of rotary scaling in a config of transformers 4 (``rope_scaling``) or 5 (``rope_parameters``)."""
    found: set[str] = set()
    pending = [getattr(config, "rope_scaling", None), getattr(config, "rope_parameters", None)]
    while pending:
        entry = pending.pop()
        if isinstance(entry, dict):
            found |= {str(entry[key]) for key in ("rope_type", "type") if key in entry}
            pending += entry.values()
    return found


def view(model: Any) -> Any:
    """A second tree of modules over the same parameters and buffers, with a config of its own.

    Setting the attention implementation, evaluation mode or a switched-off adapter on it leaves ``model`` as it was.
    """
    configs: dict[int, Any] = {}
    modules: dict[int, nn.Module] = {}

    def clone(module: nn.Module) -> nn.Module:
        if id(module) in modules:
            return modules[id(module)]
        twin = modules[id(module)] = copy.copy(module)
        for name, value in vars(module).items():
            if hasattr(value, "_attn_implementation") and hasattr(value, "to_dict"):
                twin.__dict__[name] = configs.setdefault(id(value), copy.copy(value))
        twin._modules = {name: child and clone(child) for name, child in module._modules.items()}
        return twin

    return _own_forward(clone(model))


def _own_forward(twin: Any) -> Any:
    """``twin`` with its class's forward: one put on the instance it was copied from (trainers do so) would run that instance."""
    twin.__dict__.pop("forward", None)
    return twin


def _set_attention(model: Any) -> None:
    """Set the packed attention on every config of ``model`` and read it back: an unknown name would only warn."""
    attention.register()
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._attn_implementation = attention.NAME
        if config._attn_implementation != attention.NAME:
            raise ModelError(f"{type(model).__name__} did not take the packed attention implementation")


def trunk_name(model: Any) -> str:
    """Name of the child of ``model`` that holds everything but the head."""
    if model.base_model_prefix in model._modules:
        return str(model.base_model_prefix)
    trunks: list[str] = [name for name, child in model.named_children() if hasattr(child, "get_input_embeddings")]
    if len(trunks) != 1:
        raise ModelError(f"{type(model).__name__}: its trunk cannot be told from its head")
    return trunks[0]


class _GivenHidden(nn.Module):
    """Stands in for a model's trunk and hands on the hidden states that it is given as ``inputs_embeds``."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _GivenOutput:
        return _GivenOutput(inputs_embeds)

    @property
    def decoder(self) -> _GivenHidden:  # OPT's head asks its trunk's decoder
        return self


class _GivenOutput:
    """A trunk's output that holds hidden states and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index == 0 else ()

    def __getattr__(self, name: str) -> None:
        return None


def _head_view(model: Any) -> Any:
    """``model`` with its trunk replaced: its own forward then turns hidden states into logits, scaling and caps included."""
    return _replaced(model, getattr(model, trunk_name(model)), _GivenHidden())


def _logits(head: Any, hidden: Tensor) -> Tensor:
    """What a head view makes of ``hidden`` [M, width], in float32."""
    # squeeze, not [0]: in an exported graph an index is a copy
    return cast("Tensor", head(inputs_embeds=hidden[None], use_cache=False).logits.squeeze(0).to(torch.float32))


def _at(logits: Tensor, targets: Tensor) -> Tensor:
    """``[M]``: the targets' logits."""
    return logits.gather(1, targets[:, None])[:, 0]


def _replaced(model: Any, old: nn.Module, new: nn.Module) -> Any:
    """A view of ``model`` with ``new`` in the place of its child ``old``."""
    twin = copy.copy(model)
    twin._modules = {name: new if child is old else child for name, child in model._modules.items()}
    return _own_forward(twin)


class _OutputSlice(nn.Module):
    """Some of an output embedding's rows."""

    def __init__(self, last: nn.Linear, rows: slice) -> None:
        super().__init__()
        self._last, self._rows = (last,), rows  # a tuple, so that nothing is registered twice

    def forward(self, hidden: Tensor) -> Tensor:
        [last] = self._last
        return nn.functional.linear(hidden, last.weight[self._rows], None if last.bias is None else last.bias[self._rows])


class _OutputAt(nn.Module):
    """The logit of one token a place: ``hidden`` [1, M, width], ``targets`` [M] -> [1, M, 1]."""

    def __init__(self, last: nn.Linear, targets: Tensor) -> None:
        super().__init__()
        self._last, self._targets = (last,), targets

    def forward(self, hidden: Tensor) -> Tensor:
        [last] = self._last
        found = (hidden * nn.functional.embedding(self._targets, last.weight)[None]).sum(dim=2, keepdim=True)
        return found if last.bias is None else found + last.bias[self._targets][None, :, None]


def to_tensors(layout: Layout[IntArray], device: torch.device | str) -> Layout[Tensor]:
    """The layout's arrays as tensors on ``device``."""
    return Layout(*(torch.from_numpy(field).to(device, non_blocking=True) for field in layout))


def expand(layout: Layout[Tensor]) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Undo the packing: every candidate's prompt + inputs, and the span of its places that predict its targets."""
    num_prompt = layout.prompt_slot.shape[0]
    prompt_lengths = layout.key_length - layout.past_length
    prompt_ends = torch.cumsum(prompt_lengths, 0)
    sequences: list[Tensor] = []
    spans: list[tuple[int, int]] = []
    source = layout.source.tolist()
    starts = [m for m, place in enumerate(source) if place < num_prompt] + [len(source)]
    for first, last in itertools.pairwise(starts):
        prompt = int(torch.searchsorted(prompt_ends, source[first] + 1))
        length, end = int(prompt_lengths[prompt]), int(prompt_ends[prompt])
        tokens = layout.input_ids[layout.source[first + 1 : last]]
        sequences.append(torch.cat([layout.input_ids[end - length : end], tokens]))
        spans.append((length - 1, length - 1 + last - first))
    return sequences, spans


def padded(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences as one batch padded on the right, ids and mask ``[lines, longest]``."""
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=ids.device)
    return ids, (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()


def _check_row(vocabulary: int) -> Row:
    """A small ragged row: two prompts, candidates of one to seven tokens."""
    ids = iter(range(1, 10_000))

    def tokens(count: int) -> list[int]:
        return [next(ids) * 7919 % vocabulary for _ in range(count)]

    return pack([Group(tokens(9), [tokens(7), tokens(1), tokens(4)]), Group(tokens(5), [tokens(3), tokens(6)])])
