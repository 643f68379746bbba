"""The drawings in the programs they are made for: Chromium, Graphviz, Netron; skipped where they are not installed."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import labinfer
from labinfer.compiler.plan import Plan
from labinfer.render import render
from tests.browser import Browser, find_browser

needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium here: apt-get install chromium")
needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="no Graphviz here: apt-get install graphviz")
needs_netron = pytest.mark.skipif(
    importlib.util.find_spec("netron") is None, reason="no Netron here: pip install netron"
)

SHOWN = """(() => {
  const box = one => { const r = one.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const seen = [...document.querySelectorAll('#drawing *')].filter(one => !one.closest('[visibility=hidden]'));
  const frame = text => text.parentNode.querySelector(':scope > .box');
  return {
    texts: seen.filter(one => one.matches('text')).map(text => ({
      text: text.textContent, box: box(text), owner: frame(text) && box(frame(text)),
      upright: !/rotate/.test(text.getAttribute('transform')),
      size: parseFloat(getComputedStyle(text).fontSize) * Math.abs(text.getScreenCTM().a)})),
    boxes: seen.filter(one => one.matches('[data-key], .pill')).map(one => box(one.querySelector(':scope > .box'))),
    width: document.documentElement.scrollWidth,
  };
})()"""
"""Where every text and box of the drawing is on the screen, and how large the text is."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    assert path is not None
    with Browser(path) as found:
        yield found


@pytest.fixture(scope="module")
def qwen3() -> Plan:
    return labinfer.compile("qwen3.yaml")


def page(folder: Path, plan: Plan) -> str:
    file = folder / "page.html"
    file.write_text(render(plan, "html"), "utf-8")
    return file.as_uri()


def overlap(a: list[float], b: list[float]) -> bool:
    return a[0] < b[2] - 0.5 and b[0] < a[2] - 0.5 and a[1] < b[3] - 0.5 and b[1] < a[3] - 0.5


def centre(browser: Browser, selector: str) -> tuple[float, float]:
    return middle(browser, f"document.querySelector({selector!r})")


def middle(browser: Browser, element: str) -> tuple[float, float]:
    left, top, width, height = browser.run(f"(r => [r.x, r.y, r.width, r.height])(({element}).getBoundingClientRect())")
    return left + width / 2, top + height / 2


def check_legible(shown: dict[str, Any], width: int) -> None:
    assert shown["width"] <= width
    for text in shown["texts"]:
        if text["upright"]:
            assert text["size"] >= 11, text
        if text["owner"]:
            left, top, right, bottom = text["owner"]
            x, y, u, v = text["box"]
            inside = left - 0.5 <= x and u <= right + 0.5 and top - 1 <= y and v <= bottom + 1
            assert inside, f"{text['text']} leaves its box"
    for i, one in enumerate(shown["texts"]):
        for other in shown["texts"][i + 1 :]:
            assert not overlap(one["box"], other["box"]), f"{one['text']} lies over {other['text']}"
    for i, box in enumerate(shown["boxes"]):
        assert not any(overlap(box, other) for other in shown["boxes"][i + 1 :])


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_28_layers_are_legible_at_1400_pixels(browser: Browser, qwen3: Plan, tmp_path: Path, dark: bool) -> None:
    browser.open(page(tmp_path, qwen3), 1400, 1000, dark)
    shown = browser.run(SHOWN)
    check_legible(shown, 1400)
    names = [text["text"] for text in shown["texts"]]
    assert "layer × 28" in names
    assert "attention" in names
    assert all(text["box"][0] >= 0 and text["box"][2] <= 1400 for text in shown["texts"])
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", paper))) < 64) == dark
    assert len(browser.screenshot()) > 20_000
    assert browser.complaints() == []


@needs_browser
@pytest.mark.parametrize("family", ["deepseek_v2", "gemma3_text", "gpt_neox", "qwen3_moe"])
def test_other_families_are_legible(browser: Browser, tmp_path: Path, family: str) -> None:
    browser.open(page(tmp_path, labinfer.compile(f"{family}.yaml")))
    check_legible(browser.run(SHOWN), 1400)
    assert browser.complaints() == []


@needs_browser
def test_two_devices_with_fused_ops(browser: Browser, tmp_path: Path) -> None:
    plan = labinfer.compile("qwen3.yaml", devices="reference:0=0-13,reference:1=14-27", fuse="all")
    browser.open(page(tmp_path, plan))
    shown = browser.run(SHOWN)
    check_legible(shown, 1400)
    assert {"reference:0", "reference:1", "norm_qkv"} <= {text["text"] for text in shown["texts"]}
    browser.click(*centre(browser, "[data-by=device]"))
    classes = browser.run("[...document.querySelectorAll('#overview .op')].map(op => op.getAttribute('class'))")
    assert "d-0" in classes[0]
    assert "d-1" in classes[-1]


@needs_browser
def test_page_on_a_phone(browser: Browser, qwen3: Plan, tmp_path: Path) -> None:
    browser.open(page(tmp_path, qwen3), 390, 844)
    check_legible(browser.run(SHOWN), 390)


@needs_browser
def test_click_lights_producers_and_users(browser: Browser, qwen3: Plan, tmp_path: Path) -> None:
    browser.open(page(tmp_path, qwen3))
    attention = browser.run("D.nodes.findIndex(node => node.kind === 'attention')")
    browser.click(*centre(browser, f"[data-key=n{attention}]"))
    lit = "[...document.querySelectorAll('.lit[data-key]')].map(one => D.nodes[+one.dataset.key.slice(1)].kind).sort()"
    assert browser.run(lit) == ["kv_write", "linear", "rope"]
    panel = browser.run("document.getElementById('panel').innerText")
    assert "layers.0.attn.context" in panel
    assert "llama.yaml" in panel
    assert "f32[T, 2048]" in panel
    for _ in range(3):
        browser.key("]")
    assert "layers.3.attn.context" in browser.run("document.getElementById('panel').innerText")
    browser.key("Escape")
    assert browser.run("document.querySelectorAll('.lit, .dim').length") == 0


@needs_browser
def test_hover_search_and_folding(browser: Browser, qwen3: Plan, tmp_path: Path) -> None:
    browser.open(page(tmp_path, qwen3))
    linear = browser.run("D.nodes.findIndex(node => node.name.endsWith('qkv.q'))")
    browser.hover(*centre(browser, f"[data-key=n{linear}]"))
    tip = browser.run("document.getElementById('tip').innerText")
    assert "f32[T, 2048]" in tip
    assert "[2048, 1024]" in tip
    assert "bf16" in tip
    assert re.search(r"\w+\.yaml:\d+", tip)
    browser.run(
        "(box => { box.value = 'rope'; box.dispatchEvent(new Event('input')); })(document.getElementById('search'))"
    )
    assert browser.run("document.getElementById('found').textContent") == "2 ops"
    browser.run(
        "(box => { box.value = ''; box.dispatchEvent(new Event('input')); })(document.getElementById('search'))"
    )
    card = "[data-key=s1]"
    shown = "document.querySelectorAll('.block[visibility=visible]').length"
    assert browser.run(shown) == 1
    browser.click(*centre(browser, card))
    browser.click(*centre(browser, card))
    assert browser.run(shown) == 0
    browser.click(*centre(browser, card))
    assert browser.run(shown) == 1


@needs_browser
def test_arena_map(browser: Browser, qwen3: Plan, tmp_path: Path) -> None:
    browser.open(page(tmp_path, qwen3))
    browser.click(*centre(browser, "#tab-arena"))
    browser.until("document.querySelector('.chart .set')")
    some = browser.run("document.querySelectorAll('.chart .set').length")
    browser.run(
        "[...document.querySelectorAll('#arena button')].find(one => one.textContent === 'whole model').click()"
    )
    browser.settle()
    sets = browser.run("document.querySelectorAll('.chart .set').length")
    assert sets == browser.run("D.stages[0].sets.length") > some > 5
    assert "lower bound" in browser.run("document.querySelector('.chart').textContent")
    for number in range(8):
        browser.hover(*middle(browser, f"document.querySelectorAll('.chart .set')[{number}]"))
        tip = browser.run("document.getElementById('tip').innerText")
        assert "last used by" in tip
        assert not re.search("null|undefined|NaN", tip)
    browser.click(*centre(browser, "#tab-summary"))
    summary = browser.run("document.getElementById('summary').innerText")
    assert "KV cache" in summary
    assert not re.search("null|undefined|NaN", summary)
    assert browser.complaints() == []


@needs_browser
def test_names_from_files_never_become_markup(browser: Browser, qwen3: Plan, tmp_path: Path) -> None:
    evil = "</script><img src=x onerror='document.title=1'><script>document.title=2</script>{DATA}"
    plan = qwen3.model_copy(deep=True)
    plan.source.name = plan.source.family = evil
    plan.source.maps = [evil]
    for line in plan.weights:
        line.tensor = evil
    for op in plan.stages[0].blocks["layer"]:
        op.origin = evil
    browser.open(page(tmp_path, plan))
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.run("document.title") == evil + " · LABInfer"
    browser.click(*centre(browser, "#overview [data-key=n0]"))
    browser.click(*centre(browser, "#tab-summary"))
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert evil in browser.run("document.getElementById('summary').innerText")
    assert browser.complaints() == []


@needs_browser
def test_svg_is_drawn(browser: Browser, qwen3: Plan, tmp_path: Path) -> None:
    file = tmp_path / "graph.svg"
    file.write_text(render(qwen3, "svg"), "utf-8")
    browser.open(file.as_uri())
    texts = browser.run("[...document.querySelectorAll('text')].map(text => text.textContent)")
    assert "layer × 28" in texts
    assert "attention" in texts
    assert browser.complaints() == []


@needs_dot
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "deepseek_v2"])
def test_graphviz_draws_dot(family: str) -> None:
    plan = labinfer.compile(f"{family}.yaml")
    plan.source.name = 'a "quoted" \\ name'
    done = subprocess.run(["dot", "-Tsvg"], input=render(plan, "dot").encode(), capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    groups = ET.fromstring(done.stdout).iter("{http://www.w3.org/2000/svg}g")
    kinds = [group.get("class") for group in groups]
    ops = sum(len(ops) for ops in plan.stages[0].blocks.values())
    assert kinds.count("cluster") >= 1
    assert kinds.count("node") >= ops


@contextlib.contextmanager
def netron(file: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-c",
        "import netron; netron.main()",
        str(file),
        "--host",
        "localhost",
        "--port",
        str(port),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(200):
                with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
                    break
                time.sleep(0.1)
            yield f"http://localhost:{port}"
        finally:
            server.kill()


@needs_browser
@needs_netron
def test_netron_opens_onnx_and_its_layers(browser: Browser, qwen3: Plan, tmp_path: Path) -> None:
    file = tmp_path / "qwen3.onnx.json"
    file.write_text(render(qwen3, "onnx"), "utf-8")
    texts = "[...document.querySelectorAll('#canvas text')].map(text => text.textContent)"
    with netron(file) as address:
        browser.open(address)
        browser.until(
            "document.querySelectorAll('#canvas text').length || document.body.classList.contains('notification')"
        )
        browser.run(
            "document.body.classList.contains('notification') && document.getElementById('message-button').click()"
        )
        browser.until(f"document.body.classList.contains('default') && {texts}.includes('logits')")
        found = browser.run(texts)
        assert found.count("layer") == 28
        assert "embedding" in found
        mark = "[...document.querySelectorAll('#canvas text')].find(text => text.textContent === 'ƒ')"
        browser.click(*middle(browser, mark))
        browser.until(f"{texts}.includes('attention')")
        body = browser.run(texts)
    assert body.count("linear") == 7
    assert "kv_write" in body
