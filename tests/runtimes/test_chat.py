from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cpm_edge.runtimes.bundle import hash_files, open_bundle, write_manifest
from cpm_edge.runtimes.chat import ChatTemplate
from cpm_edge.runtimes.errors import BundleError, PromptError
from tests.runtimes.fakes import CHATML, make_bundle, manifest
from tests.runtimes.templates import MINICPM41

HI = [{"role": "user", "content": "hi"}]


def render(text: str, messages: Any = HI, **options: Any) -> str:
    return ChatTemplate({"default": text}, {"bos_token": "<s>"}).render(messages, **options)


def test_the_minicpm_template() -> None:
    assert render(CHATML) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_thinking_is_passed_only_when_chosen() -> None:
    assert render(MINICPM41) == render(MINICPM41, enable_thinking=True) == render(CHATML)
    assert render(MINICPM41, enable_thinking=False).endswith("<think>\n\n</think>\n")
    assert ChatTemplate({"default": MINICPM41}, {}).has_thinking_switch
    assert not ChatTemplate({"default": CHATML}, {}).has_thinking_switch


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}", "<s>hi"),
        ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{{ {'a': '<你>', 'b': 1} | tojson }}", '{"a": "<你>", "b": 1}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ '你' | tojson(ensure_ascii=true) }}", '"\\u4f60"'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{{ tools is none }} {{ documents is none }}", "True True"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
        ("{{ missing is defined }}", "False"),
    ],
)
def test_what_templates_rely_on(text: str, expected: str) -> None:
    assert render(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('touch PWNED').read() }}",
        "{{ ''['__class__'] }}",
        "{{ (messages | attr('__class__')) }}",
        "{{ '{0.__class__}'.format(messages) }}",
    ],
)
def test_unsafe_templates_are_stopped(text: str) -> None:
    with pytest.raises(PromptError, match="the chat template tried something unsafe"):
        render(text, [dict(m) for m in HI])
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ nothing.here.at.all }}", "undefined"),
        ("{{ range(10 ** 9) | list | length }}", "Range too big"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_failing_templates(text: str, message: str) -> None:
    with pytest.raises(PromptError, match=f"(?s)the chat template.*{message}"):
        render(text)


def test_a_syntax_error_names_its_line() -> None:
    template = ChatTemplate({"default": "ok\n{% if %}"}, {})
    with pytest.raises(PromptError, match=r"the chat template has an error: .*\(line 2\)"):
        template.render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("messages", [[], ["hi"], [{"content": "hi"}], [{"role": 1}]])
def test_malformed_messages(messages: Any) -> None:
    with pytest.raises(PromptError, match="messages"):
        render(CHATML, messages)


def test_the_template_for_tools_is_used_when_there_are_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools[0].name }}"}, {})
    assert template.render(HI) == "plain"
    assert template.render(HI, tools=[]) == "plain"
    assert template.render(HI, tools=[{"name": "f"}]) == "f"
    with pytest.raises(PromptError, match="no chat template named 'default', got rag"):
        ChatTemplate({"rag": "x"}, {}).render(HI)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("text", "text"),
        ([{"name": "default", "template": "listed"}], "listed"),
        (None, None),
        ([{"name": "default"}], BundleError),
    ],
)
def test_templates_of_tokenizer_config(tmp_path: Path, value: Any, expected: Any) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "b", {"tokenizer_config.json": {"chat_template": value}}))
    if expected is BundleError:
        with pytest.raises(BundleError, match="chat_template: expected a string or a list"):
            ChatTemplate.from_bundle(bundle, {})
        return
    template = ChatTemplate.from_bundle(bundle, {})
    assert (template and template.render(HI)) == expected


def test_a_template_file_wins(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "b")
    (folder / "chat_template.jinja").write_text("from the file")
    write_manifest(folder, manifest(hash_files(folder)))
    template = ChatTemplate.from_bundle(open_bundle(folder), {})
    assert template is not None
    assert template.render(HI) == "from the file"
