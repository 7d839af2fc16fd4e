"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xmoe.errors import ConfigError
from xmoe.outputs import new_file, new_folder


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_folder_appears_when_the_block_ends_well(tmp_path):
    with new_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1" and left_behind(tmp_path) == ["out"]


@pytest.mark.parametrize("mistake", [RuntimeError, KeyboardInterrupt, OSError])
def test_nothing_appears_when_it_does_not(tmp_path, mistake):
    with pytest.raises(mistake), new_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        raise mistake
    with pytest.raises(mistake), new_file(tmp_path / "f.json") as partial:
        partial.write_text("half")
        raise mistake
    assert left_behind(tmp_path) == []


def test_what_stands_there_is_kept_unless_told_otherwise(tmp_path):
    for value in "12":
        with new_folder(tmp_path / "out", overwrite=value == "2") as partial:
            (partial / value).write_text(value)
        with new_file(tmp_path / "f", overwrite=value == "2") as partial:
            partial.write_text(value)
    assert left_behind(tmp_path / "out") == ["2"] and (tmp_path / "f").read_text() == "2"
    with pytest.raises(ConfigError, match="choose another name or pass --overwrite"), new_folder(tmp_path / "out"):
        pass
    with pytest.raises(ConfigError, match="already exists"), new_file(tmp_path / "f"):
        pass
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert left_behind(tmp_path / "out") == ["2"] and left_behind(tmp_path) == ["f", "out"]


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_a_full_disk_is_told_with_the_name_of_the_output(tmp_path, new):
    said = "No space left on device"
    as_safetensors_says_it = RuntimeError(f"Error while serializing: I/O error: {said} (os error {errno.ENOSPC})")
    for error in (OSError(errno.ENOSPC, said), as_safetensors_says_it):
        with pytest.raises(OSError, match=said) as told, new(tmp_path / "out"):
            raise error
        assert told.value.errno == errno.ENOSPC and told.value.filename == str(tmp_path / "out")
    with pytest.raises(OSError, match=said) as told, new_folder(tmp_path / "out") as partial, new(partial / "in"):
        raise OSError(errno.ENOSPC, said)
    assert told.value.filename == str(tmp_path / "out") and left_behind(tmp_path) == []
    with pytest.raises(OSError, match="other") as told, new(tmp_path / "out"):
        raise OSError(errno.EACCES, "other", "elsewhere")
    assert told.value.filename == "elsewhere"


def test_kill_9_leaves_no_folder_that_looks_complete(tmp_path):
    script = (
        "import sys,time; from xmoe.outputs import new_folder\n"
        "with new_folder(sys.argv[1]) as p:\n"
        "    (p/'a').write_text('x'); print('writing', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.01)
    assert not (tmp_path / "out").exists()
    assert all(name.startswith(".") and name.endswith(".partial") for name in left_behind(tmp_path))
