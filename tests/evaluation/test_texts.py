"""Fixed texts: generated turn by turn, kept whole, and never mistaken for others."""

from __future__ import annotations

import pytest

from aquiline.core.errors import DataError
from aquiline.engine.llm import LLM
from aquiline.evaluation.tasks import TaskPrompt
from aquiline.evaluation.texts import OVERRUN, FixedText, answer, stored_texts
from tests.tiny_checkpoint import IM_END, LETTERS, write_target

PROMPTS = [TaskPrompt("t", "1", "c", ("x", "y")), TaskPrompt("t", "2", "c", ("a",))]


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    folder = write_target(tmp_path_factory.mktemp("target"))
    return LLM(str(folder), "float32", device="cpu")


def test_every_turn_is_answered_with_its_seed(llm):
    texts = answer(llm, PROMPTS, 0, 40, seed=7)
    assert [text.seed for text in texts] == [7, 8, 9]
    first, _, second_turn = texts
    end = first.tokens.index(IM_END)
    assert first.length == end + 1 <= 40
    assert len(first.tokens) == 40 + OVERRUN
    assert first.tokens[end + 1] == LETTERS[0]  # what comes after the end is kept
    said = llm.tokenizer.decode(first.tokens[:end])
    talk = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "y"},
    ]
    assert list(second_turn.prompt) == llm.tokenizer.encode_chat(talk)


def test_a_text_that_does_not_end_is_cut(llm):
    for text in answer(llm, PROMPTS, 0, 5):
        assert (text.length, len(text.tokens), text.roots) == (5, 5 + OVERRUN, 4)


def test_neighbouring_seeds_say_different_things(llm):
    texts = answer(llm, [TaskPrompt("t", str(i), "c", ("x",)) for i in range(4)], 3.0, 20)
    assert len({text.tokens for text in texts}) == 4
    assert texts == answer(llm, [TaskPrompt("t", str(i), "c", ("x",)) for i in range(4)], 3.0, 20)


def test_a_file_is_made_once_and_only_for_its_facts(tmp_path):
    texts, path, made = [FixedText((1, 2), (3, 4, 5), 2, 9)], tmp_path / "deep" / "t.json", []

    def make():
        made.append(1)
        return texts

    for _ in range(2):
        assert stored_texts(path, {"model": "m"}, make) == texts
    assert len(made) == 1
    with pytest.raises(DataError, match="model='m', asked for 'other'"):
        stored_texts(path, {"model": "other"}, make)
    path.write_text(path.read_text()[:20])
    with pytest.raises(DataError, match="damaged"):
        stored_texts(path, {"model": "m"}, make)
