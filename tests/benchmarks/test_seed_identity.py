"""Where seeded texts part is priced by what the draw compared."""

from __future__ import annotations

from dataclasses import replace

from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from benchmarks.fp32_identity import divergences
from benchmarks.seed_identity import drawn_anew, perturbing, texts_of
from tests.tiny_checkpoint import write_target
from tests.tiny_engine import prompts


def test_perturbed_logits_name_every_token_and_price_a_planted_difference(tmp_path):
    llm = LLM(str(write_target(tmp_path / "mixed", mix=0.15)), "float32", max_num_seqs=4)
    exact = llm.engine.runner.models.target
    base = SamplingParams(temperature=2.5, top_p=0.9, max_tokens=12, ignore_eos=True)
    params = [replace(base, seed=seed) for seed in range(5)]
    asked = [prompt["prompt_token_ids"] for prompt in prompts(5)]
    perturb = perturbing(params)
    alone, together = texts_of(llm, asked, params, 1), texts_of(llm, asked, params, 4)
    assert alone == together
    assert len(set(alone)) == 5
    for length in range(1, 13):
        assert drawn_anew(exact, asked, [text[:length] for text in alone], perturb)
    other = [replace(one, seed=one.seed + 9) for one in params]
    assert not drawn_anew(exact, asked, alone, perturbing(other))
    changed = [alone[0], (*alone[1][:7], 1, *alone[1][8:]), *alone[2:]]
    (found,) = divergences(exact, None, asked, changed, alone, perturb)
    assert (found.prompt, found.tokens, found.ours, found.expected) == (1, 7, 1, alone[1][7])
    assert found.gap > 0
