"""Several models of one process: asked by their names, on the same devices, within a quota."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import labinfer
from labinfer import SamplingParams
from labinfer.cli.serve import _load
from labinfer.runtime.manager import Manager

from .browser import Browser, find_browser

Cli = Callable[..., subprocess.CompletedProcess[str]]

KEY = "a-key-of-several-models"
PROMPTS = {"words": [[5, 6], [9, 10, 11]], "bytes": [[72, 105], [33]]}


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``LABINFER_HOME`` of the service."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def http(tiny_model: Path, byte_model: Path, where: Path) -> Iterator[httpx.Client]:
    options = ["--served-model-name", "words", "--served-model-name", "bytes", "--quota", "reference=1GiB"]
    options += ["--kv-memory", "1MB", "--max-num-seqs", "4", "--port", "0", "--api-key", KEY, "--json"]
    command = [sys.executable, "-m", "labinfer", "serve", str(tiny_model), str(byte_model), *options]
    environment = os.environ | {"LABINFER_HOME": str(where)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            assert line
            text += line
        found = json.loads(text)
        assert found["models"] == ["words", "bytes"]
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=found["url"], headers=headers, timeout=60) as client:
            yield client
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


def completion(http: httpx.Client, model: str | None, prompt: list[int]) -> Any:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    answer = http.post("/v1/completions", json=body | ({"model": model} if model else {}))
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_each_model_answers_as_it_does_alone_while_the_others_answer(
    http: httpx.Client, tiny_model: Path, byte_model: Path
) -> None:
    asked = [(name, prompt) for name, prompts in PROMPTS.items() for prompt in prompts] * 4
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda each: completion(http, *each), asked))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for name, folder in (("words", tiny_model), ("bytes", byte_model)):
        with labinfer.load(folder) as model:
            for (asked_name, prompt), answer in zip(asked, found, strict=True):
                if asked_name == name:
                    assert answer["model"] == name
                    assert answer["choices"][0]["text"] == model.generate(prompt, params)[0].text


def test_a_request_without_a_name_is_for_the_first(http: httpx.Client) -> None:
    assert completion(http, None, [5, 6])["model"] == "words"
    answer = http.post("/v1/completions", json={"model": "none", "prompt": [5]})
    assert answer.status_code == 404
    assert "'words' and 'bytes'" in answer.json()["error"]["message"]


def test_what_is_told_of_the_service_is_told_of_each(
    http: httpx.Client, where: Path, labinfer_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {each["id"]: each for each in http.get("/v1/models").json()["data"]}
    assert list(listed) == ["words", "bytes"]
    assert http.get("/v1/models/bytes").json() == listed["bytes"]
    for name, described in listed.items():
        plan = http.get("/labinfer/v1/plan", params={"model": name}).json()
        expected = sum(sum(stage["bytes"].values()) for stage in plan["stages"])
        memory = {"granted_bytes": expected, "quota_bytes": 1 << 30}
        assert described["memory"] == {"reference": memory}
        assert http.get("/labinfer/v1/devices", params={"model": name}).json()["model"] == name
    assert http.get("/labinfer/v1/plan", params={"model": "none"}).status_code == 404
    monkeypatch.setenv("LABINFER_HOME", str(where))
    devices = json.loads(labinfer_cli("devices", "--json").stdout)
    reference = next(each for each in devices if each["name"] == "reference")
    assert [each["nbytes"] for each in reference["granted"]] == [
        each["memory"]["reference"]["granted_bytes"] for each in listed.values()
    ]


@pytest.mark.skipif(find_browser() is None, reason="no Chromium here")
def test_the_page_talks_to_the_model_that_is_chosen(http: httpx.Client) -> None:
    path = find_browser()
    assert path is not None
    with Browser(path) as browser:
        browser.open(f"{http.base_url}/#key={KEY}", 390, 844, False)
        browser.until("document.title === 'words · LABInfer'")
        browser.run("document.getElementsByName('max_tokens')[0].value = '5'")
        browser.run("$('models').value = 'bytes'; $('models').onchange()")
        before = http.get("/labinfer/v1/trace", params={"model": "bytes"}).json()["now"]
        browser.run("say('hi')")
        browser.until("running === null && conversation.length === 2")
        browser.until("document.title === 'bytes · LABInfer' && steps.length > 4")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    for name, few in (("bytes", 5), ("words", 0)):
        made = http.get("/labinfer/v1/trace", params={"model": name, "after": before}).json()["steps"]
        assert len(made) == few


def test_measurements_of_all_are_one_text(http: httpx.Client) -> None:
    for name in PROMPTS:
        completion(http, name, [7])
    families = list(text_string_to_metric_families(http.get("/metrics").text))
    assert len({each.name for each in families}) == len(families)
    made = next(each for each in families if each.name == "vllm:generation_tokens").samples
    counts = {each.labels["model_name"]: each.value for each in made if each.name.endswith("_total")}
    assert counts.keys() == PROMPTS.keys()
    assert min(counts.values()) >= 8


def test_a_plan_is_served_beside_another_model(tiny_model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(labinfer.compile(tiny_model, kv_memory=10**6).dump())
    with ExitStack() as loaded, closing(Manager()) as manager:
        options: dict[str, Any] = {}
        for model in (plan, tiny_model):
            llm, _ = _load(loaded, str(model), None, None, options, [], manager)
            assert llm.plan.source.name == tiny_model.name


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--quota", "reference=1kB"], 4, "device.quota"),
        (["--quota", "reference"], 2, "cli.quota"),
        (["--quota", "nothing=1GiB"], 4, "device."),
        (["--served-model-name", "a", "--served-model-name", "a"], 2, "serve.names"),
        (["--served-model-name", "a", "--served-model-name", "b", "--served-model-name", "c"], 2, "cli.usage"),
        (["--lora", "x=./y"], 2, "cli.usage"),
    ],
)
def test_what_cannot_be_served_together_is_told(
    tiny_model: Path, labinfer_cli: Cli, home: Path, arguments: list[str], code: int, expected: str
) -> None:
    done = labinfer_cli("serve", tiny_model, tiny_model, "--port", "0", "--kv-memory", "1MB", "--json", *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert expected in done.stdout
