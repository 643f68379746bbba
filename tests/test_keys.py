"""The API key that is made once and kept."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from labinfer.service.keys import kept_key


def test_all_who_start_at_once_have_the_same_key(home: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for _ in range(40):
            found = {each.result() for each in [pool.submit(kept_key) for _ in range(8)]}
            [(_, file)] = found
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert [each.name for each in file.parent.iterdir()] == [file.name]
            file.unlink()
