"""Progress bars in a log file: few lines, each whole, none that moves the cursor; on a terminal, in place."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
from pathlib import Path

PROGRAM = """
    import sys, time
    from flower_ldm import progress_bars
    from flower_ldm.errors import exit_on_input_error

    for progress_bars.LOG_INTERVAL in (10.0, 0.04):
        with exit_on_input_error(), progress_bars.progress_bar(total=40, desc="sampling", unit=" images") as bar:
            for step in range(4):
                for _ in progress_bars.progress_bar(range(10), desc="denoising", leave=False):
                    time.sleep(0.01)
                bar.update(10)
                bar.set_postfix(loss=step, refresh=False)
                if step == 1:
                    progress_bars.write_line("a remark")
"""
ROOT = Path(__file__).resolve().parents[1]


def run(stderr: int) -> None:
    """A bar within a bar, for 0.4 seconds; first with 10 seconds between two lines, then with 0.04."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(PROGRAM)], stderr=stderr, env=environment, check=True)


def test_a_log_file_gets_a_line_every_few_seconds(tmp_path):
    with (tmp_path / "run.log").open("wb") as file:
        run(file.fileno())
    text = (tmp_path / "run.log").read_text("utf-8")
    assert text.endswith("\n") and not re.search(r"[\r\x1b]", text)
    first, remark, last, *lines = text.splitlines()
    assert re.match(r"sampling: +0%.* 0/40 ", first) and remark == "a remark"
    assert re.match(r"sampling: 100%.* 40/40 .*loss=3", last)
    assert 4 <= sum(line.startswith("sampling") for line in lines) <= 7
    assert 4 <= sum(line.startswith("denoising") for line in lines) <= 12
    assert not any(re.match("denoising: +0%", line) for line in lines)


def test_a_terminal_sees_one_line_that_changes():
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    run(slave)
    os.close(slave)
    shown = os.read(master, 2**16).decode()
    os.close(master)
    assert shown.count("\rsampling") > 8 and shown.count("\rdenoising") > 8
    assert re.search(r"\rsampling: 100%\|█+\| 40/40", shown)


def test_a_denoising_within_a_bar_writes_nothing_of_its_own(finished_runs, tmp_path):
    """Of a command that draws two batches: what diffusers shows on a terminal is left out of a log."""
    words = [sys.executable, "-m", "flower_ldm.sample", "--pipeline", finished_runs.flower_ldm, "--labels", "0", "1"]
    words += ["--num_images", "1", "--batch_size", "1", "--steps", "2", "--output", tmp_path / "out"]
    log = tmp_path / "run.log"
    with log.open("wb") as file:
        subprocess.run(list(map(str, words)), stderr=file, cwd=ROOT, check=True)
    text = log.read_text("utf-8")
    lines = text.splitlines()
    assert "\r" not in text and [line[:14] for line in lines if "sampling" in line] == [
        "sampling:   0%",
        "sampling: 100%",
    ]
    assert not any("denoising" in line for line in lines)


def test_one_module_draws_every_bar():
    product = [*ROOT.glob("*.py"), *(ROOT / "flower_ldm").rglob("*.py"), *(ROOT / "pipelines").glob("*.py")]
    calls = {path.name for path in product if re.search(r"\btqdm\(", path.read_text("utf-8"))}
    assert calls == {"progress_bars.py", "app.py"}
