"""Latency counts whole rounds of a whole batch, and says what the engine says."""

from __future__ import annotations

import pytest
import torch

from aquiline.core.errors import AquilineError
from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from aquiline.evaluation.latency import measure_decoding
from tests.tiny_checkpoint import token, write_draft, write_target
from tests.tiny_engine import assert_idle

PROMPTS = [[token(letter), token("b")] for letter in "aceg"]
GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("latency")
    target, draft = write_target(root / "target", mix=0.15), write_draft(root / "draft")
    return str(target), str(draft)


def make(folders: tuple[str, str], chain: int, ahead: int) -> LLM:
    target, draft = folders
    config = {"model": draft, "num_speculative_tokens": chain} if chain else None
    llm = LLM(target, "float64", config, max_num_seqs=4, max_model_len=64)
    llm.engine.runner.ahead = ahead
    return llm


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_plain_rounds_say_one_token_each(folders, batch, ahead):
    llm = make(folders, 0, ahead)
    found = measure_decoding(llm, PROMPTS, GREEDY, batch)
    used = len(PROMPTS) // batch * batch
    assert found.tokens_per_call == 1
    assert found.rounds == used // batch * (GREEDY.max_tokens - 1)
    assert found.tokens == found.rounds * batch
    assert found.ttit_ms == pytest.approx(found.round_ms)
    assert found.tokens_per_second == pytest.approx(1e3 * batch / found.ttit_ms)
    assert 0 < found.ttft_ms < 1e3 * found.first_token_seconds + 1
    asked = [{"prompt_token_ids": prompt} for prompt in PROMPTS[:used]]
    said = [output.outputs[0].token_ids for output in llm.generate(asked, GREEDY)]
    assert list(found.token_ids) == said
    assert_idle(llm)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(max_tokens=14, seed=5)])
def test_a_chain_says_the_beginning_of_the_same_text(folders, params, ahead):
    plain = measure_decoding(make(folders, 0, ahead), PROMPTS, params, 4)
    llm = make(folders, 3, ahead)
    fast = measure_decoding(llm, PROMPTS, params, 4)
    for ours, theirs in zip(fast.token_ids, plain.token_ids, strict=True):
        assert ours == theirs[: len(ours)]
    assert 1 < fast.tokens_per_call <= 4
    assert fast.tokens_per_call == fast.tokens / (4 * fast.rounds)
    assert max(map(len, fast.token_ids)) == 14  # the window closes with the first that ends
    assert_idle(llm)


def test_bad_batches_are_refused(folders):
    llm = make(folders, 0, 0)
    for batch in (0, 5):
        with pytest.raises(AquilineError, match=f"batch {batch}"):
            measure_decoding(llm, PROMPTS, GREEDY, batch)
    with pytest.raises(AquilineError, match="max_tokens=2"):
        measure_decoding(llm, PROMPTS, SamplingParams(max_tokens=2), 1)
