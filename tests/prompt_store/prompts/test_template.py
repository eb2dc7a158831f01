import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_store.errors import InvalidInputs
from prompt_store.prompts.template import Message, parse_template, render_messages, template_fields


def user(content: str) -> tuple[Message, ...]:
    return (Message(role="user", content=content),)


def test_placeholders_are_filled_and_doubled_braces_are_literal() -> None:
    (message,) = render_messages(user('{{"q": "{question}"}} {question}'), {"question": "why {x}?"})
    assert message.content == '{"q": "why {x}?"} why {x}?'


@given(st.text(max_size=60))
def test_any_text_survives_doubling_its_braces(text: str) -> None:
    (message,) = render_messages(user(text.replace("{", "{{").replace("}", "}}")), {})
    assert message.content == text


@given(st.text("{}ab.!: ", max_size=20), st.text(max_size=20))
def test_a_template_either_parses_or_says_why_not(content: str, value: str) -> None:
    try:
        fields = template_fields(user(content))
    except ValueError as error:
        assert "brace" in str(error)  # noqa: PT017 - either branch is an outcome
        return
    render_messages(user(content), dict.fromkeys(fields, value))


@pytest.mark.parametrize(
    "content", ["{", "}", "a } b", "{}", "{0}", "{a.b}", "{a!r}", "{a:>9}", "{a b}", "{{a}", "{a}}"]
)
def test_format_codes_attributes_and_lone_braces_are_refused(content: str) -> None:
    with pytest.raises(ValueError, match="brace"):
        parse_template(content)


def test_missing_and_unexpected_inputs_are_named() -> None:
    with pytest.raises(InvalidInputs) as caught:
        render_messages(user("{title} {body}"), {"titel": "x", "body": "y"})
    assert caught.value.missing == ("title",)
    assert caught.value.unexpected == ("titel",)
    assert "missing input 'title'" in str(caught.value)
    assert "unexpected input 'titel'" in str(caught.value)


def test_an_input_that_is_not_text_is_refused() -> None:
    with pytest.raises(InvalidInputs, match="'title' is int, not text"):
        render_messages(user("{title}"), {"title": 3})
