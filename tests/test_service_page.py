"""The page of the service in a real browser: chat, stop, regenerate, placement and steps; nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import labinfer
from labinfer import SamplingParams
from labinfer.cluster.fleet import load as load_over_hosts

from .browser import Browser, find_browser
from .hosts import Hosts
from .service import KEY, Served, api_fixture, placed_plan, wait_for
from .tiny import GOLDEN

needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium here")

IDLE = "running === null"


api = api_fixture("tiny_model")


@pytest.fixture
def browser() -> Iterator[Browser]:
    path = find_browser()
    assert path is not None
    with Browser(path) as browser:
        yield browser


def opened(browser: Browser, api: Served, width: int = 1400, dark: bool = False) -> None:
    browser.open(f"{api.url}/#key={KEY}", width, 844, dark)
    browser.until("document.getElementById('model').textContent === 'tiny'")


def ask(browser: Browser, text: str) -> None:
    browser.run(f"document.getElementById('prompt').value = {text!r}")
    browser.run("document.getElementById('composer').requestSubmit()")


def test_the_page_needs_the_key_for_everything_but_itself(api: Served) -> None:
    with httpx.Client(base_url=api.url) as anyone:
        answer = anyone.get("/", headers={"accept": "text/html"})
        assert answer.status_code == 401
        assert answer.text == api.http.get("/").text
        assert KEY not in answer.text
        assert "tiny" not in answer.text
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert anyone.get("/", headers={"accept": "*/*"}).json()["error"]["code"] == "invalid_api_key"


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_a_chat_is_answered_and_measured(browser: Browser, api: Served, width: int, dark: bool) -> None:
    opened(browser, api, width, dark)
    assert browser.run("location.hash") == ""
    browser.run("document.getElementsByName('max_tokens')[0].value = '20'")
    browser.run("document.getElementsByName('temperature')[0].value = '0'")
    ask(browser, "w5 w6")
    browser.until(f"{IDLE} && conversation.length === 2")
    measured = browser.run("document.querySelector('.assistant .measured').textContent")
    assert "first token" in measured
    assert "tokens" in measured
    browser.run("document.getElementById('again').click()")
    browser.until(f"{IDLE} && conversation.length === 2")
    assert browser.run("document.querySelectorAll('.assistant').length") == 1
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    if width < 900:
        browser.run("document.getElementById('tab-chat').focus()")
        browser.key("ArrowRight")
        assert browser.run("getComputedStyle(document.getElementById('chat')).display") == "none"
    browser.until("document.querySelectorAll('#timeline rect').length > 3")
    assert "layers 0–1" in browser.run("document.getElementById('stages').textContent")
    assert "blocks of 16 tokens" in browser.run("document.getElementById('cache').textContent")
    elsewhere = [each for each in browser.complaints() if not each.startswith(api.url) and "401" not in each]
    assert elsewhere == []


@needs_browser
def test_what_the_plan_predicted_stands_beside_what_is_measured(
    browser: Browser, tiny_model: Path, tmp_path: Path
) -> None:
    with labinfer.load(placed_plan(tiny_model, tmp_path)) as model:
        model.generate([5, 6, 7], SamplingParams(ignore_eos=True))
        api = Served(model)
        try:
            opened(browser, api)
            told = browser.run("document.getElementById('planned').textContent")
        finally:
            api.close()
    assert re.fullmatch(
        r"planned decode step: 0.0\d+ ms predicted, [\d.]+ ms measured; planned prefill .* measured", told
    )


@needs_browser
def test_hosts_of_a_cluster_stand_above_their_stages(browser: Browser, home: Path, tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, ["alpha", "beta"])
    try:
        with load_over_hosts(GOLDEN / "llama-llama3", hosts.file, max_model_len=64) as model:
            api = Served(model)
            try:
                opened(browser, api)
                browser.until("document.querySelectorAll('#stages .host').length === 2")
                shown = browser.run("document.getElementById('stages').textContent")
                assert re.search(r"alpharunning.*reference@alpha.*→ reference@beta.* a token.*betarunning", shown)
                assert "0 B kept" in shown
                hosts.kill("beta")
                api.http.post("/v1/completions", json={"prompt": [5], "max_tokens": 3, "ignore_eos": True})
                browser.until("document.querySelector('#stages .lost')?.textContent === 'lost'")
                assert "reference@beta" not in browser.run("document.getElementById('stages').textContent")
            finally:
                api.close()
    finally:
        hosts.close()


@needs_browser
def test_escape_stops_an_answer_and_frees_its_place(browser: Browser, api: Served) -> None:
    opened(browser, api)
    with api.model.lock:
        ask(browser, "w5 w6")
        browser.until("running !== null")
        browser.key("Escape")
        browser.until(IDLE)
    assert "stopped" in browser.run("document.querySelector('.assistant .measured').textContent")
    wait_for(lambda: not api.service.admission.active)


@needs_browser
def test_what_a_model_writes_is_never_html(browser: Browser, api: Served) -> None:
    opened(browser, api)
    evil = (
        "<img src=x onerror=alert(1)><script>alert(1)</script> [a](javascript:alert(1)) **b** `c<i>`\n"
        "```html\n<svg onload=alert(1)>\n```\n"
    )
    browser.run(f"addMessage('assistant', {evil!r}) && 0")
    tags = browser.run("[...document.querySelectorAll('.assistant .body *')].map(each => each.tagName).join()")
    assert tags == "STRONG,CODE,PRE,CODE"
    text = browser.run("document.querySelector('.assistant .body').textContent")
    assert "<script>alert(1)</script>" in text
    assert "<svg onload=alert(1)>" in text


@needs_browser
def test_a_wrong_key_is_asked_for_again(browser: Browser, api: Served) -> None:
    browser.open(f"{api.url}/")
    browser.run("sessionStorage.clear()")
    browser.open(f"{api.url}/")
    for attempt in ("wrong", KEY):
        browser.until("document.getElementById('login').open")
        browser.run(f"document.getElementById('key').value = '{attempt}'")
        browser.run("document.getElementById('login-form').requestSubmit()")
    browser.until("document.getElementById('model').textContent === 'tiny'")


@needs_browser
def test_everything_has_a_name_for_those_who_do_not_see_it(browser: Browser, api: Served) -> None:
    opened(browser, api)
    unnamed = browser.run(
        """[...document.querySelectorAll('button, input, textarea, [role=log], svg')].filter(each =>
        !(each.ariaLabel || each.textContent.trim() || each.labels?.length)).map(each => each.outerHTML).join()"""
    )
    assert unnamed == ""
    assert browser.run("document.documentElement.lang") == "en"
