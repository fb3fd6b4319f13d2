"""What a user sees in a terminal: a real one is opened, and its screen is read."""

import fcntl
import logging
import os
import re
import shutil
import struct
import sys
import termios
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pyte
import pytest
from conftest import ROOT, SMALL_DATA, SMALL_TRAINER, SMALL_UNET
from forked import Forked
from lightning import Callback

from seg_torch.cli.messages import Wrapped
from seg_torch.drawing.table import print_table

ROWS = 70


class Talk(Callback):
    """Says something in the middle of an epoch."""

    def on_train_batch_end(self, trainer, task, outputs, batch, index):
        logging.getLogger("talk").warning("logged in epoch %d", trainer.current_epoch + 1)
        warnings.warn(f"warned in epoch {trainer.current_epoch + 1}", stacklevel=1)


def screens(arguments: list[str], folder: Path, columns: int) -> list[list[str]]:
    """Runs a command in a terminal and returns its screen, whenever that has changed."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    environment = {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    process = Forked(arguments, folder, terminal=os.ttyname(theirs), **environment)
    screen = pyte.Screen(columns, ROWS)
    stream, seen, end = pyte.ByteStream(screen), [], time.monotonic() + 240
    os.set_blocking(ours, False)
    while time.monotonic() < end:
        running = process.code is None
        try:
            stream.feed(os.read(ours, 65536))
        except (BlockingIOError, OSError):
            if not running:
                break
            time.sleep(0.02)
            continue
        seen.append([line.rstrip() for line in screen.display])
    os.close(theirs)
    os.close(ours)
    assert process.finish(1)[0] == 0, "\n".join(seen[-1])
    return seen


@pytest.mark.parametrize("columns", [60, 100])
def test_e46_e53_a_terminal_shows_one_bar_a_line_per_epoch_and_what_comes_next(tmp_path, columns):
    arguments = [str(ROOT / "train.py"), "output_dir=run", *SMALL_DATA, *SMALL_TRAINER, *SMALL_UNET]
    arguments += ["trainer.max_epochs=3", "+callbacks.talk._target_=test_terminal.Talk"]
    seen = screens(arguments, tmp_path, columns)
    bars = [[line for line in screen if "% |" in line] for screen in seen]
    assert max(map(len, bars)) == 1, "one bar"
    shown = {line.split(":")[0] for screen in bars for line in screen}
    assert {"epoch 1 of 3", "epoch 3 of 3"} <= shown
    assert not any("epoch 0" in line or "v_num" in line for screen in seen for line in screen)
    assert any("left" in line for screen in bars for line in screen)
    last = seen[-1]
    assert sum(bool(re.fullmatch(r"logged in epoch \d", line)) for line in last) >= 3
    assert sum("warned in epoch" in line for line in last) >= 3
    assert not any("of 3" in line and "warned" in line for line in last)
    epochs = [re.match(r"epoch (\d) of 3: loss \d", line) for line in last]
    assert [match[1] for match in epochs if match] == ["1", "2", "3"], "\n".join(last)
    text = re.sub(r"\s+", " ", " ".join(last))
    assert "(best so far)" in text
    assert len(re.findall(r" s, \d:\d\d:\d\d left", text)) == 2, "none after the last"
    assert not any("% |" in line for line in last), "the bar is gone"
    best, score = re.search(r"best epoch: (\d), with a val mIoU of (0\.\d+)", text).groups()
    line = next(
        re.sub(r"\s+", " ", " ".join(last[i : i + 3]))
        for i, line in enumerate(last)
        if line.startswith(f"epoch {best} ")
    )
    assert f"val mIoU {score}" in line
    assert "checkpoint: run/checkpoints/best.ckpt" in text
    for command in ("report run", "predict checkpoint=run input=IMAGES"):
        assert (
            f"{'seg-torch' if shutil.which('seg-torch') else 'python -m seg_torch'} {command}"
            in text
        )


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_e46_messages_are_broken_between_words_in_a_terminal_and_nowhere_else(monkeypatch, columns):
    path = "a/very/long/path-with-hyphens/" * 5
    message = "word " * 40 + path + "\n  an item of a list that is longer than a line " * 3
    record = logging.makeLogRecord({"msg": message})
    assert Wrapped().format(record) == message
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    lines = Wrapped().format(record).split("\n")
    assert all(len(line) <= columns for line in lines if path not in line)
    assert path in " ".join(lines), "can be copied"
    assert " ".join(" ".join(lines).split()) == " ".join(message.split())
    assert "\n  an item" in "\n".join(lines)


@pytest.mark.parametrize("columns", [40, 60, 120])
def test_e46_no_number_of_a_table_is_broken_or_cut_off(monkeypatch, capsys, columns):
    header = ["settings", "runs", "test mean IoU", "difference [95% interval]", "p", "GPU GB"]
    row = ["model=[x]/a-long-name", "2", "0.1461 ± 0.0012", "0.123 [0.104, 0.201]", "", ""]
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")  # taken for a terminal
    monkeypatch.setenv("TERM", "xterm")
    print_table("Runs", header, [row])
    printed = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert max(map(len, printed.split("\n"))) <= columns
    assert all(cell in " ".join(printed.split()) for cell in row)
    assert "GPU" not in printed, "no run has a value"
