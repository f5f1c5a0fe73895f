"""The servers and clients of these tests.

One server is shared by all tests that leave it as it was; it runs over an engine that plays a
script, so that tests can hold a request in its prefill, let it fail, and see what was cancelled.
The same server over the real engine is in test_engine.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from loopback import Running, run_server
from scripted_llm import MODEL, ScriptedLLM
from twostroke.server.limits import Limits
from twostroke.server.settings import ServerSettings


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Running]:
    """One server for all tests that leave it as it was."""
    engine = ScriptedLLM()
    settings = ServerSettings(aliases=("also-scripted",), limits=Limits(body_bytes=2**20))
    with run_server(engine, settings) as url:
        yield Running(url, engine)


@pytest.fixture
def server(shared_server: Running) -> Running:
    """The shared server with its engine's script reset."""
    shared_server.engine.reset()
    return shared_server


# Clients are shared too: making one reads the machine's certificates.


@pytest.fixture(scope="session")
def shared_http(shared_server: Running) -> Iterator[httpx.Client]:
    """A plain HTTP client of the shared server."""
    with httpx.Client(base_url=shared_server.url, timeout=20) as client:
        yield client


@pytest.fixture(scope="session")
def shared_client(shared_server: Running) -> Iterator[openai.OpenAI]:
    """The official client, unchanged but for its address."""
    with openai.OpenAI(
        base_url=f"{shared_server.url}/v1", api_key="none", max_retries=0, timeout=20
    ) as client:
        yield client


@pytest.fixture
def http(server: Running, shared_http: httpx.Client) -> httpx.Client:
    """A plain HTTP client of the shared server, whose script is reset."""
    return shared_http


@pytest.fixture
def client(server: Running, shared_client: openai.OpenAI) -> openai.OpenAI:
    """The official client of the shared server, whose script is reset."""
    return shared_client


@pytest.fixture
def model() -> str:
    """The served name."""
    return MODEL
