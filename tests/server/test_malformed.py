"""Bodies that no client should send: 4xx each, and the server still answers."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest

from tests.server.http_server import Running

COUNT = 500
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "temperature": 0.5,
        "top_p": 0.5, "n": 1, "stop": ["x"], "seed": 1, "logit_bias": {"5": 1}, "logprobs": True,
        "top_logprobs": 1, "stream": False, "top_k": 5, "min_p": 0.1, "bad_words": ["a"],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    "/v1/completions": {
        "prompt": "a", "max_tokens": 2, "temperature": 0.5, "logprobs": 1, "stop_token_ids": [3],
        "allowed_token_ids": [4, 5], "repetition_penalty": 1.1, "prompt_logprobs": 1,
    },
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1, 2]},
}  # fmt: skip
REQUIRED = {"messages", "prompt", "tokens"}
HUGE = b"9" * 400
# None of these is a value that a field takes, but for a limit that may be HUGE and an empty bias.
WRONG: list[bytes] = [
    b"{}", b"[[[]]]", b'[{"a": {}}]', b"1e400", b"-1e400", HUGE, b"-" + b"9" * 40,
    b'{"a": [1, {"b": null}]}', b'"\\ud800"', b"NaN", b"Infinity", b'"\xff\xfe"', b"tru",
    b"[" * 5000 + b"]" * 5000, b'{"a":' * 2000 + b"1" + b"}" * 2000, b"[-1]", b"[1.5, true]",
]  # fmt: skip


def malformed(draw: random.Random) -> tuple[str, bytes]:
    """A valid body, broken in one place."""
    path = draw.choice(list(VALID))
    body = VALID[path]
    whole = json.dumps(body).encode()
    match draw.randrange(5):
        case 0:  # cut short
            return path, whole[: draw.randrange(1, len(whole) - 1)]
        case 1:  # a byte that is not UTF-8, inside a string
            at = draw.choice([i for i, byte in enumerate(whole) if byte == ord('"')][::2])
            return path, whole[: at + 1] + bytes([draw.randrange(0x80, 0x100)]) + whole[at + 1 :]
        case 2:  # a field that nobody knows
            return path, json.dumps({**body, f"x{draw.random()}": 1}).encode()
        case 3:  # no object at all
            return path, draw.choice([b"", b"null", b"3", b'"text"', b"[]", b"\x00", *WRONG[1:14]])
        case _:  # a wrong value
            name = draw.choice(list(body))
            huge_is_fine, empty_is_fine = {"max_tokens", "top_k"}, body.keys() - REQUIRED
            wrong = draw.choice(
                [
                    value
                    for value in WRONG
                    if not (value == b"{}" and name in empty_is_fine)
                    and not (value == HUGE and name in huge_is_fine)
                ]
            )
            others = {key: value for key, value in body.items() if key != name}
            shown = json.dumps(others)[1:-1].encode()
            comma = b"," if shown else b""
            return path, b"{" + shown + comma + json.dumps(name).encode() + b":" + wrong + b"}"


def test_malformed_bodies_are_refused(server: Running) -> None:
    draw = random.Random(0)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for _ in range(COUNT):
            path, body = malformed(draw)
            kind = draw.choice(["application/json"] * 9 + ["text/plain"])
            answer = http.post(path, content=body, headers={"Content-Type": kind})
            assert 400 <= answer.status_code < 500, (path, body[:300], answer.text)
            assert answer.json()["error"]["message"]
        assert http.get("/health").status_code == 200
        for path, body in VALID.items():
            assert http.post(path, json=body).status_code == 200, path
    assert server.metric("engine_restarts") == 0


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}], ["a"], [{}],
        [{"role": "robot", "content": "a"}], [{"role": "assistant", "tool_calls": []}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}],
        [{"role": "user", "content": "a", "audio": {}}],
    ],
)  # fmt: skip
def test_messages_that_make_no_sense(server: Running, messages: list[Any]) -> None:
    answer = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith("messages")


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 10**30}, {"top_p": 1e-300}, {"temperature": 1e-300}, {"temperature": 1e6},
        {"min_p": 1e-300}, {"max_tokens": 10**30, "stop_token_ids": list(range(256))},
        {"repetition_penalty": 100}, {"logit_bias": {"5": -100, "7": 1e-320}},
        {"allowed_token_ids": [5] * 2000}, {"seed": 2**63 - 1}, {"n": 128, "max_tokens": 1},
        {"stop": ["\u0000", "😀" * 50]}, {"prompt": "\u0000😀\u202e"},
    ],
)  # fmt: skip
def test_extremes_are_served(server: Running, fields: dict[str, Any]) -> None:
    body = {"prompt": "abc", "max_tokens": 3, **fields}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    assert server.metric("engine_restarts") == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e7}, {"seed": 2**63}, {"n": 129}, {"stop_token_ids": [10**30]},
        {"allowed_token_ids": [10**30]}, {"min_tokens": 10**30}, {"logit_bias": {"9" * 30: 1}},
        {"logit_bias": {"-1": 1}}, {"logit_bias": {"²": 1}}, {"logprobs": 21}, {"prompt": []},
        {"prompt": [[]]}, {"prompt": [10**30]}, {"prompt": [-1]}, {"prompt": ["a"] * 300},
        {"stream_options": {"include_usage": True}}, {"bad_words": [""]}, {"stop": [""]},
        {"structured_outputs": {}}, {"guided_choice": []},
    ],
)  # fmt: skip
def test_beyond_the_extremes_is_refused(server: Running, fields: dict[str, Any]) -> None:
    answer = server.post("/v1/completions", {"prompt": "abc", "max_tokens": 3, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
