"""What is a loop and what is not."""

from __future__ import annotations

import random

import pytest

from aquiline.evaluation.loops import inside_loops, loop_share

NEWS = list(range(100, 140))


def spans(inside) -> list[int]:
    return [i for i, flag in enumerate(inside.tolist()) if flag]


def test_a_block_said_again_and_again():
    block = [1, 2, 3, 4, 5, 6, 7, 8]
    text = [*NEWS, *block * 4, *NEWS]
    first_repeat = len(NEWS) + len(block)
    assert spans(inside_loops(text)) == list(range(first_repeat, first_repeat + 24))


def test_one_token_over_and_over():
    assert spans(inside_loops([*NEWS, *[7] * 17])) == list(range(41, 57))
    assert spans(inside_loops([*NEWS, *[7] * 16])) == []  # repeated 15 times


@pytest.mark.parametrize("period", [8, 20, 64])
def test_a_block_must_be_repeated_twice(period):
    block = list(range(period))
    assert not inside_loops([*block * 2, *block[:-1]]).any()
    assert spans(inside_loops(block * 3)) == list(range(period, 3 * period))


def test_a_period_too_long_is_no_loop():
    assert not inside_loops(list(range(65)) * 4).any()
    assert inside_loops(list(range(65)) * 4, max_period=65).any()


def test_a_change_ends_a_loop():
    text = [*[1, 2] * 12, 9, *[1, 2] * 12]
    assert spans(inside_loops(text)) == [*range(2, 24), *range(27, 49)]


def test_random_text_against_the_definition():
    chance = random.Random(0)
    for _ in range(30):
        block = [chance.randrange(3) for _ in range(chance.randrange(1, 6))]
        text = [chance.randrange(3) for _ in range(20)] + block * 8 + [chance.randrange(3)] * 5
        expected = set()
        for period in range(1, 65):
            run: list[int] = []
            for at in range(len(text) + 1):
                if at < len(text) and at >= period and text[at] == text[at - period]:
                    run.append(at)
                    continue
                expected |= set(run) if len(run) >= max(16, 2 * period) else set()
                run = []
        assert set(spans(inside_loops(text))) == expected


def test_the_share_of_all_tokens():
    loop, plain = inside_loops([7] * 20), inside_loops(NEWS)
    assert loop_share([loop, plain]) == 19 / 60
    assert loop_share([]) == 0
    assert len(inside_loops([])) == 0
