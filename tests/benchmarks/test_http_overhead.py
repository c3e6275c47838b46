"""The tokenizer from ranks, and the benchmark of HTTP's cost on tiny shapes."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path

import pytest

from aquiline.text.tokenizer import load_tokenizer
from benchmarks import http_overhead
from benchmarks.llama3_tokenizer import SPECIAL_COUNT, read_ranks, write_tokenizer

LETTERS = b"etaoinshrdlu "


def write_ranks(path: Path, tokens: list[bytes]) -> Path:
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens)))
    return path


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All bytes, then pairs and longer tokens of few letters: more than random prompts may name."""
    longer = [
        bytes(letters)
        for count in (2, 3, 4)
        for letters in itertools.product(LETTERS, repeat=count)
        if b" " not in bytes(letters)[1:]
    ]
    every = [bytes([byte]) for byte in range(256)] + [*longer, *(b"9" + one for one in longer)]
    return write_ranks(tmp_path_factory.mktemp("ranks") / "tokenizer.model", every[:32100])


def by_ranks(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """A word's tokens: found whole, else the pair of lowest rank is joined as long as there is
    one."""
    parts = [word] if word in ranks else [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranks.get(a + b, 10**9), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        if not pairs or min(pairs)[0] == 10**9:
            return [ranks[part] for part in parts]
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_the_tokenizer_is_that_of_the_ranks(ranks: Path, tmp_path: Path) -> None:
    table = read_ranks(ranks)
    write_tokenizer(table, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == len(table) + SPECIAL_COUNT
    assert tokenizer.bos_token_id == len(table)
    assert tokenizer.eos_token_ids == (len(table) + 1,)
    assert tokenizer.encode("<|eot_id|>", False) == [len(table) + 9]
    for word in ("ratios", "x", "statues", "äß", " tot", "hellish"):
        assert tokenizer.encode(word, False) == by_ranks(word.encode(), table)
    text = "some text, 12345 of it\n\n and äöü"
    assert tokenizer.decode(tokenizer.encode(text, False)) == text


@pytest.mark.parametrize("tokens", [[b"a", b"b"], [bytes([i]) for i in range(255)]])
def test_files_that_are_no_ranks(tmp_path: Path, tokens: list[bytes]) -> None:
    with pytest.raises(ValueError, match="not tiktoken ranks"):
        read_ranks(write_ranks(tmp_path / "x", tokens))


def test_engine_and_http_in_turns(
    ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(http_overhead.logs, "configure", lambda: None)  # other tests read logs
    out = tmp_path / "serving.json"
    http_overhead.main(
        ["--tokenizer", str(ranks), "--device", "cpu", "--concurrency", "1", "3", "--requests",
         "1", "6", "--prompt-tokens", "8", "--max-tokens", "24", "--repeats", "2",
         "--out", str(out)]
    )  # fmt: skip
    found = json.loads(out.read_text())["http_overhead"]
    assert found["model"] == "tiny shapes"
    for row, (size, count) in zip(found["rows"], ((1, 1), (3, 6)), strict=True):
        assert (row["concurrency"], row["requests"], row["failed"]) == (size, count, 0)
        assert row["client"].startswith("aquiline bench serve --base-url http://127.0.0.1:")
        assert f"--concurrency {size} --requests {count}" in row["client"]
        assert 0.2 < row["ratio"] < 5
        assert row["engine_ttit_ms"] > 0
    # Acceptance is the rule's: 1 + 0.78 + 0.58 + 0.42, of a few dozen rounds.
    assert 2 < found["rows"][1]["tokens_per_call"] < 3.5


def test_requests_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        http_overhead.main(["--tokenizer", "x", "--requests", "3"])
    assert "--requests: give one number for each" in capsys.readouterr().err
