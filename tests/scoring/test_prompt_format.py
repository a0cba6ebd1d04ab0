"""Chat templates as data: the documented formats of the common models, and every text template that TRL ships."""

import datetime
import re
from pathlib import Path

import pytest

from dpo_rank.errors import ArtifactError, EncodingError
from dpo_rank.scoring.derive import CannotExpressError, TemplateRenderer, conversations, prompt_format, template_render
from dpo_rank.scoring.prompt_format import PromptFormat
from tests.templates import DOCUMENTED, trl_templates
from tests.toks import tokenizer

pytestmark = pytest.mark.models
TABLE = Path(__file__).parents[2] / "docs" / "templates.md"


def with_template(template):
    tok = tokenizer("byte-bpe")
    tok.chat_template = template
    return tok


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_formats_are_expressed(name):
    tok = with_template(DOCUMENTED[name])
    form = PromptFormat.from_dict(prompt_format(tok).to_dict())
    render = template_render(tok)
    seen = 0
    for case, messages, answer in conversations(form):
        assert form.prompt(messages) == render(messages, True), case
        whole = form.prompt(messages) + form.completion(messages, answer, True)
        assert whole == render([*messages, {"role": "assistant", "content": answer}], False), case
        seen += 1
    assert seen >= 12


def test_every_template_of_trl_is_in_the_table():
    table = dict(re.findall(r"^\| `([\w.]+)` \| (expressed|refused)", TABLE.read_text(encoding="utf-8"), re.M))
    found = {}
    for name, template in trl_templates().items():
        try:
            prompt_format(with_template(template))
            found[name] = "expressed"
        except CannotExpressError:
            found[name] = "refused"
    missing = {name: verdict for name, verdict in found.items() if table.get(name) != verdict}
    assert not missing, "docs/templates.md is out of date: run `python docs/make_templates.py`"


def test_what_templates_do_with_thoughts():
    form = prompt_format(with_template(DOCUMENTED["qwen3"]))
    user = {"role": "user", "content": "hi"}
    assert form.completion([user], "yes", True) == "<think>\n\n</think>\n\nyes<|im_end|>\n"
    assert form.completion([user], "<think>\nhm\n</think>\n\nyes", True) == "<think>\nhm\n</think>\n\nyes<|im_end|>\n"
    earlier = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
    assert "hm" not in form.prompt([user, earlier, user])


def test_a_date_is_frozen_on_the_day_of_derivation():
    template = "{{ strftime_now('%Y-%m-%d') }}" + DOCUMENTED["chatml"]
    form = prompt_format(with_template(template))
    assert form.frozen_date == datetime.date.today().isoformat()
    assert form.joints["start>user"].startswith(form.frozen_date)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", "in a way no table says"),
        ("{{ messages[-1].content | upper }}", "does not write a turn's text"),
        ("{{ raise_exception('no') }}", "refuses a single user turn"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}GO{% endif %}", "generation prompt"),
    ],
)
def test_a_template_that_is_no_table_is_refused_with_the_reason(template, reason):
    with pytest.raises(CannotExpressError, match=reason):
        prompt_format(with_template(template))


def test_the_renderer_writes_what_the_template_writes():
    tok = with_template("{% for m in messages %}{{ loop.index }}:{{ m.content }};{% endfor %}")
    renderer = TemplateRenderer(tok)
    user = {"role": "user", "content": "hi"}
    assert renderer.prompt([user]) == "1:hi;"
    assert renderer.completion([user], "yes", True) == "2:yes;"
    assert renderer.completion([user], "yes", False) == "2:yes"


def test_a_role_without_a_place_is_named():
    form = prompt_format(with_template(DOCUMENTED["gemma2"]))
    with pytest.raises(EncodingError, match="message 0: .*no place for a system turn at the start"):
        form.prompt([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])


@pytest.mark.parametrize("change", [{"string": "maybe"}, {"strip": {"user": "most"}}, {"joints": {"start>user": 5}}])
def test_a_damaged_format_is_refused(change):
    good = prompt_format(with_template(DOCUMENTED["chatml"])).to_dict()
    with pytest.raises(ArtifactError, match="prompt_format"):
        PromptFormat.from_dict({**good, **change})
    assert PromptFormat.from_dict({**good, "of_a_later_version": 1}).to_dict() == good
