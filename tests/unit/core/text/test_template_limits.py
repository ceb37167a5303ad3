"""Templates of others end in bounded time and memory, and others render as they did."""

import pytest

from s2l_ray.core.text.template_limits import limited
from s2l_ray.errors import UserError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def rendered(template: str) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    with limited():
        texts, _ = render_jinja_template([TURNS], chat_template=template)
    return str(texts[0])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "turns of loops",
        ),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
            "{{ f(40) }}",
            "turns of loops",
        ),
        ("{{ 'x' * 3000000000 }}", "a text or list of more than"),
        ("{{ ([0] * 3000000000) | length }}", "a text or list of more than"),
        ("{{ 3000000000 * 'x' }}", "a text or list of more than"),
        (
            "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(40) %}"
            "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "more than .* as much text",
        ),
        (
            "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(40) %}"
            "{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "more than .* as much text",
        ),
        ("{{ 'x'.ljust(3000000000) }}", "calls a function with 3,000,000,000"),
        ("{{ 'x' | center(3000000000) }}", "calls a function with 3,000,000,000"),
        ("{{ '%3000000000d' % 1 }}", "a width that can be of any length"),
        ("{{ '%3000000000d' | format(1) }}", "a width that can be of any length"),
        ("{{ '{:3000000000}'.format(1) }}", "a width that can be of any length"),
        ("{{ '{:{}}'.format(1, 3000000000) }}", "a width that can be of any length"),
        ("{{ 9 ** 999999999 }}", "calls a function with"),
        (
            "{% set x = 'x' * 9999999 %}{% for i in range(9999) %}{{ x }}{% endfor %}",
            "turns of loops, or as much text",
        ),
        (
            "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
            "turns of loops, or as much text",
        ),
    ],
)
def test_a_template_without_bounds_is_refused(template: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        rendered(template)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}<{{ m.role ~ '|' ~ 1 ~ none }}>{% endfor %}",
         "<user|1None><assistant|1None>"),
        ("{% for m in messages %}{{ loop.index0 }}{% else %}none{% endfor %}", "01"),
        ("{% for m in messages if m.role == 'user' %}{{ loop.last }}{% endfor %}", "True"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}", "x"),
        ("{% macro f(a, b='-') %}{{ a }}{{ b * 3 }}{% endmacro %}{{ f('x') }}{{ f(1, b='2') }}",
         "x---1222"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
         "{% endfor %}{{ ns.n }}", "2"),
        ("{{ '%02d' % 7 }}{{ '%s-%s' | format(1, 'b') }}{{ '{:>3}'.format(4) }}", "071-b  4"),
        ("{{ (messages | map(attribute='role') | list) + ['x'] }}", "['user', 'assistant', 'x']"),
        ("{{ [1, none, true] | tojson }}{{ undefined_name }}{{ 'a' 'b' ~ ('c' ~ 'd') }}",
         "[1, null, true]abcd"),
        ("{{ 7 % 4 }}{{ 2 ** 10 }}{{ 'ab'.center(4) }}{{ 'ab' | indent(2, true) }}",
         "31024 ab   ab"),
    ],
)  # fmt: skip
def test_other_templates_render_as_they_did(template: str, text: str) -> None:
    assert rendered(template) == text
