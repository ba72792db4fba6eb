"""`qllama chat` answers with the whole conversation as prompt."""

from __future__ import annotations

import pytest

import qllama_jax as ql
from typed_lines import answers, replace_stream


@pytest.mark.parametrize("system", [None, "and"])
def test_chat_answers_with_the_whole_conversation_as_prompt(chat_path, chat, system):
    flags = [] if system is None else ["--system", system]
    code, out, err = chat(chat_path(), "hello\n\n  the \n", *flags)
    assert code == 0
    assert out == answers(chat_path(), ["hello", "the"], system)
    assert err.count("finish: ") == 2


def test_clear_forgets_all_but_the_system_message(chat_path, chat):
    _, out, _ = chat(chat_path(), "hello\n/clear\nthe world\n", "--system", "and")
    again = answers(chat_path(), ["the world"], "and")
    assert out == answers(chat_path(), ["hello"], "and") + again


def test_exit_ends_a_chat_before_the_end_of_input(chat_path, chat):
    code, out, _ = chat(chat_path(), "hello\n/exit\nthe world\n")
    assert code == 0
    assert out == answers(chat_path(), ["hello"])


def test_a_message_too_long_for_the_context_is_forgotten_with_an_error(chat_path, chat):
    path = chat_path(context_length=48)
    code, out, err = chat(path, "x" * 48 + "\nhello\n")
    assert code == 0
    assert out == answers(path, ["hello"])
    error, hint, closing = err.splitlines()
    assert error.startswith("qllama: error: prompt of ")
    assert "context is 48 tokens" in error
    assert hint.startswith("/clear")
    assert "finish: " in closing


def test_an_answer_may_fill_the_context(chat_path, chat):
    path = chat_path(context_length=48)
    model = ql.load(path)
    text = model.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    room = 48 - len(model.tokenizer.encode(text))
    assert 0 < room < 100
    _, out, _ = chat(path, "hello\n", "-n", "100")
    assert out == answers(path, ["hello"], new_tokens=room)


def test_control_c_ends_an_answer_which_stays_in_the_history_as_far_as_it_got(
    chat_path, chat, monkeypatch
):
    prompts = []

    def stream(model, ids, **_):
        prompts.append(model.tokenizer.decode(ids, skip_special=False))
        if len(prompts) == 2:
            raise KeyboardInterrupt
        yield ql.Piece("an answer", 1, 0.0)
        raise KeyboardInterrupt

    replace_stream(monkeypatch, "chat", stream)
    code, out, _ = chat(chat_path(), "one\ntwo\nthree\n")
    assert code == 0
    assert out == "an answer\n\nan answer\n"
    one, ask = "<|im_start|>u one<|im_end|>", "<|im_end|><|im_start|>a "
    then = one + "<|im_start|>a an answer<|im_end|>"
    assert prompts == [
        one + "<|im_start|>a ",
        then + "<|im_start|>u two" + ask,
        then + "<|im_start|>u three" + ask,
    ]


def test_a_template_can_be_given(chat, path, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    code, out, err = chat(path, "hello\n", "--chat-template", str(template), "-n", "2")
    assert code == 0, err
    assert out


def test_an_empty_template_is_no_template(chat, tiny_llama):
    path = str(tiny_llama("Q4_0", layers=1, metadata={"tokenizer.chat_template": ""}))
    code, out, err = chat(path, "hello\n")
    assert (code, out) == (2, "")
    assert "no chat template" in err
    assert "--chat-template" in err
