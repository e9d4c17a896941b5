"""Chat templates: what transformers writes, and nothing that leaves the sandbox."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from liquidc import chat
from liquidc.chat import ChatTemplate, ForbiddenTemplate, read_chat_template, start_early
from liquidc.errors import InputError
from tests.liquidc.conftest import CONFIG, save_model
from tests.liquidc.test_cli import call, ok, refused

CHATML = """{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {{- message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
HEADERS = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday: " + (date_string or "then") + "\\n" + system + eos_token }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' }}
        {{- message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}
"""
STRICT = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% endif %}{% endfor %}"""
TRICKS = """{%- set ns = namespace(n=0) -%}
{%- macro quoted(x) -%}{{ x | tojson }}{%- endmacro -%}
{%- for m in messages -%}
{%- set ns.n = ns.n + 1 -%}
{%- if ns.n > 3 -%}{%- break -%}{%- endif -%}
{{ ns.n }}:{{ quoted(m) }}{{ m.content.split(' ') | join('_') | upper }}{{ '<é&>' | tojson }}
{%- endfor -%}"""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "strict": STRICT, "tricks": TRICKS}
USER = {"role": "user", "content": " What is a list? "}
ANSWER = {"role": "assistant", "content": "A <sequence> & more."}
CONVERSATIONS = {
    "one": [USER],
    "system": [{"role": "system", "content": "Sois bref, à côté."}, USER],
    "more": [USER, ANSWER, {"role": "user", "content": "And a tuple?"}],
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_transformers_writes(name: str, conversation: str, prompted: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = CONVERSATIONS[conversation]
    ours = ChatTemplate(TEMPLATES[name], Path("x"), TOKENS)
    if name == "strict" and conversation == "system":
        with pytest.raises(InputError, match=r"x: the chat template fails \(roles must alternate"):
            ours.render(messages)
        return
    theirs: Any = render_jinja_template(
        [messages], chat_template=TEMPLATES[name], add_generation_prompt=prompted, **TOKENS
    )
    assert ours.render(messages, add_generation_prompt=prompted) == theirs[0][0]


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a class": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of the clock": "{{ strftime_now.__globals__['datetime'] }}",
    "by a filter": "{{ (''|attr('__class__'))|attr('__base__') }}",
    "by a subscript": "{{ ''['__class__']['__mro__'] }}",
    "by a map": "{{ ['']|map(attribute='__class__')|list }}",
    "by a sort": "{{ ['', 'a']|sort(attribute='__class__')|list }}",
    "by a sum": "{{ ['']|sum(attribute='__class__.__mro__') }}",
    "by a group": "{{ ['']|groupby('__class__')|list }}",
    "by a selection": "{{ ['']|selectattr('__class__')|list }}",
    "by a rejection": "{{ ['']|rejectattr('__class__')|list }}",
    "by a format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "by a format of a map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "by a format of safe text": "{{ ('{0.__class__}'|safe).format('') }}",
    "by a method kept": "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "by a macro": "{% macro m() %}{% endmacro %}{{ m.__init__ }}",
    "a macro's code": "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "a caller": "{% macro m() %}{{ caller.__call__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "a loop": "{% for x in [1] %}{{ loop.__class__ }}{% endfor %}",
    "what a loop holds": "{% for x in [1] %}{{ loop._iterator }}{% endfor %}",
    "a namespace": "{{ namespace().__class__ }}",
    "a joiner": "{{ joiner().__init__.__globals__ }}",
    "a dictionary": "{{ dict.__subclasses__() }}",
    "a range": "{{ range(1).__class__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('id') }}",
    "the context": "{{ self._TemplateReference__context }}",
    "itself": "{{ self.__init__.__globals__ }}",
    "what a block is": "{% block b %}{{ self.b.__call__ }}{% endblock %}",
    "a generator": "{{ (messages|map('upper')).gi_frame }}",
    "a generator's code": "{{ (messages|map('upper')).gi_code }}",
    "a change of the messages": "{{ messages.append(1) }}{{ messages[0].update({}) }}",
    "a change of a message": "{{ messages[0].clear() }}",
    "messages taken": "{{ messages.pop() }}",
    "messages sorted": "{{ messages.sort() }}",
    "a string's type": "{{ 'a'.upper.__self__.__class__ }}",
    "a number's type": "{{ 1 .__class__ }}",
    "an undefined": "{{ nothing.__class__ }}",
    "an undefined's error": "{{ (x|default(1)).__class__ }}",
    "an error": "{{ cycler('a').next.__func__ }}",
}
"""What the sandbox itself forbids."""
FAILS = {
    "an import": "{% import 'os' as os %}",
    "names of an import": "{% from 'os' import path %}",
    "a file": "{% include '/etc/passwd' %}",
    "a file, if it is there": "{% include ['/etc/passwd', '../x'] %}",
    "a parent": "{% extends '/etc/passwd' %}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a method": "{{ 1.x.y }}",
    "a python statement": "{% exec 'import os' %}",
    "a name of python": "{{ open('/etc/passwd').read() }}",
    "evaluation": "{{ eval('1') }}",
    "an import function": "{{ __import__('os') }}",
    "builtins": "{{ __builtins__.open }}",
    "a break outside of a loop": "{% break %}",
    "a continue outside of a loop": "{% continue %}",
    "nested loops": "{% for a in b %}" * 25 + "{% endfor %}" * 25,
    "nested parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested conditions": "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "nested lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "signs": "{{ " + "-" * 50_000 + "1 }}",
    "no end": "{% for a in b %}",
    "newlines and colours": "{{ raise_exception('a\n\x1b[31merror: b') }}",
    "a division": "{{ 1 // 0 }}",
    "a wrong type": "{{ [] + {} }}",
}
"""What is no template, or fails."""
BOMBS = {
    "a width": "{{ 'a'|center(3000000000) }}",
    "an indent": "{{ 'a\na'|indent(3000000000) }}",
    "bytes": "{{ (1).to_bytes(3000000000, 'big') }}",
    "a format": "{{ '%03000000000d' % 1 }}",
    "a formatted width": "{{ '{:>3000000000}'.format(1) }}",
    "a filter's format": "{{ '%03000000000d'|format(1) }}",
    "justified": "{{ 'a'.ljust(3000000000) }}",
    "zeros": "{{ 'a'.zfill(3000000000) }}",
    "a product": "{{ 'x' * 10**10 }}",
    "a product of lists": "{{ [1] * 10**9 }}",
    "doubling": "{% set n = namespace(a='ab') %}{% for i in range(99) %}"
    "{% set n.a = n.a ~ n.a %}{% endfor %}",
    "doubling by a sum": "{% set n = namespace(a='ab') %}{% for i in range(99) %}"
    "{% set n.a = n.a + n.a %}{% endfor %}",
    "doubling a list": "{% set n = namespace(a=[1, 2]) %}{% for i in range(99) %}"
    "{% set n.a = n.a + n.a %}{% endfor %}",
    "a replacement": "{% set n = namespace(a='a' * 9999) %}{% for i in range(9) %}"
    "{% set n.a = n.a.replace('a', n.a[:9999]) %}{% endfor %}",
    "a join": "{% set a = 'a' * 99999 %}{{ (a|list)|join(a) }}",
    "a long text": "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "a range": "{% for i in range(10**9) %}{% endfor %}",
    "tabs": "{{ ('\t' * 9999).expandtabs(999999) }}",
    "json": "{{ [1]|tojson(indent=3000000000) }}",
    "batches": "{{ [1]|batch(10**9, 'x')|list }}",
    "a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "three loops": "{% for i in range(999) %}{% for j in range(999) %}{% for k in range(999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "sums": "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "slices": "{{ [1]|slice(10**9)|list }}",
    "lipsum": "{{ lipsum(10**7) }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a modular power": "{{ (7 ** (9 ** 8)) % 10 }}",
    "digits": "{{ (1).__add__ }}{{ 10 ** 10 ** 8 }}",
    "a shift by products": "{% set n = namespace(a=3) %}{% for i in range(99) %}"
    "{% set n.a = n.a * n.a %}{% endfor %}",
    "membership": "{% for i in range(99999) %}{% if -1 in range(99999)|list %}{% endif %}"
    "{% endfor %}",
    "sorting": "{% for i in range(99999) %}{{ range(99999)|sort|length }}{% endfor %}",
    "unique": "{% for i in range(99999) %}{{ range(99999)|unique|list|length }}{% endfor %}",
    "reversal": "{% for i in range(99999) %}{{ range(99999)|list|reverse|list|length }}"
    "{% endfor %}",
    "counting": "{% set a = 'a' * 999999 %}{% for i in range(99999) %}{{ a.count('b') }}"
    "{% endfor %}",
    "wrapping": "{{ ('a ' * 999999)|wordwrap(2) }}",
    "links": "{{ ('http://a.b ' * 99999)|urlize }}",
    "a macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "an infinite cycle": "{% set c = cycler(1, 2) %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{% set x = c.next() %}{% endfor %}{% endfor %}",
    "a recursive loop": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "titles": "{% set a = 'a b ' * 99999 %}{% for i in range(99999) %}{{ (a|title)|length }}"
    "{% endfor %}",
    "wide sums": "{% set n = namespace(a=[]) %}{% for i in range(99999) %}"
    "{% set n.a = n.a + [range(9999)|list] %}{% endfor %}",
}
"""What takes minutes or gigabytes where nothing limits it."""
QUICK = ("a width", "bytes", "doubling", "a long text", "a range", "sums")


@pytest.mark.parametrize("name", ESCAPES)
def test_the_sandbox_holds(name: str) -> None:
    with pytest.raises(ForbiddenTemplate, match="does what it may not do") as caught:
        ChatTemplate(ESCAPES[name], Path("x")).render([USER])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FAILS)
def test_what_fails_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match="the chat template") as caught:
        ChatTemplate(FAILS[name], Path("x")).render([USER])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BOMBS]
)
def test_a_bomb_is_stopped(name: str) -> None:
    """It costs up to two seconds of CPU time and half a gigabyte, both of another process."""
    with pytest.raises(InputError, match="the chat template") as caught:
        ChatTemplate(BOMBS[name], Path("x")).render([USER])
    assert "\n" not in str(caught.value)


def test_a_process_that_is_gone_is_replaced() -> None:
    template = ChatTemplate("{{ messages[0].content.ljust(messages[0].n) }}|", Path("x"))
    assert template.render([{"role": "user", "content": "a", "n": 3}]) == "a  |"
    with pytest.raises(ForbiddenTemplate, match="x: the chat template does what it may not do"):
        template.render([{"role": "user", "content": "a", "n": 3 * 10**9}])
    assert template.render([{"role": "user", "content": "a", "n": 2}]) == "a |"
    template.close()
    assert template.render([{"role": "user", "content": "b", "n": 1}]) == "b|"
    template.close()


def test_a_process_that_was_started_early_is_taken() -> None:
    start_early()
    start_early()
    (spare,) = chat._SPARE
    template = ChatTemplate("{{ messages[0].content }}", Path("x"))
    assert template.render([{"role": "user", "content": "a"}]) == "a"
    assert template._worker is spare
    assert not chat._SPARE
    template.close()


def test_an_answer_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liquidc.chat.TIMEOUT_SECONDS", 0)
    with pytest.raises(ForbiddenTemplate, match="no answer after 0 seconds"):
        ChatTemplate("a", Path("x")).render([USER])


def test_what_is_no_message() -> None:
    template = ChatTemplate("a", Path("x"))
    with pytest.raises(InputError, match="a message is a mapping with role and content, not 1"):
        template.render(cast("Any", [1]))
    with pytest.raises(InputError, match="a message holds what JSON can't"):
        template.render([{"role": "user", "content": object()}])


def test_the_process_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the environment is there, should a template ever get out of its sandbox."""
    monkeypatch.setenv("LIQUIDC_TEST_SECRET", "x")
    template = ChatTemplate("a", Path("x"))
    assert template.render([USER]) == "a"
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    if children.exists():
        told = [Path(f"/proc/{n}/environ").read_bytes() for n in children.read_text().split()]
        assert any(b"PYTHONPATH" in each for each in told)
        assert not any(b"LIQUIDC_TEST_SECRET" in each for each in told)
    template.close()


def test_where_templates_are_found(tmp_path: Path) -> None:
    def template(**config: Any) -> str | None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        found = read_chat_template(tmp_path)
        return None if found is None else found.render([USER])

    assert read_chat_template(tmp_path) is None
    assert template() is None
    assert template(chat_template="A{{ bos_token }}", bos_token="<s>") == "A<s>"
    assert template(chat_template="A{{ eos_token }}", eos_token={"content": "<e>"}) == "A<e>"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert template(chat_template=named) == "D"
    assert template(chat_template=named[:1]) is None
    (tmp_path / "chat_template.jinja").write_text("F{{ bos_token }}")
    assert template(chat_template="A", bos_token="<s>") == "F<s>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"chat_template": 3}', "must be a text"),
        ('{"chat_template": [{"name": "x"}]}', "must be a list of names and templates"),
        ('{"chat_template": "{% for %}"}', "the chat template is none"),
        ('{"chat_template": "{{ \'\'.__class__ }}"}', "does what it may not do"),
    ],
)
def test_a_bad_one_is_refused_and_nothing_written(
    content: str, message: str, model: Path, tmp_path: Path
) -> None:
    path = model / "tokenizer_config.json"
    before = path.read_text()
    path.write_text(content)
    try:
        refused(message, "compile", model, "-o", tmp_path / "engine", "--target", "null")
    finally:
        path.write_text(before)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_model(
        tmp_path_factory.mktemp("chat") / "model", {**CONFIG, "max_position_embeddings": 512}
    )
    config = {"chat_template": CHATML, "bos_token": "<s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def engine(model: Path) -> Path:
    ok("compile", model, "-o", model.parent / "engine", "--target", "null")
    return model.parent / "engine"


def test_a_conversation(engine: Path) -> None:
    short = ("-n", "5")
    lines = "Hello\n\n How are you?\n"
    told = ok("run", engine, "--chat", "--system", "Be kind.", *short, input=lines)
    first, second = told["turns"]
    assert (first["prompt"], second["prompt"]) == ("Hello", "How are you?")
    said = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "How are you?"},
    ]
    text = ChatTemplate(CHATML, Path("x")).render(said)
    ids = ",".join(str(byte) for byte in text.encode())
    direct = ok("run", engine, "--ids", ids, *short)
    assert direct["tokens"] == second["tokens"]
    plain = call("run", engine, "--chat", "-p", "Hello", *short)
    assert plain.exit_code == 0, plain.output
    assert plain.stdout.strip("\n")


def test_what_chat_needs(engine: Path, null_engine: Path) -> None:
    refused(
        "the engine has no chat template: give a prompt", "run", null_engine, "--chat", "-p", "x"
    )
    refused("Give --chat or --ids", "run", engine, "--chat", "--ids", "1")
    refused("--system needs --chat", "run", engine, "--system", "x", "-p", "x")


def test_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    engine = tmp_path / "engine"
    ok("compile", bare, "-o", engine, "--target", "null")
    assert len(ok("run", engine, "--ids", "1,2", "-n", "3")["tokens"]) == 3
    refused("the engine has no tokenizer: give token ids", "run", engine, "-p", "x")
    refused("the engine has no tokenizer", "run", engine, "--chat", "-p", "x")
