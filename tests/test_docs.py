"""The pages tell the truth: their code runs and prints what they say; generated parts and links are up to date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from labinfer import catalogue

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = [
    pytest.param(page, need, id=f"{page.name}-{need}")
    for page in PAGES
    for need in sorted(set(re.findall(r"<!-- needs: (.*?) -->", page.read_text("utf-8"))))
]


def name(page: Path) -> str:
    return page.name


def run_page(page: Path, *options: str) -> None:
    command = [sys.executable, str(ROOT / "docs" / "run_blocks.py"), str(page), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_of_a_page_runs(page: Path) -> None:
    run_page(page)


@pytest.mark.parametrize(("page", "need"), NEEDS)
def test_code_that_needs_more_runs(page: Path, need: str) -> None:
    if need == "transformers":
        pytest.importorskip("transformers", reason="transformers is not installed: make test-hf")
    elif catalogue.find(need).pulled() is None:
        pytest.skip(f"{need} is not in the cache: labinfer pull {need}")
    run_page(page, need)


def test_few_blocks_are_not_run() -> None:
    reasons = [why for page in PAGES for why in re.findall(r"<!-- not run: (.*?) -->", page.read_text("utf-8"))]
    assert set(reasons) == {"needs the network"}
    assert len(reasons) <= 4


def test_generated_parts_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def anchors(page: Path) -> set[str]:
    """The fragments that the headings of a page can be linked with, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"(?<!`)\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if re.match(r"https?:", target):
            continue
        path, _, fragment = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), f"{page.name} links {target}"
        assert not fragment or fragment in anchors(there), f"{page.name} links {target}"


def test_every_environment_variable_is_documented() -> None:
    sources = "\n".join(file.read_text("utf-8") for file in (ROOT / "labinfer").rglob("*.py"))
    used = set(re.findall(r"""(?:environ(?:\.get)?[\[(]["']|_xdg\(")(\w+)["']""", sources))
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    assert {"LABINFER_HOME", "LABINFER_POISON"} <= used
    assert not {each for each in used if f"`{each}`" not in page}


def test_every_code_of_a_map_error_is_documented() -> None:
    files = [*(ROOT / "labinfer" / "compiler").glob("*.py"), ROOT / "labinfer" / "api.py"]
    sources = "\n".join(file.read_text("utf-8") for file in files)
    used = set(re.findall(r'"((?:map|config|yaml|file)\.[a-z-]+)"', sources)) - {"config.json"}
    page = (ROOT / "docs" / "map-language.md").read_text("utf-8")
    assert "map.undefined-name" in used
    assert not {each for each in used if f"`{each}`" not in page}
