"""Write docs/templates.md: what the prompt format makes of every chat template that TRL ships."""

from __future__ import annotations

from pathlib import Path

import trl
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dpo_rank.scoring.derive import CannotExpressError, prompt_format

HEAD = """# Chat templates as data

A ranker stores its prompt format as data, derived from the tokenizer's chat template and proved equal to it on conversations
(system text, several turns, an earlier assistant turn, empty and Unicode texts, white space, markup). Below is what becomes of
every template in `trl/chat_templates` (TRL {version}). *Expressed* templates can be trained, saved and exported. *Refused* ones
still work with `Ranker.from_models` (the torch engine falls back to transformers' sandboxed renderer) but are never stored in
an artifact. Written by `python docs/make_templates.py`; a test holds it up to date.

ChatML, Llama-2, Mistral, Zephyr, Tulu and Gemma 2, which TRL does not ship (or ships in another version), are expressed from their
documented form (`tests/templates.py`).

| template | verdict | why |
|---|---|---|
"""


def main() -> None:
    lines = []
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        )
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        try:
            prompt_format(tokenizer)
            lines.append(f"| `{path.name}` | expressed | |")
        except CannotExpressError as error:
            reason = str(error).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
            lines.append(f"| `{path.name}` | refused | {reason[:160]} |")
    Path(__file__).with_name("templates.md").write_text(HEAD.format(version=trl.__version__) + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
