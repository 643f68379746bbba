"""Settings for all tests, and a LABINFER_HOME of their own for those that ask."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The machines that run this are slow and shared: what is checked is the result, never the time of one example.
settings.register_profile("labinfer", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("labinfer")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty LABINFER_HOME, for this process and the ones it starts."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("LABINFER_HOME", str(folder))
    return folder
