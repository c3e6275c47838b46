"""OpenAI's Node client and LangChain's ChatOpenAI, unchanged."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from tests.server.http_server import NAME, Running

NODE_CLIENT = "openai@6.49.0"


@pytest.mark.node
def test_node_client(server: Running, alone: LLM, tmp_path: Path) -> None:
    script = Path(__file__).with_name("openai_client.mjs")
    (tmp_path / script.name).write_text(script.read_text())
    install = ["npm", "install", "--silent", "--prefix", str(tmp_path), NODE_CLIENT]
    subprocess.run(install, check=True, capture_output=True)
    done = subprocess.run(
        ["node", script.name, server.url], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    talk = [{"role": "user", "content": "abc"}]
    params = SamplingParams(temperature=1.3, seed=5, max_tokens=30, n=3, stop=("z",))
    expected = alone.chat(talk, params)[0].outputs
    assert got["texts"] == [one.text for one in expected]
    assert got["ends"] == [one.finish_reason for one in expected]
    (one,) = alone.chat(talk, SamplingParams(temperature=1.3, seed=5, max_tokens=30))[0].outputs
    assert (got["streamed"], got["usage"]) == (one.text, len(one.token_ids))
    assert got["scored"] == len(one.token_ids)
    assert got["errors"] == [[404, "model"], [400, "temperature"], [400, "store"]]


@pytest.mark.peer
def test_langchain(server: Running, alone: LLM) -> None:
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    talk = [{"role": "user", "content": "abc"}]
    model = chat_openai(
        model=NAME, base_url=server.url + "/v1", api_key="none", temperature=1.3, seed=5,
        max_tokens=30, stream_usage=True,
    )  # fmt: skip
    (one,) = alone.chat(talk, SamplingParams(temperature=1.3, seed=5, max_tokens=30))[0].outputs
    answer = model.invoke("abc")
    assert answer.content == one.text
    assert answer.usage_metadata["output_tokens"] == len(one.token_ids)
    assert "".join(chunk.content for chunk in model.stream("abc")) == one.text
    assert model.bind(stop=["z"]).invoke("abc").content == one.text.partition("z")[0]
    scored = model.bind(logprobs=True).invoke("abc")
    assert len(scored.response_metadata["logprobs"]["content"]) == len(one.token_ids)
    message = pytest.importorskip("langchain_core.messages").HumanMessage("abc")
    several = model.generate([[message]], n=3).generations[0]
    assert len({one.text for one in several}) == 3

    def add(a: int, b: int) -> int:
        """Adds."""
        return a + b

    assert model.bind_tools([add]).invoke("abc").tool_calls == []
    with pytest.raises(Exception, match="temperature=-1"):
        model.bind(temperature=-1.0).invoke("abc")
