"""One attempt over a real socket: everything that a provider can do to it."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.engines.errors import (
    BackendError,
    DeadlineExceeded,
    ProviderError,
    ProviderMisbehaved,
    ProviderRateLimited,
    ProviderRefused,
    ProviderUnavailable,
)
from service.engines.remote.options import TransportOptions
from tests.providers import (
    DONE,
    HALF_CLOSE,
    HANG_UP,
    RESET,
    STREAM_END,
    UNTIL_LEFT,
    Answer,
    ScriptedProvider,
    chunk,
    error_answer,
    event,
    json_answer,
    stream_head,
    text_answer,
    whole,
)
from tests.service.engines.remote.speaking import PATH, read, transport

NAMED = {"x-request-id": "req_1"}
HEAD = stream_head(NAMED)
OPEN_ENDED = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n"


async def test_a_whole_answer_is_read_and_the_connection_kept() -> None:
    async with (
        ScriptedProvider([json_answer({"answer": "yes"}, headers=NAMED)]) as server,
        transport(server.url) as provider,
    ):
        for _ in range(3):
            reply = await provider.post(PATH, b'{"model":"m"}')
        assert (reply.document, reply.request_id) == ({"answer": "yes"}, "req_1")
        assert server.connections == 1
        asked = server.requests[0]
        assert (asked.method, asked.path, asked.document()) == ("POST", "/v1/chat/completions", {"model": "m"})
        assert asked.headers["content-type"] == "application/json"


async def test_a_stream_is_read_as_it_comes_and_the_connection_kept() -> None:
    go = asyncio.Event()
    answer: Answer = [
        HEAD,
        event({"n": 1}),
        go,
        chunk(b'data: {"n"'),
        chunk(b": 2}\r\n\r"),
        chunk(b"\n"),
        DONE,
        STREAM_END,
    ]
    async with ScriptedProvider([answer]) as server, transport(server.url) as provider:
        async with provider.events(PATH, b"{}") as events:
            assert await anext(events) == {"n": 1}
            go.set()
            assert [document async for document in events] == [{"n": 2}]
            assert events.request_id == "req_1"
        assert await read(provider) == [{"n": 1}, {"n": 2}]
        assert server.connections == 1


async def test_key_and_headers_go_where_they_are_meant_to() -> None:
    async with ScriptedProvider([json_answer({})]) as server:
        async with transport(server.url, key=SecretStr("sk-1"), headers={"OpenAI-Organization": "o"}) as provider:
            await provider.post(PATH, b"{}")
        async with transport(server.url, key=SecretStr("sk-1"), key_header="api-key") as provider:
            await provider.get("/models?api-version=1")
    first, second = server.requests
    assert (first.headers["authorization"], first.headers["openai-organization"]) == ("Bearer sk-1", "o")
    assert (second.method, second.path) == ("GET", "/v1/models?api-version=1")
    assert second.headers["api-key"] == "sk-1"
    assert "authorization" not in second.headers


WRONG_ANSWERS: dict[str, tuple[Answer, type[ProviderError], str]] = {
    "500": (error_answer(500, headers=NAMED), ProviderUnavailable, "answered 500: it failed"),
    "429": (error_answer(429, headers=NAMED), ProviderRateLimited, "takes no more"),
    "400": (error_answer(400, headers=NAMED), ProviderRefused, "it failed"),
    "no JSON": ([whole(b'{"choices": [', headers=NAMED)], ProviderMisbehaved, "no JSON;"),
    "no UTF-8": ([whole(b'{"a": "\xff"}', headers=NAMED)], ProviderMisbehaved, "no JSON;"),
    "no object": ([whole(b"[]", headers=NAMED)], ProviderMisbehaved, "no JSON object"),
    "too deep": ([whole(b"[" * 100_000, headers=NAMED)], ProviderMisbehaved, "no JSON;"),
    "empty": ([whole(b"", headers=NAMED)], ProviderMisbehaved, "no JSON;"),
    "HTML": ([whole(b"<html>", headers=NAMED, content_type="text/html")], ProviderMisbehaved, "'text/html'"),
    "an error in place": (json_answer({"error": {"message": "no"}}, headers=NAMED), ProviderUnavailable, "no"),
    "a redirect": (
        [whole(b"", 307, {**NAMED, "location": "http://127.0.0.1:1/"})], ProviderMisbehaved, "answered 307"
    ),
    "cut before its length": (
        [whole(b'{"a": 1}', headers={**NAMED, "content-length": "100"}), HANG_UP], ProviderUnavailable, "hung up before"
    ),
    "half closed": (
        [whole(b'{"a": 1}', headers={**NAMED, "content-length": "100"}), HALF_CLOSE, UNTIL_LEFT],
        ProviderUnavailable,
        "hung up before",
    ),
    "reset within": (
        [whole(b'{"a": 1}', headers={**NAMED, "content-length": "100"}), RESET], ProviderUnavailable, "hung up before"
    ),
    "cut between chunks": (
        [HEAD.replace(b"text/event-stream", b"application/json"), chunk(b'{"a": 1}'), HANG_UP],
        ProviderUnavailable,
        "hung up before",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ANSWERS)
async def test_a_wrong_answer_is_an_error_that_names_the_providers_request(name: str) -> None:
    answer, kind, words = WRONG_ANSWERS[name]
    async with ScriptedProvider([answer]) as server, transport(server.url) as provider:
        with pytest.raises(ProviderError, match=words) as caught:
            await provider.post(PATH, b"{}")
        assert type(caught.value) is kind
        assert caught.value.request_id == "req_1"
        assert "the provider's request id is req_1" in str(caught.value)
        assert len(server.requests) == 1


NO_ANSWERS: dict[str, tuple[Answer, type[ProviderError], str]] = {
    "hangs up": ([HANG_UP], ProviderUnavailable, "hung up without an answer"),
    "resets": ([RESET], ProviderUnavailable, "hung up without an answer"),
    "cut head": ([b"HTTP/1.1 200 OK\r\ncontent-", HANG_UP], ProviderUnavailable, "hung up without an answer"),
    "no HTTP": ([b"SSH-2.0-OpenSSH_9\r\n\r\n", HANG_UP], ProviderMisbehaved, "no HTTP answer"),
    "endless head": ([b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000], ProviderMisbehaved, "no HTTP answer"),
    "cut without a length": ([OPEN_ENDED + b'{"a"', HANG_UP], ProviderMisbehaved, "no JSON"),
    "silent": ([UNTIL_LEFT], ProviderUnavailable, r"silent for 0\.05 s"),
    "silent after its head": ([OPEN_ENDED, UNTIL_LEFT], ProviderUnavailable, r"silent for 0\.05 s"),
    "silent within": ([OPEN_ENDED + b'{"a"', UNTIL_LEFT], ProviderUnavailable, r"silent for 0\.06 s"),
}


@pytest.mark.parametrize("name", NO_ANSWERS)
async def test_no_answer_is_an_error_and_never_a_hang(name: str) -> None:
    answer, kind, words = NO_ANSWERS[name]
    options = {"first_byte_s": 0.05, "between_bytes_s": 0.06}
    async with ScriptedProvider([answer]) as server, transport(server.url, **options) as provider:
        for call in (provider.post(PATH, b"{}"), provider.get("/models")):
            with pytest.raises(ProviderError, match=words) as caught:
                await call
            assert type(caught.value) is kind


WRONG_STREAMS: dict[str, tuple[Answer, type[ProviderError], str]] = {
    "hung up": ([HANG_UP], ProviderUnavailable, "hung up before"),
    "reset": ([RESET], ProviderUnavailable, "hung up before"),
    "half closed": ([HALF_CLOSE, UNTIL_LEFT], ProviderUnavailable, "hung up before"),
    "cut within a chunk": ([event({})[:12], HANG_UP], ProviderUnavailable, "hung up before"),
    "ended without its marker": ([STREAM_END], ProviderMisbehaved, r"without the \[DONE\]"),
    "no JSON": ([chunk(b"data: {\n\n")], ProviderMisbehaved, "an event that is no JSON"),
    "no object": ([event([])], ProviderMisbehaved, "an event that is no JSON object"),
    "too large": ([event("x" * 2000), UNTIL_LEFT], ProviderMisbehaved, "more than 1000 bytes"),
    "an endless line": ([chunk(b"x" * 2000), UNTIL_LEFT], ProviderMisbehaved, "more than 1000 bytes"),
    "an error": ([event({"error": {"message": "oh"}})], ProviderUnavailable, "oh"),
    "silent": ([UNTIL_LEFT], ProviderUnavailable, r"silent for 0\.2 s"),
    "bad chunks": ([b"zz\r\n", UNTIL_LEFT], ProviderUnavailable, r"silent for 0\.2 s"),
}


@pytest.mark.parametrize("name", WRONG_STREAMS)
async def test_a_stream_that_goes_wrong_after_its_first_event_raises_the_error(name: str) -> None:
    wrong, kind, words = WRONG_STREAMS[name]
    go = asyncio.Event()
    answer: Answer = [HEAD, event({"n": 1}), go, *wrong]
    async with (
        ScriptedProvider([answer]) as server,
        transport(server.url, between_bytes_s=0.2, max_event_bytes=1000) as provider,
        provider.events(PATH, b"{}") as events,
    ):
        assert await anext(events) == {"n": 1}
        go.set()
        with pytest.raises(ProviderError, match=words) as caught:
            await anext(events)
        assert type(caught.value) is kind
        assert caught.value.request_id == "req_1"
        assert len(server.requests) == 1
        assert await anext(events, None) is None
        assert events.failure is not None


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (json_answer({}, headers=NAMED), "'application/json'"),
        (text_answer("<html>"), "'text/html'"),
        ([HEAD, STREAM_END], "without the"),
        ([HEAD, DONE, STREAM_END], "without an event"),
        ([HEAD, chunk(b": only comments\n\n"), STREAM_END], "without the"),
    ],
)
async def test_what_is_no_stream_is_said_before_anything_is_handed_on(answer: Answer, words: str) -> None:
    async with ScriptedProvider([answer]) as server, transport(server.url) as provider:
        with pytest.raises(ProviderMisbehaved, match=words):
            await read(provider)


async def test_a_stream_of_a_provider_without_a_marker_ends_with_its_body() -> None:
    answer: Answer = [HEAD, event({"n": 1}), event({"n": 2}), STREAM_END]
    async with ScriptedProvider([answer]) as server, transport(server.url, done_marker=False) as provider:
        assert await read(provider) == [{"n": 1}, {"n": 2}]


async def test_a_connection_that_stays_open_behind_the_marker_holds_nobody_up() -> None:
    async with ScriptedProvider([[HEAD, event({}), DONE, UNTIL_LEFT]]) as server, transport(server.url) as provider:
        assert await read(provider) == [{}]
        await server.requests[0].left.wait()


async def test_the_time_to_the_first_byte_of_a_stream_is_not_that_between_bytes() -> None:
    async with (
        ScriptedProvider([[HEAD, UNTIL_LEFT]]) as server,
        transport(server.url, first_byte_s=0.05, between_bytes_s=60.0) as provider,
    ):
        with pytest.raises(ProviderUnavailable, match=r"silent for 0\.05 s"):
            await read(provider)
        await server.requests[0].left.wait()


async def test_leaving_a_stream_early_hangs_up_so_that_the_provider_stops() -> None:
    async with ScriptedProvider([[HEAD, event({"n": 1}), UNTIL_LEFT]]) as server, transport(server.url) as provider:
        async with provider.events(PATH, b"{}") as events:
            assert await anext(events) == {"n": 1}
        await server.requests[0].left.wait()


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_call_that_is_cancelled_hangs_up(streamed: bool) -> None:
    async with ScriptedProvider([[UNTIL_LEFT]]) as server, transport(server.url) as provider:
        call = asyncio.create_task(read(provider) if streamed else provider.post(PATH, b"{}"))
        await server.asked(1)
        call.cancel()
        await asyncio.wait((call,))
        assert call.cancelled()
        await server.requests[0].left.wait()
        assert provider.stats().failures == 0


@pytest.mark.parametrize("answer", [[UNTIL_LEFT], [HEAD, UNTIL_LEFT], [HEAD, event({}), UNTIL_LEFT]])
async def test_no_stream_outlives_its_deadline(answer: Answer) -> None:
    async with ScriptedProvider([answer]) as server, transport(server.url) as provider:
        with pytest.raises(DeadlineExceeded, match="allow it more time"):
            await read(provider, deadline_s=0.05)
        await server.requests[0].left.wait()


@pytest.mark.parametrize("answer", [[UNTIL_LEFT], [OPEN_ENDED + b"{", UNTIL_LEFT]])
async def test_no_answer_outlives_its_deadline(answer: Answer) -> None:
    async with ScriptedProvider([answer]) as server, transport(server.url) as provider:
        with pytest.raises(DeadlineExceeded, match="allow it more time"):
            await provider.post(PATH, b"{}", deadline_s=0.05)
        await server.requests[0].left.wait()


async def test_an_answer_above_the_limit_is_refused_without_being_read_whole() -> None:
    async with (
        ScriptedProvider([[OPEN_ENDED + b"[" + b"1," * 10_000, UNTIL_LEFT]]) as server,
        transport(server.url, max_answer_bytes=10_000) as provider,
    ):
        with pytest.raises(ProviderMisbehaved, match="more than 10000 bytes"):
            await provider.post(PATH, b"{}")
        await server.requests[0].left.wait()


async def test_a_small_answer_that_unpacks_to_a_large_one_is_refused() -> None:
    packed = gzip.compress(b'{"a": "' + bytes(100_000_000) + b'"}')
    answer = [whole(packed, headers={"content-encoding": "gzip"})]
    async with ScriptedProvider([answer]) as server, transport(server.url, max_answer_bytes=100_000) as provider:
        with pytest.raises(ProviderMisbehaved, match="more than 100000 bytes"):
            await provider.post(PATH, b"{}")


async def test_a_packed_answer_is_unpacked_though_none_was_asked_for() -> None:
    answer = [whole(gzip.compress(b'{"a": 1}'), headers={"content-encoding": "gzip"})]
    async with ScriptedProvider([answer]) as server, transport(server.url) as provider:
        assert (await provider.post(PATH, b"{}")).document == {"a": 1}
        assert server.requests[0].headers["accept-encoding"] == "identity"


async def test_cookies_are_not_kept_and_the_environments_proxy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with ScriptedProvider([json_answer({}, headers={"set-cookie": "a=b"})]) as server:
        async with transport(server.url) as provider:
            await provider.post(PATH, b"{}")
            await provider.post(PATH, b"{}")
        assert "cookie" not in server.requests[1].headers


async def test_a_proxy_that_is_named_is_asked() -> None:
    async with ScriptedProvider([json_answer({"by": "proxy"})]) as proxy:
        async with transport("http://provider.invalid/v1", proxy=proxy.url.removesuffix("/v1")) as provider:
            assert (await provider.post(PATH, b"{}")).document == {"by": "proxy"}
        assert proxy.requests[0].path == "http://provider.invalid/v1/chat/completions"


async def test_a_name_that_cannot_be_resolved_is_said() -> None:
    async with transport("http://provider.invalid/v1") as provider:
        with pytest.raises(ProviderUnavailable, match=r"provider\.invalid.* has a name that cannot be resolved"):
            await provider.post(PATH, b"{}")


async def test_a_port_where_nobody_listens_is_said() -> None:
    async with ScriptedProvider([]) as server:
        url = server.url
    async with transport(url) as provider:
        with pytest.raises(ProviderUnavailable, match=r"took no connection \(Connection refused\)"):
            await provider.post(PATH, b"{}")


async def test_a_certificate_that_nobody_signed_is_refused_and_one_that_is_named_is_not() -> None:
    async with ScriptedProvider([json_answer({"a": 1})], tls=True) as server:
        async with transport(server.url) as provider:
            with pytest.raises(ProviderUnavailable, match=r"not trusted \(self-signed certificate\).*ca_file"):
                await provider.post(PATH, b"{}")
        assert server.requests == []
        async with transport(server.url, ca_file=server.ca_file) as provider:
            assert (await provider.post(PATH, b"{}")).document == {"a": 1}
            assert (await provider.post(PATH, b"{}")).document == {"a": 1}
        assert len(server.requests) == 2


async def test_a_certificate_for_another_name_is_refused() -> None:
    async with ScriptedProvider([json_answer({})], tls=True) as server:
        url = server.url.replace("127.0.0.1", "127.0.0.2")
        async with transport(url, ca_file=server.ca_file) as provider:
            with pytest.raises(ProviderUnavailable):
                await provider.post(PATH, b"{}")
        assert server.requests == []


async def test_speaking_tls_to_a_port_without_it_is_said() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 This is no TLS\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with transport(url) as provider:
            with pytest.raises(ProviderUnavailable, match="over TLS"):
                await provider.post(PATH, b"{}")


async def test_a_ca_file_that_is_none_is_refused_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    for content in (None, "no certificate"):
        if content is not None:
            file.write_text(content)
        with pytest.raises(BackendError, match="name a file of certificates"):
            async with transport("https://127.0.0.1:1/v1", ca_file=file):
                pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"urls": ()}, "needs one address"),
        ({"urls": ("http://a/v1", "http://a/v1")}, "that differ"),
        ({"urls": ("ftp://a/v1",)}, "no address"),
        ({"urls": ("http://[v1",)}, "no address"),
        ({"urls": ("http://me:secret@a/v1",)}, "credentials"),
        ({"urls": ("http://a/v1?b=c",)}, "query"),
        ({"urls": ("http://a/v1",), "key": SecretStr("sk-1\n")}, "copy it anew"),
    ],
)
def test_options_that_no_request_could_be_sent_with_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        TransportOptions(**options)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)
    assert "sk-1" not in str(caught.value)


def test_nothing_that_is_secret_is_in_the_repr_of_options() -> None:
    options = TransportOptions(
        ("http://a/v1",), SecretStr("sk-1"), headers={"x": "hidden"}, proxy="http://me:hidden@proxy"
    )
    assert "sk-1" not in repr(options)
    assert "hidden" not in repr(options)


async def test_a_key_is_in_no_error_even_where_the_provider_sends_it_back() -> None:
    key = "sk-0123456789"
    echo = json.dumps({"error": {"message": f"bad {key}"}}).encode()
    for status in (200, 400, 401, 403, 429, 500):
        async with (
            ScriptedProvider([[whole(echo, status)]]) as server,
            transport(server.url, key=SecretStr(key)) as provider,
        ):
            with pytest.raises(ProviderError) as caught:
                await provider.post(PATH, b"{}")
            assert key not in repr(caught.value)
