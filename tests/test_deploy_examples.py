"""The examples in docs/deploy name options, paths and variables that exist."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from labinfer.cli.serve import serve
from labinfer.service.app import OPERATIONS
from labinfer.service.options import ServiceOptions

from .service import served

FOLDER = Path(__file__).parent.parent / "docs" / "deploy"
OPTIONS = {text for parameter in serve.params for text in parameter.opts} | {"-q"}
PUBLIC = {each.path for each in OPERATIONS if each.public}


def unit() -> configparser.ConfigParser:
    found = configparser.ConfigParser(strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read_string((FOLDER / "labinfer.service").read_text())
    return found


def docker(instruction: str) -> list[str]:
    text = (FOLDER / "Dockerfile").read_text()
    found = re.search(rf"^{instruction} (\[.*\])$", text, re.MULTILINE)
    assert found is not None
    listed: list[str] = json.loads(found[1])
    return listed


def kubernetes() -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))


def test_commands_have_options_that_exist() -> None:
    for words in (unit()["Service"]["ExecStart"].split(), docker("ENTRYPOINT") + docker("CMD")):
        assert Path(words[0]).name == "labinfer"
        assert "serve" in words
        assert {word for word in words if word.startswith("-")} <= OPTIONS


def test_time_to_stop_is_longer_than_the_drain() -> None:
    drain = ServiceOptions().drain_seconds
    assert float(unit()["Service"]["TimeoutStopSec"]) > drain
    deployment = kubernetes()[0]["spec"]["template"]["spec"]
    assert deployment["terminationGracePeriodSeconds"] > drain
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["labinfer"]
    assert float(compose["stop_grace_period"].removesuffix("s")) > drain


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_probes_ask_for_public_paths(probe: str) -> None:
    [container] = kubernetes()[0]["spec"]["template"]["spec"]["containers"]
    assert container[probe]["httpGet"]["path"] in PUBLIC
    assert container[probe]["httpGet"]["port"] == ServiceOptions().port


def test_the_key_comes_from_where_the_command_reads_it() -> None:
    [option] = [each for each in serve.params if each.name == "api_key"]
    [container] = kubernetes()[0]["spec"]["template"]["spec"]["containers"]
    assert [each["name"] for each in container["env"]] == [option.envvar]
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["labinfer"]
    assert list(compose["environment"]) == [option.envvar]


def test_the_board_shows_metrics_that_exist(tiny_model: Path) -> None:
    board = json.loads((FOLDER / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked.append(board["templating"]["list"][1]["query"])
    with served(tiny_model, {"devices": "reference,reference:1"}) as api:
        families = list(text_string_to_metric_families(api.http.get("/metrics").text))
    labels: dict[str, set[str]] = {}
    for sample in [sample for family in families for sample in family.samples]:
        labels.setdefault(sample.name, set()).update(sample.labels)
    for text in asked:
        names = re.findall(r"\b(?:vllm|labinfer):\w+", text)
        assert names
        assert set(names) <= labels.keys(), text
        assert {name for by in re.findall(r"by \(([\w, ]+)\)", text) for name in by.split(", ")} <= labels[names[0]]
    shown = {target["legendFormat"] for panel in board["panels"] for target in panel["targets"]}
    assert set(re.findall(r"\{\{(\w+)\}\}", " ".join(shown))) == {
        "finished_reason",
        "reason",
        "device",
        "use",
        "src",
        "dst",
    }
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
