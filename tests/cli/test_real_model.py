"""The commands with a real model, each in a process of its own, as a user runs them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import pytest
from openai import OpenAI

from places import get_model_path
from twostroke.cli.compose import LLM
from twostroke.engine.params import SamplingParams

pytestmark = pytest.mark.real_model

MODEL = "smollm2-135m"
PROMPT = "Name three rivers of Europe."


@pytest.fixture(autouse=True)
def pulled() -> None:
    """Say early, and clearly, when the model is not there."""
    get_model_path(MODEL)


def run(*arguments: str, standard_input: str = "") -> subprocess.CompletedProcess[str]:
    """`twostroke` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "twostroke", *arguments],
        input=standard_input,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_generate_shows_the_answer_and_both_strokes() -> None:
    plain = run("generate", MODEL, "-p", PROMPT, "-n", "24")
    assert plain.returncode == 0, plain.stderr
    assert "prefill" in plain.stderr
    assert "share of the limit" in plain.stderr
    whole = run("generate", MODEL, "--json", "-n", "24", standard_input=PROMPT)
    reply = json.loads(whole.stdout)
    assert reply["text"].rstrip("\n") == plain.stdout.rstrip("\n")
    assert len(reply["token_ids"]) == reply["decode"]["tokens"] + 1
    for stroke in ("prefill", "decode"):
        assert reply[stroke]["tokens_per_s"] > 0
        assert reply[stroke]["share_of_limit"] > 0
        assert reply[stroke]["bound_by"] in ("memory", "compute")


def test_the_threads_do_not_change_the_answer() -> None:
    one, two = (
        json.loads(run("generate", MODEL, "-p", PROMPT, "--json", "--threads", threads).stdout)
        for threads in ("1", "2")
    )
    assert one["token_ids"] == two["token_ids"]


def test_a_template_and_the_raw_prompt_differ() -> None:
    chat = json.loads(run("generate", MODEL, "-p", PROMPT, "-n", "8", "--json").stdout)
    raw = json.loads(run("generate", MODEL, "-p", PROMPT, "-n", "8", "--json", "--raw").stdout)
    assert chat["prefill"]["tokens"] > raw["prefill"]["tokens"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "no-such-model", "-p", "x"), "no-such-model"),
        (("generate", MODEL, "-p", ""), "prompt"),
        (("generate", MODEL, "-p", "x", "--top-p", "7"), "top_p"),
        (("generate", MODEL, "-p", "x", "--threads", "0"), "threads"),
        (("generate", MODEL, "-p", "x", "--backend", "abacus"), "backend"),
        (("generate", MODEL, "--raw", "-p", "word " * 20_000), "tokens"),
        (("serve", MODEL, "--kv-memory", "plenty"), "kv_memory"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_code_2(arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: .+\n", done.stderr), done.stderr
    assert words in done.stderr


def test_chat_remembers_and_resets() -> None:
    lines = "My name is Ada.\nWhat is my name?\n/reset\n/quit\n"
    done = run("chat", MODEL, "-n", "32", standard_input=lines)
    assert done.returncode == 0, done.stderr
    assert "Ada" in done.stdout
    assert "(forgotten)" in done.stderr


def test_serve_answers_the_openai_client_and_ends_on_a_signal() -> None:
    command = [sys.executable, "-m", "twostroke", "serve", MODEL, "--port", "0", "--max-rows", "4"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            said = ""
            while (found := re.search(r"http://\S+", said)) is None:
                line = server.stderr.readline()
                assert line, said
                said += line
            assert "KV pool" in said
            with OpenAI(base_url=found[0], api_key="unused", max_retries=0) as client:
                reply = client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": PROMPT}],
                    max_tokens=24,
                    temperature=0,
                )
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) == 0
        finally:
            server.kill()
    alone = json.loads(run("generate", MODEL, "-p", PROMPT, "-n", "24", "--json").stdout)
    assert reply.choices[0].message.content == alone["text"]


def test_a_batch_gives_what_each_prompt_gives_alone() -> None:
    prompts = ["The sea is", "Once upon a time", PROMPT]
    params = SamplingParams(max_tokens=16, temperature=0.8, seed=5)
    with LLM(MODEL, max_rows=8, kv_memory="64MiB") as llm:
        together = [output.completions[0] for output in llm.generate(prompts, params)]
        alone = [llm.generate(prompt, params)[0].completions[0] for prompt in prompts]
        streamed = "".join(delta.text for delta in llm.stream(PROMPT, params))
    assert together == alone
    assert streamed == alone[2].text
