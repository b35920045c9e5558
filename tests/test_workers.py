"Processes that work for another: what becomes of them when that ends, is stopped or is killed."

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from csrae_nb.process import worker_processes

SCRIPT = """
import time, sys
from pathlib import Path
from csrae_nb.process import worker_processes

def piece(folder, k):
    (Path(folder) / f"begun {k}").touch()
    time.sleep(0.5)
    (Path(folder) / f"done {k}").touch()

if __name__ == "__main__":
    with worker_processes(2) as pool:
        for f in [pool.submit(piece, sys.argv[1], k) for k in range(40)]:
            f.result()
"""


HEARD = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # also under nohup


@pytest.fixture
def work(tmp_path):
    "A script of forty pieces of half a second, by two processes; it has begun with the first two."
    (tmp_path / "script.py").write_text(SCRIPT)
    (folder := tmp_path / "out").mkdir()
    words = [sys.executable, tmp_path / "script.py", folder]
    p = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True, **HEARD)
    while len(list(folder.glob("begun *"))) < 2:
        assert p.poll() is None
        time.sleep(0.01)
    return p, folder


def group(p):
    "The processes of its session that are left."
    said = subprocess.run(["ps", "-o", "pid=", "-s", str(p.pid)], capture_output=True, text=True).stdout
    return said.split()


@pytest.mark.parametrize("whom", [os.killpg, os.kill], ids=["all", "only the first"])
def test_ctrl_c_interrupts_what_is_done_and_cancels_what_waits(work, whom):
    "It comes from a terminal, which tells all, or from kill -INT, which tells one."
    p, folder = work
    whom(p.pid, signal.SIGINT)
    said = p.communicate(timeout=60)[1]
    assert p.returncode == -signal.SIGINT and said.count("Traceback") == 1
    assert len(list(folder.glob("done *"))) < len(list(folder.glob("begun *"))) < 10


def test_ctrl_c_is_not_lost_while_processes_begin(tmp_path):
    "Nor does it reach them while they import."
    (tmp_path / "script.py").write_text(SCRIPT.replace("with worker", "print(flush=True)\n    with worker"))
    (folder := tmp_path / "out").mkdir()
    for milliseconds in (0, 5, 20, 200):
        words = [sys.executable, tmp_path / "script.py", folder]
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        p = subprocess.Popen(words, start_new_session=True, **streams, **HEARD)
        p.stdout.readline()
        time.sleep(milliseconds / 1000)
        os.killpg(p.pid, signal.SIGINT)
        said = p.communicate(timeout=60)[1]
        assert p.returncode == -signal.SIGINT and said.count("Traceback") == 1
    assert not list(folder.glob("done *"))


def test_processes_end_with_one_that_is_killed(work):
    p, folder = work
    p.kill()
    p.communicate(timeout=60)
    for _ in range(600):
        if not group(p):
            break
        time.sleep(0.1)
    assert not group(p) and len(list(folder.glob("begun *"))) < 10


def test_a_process_that_dies_breaks_the_pool():
    with pytest.raises(BrokenProcessPool), worker_processes(2) as pool:
        pool.submit(os._exit, 1).result()


def test_a_script_that_its_processes_would_begin_again_is_told_so(tmp_path):
    (tmp_path / "script.py").write_text(
        "from csrae_nb.process import refuse_in_workers, worker_processes\n"
        "refuse_in_workers('a table is written')\n"
        "with worker_processes(1) as pool:\n    print(pool.submit(abs, -3).result())\n"
    )
    p = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert p.returncode == 1 and 'put what the script does under if __name__ == "__main__"' in p.stderr
    last = p.stderr.strip().splitlines()[-1]  # which is what one reads
    assert last.startswith("ChildProcessError: 1 processes could not begin") and "__main__" in last
