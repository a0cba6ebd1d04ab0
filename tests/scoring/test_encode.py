"""Token ids of prompts and answers, against transformers' own rendering and tokenisation."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_rank.errors import DataError, EncodingError
from dpo_rank.scoring.derive import prompt_format
from dpo_rank.scoring.encode import Encoder, Limits, load_tokenizer
from dpo_rank.scoring.prompt_format import PassageFormat, PromptFormat
from tests.toks import KINDS, tokenizer

pytestmark = pytest.mark.models
WIDE = Limits(1000, 1000)


def encoder(tok, limits=WIDE, passages=None, boundary="split", string=None):
    return Encoder(load_tokenizer(tok.backend_tokenizer.to_str()), prompt_format(tok, string), limits, passages, boundary)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_prompt_has_the_ids_that_the_template_gives(kind):
    tok = tokenizer(kind)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
    found = encoder(tok).encode(messages, ["It is 4."])
    text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert found.group.prompt == tok(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", [True, False])
def test_prompt_ids_do_not_depend_on_the_answers(kind, chat):
    encode = encoder(tokenizer(kind, chat=chat)).encode
    prompts = {tuple(encode("How do I boil an egg?", [answer]).group.prompt) for answer in ("water", " water", "", "?!")}
    assert len(prompts) == 1


def test_byte_level_answers_are_the_joint_ids_behind_a_special_token():
    tok = tokenizer("byte-bpe")
    messages = [{"role": "user", "content": "How?"}]
    for answer in ("It is 4.", " It", "", "\n"):
        full = tok.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
        found = encoder(tok).encode(messages, [answer])
        assert [*found.group.prompt, *found.group.candidates[0]] == tok(full, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["sentencepiece-bpe", "unigram"])
def test_an_answer_gets_no_dummy_space(kind):
    tok = tokenizer(kind)
    found = encoder(tok).encode("How?", ["water", " water"]).group.candidates
    assert found[0] != found[1]
    pieces = tok.convert_ids_to_tokens(found[0])
    assert not pieces[0].startswith("▁")
    assert "".join(pieces[:-1]) == "water"


@pytest.mark.parametrize("kind", KINDS)
def test_joint_boundary_is_the_common_prefix_split(kind):
    tok = tokenizer(kind)
    messages, answers = [{"role": "user", "content": "How?"}], ["water", "It is 4."]
    found = encoder(tok, boundary="joint").encode(messages, answers)
    for answer, ids in zip(answers, found.group.candidates, strict=True):
        full = tok.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
        assert [*found.group.prompt, *ids] == tok(full, add_special_tokens=False)["input_ids"]


def test_plain_text_gets_bos_and_eos_and_its_answer_lead():
    tok = tokenizer("byte-bpe", chat=False, bos=True)
    form = prompt_format(tok)
    made = Encoder(load_tokenizer(tok.backend_tokenizer.to_str()), form, WIDE).encode("The fox", [" jumps", " jumps</s>"])
    assert made.group.prompt[0] == tok.bos_token_id
    assert made.group.candidates[0][-1] == tok.eos_token_id
    assert made.group.candidates[0] == made.group.candidates[1]
    lead = PromptFormat(**{**form.to_dict(), "answer_lead": " "})
    led = Encoder(load_tokenizer(tok.backend_tokenizer.to_str()), lead, WIDE).encode("The fox", ["jumps", " jumps"])
    assert led.group.candidates[0] == led.group.candidates[1] == made.group.candidates[0]


def test_an_appended_eos_is_no_part_of_a_prompt():
    from tokenizers import processors

    tok = tokenizer("byte-bpe", chat=False)
    raw = tok.backend_tokenizer
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", raw.token_to_id("</s>"))])
    made = Encoder(load_tokenizer(raw.to_str()), prompt_format(tok), WIDE).encode("The fox", ["jumps"])
    assert raw.token_to_id("</s>") not in made.group.prompt
    assert made.group.candidates[0].count(raw.token_to_id("</s>")) == 1


def test_an_unfinished_answer_has_no_end():
    tok = tokenizer()
    whole, open_end = encoder(tok).encode("How?", ["water", "water"], [True, False]).group.candidates
    assert whole == [*open_end, tok.convert_tokens_to_ids("<|end|>")]


def test_a_str_prompt_is_a_user_turn_or_verbatim():
    tok = tokenizer()
    turn = encoder(tok).encode("How?", ["x"]).group.prompt
    assert turn == encoder(tok).encode([{"role": "user", "content": "How?"}], ["x"]).group.prompt
    assert encoder(tok, string="verbatim").encode("<|user|>How?<|end|><|assistant|>", ["x"]).group.prompt == turn


def test_text_parts_are_joined_and_other_parts_refused():
    encode = encoder(tokenizer()).encode
    parts = [{"type": "text", "text": "Ho"}, {"type": "text", "text": "w?"}]
    assert encode([{"role": "user", "content": parts}], ["x"]) == encode("How?", ["x"])
    with pytest.raises(DataError, match="message 0.*image_url"):
        encode([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], ["x"])


def test_long_prompts_lose_passages_then_turns_then_tokens():
    tok = tokenizer()
    question = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "How do I boil an egg?"},
    ]
    passages = ["Put it in boiling water.", "The quick brown fox."]
    whole = encoder(tok, passages=PassageFormat()).encode(question, ["x"], passages=passages)
    assert not whole.prompt_truncated
    total = len(whole.group.prompt)
    seen = []
    for limit in range(total, 0, -1):
        made = encoder(tok, Limits(limit, 10), PassageFormat()).encode(question, ["x"], passages=passages)
        assert len(made.group.prompt) <= limit
        assert made.prompt_truncated == (limit < total)
        text = tok.decode(made.group.prompt)
        seen.append((len(made.dropped_passages), "hello there" in text, "Be brief" in text, "boil an egg?<|end|><|assistant|>" in text))
    assert seen[0] == (0, True, True, True)
    assert (1, True, True, True) in seen
    assert (2, True, True, True) in seen
    assert (2, False, True, True) in seen
    assert [dropped for dropped, *_ in seen] == sorted(dropped for dropped, *_ in seen)
    short = encoder(tok, Limits(5, 10)).encode("How do I boil an egg?", ["x"]).group.prompt
    assert tok.convert_ids_to_tokens(short)[0] == "<|user|>"
    assert tok.convert_ids_to_tokens(short)[-1] == "<|assistant|>"


def test_a_long_answer_is_cut_openly(caplog):
    made = encoder(tokenizer(), Limits(100, 3))
    with caplog.at_level(logging.WARNING):
        first = made.encode("How?", ["x", "a very long answer indeed"])
        made.encode("How?", ["another very long answer indeed"])
    assert first.truncated == (False, True)
    assert len(first.group.candidates[1]) == 3
    assert made.num_truncated == 2
    assert len([record for record in caplog.records if "cut" in record.message]) == 1


def test_a_prompt_is_cut_the_same_whatever_the_answers_are():
    made = encoder(tokenizer(), Limits(6, 30))
    long = "The quick brown fox jumps over the lazy dog."
    assert made.encode(long, ["x"]).group.prompt == made.encode(long, ["x", "y " * 25]).group.prompt


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: e.encode(5, ["x"]), "a str or a list of chat messages, not int"),
        (lambda e: e.encode([], ["x"]), "empty list"),
        (lambda e: e.encode([{"role": "user"}], ["x"]), "message 0 .user.: 'content' is NoneType"),
        (lambda e: e.encode([{"content": "x"}], ["x"]), "message 0 has no 'role'"),
        (lambda e: e.encode(["x"], ["x"]), "message 0 is str"),
        (lambda e: e.encode([{"role": "tool", "content": "x"}], ["x"]), "no place for a tool turn"),
        (
            lambda e: e.encode([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], ["x"]),
            "the answer after a assistant",
        ),
        (lambda e: e.encode([{"role": "assistant", "content": "x", "tool_calls": [1]}], ["x"]), "tool calls"),
        (lambda e: e.encode("\ud800", ["x"]), "the prompt: character 0 is a lone surrogate"),
        (lambda e: e.encode("x", ["a\udfff"]), "candidate 0: character 1 is a lone surrogate"),
        (lambda e: e.encode("x", ["y"], [False]) and e.encode("x", ["a", ""], [True, False]), "candidate 1 is empty and unfinished"),
        (lambda e: e.encode("x", ["y"], passages=["p"]), "no passage format"),
        (lambda e: e.encode("x", [3]), "candidate 0: expected a str, got int"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(DataError, match=words):
        call(encoder(tokenizer()))


def test_bad_passages_and_an_empty_plain_prompt_are_named():
    with pytest.raises(DataError, match="passage 1"):
        encoder(tokenizer(), passages=PassageFormat()).encode("x", ["y"], passages=["a", {"title": "b"}])
    with pytest.raises(DataError, match="nothing to condition on"):
        encoder(tokenizer(chat=False)).encode("", ["y"])
    with pytest.raises(EncodingError, match="plain text"):
        encoder(tokenizer(chat=False)).encode([{"role": "user", "content": "x"}], ["y"])


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_encodes_or_is_refused_by_name(prompt, answer):
    try:
        made = ENCODER.encode(prompt, [answer])
    except DataError:
        assert any(0xD800 <= ord(c) <= 0xDFFF for c in prompt + answer)
    else:
        assert made.group.prompt
        assert made.group.candidates[0]


@given(st.lists(st.text("ab {}index%\n", max_size=12), max_size=4))
def test_passages_stand_in_the_prompt_as_they_are(texts):
    rendered = PassageFormat("H\n", "[{index}] {text}\n", "F").render(texts)
    assert rendered == ("H\n" + "".join(f"[{n}] {text}\n" for n, text in enumerate(texts, 1)) + "F" if texts else "")


ENCODER = encoder(tokenizer())
