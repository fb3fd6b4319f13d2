"""Which errors are the user's, and which of several processes prints them."""

from datetime import timedelta
from io import StringIO

import pytest
from ports import free_port
from torch.distributed import DistNetworkError, DistStoreError, TCPStore

from seg_torch.cli.messages import LOST, explain, print_error, wrapped


def test_only_the_first_process_of_torchrun_reports_a_mistake(run_as):
    for rank, lines in (("0", 1), ("1", 0)):
        result = run_as("train.py seed=null", LOCAL_RANK=rank, WORLD_SIZE="2")
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == lines


def test_under_torchrun_a_message_is_printed_once_and_another_one_always(monkeypatch, capsys):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(store.port), "GROUP_RANK": "0"}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)

    def printed(message: str, rank: str) -> str:
        monkeypatch.setenv("LOCAL_RANK", rank)
        print_error(message)
        return capsys.readouterr().err

    assert printed("no space left", "1") == "error: no space left\n"
    assert printed("no space left", "0") == ""
    assert printed("a.png is damaged", "1") == "error: a.png is damaged\n"
    monkeypatch.setenv("GROUP_RANK", "1")  # another machine, with a console of its own
    assert printed("no space left", "0") == "error: no space left\n"
    monkeypatch.setenv("MASTER_PORT", str(free_port()))  # the machine of the store is gone
    assert printed("no space left", "1") == "error: no space left\n"
    # Of the first machine that is torchrun, which has ended since a process failed and said why.
    monkeypatch.setenv("GROUP_RANK", "0")
    assert printed("no space left", "1") == ""
    # Nobody is left out by it: the lost process is not among those that notice.
    assert printed(LOST, "1") == ""
    assert printed(LOST, "0") == f"error: {LOST}\n"


def test_processes_that_do_not_find_each_other_are_told_apart_from_bugs():
    limit = timedelta(seconds=1)
    with pytest.raises(DistStoreError) as alone:
        TCPStore("127.0.0.1", 0, world_size=2, is_master=True, timeout=limit)
    with pytest.raises(DistNetworkError) as unreachable:
        TCPStore("127.0.0.1", free_port(), is_master=False, timeout=limit)
    assert "1/2 clients joined" in explain(alone.value)
    assert "trying to connect to (127.0.0.1, " in explain(unreachable.value)
    for error in (alone.value, unreachable.value):
        assert explain(error).startswith(LOST)
        assert len(explain(error).splitlines()) == 3
    assert explain(RuntimeError("a bug")) is None


def test_a_command_in_a_message_stays_on_one_line_of_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    command = "  cp /a/long/path/classes.txt /another/long/path/classes.txt"
    terminal = StringIO()
    terminal.isatty = lambda: True
    lines = wrapped(f"For other names, change them in a copy of the list:\n{command}", terminal)
    assert lines.splitlines()[1:] == ["  of the list:", command]
