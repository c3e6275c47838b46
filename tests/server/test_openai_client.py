"""OpenAI's own client, unchanged; texts are those of the model alone."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import jsonschema
import openai
import pytest

from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from tests.server.http_server import NAME, Running

TALK: list[Any] = [{"role": "user", "content": "abc"}]


def expected(alone: LLM, **params: Any) -> Any:
    (output,) = alone.chat(TALK, SamplingParams(**params))
    return output


def test_chat_says_what_the_model_says_alone(client: openai.OpenAI, alone: LLM) -> None:
    sampled = {"max_tokens": 40, "temperature": 1.3, "seed": 5, "n": 3}
    answer = client.chat.completions.create(model=NAME, messages=TALK, **sampled)
    output = expected(alone, **sampled)
    assert [choice.message.content for choice in answer.choices] == [o.text for o in output.outputs]
    assert [choice.finish_reason for choice in answer.choices] == [
        one.finish_reason for one in output.outputs
    ]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(len(one.token_ids) for one in output.outputs)
    assert answer.usage.prompt_tokens == len(output.prompt_token_ids)


def test_chat_streams_every_choice_with_usage_and_speculation(
    client: openai.OpenAI, alone: LLM
) -> None:
    sampled = {"max_tokens": 60, "temperature": 1.3, "seed": 6, "n": 2, "stop": ["z", "qr"]}
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=TALK, stream=True, stream_options={"include_usage": True},
            extra_body={"return_speculation": True}, **sampled,
        )
    )  # fmt: skip
    texts, depths, ends = ["", ""], [[], []], {}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        depths[choice.index] += getattr(choice, "depths", [])
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    output = expected(alone, **{**sampled, "stop": ("z", "qr")})
    assert texts == [one.text for one in output.outputs]
    assert list(map(len, depths)) == [len(one.token_ids) for one in output.outputs]
    assert [ends[0], ends[1]] == [one.finish_reason for one in output.outputs]
    last = chunks[-1]
    assert last.usage is not None
    assert last.usage.completion_tokens == sum(map(len, depths))
    assert last.speculation["accepted_by_depth"][0] > 0
    assert last.speculation["depths"] == [*depths[0], *depths[1]]


@pytest.mark.parametrize("speculation", [True, False])
def test_chunks_tell_tree_bytes_and_tokens_per_call(
    client: openai.OpenAI, alone: LLM, speculation: bool
) -> None:
    more = {"return_speculation": True, "speculation": speculation}
    asked = {"max_tokens": 40, "temperature": 1.1, "seed": 8}
    (expected_text,) = expected(alone, **asked).outputs
    chat = client.chat.completions.create(
        model=NAME, messages=TALK, stream=True, extra_body=more, **asked
    )
    text = client.completions.create(
        model=NAME, prompt=list(expected(alone, **asked).prompt_token_ids), stream=True,
        extra_body=more, **asked,
    )  # fmt: skip
    for stream in (chat, text):
        *chunks, last = list(stream)
        choices = [chunk.choices[0] for chunk in chunks if hasattr(chunk.choices[0], "tree")]
        said = b"".join(bytes(one) for choice in choices for one in choice.bytes)
        assert said.decode(errors="replace") == expected_text.text
        assert all(len(choice.bytes) == len(choice.depths) for choice in choices)
        assert choices[0].tree is None
        paths = [[0], [0, 0], [0, 0, 0]] if speculation else []
        assert {repr(choice.tree) for choice in choices[1:]} == {
            repr({"paths": paths, "retrieved": 0})
        }
        assert choices[-1].tokens_per_call == last.speculation["tokens_per_call"]
        assert (last.speculation["drafted"] > 0) == speculation
        if not speculation:
            assert choices[-1].tokens_per_call == 1.0


def test_logprobs_of_chat_and_text(client: openai.OpenAI, alone: LLM) -> None:
    asked = {"temperature": 0, "max_tokens": 6}
    answer = client.chat.completions.create(
        model=NAME, messages=TALK, logprobs=True, top_logprobs=2, **asked
    )
    shown = answer.choices[0].logprobs.content
    positions = expected(alone, logprobs=2, **asked).outputs[0].logprobs
    for one, position in zip(shown, positions, strict=True):
        said = next(iter(position.values()))
        assert (one.token, one.bytes) == (said.decoded_token, list(said.decoded_token.encode()))
        assert one.logprob == pytest.approx(said.logprob)
        assert len(one.top_logprobs) == 2
        assert one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob
    text = client.completions.create(model=NAME, prompt="abc", logprobs=1, **asked)
    logprobs = text.choices[0].logprobs
    assert "".join(logprobs.tokens) == text.choices[0].text
    assert logprobs.text_offset == list(range(6))
    assert max(logprobs.top_logprobs[0].values()) == pytest.approx(logprobs.token_logprobs[0])


def test_texts_of_several_prompts_whole_and_streamed(client: openai.OpenAI, alone: LLM) -> None:
    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 9, "n": 2}
    prompts = ["abc", "xyz"]
    outputs = alone.generate(prompts, SamplingParams(**asked))
    texts = [one.text for output in outputs for one in output.outputs]
    whole = client.completions.create(model=NAME, prompt=prompts, **asked)
    assert [choice.text for choice in whole.choices] == texts
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(model=NAME, prompt=prompts, stream=True, **asked):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    ids = [alone.tokenizer.encode(prompt) for prompt in prompts]
    of_ids = client.completions.create(model=NAME, prompt=ids, **asked)
    assert [choice.text for choice in of_ids.choices] == texts


def test_every_sampling_field_does_what_it_does_in_the_engine(
    client: openai.OpenAI, alone: LLM
) -> None:
    base: dict[str, Any] = {"max_tokens": 30, "temperature": 1.5, "seed": 1}
    changes: list[dict[str, Any]] = [
        {"top_p": 0.5}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0},
        {"logit_bias": {70: 50.0}}, {"top_k": 2}, {"min_p": 0.5}, {"repetition_penalty": 3.0},
        {"min_tokens": 29}, {"ignore_eos": True}, {"stop_token_ids": (70, 80)}, {"seed": 2},
        {"allowed_token_ids": (70, 71, 72)}, {"bad_words": ("t",)}, {"max_tokens": 5},
        {"skip_special_tokens": False, "ignore_eos": True}, {"stop": ("t",)},
        {"temperature": 0},
    ]  # fmt: skip
    plain = alone.chat(TALK, SamplingParams(**base))[0].outputs[0].text
    moved = 0
    for change in changes:
        asked = {**base, **change}
        text = alone.chat(TALK, SamplingParams(**asked))[0].outputs[0].text
        moved += text != plain
        answer = client.chat.completions.create(
            model=NAME,
            messages=TALK,
            extra_body=asked,  # type: ignore[arg-type]
        )
        assert answer.choices[0].message.content == text, change
    assert moved >= len(changes) - 2


def test_models_and_tokens(client: openai.OpenAI, server: Running, alone: LLM) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    ids = server.post("/tokenize", {"messages": TALK, "model": NAME}).json()["tokens"]
    assert ids == alone.tokenizer.encode_chat(TALK)
    assert server.post("/detokenize", {"tokens": ids}).json() == {
        "prompt": alone.tokenizer.render_chat(TALK)
    }
    strings = server.post("/tokenize", {"prompt": "ab", "return_token_strs": True}).json()
    assert (strings["token_strs"], strings["max_model_len"]) == (["a", "b"], 2048)
    assert server.post("/detokenize", {"tokens": [10**20]}).status_code == 400
    assert server.get("/version").json()["version"]


def test_errors_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served"):
        client.chat.completions.create(model="gpt", messages=TALK)
    with pytest.raises(openai.BadRequestError, match="leave no room in the context") as error:
        client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "a" * 3000}], stream=True
        )
    assert error.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="top_logprobs: it goes with logprobs"):
        client.chat.completions.create(model=NAME, messages=TALK, top_logprobs=2)
    with pytest.raises(openai.BadRequestError, match="audio: unknown field"):
        client.chat.completions.create(
            model=NAME, messages=TALK, audio={"voice": "ash", "format": "wav"}
        )
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "a" * 200000}]
        )
    assert error.value.status_code == 413


def test_no_ops_are_accepted(client: openai.OpenAI, alone: LLM) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=TALK, temperature=0, max_completion_tokens=8, user="me",
        metadata={"a": "b"}, store=False, service_tier="auto", parallel_tool_calls=True,
        safety_identifier="x", prompt_cache_key="y", tool_choice="none",
        response_format={"type": "text"}, modalities=["text"],
    )  # fmt: skip
    text = expected(alone, temperature=0, max_tokens=8).outputs[0].text
    assert answer.choices[0].message.content == text
    again = [*TALK, answer.choices[0].message, {"role": "user", "content": "d"}]
    client.chat.completions.create(model=NAME, messages=again, max_tokens=2)
    for field in ({"store": True}, {"service_tier": "flex"}, {"best_of": 2}, {"echo": True}):
        with pytest.raises(openai.BadRequestError, match=f"{next(iter(field))}: not served beyond"):
            client.chat.completions.create(model=NAME, messages=TALK, extra_body=field)


def test_texts_of_a_form(client: openai.OpenAI) -> None:
    """A schema, a choice and a tool that must be called; a schema that cannot be held is named."""
    schema = {
        "type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
        "required": ["a", "b"], "additionalProperties": False,
    }  # fmt: skip
    asked: dict[str, Any] = {"model": NAME, "messages": TALK, "max_tokens": 200, "seed": 3}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for temperature in (0.0, 1.0):
        answer = client.chat.completions.create(
            **asked, temperature=temperature, response_format=form
        )
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)
    chosen = client.chat.completions.create(**asked, extra_body={"guided_choice": ["ab", "ba"]})
    assert chosen.choices[0].message.content in ("ab", "ba")
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": schema}}
    called = client.chat.completions.create(**asked, tools=[tool], tool_choice="required")
    (call,) = called.choices[0].message.tool_calls or ()
    assert call.function.name == "add"
    jsonschema.validate(json.loads(call.function.arguments), schema)
    form["json_schema"]["schema"] = {"type": "object", "not": {}}
    with pytest.raises(openai.BadRequestError, match="not"):
        client.chat.completions.create(**asked, response_format=form)


def test_usage_tells_what_the_prefix_cache_had(client: openai.OpenAI) -> None:
    """All but the last token of a prompt that is asked again, in one piece and in streams."""
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 3, "temperature": 0}
    streamed: dict[str, Any] = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    talk: list[Any] = [{"role": "user", "content": "nothing before began like this"}]
    texts = ["no text before began so", "other texts began otherwise"]
    for create, new, count in (
        (client.chat.completions.create, {"messages": talk}, 1),
        (client.completions.create, {"prompt": texts}, 2),
    ):
        first, again = create(**asked, **new).usage, create(**asked, **new).usage
        (*_, last) = create(**streamed, **new)
        assert first.prompt_tokens_details.cached_tokens < first.prompt_tokens - 2 * count
        assert again.prompt_tokens_details.cached_tokens == again.prompt_tokens - count
        assert last.usage == again


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl(server: Running) -> None:
    body = '{"prompt": "abc", "temperature": 0, "max_tokens": 3, "stream": true}'
    url, kind = f"{server.url}/v1/completions", "Content-Type: application/json"
    answer = subprocess.run(["curl", "-sN", url, "-H", kind, "-d", body], capture_output=True)
    events = answer.stdout.decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert len(events) >= 2
    assert all(event.startswith("data: ") for event in events)


def test_metrics_count_what_was_done(server: Running, client: openai.OpenAI) -> None:
    names = (
        "prompt_tokens_total", "generation_tokens_total", "spec_decode_num_drafts_total",
        "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total",
        "time_to_first_token_seconds_count", "e2e_request_latency_seconds_count",
        "inter_token_latency_seconds_count",
    )  # fmt: skip
    client.completions.create(model=NAME, prompt="a", max_tokens=60, seed=3)
    before = {name: server.metric(name) for name in names}
    answer = client.completions.create(
        model=NAME, prompt="abcd", max_tokens=60, seed=3, extra_body={"return_speculation": True}
    )
    done, stats = {name: server.metric(name) - before[name] for name in names}, answer.speculation
    tokens = answer.usage.completion_tokens
    assert list(done.values()) == [
        4, tokens, stats["rounds"], stats["drafted"], sum(stats["accepted_by_depth"]), 1, 1,
        tokens - 1,
    ]  # fmt: skip
    assert sum(stats["accepted_by_depth"]) > 0
    by_depth = "spec_decode_num_accepted_tokens_per_pos_total"
    assert server.metric(by_depth) == server.metric("spec_decode_num_accepted_tokens_total")
