"""Who may come in, what a connection may do, and how the service ends."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from labinfer.bench.load import load, target
from labinfer.service.app import OPERATIONS
from labinfer.service.guard import Guard
from labinfer.service.options import ServiceOptions

from .service import KEY, OTHER_KEY, Served, served, wait_for

LONG = {"prompt": [5, 6], "max_tokens": 120, "ignore_eos": True}


@pytest.fixture(scope="module")
def api(tiny_model: Path) -> Iterator[Served]:
    with served(
        tiny_model, header_seconds=0.5, body_seconds=0.5, max_body_bytes=100_000, max_connections=20
    ) as running:
        yield running


def raw(api: Served, data: bytes, seconds: float = 60) -> bytes:
    """What the server says to ``data``, until it closes the connection."""
    with closing(socket.create_connection(("127.0.0.1", api.service.options.port), timeout=seconds)) as connection:
        connection.sendall(data)
        found = b""
        while chunk := connection.recv(1 << 16):
            found += chunk
        return found


def request(*lines: str, body: bytes = b"") -> bytes:
    head = ["Host: localhost", f"Authorization: Bearer {KEY}", "Connection: close", *lines[1:]]
    return "\r\n".join([lines[0], *head, "", ""]).encode() + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def test_every_path_but_health_and_ready_needs_a_key(api: Served) -> None:
    public = set()
    with httpx.Client(base_url=api.url) as anyone:
        for operation in OPERATIONS:
            path = operation.path.replace("{model:path}", "tiny")
            answer = anyone.request(operation.method, path)
            if answer.status_code != 401:
                public.add(path)
            else:
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
    assert public == {"/health", "/ready"}


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "//v1/models", "/v1/models/", "/V1/models", "/health/", "/ready/../v1/models"]
)
def test_no_form_of_a_path_gets_around_the_key(api: Served, path: str) -> None:
    for form in (path, path.replace("models", "%6dodels"), f"{path}?a=b"):
        assert status(raw(api, f"GET {form} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())) == 401


@pytest.mark.parametrize("target", ["/%68ealth", "/health%2f..", "/./health"])
def test_a_public_path_is_public_as_written_only(api: Served, target: str) -> None:
    assert status(raw(api, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())) == 401


@pytest.mark.parametrize("key", ["x", KEY[:-1], KEY + "x", "k" * 50_000, "käse", f"{KEY} {KEY}"])
def test_a_wrong_key_is_refused(api: Served, key: str) -> None:
    with httpx.Client(base_url=api.url) as anyone:
        assert anyone.get("/v1/models", headers={"authorization": f"Bearer {key}".encode()}).status_code == 401
        assert anyone.get("/v1/models", headers={"x-api-key": key.encode()}).status_code == 401


def test_each_key_is_good_in_each_header(api: Served) -> None:
    with httpx.Client(base_url=api.url) as anyone:
        for key in (KEY, OTHER_KEY):
            assert anyone.get("/v1/models", headers={"authorization": f"bearer {key}"}).status_code == 200
            assert anyone.get("/v1/models", headers={"x-api-key": key}).status_code == 200


def test_keys_do_not_share_cached_prompts(api: Served) -> None:
    body = {"prompt": list(range(5, 60)), "max_tokens": 1}
    cached = []
    with httpx.Client(base_url=api.url) as anyone:
        for key in (KEY, KEY, OTHER_KEY):
            answer = anyone.post("/v1/completions", json=body, headers={"x-api-key": key})
            cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 48, 0]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200), ("LOCALHOST:1234", 200), ("127.0.0.1:80", 200), ("[::1]:8000", 200), ("evil.com", 421),
        ("localhost.evil.com", 421), ("127.0.0.1.evil.com", 421), ("localhost:80:80", 421), ("", 421), ("a b", 421),
    ],
)  # fmt: skip
def test_only_our_host_names_are_served(api: Served, host: str, expected: int) -> None:
    answer = api.http.get("/v1/models", headers={"host": host})
    assert answer.status_code == expected


def test_no_other_site_may_read_answers(api: Served) -> None:
    answer = api.http.options(
        "/v1/models", headers={"origin": "http://evil.com", "access-control-request-method": "GET"}
    )
    assert answer.status_code == 405
    answer = api.http.get("/v1/models", headers={"origin": "http://evil.com"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (request("POST /health HTTP/1.1", "Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400),
        (request("POST /v1/completions HTTP/1.1", "Content-Length: 2", "Content-Length: 3", body=b"{}"), 400),
        (request("POST /v1/completions HTTP/1.1", "Content-Length: -1"), 400),
        (request("POST /v1/completions HTTP/1.1", "Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n"), 400),
        (request("POST /v1/completions HTTP/1.1", "Transfer-Encoding: chunked", body=b"zz\r\n\r\n"), 400),
        (request("GET /v1/models HTTP/1.1", "Host: evil.com"), 400),
        (request("GET http://localhost/v1/models HTTP/1.1"), 400),
        (request("GET /v1/models HTTP/1.1").replace(b"\r\n", b"\n"), 400),
        (request("GET /v1/models HTTP/1.1", " X-Folded: a"), 400),
        (request("GET /v1/models HTTP/9.9"), 400),
        (request("GET /v1/models HTTP/1.1", f"X-Large: {'a' * 70_000}"), 431),
        (request(f"GET /{'a' * 70_000} HTTP/1.1"), 431),
        (request("GET /v1/models HTTP/1.1", *[f"X-{n}: a" for n in range(120)]), 431),
        (request("POST /v1/completions HTTP/1.1", "Content-Length: 100001"), 413),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n", 408),
        (b"", 408),
    ],
    ids=lambda value: str(value)[:70],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_or_is_too_much_is_refused(api: Served, data: bytes, expected: int) -> None:
    assert status(raw(api, data)) == expected


ASKED = b'{"prompt": [5], "max_tokens": 1}'
SIZE = f"{len(ASKED):x}"
IN_CHUNKS = f"{SIZE}\r\n{ASKED.decode()}\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (f"Content-Length: {len(ASKED)}\r\nTransfer-Encoding: chunked", IN_CHUNKS),
        (f"Content-Length: {len(ASKED)}\r\nContent-Length: {len(ASKED)}", ASKED.decode()),
        (f"Content-Length: {len(ASKED)}, {len(ASKED)}", ASKED.decode()),
        (f"Content-Length: +{len(ASKED)}", ASKED.decode()),
        (f"Content-Length: {len(ASKED)} 5", ASKED.decode()),
        (f"Content-Length: 0x{SIZE}", ASKED.decode()),
        (f"Content-Length : {len(ASKED)}", ASKED.decode()),
        ("Content-Length: 18446744073709551648", ASKED.decode()),
        ("Transfer-Encoding : chunked", IN_CHUNKS),
        ("Transfer-Encoding: xchunked", IN_CHUNKS),
        ("Transfer-Encoding: \x0bchunked", IN_CHUNKS),
        ("Transfer-Encoding: identity", IN_CHUNKS),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", IN_CHUNKS),
        ("Transfer-Encoding: chunked, identity", IN_CHUNKS),
        ("Transfer-Encoding: chunked", f"0x{IN_CHUNKS}"),
        ("Transfer-Encoding: chunked", f"-{IN_CHUNKS}"),
        ("Transfer-Encoding: chunked", f"ffffffffffffffff{IN_CHUNKS}"),
        ("Transfer-Encoding: chunked", IN_CHUNKS.replace("\r\n", "\n")),
        ("Transfer-Encoding: chunked", IN_CHUNKS.replace("}", "}}")),
        ("X: a\x00b", ""),
        ("X: a\rTransfer-Encoding: chunked", IN_CHUNKS),
    ],
)
def test_no_second_request_hides_behind_a_first_that_is_ambiguous(api: Served, header: str, body: str) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\n{header}\r\n\r\n"
    answer = raw(api, f"{head}{body}".encode() + request("GET /v1/models HTTP/1.1"))
    assert status(answer) == 400
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_second_request_behind_one_that_is_clear_is_answered(api: Served) -> None:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\nContent-Length: {len(ASKED)}\r\n\r\n"
    )
    answer = raw(api, head.encode() + ASKED + request("GET /v1/models HTTP/1.1"))
    assert answer.count(b"HTTP/1.1 200 ") == 2


def test_a_body_that_trickles_in_is_not_waited_for(api: Served) -> None:
    head = request("POST /v1/completions HTTP/1.1", "Content-Type: application/json", "Content-Length: 1000")
    assert status(raw(api, head + b"{")) == 408


def test_a_chunked_body_beyond_the_limit_is_refused_while_it_comes(api: Served) -> None:
    answer = api.http.post("/v1/completions", content=(b"x" * 10_000 for _ in range(20)))
    assert answer.status_code == 413


def test_more_connections_than_allowed_are_told_so(api: Served) -> None:
    address = ("127.0.0.1", api.service.options.port)
    held = [socket.create_connection(address, timeout=60) for _ in range(20)]
    try:
        answer = raw(api, request("GET /health HTTP/1.1"))
        assert status(answer) == 503
        assert b"retry-after: 1" in answer
    finally:
        for connection in held:
            connection.close()
    for _ in range(100):
        if status(raw(api, request("GET /health HTTP/1.1"))) == 200:
            return
        time.sleep(0.05)
    pytest.fail("the connections were not given back")


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2_3:4", True), ("", False), ("a b", False), ("x" * 200, False)])
def test_every_answer_has_a_request_id(api: Served, given: str, kept: bool) -> None:
    found = api.http.get("/v1/models", headers={"x-request-id": given}).headers["x-request-id"]
    assert (found == given) == kept
    assert found


def test_what_nobody_foresaw_is_told_without_details(capfd: pytest.CaptureFixture[str]) -> None:
    async def broken(scope: object, receive: object, send: object) -> None:
        raise RuntimeError("/secret/path 0x7f001234")

    sent = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "GET", "path": "/x", "raw_path": b"/x",
        "headers": [(b"host", b"localhost"), (b"x-api-key", KEY.encode())],
    }  # fmt: skip
    guard = Guard(broken, ServiceOptions(api_keys=(KEY,)), (), ())
    asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 500
    assert (b"x-should-retry", b"false") in sent[0]["headers"]  # type: ignore[operator]
    assert b"secret" not in sent[1]["body"]  # type: ignore[operator]
    assert b"0x7f" not in sent[1]["body"]  # type: ignore[operator]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_request(tiny_model: Path, stream: bool) -> None:
    with served(tiny_model, {"max_num_seqs": 1, "num_blocks": 64}) as api:
        data = json.dumps({**LONG, "stream": stream, "n": 16}).encode()
        head = request(
            "POST /v1/completions HTTP/1.1", "Content-Type: application/json", f"Content-Length: {len(data)}"
        )
        with closing(socket.create_connection(("127.0.0.1", api.service.options.port))) as connection:
            connection.sendall(head + data)
            wait_for(lambda: api.service.admission.active)
        wait_for(lambda: not api.service.admission.active)
        wait_for(lambda: not api.model.engine.busy and not api.model.blocks.usage)


def test_a_client_that_reads_nothing_is_given_up_and_others_are_not_held_up(tiny_model: Path) -> None:
    with served(tiny_model, write_seconds=0.5) as api:
        body = {**LONG, "stream": True, "n": 4, "logprobs": 20}
        data = json.dumps(body | {"prompt": [[5, 6]] * 20}).encode()
        head = request(
            "POST /v1/completions HTTP/1.1", "Content-Type: application/json", f"Content-Length: {len(data)}"
        )
        with closing(socket.socket()) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", api.service.options.port))
            connection.sendall(head + data)
            wait_for(lambda: any(call.writing for call in api.service.open_streams))
            assert api.http.post("/v1/completions", json={"prompt": [7], "max_tokens": 3}).status_code == 200
            wait_for(lambda: not api.service.admission.active)
            found = b""
            while chunk := connection.recv(1 << 20):
                found += chunk
            assert not found.endswith(b"0\r\n\r\n")


def test_clients_that_leave_at_any_time_leave_nothing_behind(tiny_model: Path) -> None:
    source = random.Random(5)
    with served(tiny_model, {"max_num_seqs": 3, "num_blocks": 20}) as api:
        assert api.server.loop is not None
        tasks = len(asyncio.all_tasks(api.server.loop))
        for _ in range(150):
            body = {
                **LONG,
                "prompt": [source.randrange(5, 60)] * source.randrange(1, 90),
                "stream": source.random() < 0.7,
            }
            data = json.dumps({**body, "n": source.choice([1, 1, 3])}).encode()
            head = request(
                "POST /v1/completions HTTP/1.1", "Content-Type: application/json", f"Content-Length: {len(data)}"
            )
            with closing(socket.create_connection(("127.0.0.1", api.service.options.port))) as connection:
                connection.sendall((head + data)[: None if source.random() < 0.8 else -5])
                time.sleep(source.choice([0, 0.001, 0.01, 0.05]))
        wait_for(lambda: not api.service.admission.active and not api.model.engine.busy)
        wait_for(lambda: len(asyncio.all_tasks(api.server.loop)) <= tasks)
        assert api.model.blocks.usage == 0
        assert api.http.post("/v1/completions", json=LONG).json()["usage"]["completion_tokens"] == 120


def test_two_hundred_streams_at_once_are_all_answered(tiny_model: Path) -> None:
    with served(tiny_model, {"max_num_seqs": 8}) as api:
        to = target(api.url, "/v1/completions", KEY)
        body = {"max_tokens": 5, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        bodies = [{**body, "prompt": [5 + number % 50] * 4} for number in range(200)]
        samples, _ = asyncio.run(load(to, bodies, float("inf"), None))
        assert [sample.error for sample in samples] == [None] * 200
        assert {sample.tokens for sample in samples} == {5}


def test_a_full_queue_refuses_at_once(tiny_model: Path) -> None:
    with served(tiny_model, {"max_num_seqs": 1, "num_blocks": 64}, max_queue=3) as api:
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(api.http.post("/v1/completions", json=LONG).status_code))
            for _ in range(4)
        ]
        with api.model.lock:  # no step ends meanwhile
            for thread in threads:
                thread.start()
            wait_for(lambda: api.service.admission.active == 4)
            refused = api.http.post("/v1/completions", json=LONG)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) >= 1
            assert api.http.get("/health").status_code == 200
        for thread in threads:
            thread.join()
        assert answers == [200] * 4
        assert api.service.admission.refusals["queue_full"] == 1


def test_a_server_that_stops_finishes_what_it_began(tiny_model: Path) -> None:
    with served(tiny_model) as api:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(api.http.post("/v1/completions", json=LONG)))
        with api.model.lock:
            thread.start()
            wait_for(lambda: api.service.admission.active)
            api.stop()
            wait_for(lambda: api.service.admission.draining)
            assert api.http.get("/ready").status_code == 503
            assert api.http.get("/health").status_code == 200
            assert api.http.post("/v1/completions", json=LONG).status_code == 503
        thread.join()
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] == 120
        api.thread.join(60)
        assert not api.thread.is_alive()


def test_a_server_that_must_stop_now_tells_its_streams(tiny_model: Path) -> None:
    with served(tiny_model, drain_seconds=0.0) as api:
        lines: list[str] = []

        def read() -> None:
            with api.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
                lines.extend(answer.iter_lines() if answer.status_code == 200 else [str(answer.status_code)])

        thread = threading.Thread(target=read)
        with api.model.lock:
            thread.start()
            wait_for(lambda: api.service.admission.active)
            api.stop()
            wait_for(lambda: api.server.uvicorn.should_exit)
        thread.join()
        assert lines == ["503"] or any('"error"' in line for line in lines)
