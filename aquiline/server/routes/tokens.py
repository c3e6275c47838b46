"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from aquiline.core.errors import AquilineError
from aquiline.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from aquiline.server.routes.json_route import JsonRoute, Shared
from aquiline.server.tools.formats import told_in_words

router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize", summary="Text or conversation to token ids")
async def tokenize(body: TokenizeRequest, serving: Shared) -> dict[str, Any]:
    """Token ids, as a completion would see them."""
    serving.model_name(body.model)
    body.check()
    tokenizer = serving.tokenizer

    def encode() -> list[int]:
        if body.prompt is not None:
            return tokenizer.encode(body.prompt, body.add_special_tokens is not False)
        messages = [message.for_template() for message in body.messages or ()]
        tools = [tool.for_template() for tool in body.tools]
        if not tokenizer.template_takes_tools:
            messages, tools = told_in_words(messages, tools), []
        return tokenizer.encode_chat(messages, body.add_generation_prompt, tools or None)

    characters = len(body.prompt or "") + sum(len(str(m.content)) for m in body.messages or ())
    tokens = await serving.tokens(encode, characters)
    answer: dict[str, Any] = {
        "count": len(tokens), "tokens": tokens,
        "max_model_len": serving.llm.require_ready().max_model_len,
    }  # fmt: skip
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.decode([token], False) for token in tokens]
    return answer


@router.post("/detokenize", summary="Token ids to text")
async def detokenize(body: DetokenizeRequest, serving: Shared) -> dict[str, str]:
    """The text, special tokens included."""
    serving.model_name(body.model)
    vocab = serving.llm.require_ready().vocab_size
    if not all(0 <= token < vocab for token in body.tokens):
        raise AquilineError(f"tokens: one is outside the vocabulary of {vocab}")
    return {"prompt": serving.tokenizer.decode(body.tokens, False)}
