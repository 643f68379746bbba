"""Chat templates: the text transformers renders, and a quick, coded end for every hostile template."""

import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from labinfer.errors import LabinferError, UsageError, WeightsError
from labinfer.runtime import chat_template
from labinfer.runtime.chat_template import render_chat_template

HERE = Path(__file__).parent / "chat_templates"
DATA = json.loads((HERE / "conversations.json").read_text())
EXPECTED: dict[str, dict[str, str | None]] = json.loads((HERE / "expected.json").read_text())
CASES = [(template, name) for template, rows in EXPECTED.items() for name in rows]
USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(("template", "name"), CASES)
def test_same_text_as_transformers(template: str, name: str) -> None:
    case = {**DATA["variables"], **DATA["conversations"][name]}
    case.pop("only", None)
    tools = DATA["tools"] if case.pop("with_tools", False) else None
    source, expected = (HERE / f"{template}.jinja").read_text(), EXPECTED[template][name]
    if expected is None:
        with pytest.raises(UsageError, match=r"alternate|not supported") as caught:
            render_chat_template(source, tools=tools, **case)
        assert caught.value.code == "chat.refused"
    else:
        assert render_chat_template(source, tools=tools, **case) == expected


def test_every_template_has_an_expectation() -> None:
    assert {file.stem for file in HERE.glob("*.jinja")} == set(EXPECTED)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'b': 1, 'a': ['<é>', none, true, 1.5]} | tojson }}", '{"b": 1, "a": ["<é>", null, true, 1.5]}'),
        ("{{ {'a': [1]} | tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{{ ' a.b '.strip().split('.')[-1].upper() }}", "B"),
        ("{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "x1"),
        ("{{ messages[0].get('name', 'nobody') }}{{ messages[0]['role'].title() }}", "nobodyUser"),
        ("{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "0234"),
        ("{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("a\n    {% if true %}\nb\n    {% endif %}\nc\n", "a\nb\nc"),
        ("{%- generation -%} x {%- endgeneration %} y", "x y"),
        ("{{ none }}|{{ true }}|{{ missing }}|{{ [1, 'a'] }}|{{ {'a': none} }}", "None|True||[1, 'a']|{'a': None}"),
        ("{{ documents is none }}{{ tools is none }}{{ add_generation_prompt }}", "TrueTrueTrue"),
    ],
)  # fmt: skip
def test_template_language(source: str, text: str) -> None:
    assert render_chat_template(source, USER) == text


def test_the_time_is_the_local_time() -> None:
    assert render_chat_template("{{ strftime_now('%Y-%m') }}", USER).startswith("20")


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set ns = namespace(x=[1]) %}{% for i in range(34) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
NEST = (
    "{% set ns = namespace(x=[], y=[]) %}{% for i in range(30000) %}"
    "{% set ns.x = [ns.x] %}{% set ns.y = [ns.y] %}{% endfor %}"
)
CUBE = "{% set a = [1] * 1000 %}{% set b = [a] * 1000 %}{% set c = [b] * 1000 %}"
HOSTILE = {
    "endless loop": LOOP,
    "endless sum": DOUBLE + "{{ 5 in ns.x }}",
    "endless comparison": CUBE + "{% set d = [[[1] * 1000] * 1000] * 1000 %}{{ c == d }}",
    "endless json": CUBE + "{{ c | tojson }}",
    "deep comparison": NEST + "{{ ns.x == ns.y }}",
    "deep text": NEST + "{{ ns.x }}",
    "deep json": NEST + "{{ ns.x | tojson }}",
    "deep argument": NEST + "{{ raise_exception(ns.x) }}",
    "deep macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "deep expression": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "deep blocks": "{% if 1 %}" * 50_000 + "{% endif %}" * 50_000,
    "huge range": "{{ range(10 ** 10) | list | length }}",
    "huge repeat": "{{ 'a' * (10 ** 10) }}",
    "huge doubling": DOUBLE.replace("[1]", "'aaaa'") + "{{ ns.x }}",
    "huge replace": "{% set x = 'a' * 1000 %}{{ x.replace('a', x).replace('a', x).replace('a', x) }}",
    "huge format": "{{ '%1000000000d' | format(1) }}",
    "huge indent": "{{ ('a\n' * 1000) | indent(10 ** 9) }}",
    "huge power": "{{ 9 ** (9 ** 9) }}",
    "huge output": "{% for i in range(90000) %}" + "x" * 4096 + "{% endfor %}",
    "syntax": "{% if %}",
    "unknown": "{{ messages | no_such_filter }}",
    "file": "{% include '/etc/passwd' %}",
    "python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "lambda": "{{ (messages.append).__self__.__class__.__base__.__subclasses__() }}",
    "fallback then loop": "{{ 'a'.partition('a') }}" + LOOP,
    "fallback then text": "{{ 'a'.partition('a') }}{{ 'a' * (10 ** 10) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_quickly_with_a_coded_error(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(LabinferError) as caught:
        render_chat_template(HOSTILE[name], USER)
    assert time.perf_counter() - start < 10
    assert caught.value.code in ("chat-template.limit", "chat-template.failed")
    assert len(str(caught.value)) < 2000
    assert render_chat_template("{{ messages[0].content }}", USER) == "hi"  # the next render works again


def test_what_a_template_changes_is_its_own() -> None:
    messages = [{"role": "user", "content": "hi"}]
    render_chat_template("{{ messages.append(1) }}{{ messages[0].update({'role': 'x'}) }}", messages)
    assert messages == USER


def test_jinja2_reads_what_minijinja_does_not() -> None:
    source = "{{ 'a=b'.partition('=')[2] }}"
    if _has_jinja2():
        assert render_chat_template(source, USER) == "b"
        return
    with pytest.raises(WeightsError) as caught:
        render_chat_template(source, USER)
    assert caught.value.code == "chat-template.failed"
    assert "jinja2" in str(caught.value.remedy)


def _has_jinja2() -> bool:
    return subprocess.run([sys.executable, "-c", "import jinja2"], capture_output=True).returncode == 0


def _deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    "messages",
    ["text", ["text"], [1], [{"role": "user", "content": b"x"}], [{"content": "\ud800"}], [{"content": _deep()}]],
    ids=["text", "texts", "number", "bytes", "surrogate", "deep"],
)
def test_messages_that_are_none(messages: Any) -> None:
    with pytest.raises(UsageError) as caught:
        render_chat_template("{{ messages }}", messages)
    assert caught.value.code == "chat.messages"


def test_a_long_conversation_is_no_attack() -> None:
    messages = [{"role": "user", "content": "word " * 200}] * 2000
    source = (HERE / "llama3.jinja").read_text()
    text = render_chat_template(source, messages, bos_token="")
    assert len(text) > 2_000_000
    assert text.count("<|eot_id|>") == 2000


def test_threads_get_their_own_answers() -> None:
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        for _ in range(20):
            answers[number] = render_chat_template("{{ messages[0].content }}", [{"content": str(number)}])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number) for number in range(8)}


def test_an_interrupted_answer_does_not_reach_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    render_chat_template("{{ 1 }}", USER)
    process = chat_template._worker._process
    assert process is not None
    assert process.stdout is not None

    class Interrupted:
        def readline(self) -> bytes:
            raise KeyboardInterrupt

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    real = process.stdout
    monkeypatch.setattr(process, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        render_chat_template("stale", USER)
    assert render_chat_template("fresh", USER) == "fresh"


def test_a_forked_child_has_a_renderer_of_its_own() -> None:
    render_chat_template("{{ 1 }}", USER)
    gc.collect()
    child = os.fork()
    if child == 0:
        os._exit(0 if render_chat_template("{{ 2 }}", USER) == "2" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert render_chat_template("{{ 3 }}", USER) == "3"


def test_the_renderer_ends_with_the_process() -> None:
    program = (
        "from labinfer.runtime import chat_template as c\n"
        "c.render_chat_template('x', [])\nprint(c._worker._process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)
    assert done.stderr == ""
