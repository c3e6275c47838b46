"""A batch of rows with and without grammars; the text is that of plain decoding, and valid."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch

from aquiline.core.guided_params import StructuredOutput
from aquiline.core.params import SamplingParams, SpeculationParams
from aquiline.engine.config import EngineConfig
from aquiline.engine.loader import load
from aquiline.guided.batch import GuidedBatch
from aquiline.guided.grammar import Grammars, mask_words
from aquiline.guided.matcher import Matcher
from aquiline.speculation.tree import TreeShape
from tests.guided.decoding import guided_texts
from tests.guided.forms import VOCAB, allowed, compiled, tokens_of
from tests.laws.tiny import VOCAB as TINY_VOCAB
from tests.laws.tiny import prophetic_models, tiny_models

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tag": {"enum": ["a", "be", None]},
    },
    "required": ["name", "tag"],
}
TREES = [TreeShape.chain(3), TreeShape.named("tree-8")]
LETTERS = '{}[]":, \nabcdefghilmnrstu0123456789-x'
TINY_END = 48
LIMIT = 120
PARAMS = SamplingParams(temperature=2.0, top_p=0.98)


@pytest.fixture(scope="module")
def tiny_grammar():
    tokens = [letter.encode() for letter in LETTERS] + [b'{"', b'":', b"name"]
    store = Grammars(tokens, TINY_VOCAB, [TINY_END], lambda text: [*map(LETTERS.index, text)])
    return store.compile(StructuredOutput(json=SCHEMA))


def text_of(tokens: list[int]) -> str:
    tokens_bytes = [*LETTERS, '{"', '":', "name"]
    return "".join(tokens_bytes[token] for token in tokens)


def test_rows_without_a_grammar_are_all_ones():
    tree = TreeShape.chain(2)
    matcher = Matcher(compiled(regex="ab"))
    tokens = torch.tensor([[0, 1, 2], [0, ord("a"), ord("b")], [0, 1, 2]])
    masks = GuidedBatch([None, matcher, None], VOCAB).masks(tree, tokens)
    assert masks.shape == (3, 3, mask_words(VOCAB))
    assert masks.dtype == torch.int32
    assert (masks[[0, 2]] == -1).all()
    alone = torch.empty_like(masks[1])
    matcher.fill(tree, tokens[1], alone)
    assert torch.equal(masks[1], alone)


def test_what_is_foreseen_by_row():
    matchers = [None, Matcher(compiled(regex="abc")), Matcher(compiled(regex="a+"))]
    foreseen = GuidedBatch(matchers, VOCAB).foreseen(3)
    assert foreseen.tolist() == [[-1] * 3, [*tokens_of("ab"), -1], [-1] * 3]
    assert GuidedBatch(matchers, VOCAB).foreseen(0).shape == (3, 0)


def test_roots_are_what_may_come_next():
    matchers = [Matcher(compiled(regex="abc")), None]
    matchers[0].advance(tokens_of("ab"))
    roots = GuidedBatch(matchers, VOCAB).roots()
    assert roots.shape == (2, 1, mask_words(VOCAB))
    assert allowed(roots[0, 0]) == {ord("c")}
    assert (roots[1] == -1).all()


@pytest.mark.parametrize("tree", TREES, ids=["chain", "tree"])
@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), PARAMS], ids=["greedy", "seeded"]
)
def test_speculation_changes_no_guided_text(tiny_grammar, tree, params):
    models, prompts = tiny_models(), [[1, 2, 3], [7, 8, 9, 10], [4, 5]]
    grammars = [tiny_grammar, None, tiny_grammar]
    plain, plain_rounds = guided_texts(models, prompts, grammars, TreeShape.chain(0), params, LIMIT)
    drafted, rounds = guided_texts(models, prompts, grammars, tree, params, LIMIT)
    assert drafted == plain
    assert rounds < plain_rounds
    for tokens in (plain[0], plain[2]):
        if tokens[-1] == TINY_END:
            jsonschema.validate(json.loads(text_of(tokens[:-1])), SCHEMA)
    assert params.temperature == 0 or plain[0][-1] == TINY_END


@pytest.mark.parametrize("tree", TREES, ids=["chain", "tree"])
def test_a_text_may_end_inside_an_accepted_run(tiny_grammar, tree):
    models, prompts = tiny_models(), [[1, 2, 3]]
    (text,), count = guided_texts(
        models, prompts, [tiny_grammar], TreeShape.chain(0), PARAMS, LIMIT
    )
    assert text[-1] == TINY_END
    assert count == len(text)
    foreseen = prophetic_models(models, [[1, 2, 3, *text, TINY_END, 3, 3, 3, 3]])
    drafted, rounds = guided_texts(foreseen, prompts, [tiny_grammar], tree, PARAMS, LIMIT)
    assert drafted == [text]
    assert rounds == -(-len(text) // (tree.depth + 1))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_real_model_writes_valid_objects(temperature):
    loaded = load(
        EngineConfig("smollm2-135m-instruct", dtype="float32", speculation=SpeculationParams())
    )
    tokenizer, models = loaded.tokenizer, loaded.models
    store = Grammars(
        tokenizer.token_bytes(),
        models.target.config.vocab_size,
        tokenizer.eos_token_ids,
        tokenizer.encode,
    )
    grammar = store.compile(StructuredOutput(json=SCHEMA))
    asked = [
        "Describe a cat as JSON with name, age and tag.",
        "JSON of a person, please.",
        "Hello!",
    ]
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in asked]
    grammars, params = [grammar, grammar, None], SamplingParams(temperature=temperature)
    plain, rounds = guided_texts(models, prompts, grammars, TreeShape.chain(0), params, 64)
    for tokens in plain[:2]:
        if tokens[-1] in tokenizer.eos_token_ids:
            jsonschema.validate(json.loads(tokenizer.decode(tokens)), SCHEMA)
    assert plain[0][-1] in tokenizer.eos_token_ids
    for tree in TREES:
        drafted, fewer = guided_texts(models, prompts, grammars, tree, params, 64)
        assert drafted == plain
        assert fewer < rounds
