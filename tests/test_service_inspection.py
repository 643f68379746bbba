"""What the service tells of itself: metrics, plan, devices, steps; the watchdog; failures of one request."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import labinfer
from labinfer import SamplingParams
from labinfer.compiler.plan import Plan
from labinfer.service.metrics import COUNTERS, HISTOGRAMS
from labinfer.service.plan_metrics import plan_families
from labinfer.service.watchdog import Watchdog

from .service import KEY, Served, api_fixture, placed_plan, served

BODY = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}


api = api_fixture("tiny_model")


def scraped(api: Served) -> dict[str, float]:
    """The value of each sample, by name and the labels that tell samples of a name apart."""
    answer = api.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            apart = sorted(value for name, value in sample.labels.items() if name not in ("model_name", "engine"))
            found[" ".join([sample.name, *apart])] = sample.value
    return found


def test_metrics_count_requests_and_tokens_under_vllms_names(api: Served) -> None:
    before = scraped(api)
    for _ in range(2):
        assert api.http.post("/v1/completions", json={**BODY, "n": 2}).status_code == 200
    after = scraped(api)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["vllm:generation_tokens_total"] == 16
    assert grown["vllm:prompt_tokens_total"] == 6
    assert grown["vllm:request_success_total length"] == 2
    for name in HISTOGRAMS:
        assert f"vllm:{name}_count" in after
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert grown[f"vllm:{name}_count"] == 2
    assert grown["vllm:iteration_tokens_total_sum"] == 2 * (3 + 2 * 3)
    for name in COUNTERS:
        assert f"vllm:{name}_total" in after
    assert after["vllm:num_requests_waiting_by_reason capacity"] == 0
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:kv_cache_usage_perc"] == 0
    assert after["labinfer:device_bytes reference weights"] > 0
    assert grown["labinfer:device_busy_seconds_total reference"] > 0
    assert all(value >= 0 for value in grown.values() if value == value)


@pytest.mark.parametrize("transport", [None, "local"])
def test_metrics_tell_how_busy_devices_are_and_what_goes_between_them(tiny_model: Path, transport: str | None) -> None:
    names = ["reference", "reference:1"]
    with served(tiny_model, {"devices": ",".join(names), "transport": transport}) as api:
        assert api.http.post("/v1/completions", json=BODY).status_code == 200
        found = scraped(api)
    assert found["labinfer:transfer_bytes_total reference reference:1"] == (3 + 3) * 16 * 4  # float32 [tokens, 16]
    assert min(found[f"labinfer:device_busy_seconds_total {name}"] for name in names) > 0
    assert not [name for name in found if name.startswith("labinfer:plan_")]


def test_metrics_tell_what_the_plan_predicted_and_what_it_is(tiny_model: Path, tmp_path: Path) -> None:
    plan = placed_plan(tiny_model, tmp_path)
    assert plan.placement is not None
    [stage] = plan.placement.stages
    with labinfer.load(plan) as model:
        model.generate([5, 6, 7], SamplingParams(ignore_eos=True))
        api = Served(model)
        told = api.http.get("/labinfer/v1/devices").json()["plan_steps"]
        api.close()
        samples = [each for family in plan_families([model], "tiny") for each in family.samples]
        found = {(each.name, each.labels["phase"]): each.value for each in samples if "phase" in each.labels}
        costs = model.engine.costs
    assert costs.alone.per_token is not None
    assert told == {
        kind: {phase: found[f"labinfer:plan_{kind}_step_seconds", phase] for phase in ("decode", "prefill")}
        for kind in ("predicted", "measured")
    }
    assert found == {
        ("labinfer:plan_predicted_step_seconds", "decode"): stage.decode,
        ("labinfer:plan_predicted_step_seconds", "prefill"): stage.prefill,
        ("labinfer:plan_measured_step_seconds", "decode"): costs.decode[1],
        ("labinfer:plan_measured_step_seconds", "prefill"): plan.placement.prefill.tokens * costs.alone.per_token,
    }


def test_no_key_and_no_path_is_in_what_is_told(api: Served) -> None:
    for path in ("/metrics", "/labinfer/v1/plan", "/labinfer/v1/devices", "/labinfer/v1/trace", "/labinfer/v1/startup"):
        answer = api.http.get(path)
        assert answer.status_code == 200
        assert KEY not in answer.text
        assert "/tmp" not in answer.text
        assert str(api.model.checkpoint.path) not in answer.text


def test_the_plan_that_is_served_is_a_plan(api: Served) -> None:
    found = Plan.model_validate_json(api.http.get("/labinfer/v1/plan").content)
    assert found.stages == api.model.plan.stages


def test_devices_tell_where_the_layers_are(api: Served) -> None:
    found = api.http.get("/labinfer/v1/devices").json()
    [stage] = found["stages"]
    assert stage["device"] == "reference"
    assert stage["layers"] == [0, 1]
    assert stage["bytes"]["weights"] > 0
    [group] = found["cache"]["groups"]
    assert group["free_blocks"] == group["num_blocks"]


def test_devices_tell_of_stages_in_other_processes(tiny_model: Path) -> None:
    with served(tiny_model, {"devices": "reference,reference:1", "transport": "shm"}) as api:
        stages = api.http.get("/labinfer/v1/devices").json()["stages"]
    assert [(stage["device"], stage["layers"]) for stage in stages] == [("reference", [0, 0]), ("reference:1", [1, 1])]
    assert {stage["description"] for stage in stages} == {"in another process"}


def test_the_trace_gives_each_step_once(api: Served) -> None:
    first = api.http.get("/labinfer/v1/trace").json()
    api.http.post("/v1/completions", json=BODY)
    steps = api.http.get("/labinfer/v1/trace", params={"after": first["now"]}).json()["steps"]
    assert len(steps) == 4
    assert [step["num_tokens"] for step in steps][1:] == [1, 1, 1]
    assert all(step["seconds"] > 0 for step in steps)
    estimates = [step["predicted_seconds"] for step in steps]  # each from the steps before it
    assert estimates[2] + 0.2 * (min(steps[2]["seconds"], 2 * estimates[2]) - estimates[2]) == pytest.approx(
        estimates[3]
    )
    assert api.http.get("/labinfer/v1/trace", params={"after": steps[-1]["time"]}).json()["steps"] == []
    for wrong in ("x", "nan", "1e999"):
        assert api.http.get("/labinfer/v1/trace", params={"after": wrong}).status_code == 400


def test_a_request_whose_logits_are_no_numbers_fails_alone(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    def spoil(logits: np.ndarray) -> np.ndarray | None:
        if len(logits) != 2 or not api.service.open_streams:
            return None
        logits[0] = np.nan
        return logits

    with served(tiny_model) as api:
        failing = {**BODY, "prompt": [[5, 6], [7, 8]], "stream": True, "max_tokens": 120}
        name = api.model.plan.stages[-1].outputs[-1]
        with api.model.listen(name, spoil):
            answer = api.http.post("/v1/completions", json=failing, headers={"x-request-id": "spoilt"})
        told = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        assert told[-1]["error"]["code"] == "run.not-a-number"
        assert "request spoilt failed after its answer began" in caplog.text
        assert scraped(api)["vllm:corrupted_requests_total"] >= 1
        assert api.http.post("/v1/completions", json=BODY).status_code == 200


def test_a_step_that_raises_fails_its_requests_and_the_service_goes_on(tiny_model: Path) -> None:
    def fail(logits: np.ndarray) -> np.ndarray | None:
        raise RuntimeError("at 0x7f001234 in /secret")

    with served(tiny_model) as api:
        with api.model.listen(api.model.plan.stages[-1].outputs[-1], fail):
            answer = api.http.post("/v1/completions", json=BODY)
        assert answer.status_code == 500
        assert answer.headers["x-should-retry"] == "false"
        assert "secret" not in answer.text
        assert "0x" not in answer.text
        assert api.http.post("/v1/completions", json=BODY).status_code == 200


def test_an_engine_that_stands_still_is_noticed(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served(tiny_model, stall_seconds=0.0) as api:
        watchdog = Watchdog(api.service)
        watchdog.look()
        assert not api.service.stalled
        with api.model.lock:
            api.model.engine.submit(lambda: None)
            watchdog.look()
            time.sleep(0.01)
            watchdog.look()
            assert api.service.stalled
            assert api.http.get("/ready").status_code == 503
            assert api.http.get("/health").status_code == 503
        api.model.engine.start()
        assert api.http.post("/v1/completions", json=BODY).status_code == 200
        watchdog.look()
        assert api.http.get("/ready").status_code == 200
    assert "Thread labinfer-engine:" in caplog.text
    assert "in look" in caplog.text


def test_logs_are_json_with_the_request_id() -> None:
    from labinfer.service.logs import JsonFormatter

    record = logging.LogRecord("labinfer", logging.INFO, "", 0, "said %s", ("ü\n",), None)
    record.request_id = "abc"
    found: dict[str, Any] = json.loads(JsonFormatter().format(record))
    assert found["message"] == "said ü\n"
    assert found["request_id"] == "abc"
    assert found["time"].endswith("Z")
