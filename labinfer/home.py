"""Where LABInfer keeps things: the cache of pulled models, the user's own catalogue, and the shipped graphs."""

from __future__ import annotations

import os
from pathlib import Path

from labinfer.errors import LabinferError


def _xdg(variable: str, fallback: str) -> Path:
    """The XDG base directory of ``variable``; the specification says to ignore relative values."""
    value = os.environ.get(variable, "")
    return (Path(value) if os.path.isabs(value) else Path.home() / fallback) / "labinfer"


def cache_dir() -> Path:
    """The cache folder, which may not exist yet: ``$LABINFER_HOME``, else ``labinfer`` in ``$XDG_CACHE_HOME``."""
    value = os.environ.get("LABINFER_HOME")
    return Path(value).expanduser().absolute() if value else _xdg("XDG_CACHE_HOME", ".cache")


def models_dir() -> Path:
    """The folder that holds one folder per pulled model."""
    return cache_dir() / "models"


def user_catalogue() -> Path:
    """The user's catalogue: ``$LABINFER_HOME/catalogue.yaml``, else ``~/.config/labinfer/catalogue.yaml`` (XDG)."""
    base = cache_dir() if os.environ.get("LABINFER_HOME") else _xdg("XDG_CONFIG_HOME", ".config")
    return base / "catalogue.yaml"


def graphs_dir() -> Path:
    """The folder of the shipped model maps: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "graphs", package.parent / "graphs"):
        if folder.is_dir():
            return folder
    raise LabinferError(
        "install.no-graphs",
        f"the model maps that ship with labinfer are missing from {package}",
        remedy="install labinfer again: pip install --force-reinstall labinfer",
    )
