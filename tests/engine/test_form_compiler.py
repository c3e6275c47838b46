"""Forms are compiled beside the loop: others go on, errors name the place, nobody waits in vain."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe
from typing import Any

import pytest

from aquiline.core.guided_params import StructuredOutput
from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from aquiline.engine.messages import Abort, Admitted, Progress, Refused, Report, Submit
from aquiline.engine.process import EngineLoop
from aquiline.guided.grammar import Grammar
from tests.tiny_engine import CHAIN, LETTERS, Make, assert_idle

PROMPT = (3, 4, 5)
FREE = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
HELD = replace(FREE, ignore_eos=False, max_tokens=40, structured_outputs={"regex": LETTERS})
QUICK = replace(HELD, structured_outputs={"choice": ["abc", "abd"]})


class Held:
    """An engine's loop in a thread; expressions are compiled once ``release`` is set."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.release, self.begun = llm.engine, threading.Event(), list[str]()
        compile_ = llm.engine.grammars.compile

        def held(wanted: StructuredOutput) -> Grammar:
            self.begun.append(wanted.field)
            if wanted.regex is not None:
                assert self.release.wait(30)
            return compile_(wanted)

        monkeypatch.setattr(llm.engine.grammars, "compile", held)
        self.pipe, theirs = Pipe()
        self._thread = threading.Thread(target=self._run, args=(theirs,))
        self._thread.start()

    def _run(self, connection: Any) -> None:
        with pytest.raises((EOFError, OSError)):
            EngineLoop(self.engine, connection).run()
        connection.close()

    def reports(self) -> Iterator[Report]:
        while self.pipe.poll(30):
            yield self.pipe.recv()
        raise AssertionError("the loop says nothing")

    def until_finished(self, request: int) -> list[Report]:
        """What is reported until then."""
        found = list[Report]()
        for report in self.reports():
            found.append(report)
            if isinstance(report, Progress) and any(
                one.request_id == request and one.finished for one in report.updates
            ):
                return found
        raise AssertionError

    def hang_up(self) -> None:
        self.pipe.close()
        self._thread.join(30)
        assert not self._thread.is_alive()


def tokens_of(reports: list[Report], request: int) -> tuple[int, ...]:
    updates = [one for report in reports if isinstance(report, Progress) for one in report.updates]
    mine = [one for one in updates if one.request_id == request]
    return tuple(token for one in mine for delta in one.deltas for token in delta.token_ids)


def about(reports: list[Report], request: int) -> list[Report]:
    """Reports about a request, but for its tokens."""
    return [one for one in reports if isinstance(one, Admitted | Refused)
            and one.request_id == request]  # fmt: skip


@pytest.fixture
def held(make: Make, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    loop = Held(make("mixed", CHAIN), monkeypatch)
    yield loop
    loop.release.set()
    loop.hang_up()


def expected(make: Make, params: SamplingParams) -> tuple[int, ...]:
    (output,) = make("mixed", None).generate({"prompt_token_ids": PROMPT}, params)
    return output.outputs[0].token_ids


def test_others_go_on_while_a_form_is_compiled(held: Held, make: Make) -> None:
    held.pipe.send(Submit(1, PROMPT, HELD))
    for number, params in ((2, FREE), (3, QUICK)):  # a quick form passes it too
        held.pipe.send(Submit(number, PROMPT, params))
        reports = held.until_finished(number)
        assert tokens_of(reports, number) == expected(make, params)
        assert about(reports, number) == [Admitted(number)]
        assert not about(reports, 1)
        assert [one for one in reports if isinstance(one, Progress)][-1].load.waiting == 1
    held.release.set()
    reports = held.until_finished(1)
    assert about(reports, 1) == [Admitted(1)]
    assert tokens_of(reports, 1) == expected(make, HELD)


def test_what_does_not_compile_is_refused_beside_a_running_request(held: Held) -> None:
    held.pipe.send(Submit(1, PROMPT, replace(FREE, max_tokens=80)))
    bad = replace(
        HELD, structured_outputs={"json": {"type": "object", "properties": {"a": {"type": "odd"}}}}
    )
    held.pipe.send(Submit(2, PROMPT, bad))
    held.pipe.send(Submit(3, (), QUICK))  # a form that compiles helps nothing else
    reports = held.until_finished(1)
    (refused,) = about(reports, 2)
    assert isinstance(refused, Refused)
    assert "json: #/properties/a" in refused.message
    (refused,) = about(reports, 3)
    assert isinstance(refused, Refused)
    assert "prompt: it is empty" in refused.message
    assert len(tokens_of(reports, 1)) == 80
    assert not tokens_of(reports, 2)


def test_a_request_aborted_before_its_form_is_done_leaves_nothing(held: Held) -> None:
    for number in (1, 2):  # both workers are busy
        form = {"regex": f"{LETTERS}{number}"}
        held.pipe.send(Submit(number, PROMPT, replace(HELD, structured_outputs=form)))
    held.pipe.send(Submit(3, PROMPT, QUICK))
    for number in (3, 1):
        held.pipe.send(Abort(number))
    held.pipe.send(Submit(4, PROMPT, FREE))
    assert len(tokens_of(held.until_finished(4), 4)) == 12
    held.release.set()
    reports = held.until_finished(2)
    held.pipe.send(Submit(5, PROMPT, FREE))
    reports += held.until_finished(5)
    assert not about(reports, 1)
    assert not about(reports, 3)
    assert "choice" not in held.begun, "nobody waited for it any more"
    held.pipe.send(Abort(5))  # it has ended
    held.pipe.send(Submit(6, PROMPT, FREE))
    last = held.until_finished(6)[-1]
    assert isinstance(last, Progress)
    assert (last.load.running, last.load.waiting) == (0, 0)


def test_the_loop_ends_with_its_pipe_whatever_is_compiled(make: Make, monkeypatch) -> None:
    llm = make("mixed", CHAIN)
    held = Held(llm, monkeypatch)
    held.pipe.send(Submit(1, PROMPT, HELD))
    held.pipe.send(Submit(2, PROMPT, FREE))
    held.until_finished(2)
    held.hang_up()
    held.release.set()
    assert_idle(llm)
