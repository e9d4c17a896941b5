"""Chat templates: what transformers writes, and nothing that leaves the sandbox."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from liquidc.chat import ChatTemplate, ForbiddenTemplate, read_chat_template
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
    "by a filter": "{{ (''|attr('__class__'))|attr('__base__') }}",
    "by a format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "by a format of a map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "a change of the messages": "{{ messages.append(1) }}{{ messages[0].update({}) }}",
    "itself": "{{ self.__init__.__globals__ }}",
    "a generator": "{{ (messages|map('upper')).gi_frame }}",
    "a range": "{% for i in range(10**9) %}{% endfor %}",
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "a recursive macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a long text": "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "a product": "{{ 'x' * 10**10 }}",
    "a product of lists": "{{ [1] * 10**9 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
}
IMPOSSIBLE = {
    "an import": "{% import 'os' as os %}",
    "a file": "{% include '/etc/passwd' %}",
    "a parent": "{% extends '/etc/passwd' %}",
}
FAILS = {"recursion": ESCAPES.pop("a recursive macro"), **IMPOSSIBLE, "a method": "{{ 1.x.y }}"}


@pytest.mark.parametrize("name", ESCAPES)
def test_the_sandbox_holds(name: str) -> None:
    with pytest.raises(ForbiddenTemplate, match="does what it may not do") as caught:
        ChatTemplate(ESCAPES[name], Path("x")).render([USER])
    assert "\n" not in str(caught.value)
    assert sys.gettrace() is None or "coverage" in repr(sys.gettrace())


@pytest.mark.parametrize("name", FAILS)
def test_what_fails_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match="the chat template") as caught:
        ChatTemplate(FAILS[name], Path("x")).render([USER])
    assert "\n" not in str(caught.value)


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
