"""Cases of CASES.md that no other test of the service shows."""

from __future__ import annotations

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

import labinfer.service

from .service import Served, api_fixture, wait_for

BODY = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "temperature": 0}


api = api_fixture("tiny_model")


def test_biases_of_all_tokens_are_taken_and_unknown_or_infinite_ones_refused(api: Served) -> None:
    many = {str(token): -100 if token != 9 else 100 for token in range(64)}
    found = api.http.post("/v1/completions", json={**BODY, "logit_bias": many}).json()
    assert found["choices"][0]["text"].split() == ["w9"] * 4
    for count, status in ((300, 400), (2000, 400)):  # the vocabulary has 64, so that 300 cannot be known
        bias = {str(token): 1 for token in range(count)}
        assert api.http.post("/v1/completions", json={**BODY, "logit_bias": bias}).status_code == status
    text = json.dumps(BODY)[:-1] + ', "logit_bias": {"9": 1e999}}'
    answer = api.http.post("/v1/completions", content=text, headers={"content-type": "application/json"})
    assert answer.status_code == 400


def test_sixteen_answers_of_a_stream_are_complete(api: Served) -> None:
    answer = api.http.post("/v1/completions", json={**BODY, "temperature": 1, "seed": 1, "n": 16, "stream": True})
    chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
    ends = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(ends) == list(range(16))


def test_a_request_id_given_twice_is_no_mix_up(api: Served) -> None:
    headers = {"x-request-id": "twice"}

    def ask(prompt: list[int]) -> tuple[str, str, str]:
        answer = api.http.post("/v1/completions", json={**BODY, "prompt": prompt}, headers=headers)
        found: dict[str, Any] = answer.json()
        return answer.headers["x-request-id"], found["id"], found["choices"][0]["text"]

    prompts = [[5, 6], [7, 8, 9]]
    alone = [ask(prompt)[2] for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(ask, prompts))
    assert [text for _, _, text in together] == alone
    assert {given for given, _, _ in together} == {"twice"}
    assert len({own for _, own, _ in together}) == 2


def test_no_time_that_is_waited_for_is_the_wall_clocks() -> None:
    folder = Path(labinfer.service.__file__).parent
    lines = [line.strip() for file in folder.rglob("*.py") for line in file.read_text().splitlines()]
    wall = [line for line in lines if re.search(r"\btime\.time\(\)", line)]
    assert wall
    stamps = ("created", "uptime", "add_metric")  # told to clients, never waited for
    assert all(any(stamp in line for stamp in stamps) for line in wall), wall


def test_scrapes_at_once_are_all_whole(api: Served) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = pool.submit(lambda: [api.http.post("/v1/completions", json=BODY).status_code for _ in range(5)])
        texts = list(pool.map(lambda _: api.http.get("/metrics").text, range(40)))
        assert asked.result() == [200] * 5
    names = [{family.name for family in text_string_to_metric_families(text)} for text in texts]
    assert names == [names[0]] * 40


def test_the_log_has_no_line_for_polls_that_went_well(api: Served) -> None:
    log = logging.getLogger("labinfer.service.access")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage().split(" ")[1])  # type: ignore[method-assign]
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        for path in ("/health", "/ready", "/metrics", "/labinfer/v1/devices", "/labinfer/v1/trace", "/v1/models"):
            assert api.http.get(path).status_code == 200
        assert api.http.get("/metrics", headers={"authorization": "Bearer wrong"}).status_code == 401
        wait_for(lambda: len(said) >= 2)  # a line follows its answer, maybe after the next request
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert sorted(said) == ["'/metrics'", "'/v1/models'"]
