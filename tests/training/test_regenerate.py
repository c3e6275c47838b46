"""Every user turn is answered in the regenerated context; a stopped run ends up the same."""

import json
from collections import Counter, deque
from collections.abc import Iterator

import pytest

from aquiline.core.errors import DataError
from aquiline.training.conversations import CUT, Entry
from aquiline.training.regenerate import (
    Answer,
    Ask,
    RegenerationSettings,
    questions,
    regenerate,
)

SETTINGS = RegenerationSettings("tiny", (0.0, 0.7, 1.0), 1.0, 64, 512, 0)


class Echo:
    """Says how many messages it saw, the temperature and the seed; ``width`` questions at once."""

    def __init__(self, width: int = 4, stop_after: int | None = None) -> None:
        self.width, self.stop_after = width, stop_after
        self.asked: list[Ask] = []

    def __call__(self, asks: deque[Ask], /) -> Iterator[tuple[Ask, Answer]]:
        running: list[Ask] = []
        while asks or running:
            while asks and len(running) < self.width:
                running.append(asks.popleft())
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            ask = running.pop(len(self.asked) % len(running))  # some order
            self.asked.append(ask)
            yield ask, self.answer(ask)

    def answer(self, ask: Ask) -> Answer:
        assert ask.messages[-1]["role"] == "user"
        last = ask.messages[-1]["content"]
        if last.startswith("long"):
            return Answer(f"{last} and on\ufffd", 64, "length")
        if last.startswith("broken"):
            return Answer("\ufffd", 64, "length")
        if last.startswith("full"):
            return Answer("", 0, "refused")
        return Answer(f"{len(ask.messages)} {ask.temperature} {ask.seed}", 3, "stop")


def chat(*turns: str) -> list[dict[str, str]]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def many(count: int) -> list[Entry]:
    def turns(i: int) -> Iterator[str]:
        yield "s:be brief"
        for turn in range(i % 4 + 1):
            yield from (f"u:{i} {turn}", "a:old")

    return [Entry(i, chat(*turns(i))) for i in range(count)]


def test_answers_are_replaced_in_order_and_in_context(tmp_path):
    given, echo = many(30), Echo()
    kept, report = regenerate(given, echo, SETTINGS, tmp_path / "p")
    assert [entry.number for entry in kept] == list(range(30))
    for before, after in zip(given, kept, strict=True):
        assert [t["role"] for t in after.conversation] == [t["role"] for t in before.conversation]
        assert questions(after.conversation) == questions(before.conversation)
        for at, turn in enumerate(after.conversation):
            if turn["role"] == "assistant":
                assert turn["content"].startswith(f"{at} ")
    for ask in echo.asked:  # what was asked is the beginning of what came out
        whole = next(e for e in kept if e.conversation[1] == ask.messages[1]).conversation
        assert whole[: len(ask.messages)] == ask.messages
    assert len({ask.seed for ask in echo.asked}) == report.answers == 73
    assert report.tokens == 3 * 73
    by_key = {ask.key: ask.temperature for ask in echo.asked}
    assert {(ask.key, ask.temperature) for ask in echo.asked} == set(by_key.items())
    assert set(by_key.values()) == {0.0, 0.7, 1.0}
    assert report.temperatures == Counter(map(str, by_key.values()))


def test_prompts_system_turns_and_equal_conversations(tmp_path):
    given = [Entry(1, chat("u:a", "u:b")), Entry(2, chat("u:a", "a:x", "u:b")),
             Entry(3, chat("s:x", "u:a", "a:old", "s:y"))]  # fmt: skip
    echo = Echo()
    kept, report = regenerate(given, echo, SETTINGS, tmp_path / "p")
    roles = [[turn["role"][0] for turn in entry.conversation] for entry in kept]
    assert roles == [list("uaua"), list("uaua"), list("sua")]
    assert kept[0].conversation == kept[1].conversation
    assert len(echo.asked) == 3
    assert report.conversations == 2


def test_cut_and_refused_answers_end_a_conversation(tmp_path):
    given = [
        Entry(1, chat("u:hi", "u:long", "u:never asked")),
        Entry(2, chat("u:hi", "s:now", "u:broken", "u:never asked")),
        Entry(3, chat("u:hello", "u:full", "u:never asked")),
        Entry(4, chat("u:full at once")),
    ]
    kept, report = regenerate(given, Echo(), SETTINGS, tmp_path / "p")
    assert [entry.number for entry in kept] == [1, 2, 3]
    cut, broken, full = (entry.conversation for entry in kept)
    assert cut[-1] == {"role": "assistant", "content": "long and on", **CUT}
    assert [turn["role"] for turn in broken] == ["user", "assistant"]
    assert [turn["role"] for turn in full] == ["user", "assistant"]
    assert (report.cut, report.refused, report.empty) == (1, 2, 1)
    assert (report.conversations, report.answers, report.tokens) == (3, 4, 3 * 3 + 2 * 64)


@pytest.mark.parametrize("stop_after", [0, 1, 11, 40, 72])
def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path, stop_after):
    given = many(30)
    whole, report = regenerate(given, Echo(), SETTINGS, tmp_path / "whole")
    partial = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        regenerate(given, Echo(width=7, stop_after=stop_after), SETTINGS, partial)
    finished = len(partial.read_text().splitlines()) - 1
    with partial.open("a") as file:
        file.write('{"id": "torn')
    calls, echo = [], Echo(width=3)
    again, resumed = regenerate(
        given, echo, SETTINGS, partial, lambda conversations, tokens: calls.append(conversations)
    )
    assert again == whole
    assert calls == list(range(finished, 31))
    assert resumed.resumed == finished
    assert len(echo.asked) < 73 or not finished
    assert (resumed.answers, resumed.tokens) == (report.answers, report.tokens)
    assert "torn" not in partial.read_text()


def test_another_seed_says_something_else(tmp_path):
    settings = RegenerationSettings("tiny", (0.0, 0.7, 1.0), 1.0, 64, 512, 1)
    one, _ = regenerate(many(5), Echo(), SETTINGS, tmp_path / "one")
    other, _ = regenerate(many(5), Echo(), settings, tmp_path / "other")
    assert all(a.conversation != b.conversation for a, b in zip(one, other, strict=True))
    with pytest.raises(DataError, match="other settings"):
        regenerate(many(5), Echo(), settings, tmp_path / "one")


def test_damaged_partial_file_is_named(tmp_path):
    partial = tmp_path / "p"
    regenerate(many(3), Echo(), SETTINGS, partial)
    lines = partial.read_text().splitlines()
    partial.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    with pytest.raises(DataError, match="damaged"):
        regenerate(many(3), Echo(), SETTINGS, partial)
    assert json.loads(lines[0])["settings"]["target"] == "tiny"
