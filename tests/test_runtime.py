import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lungopacity.errors import UserError
from lungopacity.runtime import (
    KEEP_FREED_MEMORY,
    check_same_code,
    code_digest,
    container,
    free_resources,
    own_cpus,
    own_memory_bytes,
    ray_session,
    require_resources,
    resolve_gpu,
    versions,
    worker_environment,
)
from lungopacity.runtime.session import RAY, RaySession


def test_a_cluster_that_is_gone_ends_no_word_of_waiting(monkeypatch):
    def gone() -> dict[str, float]:
        raise ConnectionError("GCS is gone\nand more")

    monkeypatch.setattr("ray.cluster_resources", gone)
    assert free_resources() == "the Ray cluster does not tell what is free (GCS is gone)"


def test_a_node_with_another_version_of_the_code_is_refused():
    check_same_code(code_digest())
    with pytest.raises(
        UserError, match=r"^\S+: this Ray node's .* is another version than the dri"
    ):
        check_same_code("0" * 64)


def test_the_versions_of_all_that_decodes_are_told():
    """A film may get other pixels, and another score, from another version of its decoder."""
    files = (Path(__file__).parents[1] / "lungopacity/radiograph").glob("*.py")
    imported = {
        name
        for file in files
        for name in re.findall(r"^ *(?:import|from) (\w+)", file.read_text(), re.MULTILINE)
    }
    named = {"PIL": "pillow", "gdcm": "python-gdcm"}
    packages = imported - sys.stdlib_module_names - {"lungopacity"}
    assert {named.get(name, name) for name in packages} <= set(versions())


@pytest.mark.usefixtures("ray_cluster")
def test_what_the_cluster_can_never_give_is_refused_at_once():
    require_resources(cpus=1, gpus=0, what="screening")
    with pytest.raises(UserError, match=r"training needs 999 CPUs, the Ray cluster has \d"):
        require_resources(cpus=999, gpus=0, what="training")
    fix = r"use --no-gpu, or fewer --workers, or a larger cluster \(if it autoscales, give"
    with pytest.raises(UserError, match=rf"training needs 999 GPUs, .*; {fix} --grows-to\)"):
        require_resources(cpus=1, gpus=999, what="training", option="--workers")
    with pytest.raises(UserError, match="0; use --no-gpu, or a larger cluster"):
        require_resources(cpus=1, gpus=999, what="evaluation")


def test_the_limits_of_a_container_are_known_without_ray(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    has = own_memory_bytes()
    for files, cpus, memory in (
        ({}, 8, has),
        ({"cpu.max": "350000 100000", "memory.max": "4096"}, 3, 4096),
        ({"cpu.max": "50000 100000", "memory.max": str(2 * has)}, 1, has),
        ({"cpu.max": "max 100000", "memory.max": "max"}, 8, has),
        ({"cpu.max": "1600000 100000"}, 8, has),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000",
          "memory/memory.limit_in_bytes": "4096"}, 2, 4096),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
          "memory/memory.limit_in_bytes": str(2**63 - 4096)}, 8, has),
    ):  # fmt: skip
        for file in tmp_path.rglob("*.*"):
            file.unlink()
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        assert (own_cpus(), own_memory_bytes()) == (cpus, memory), files


@pytest.mark.usefixtures("ray_cluster")
def test_gpus_are_used_where_there_are_any_unless_told_otherwise():
    import ray

    assert resolve_gpu(None) == (ray.cluster_resources().get("GPU", 0) > 0)
    assert resolve_gpu(False) is False
    assert resolve_gpu(True) is True


@pytest.mark.usefixtures("ray_cluster")
def test_a_session_inside_a_session_leaves_ray_running():
    import ray

    with ray_session():
        pass
    assert ray.is_initialized()


def test_the_model_is_looked_at_before_any_cluster():
    script = (
        "import os; os.environ['RAY_ADDRESS'] = '127.0.0.1:1'\n"
        "from lungopacity.cli import main\n"
        "import sys; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["screen", "--archive", "jobs", "--output", "x", "--model", "x"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )
    # The model is looked at first: no cluster is troubled for a mistake in the options.
    assert done.returncode == 2
    assert "is not a model folder" in done.stderr


def test_memory_that_was_freed_is_kept_for_the_next_time():
    script = (
        "import resource, threading\n"
        "import numpy as np\n"
        "def work():\n"
        "    np.zeros(2**25, np.uint8)[:] = 1\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10): np.empty(2**25, np.uint8)[:] = 1\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        "thread = threading.Thread(target=work)\n"
        "thread.start()\n"
        "thread.join()"
    )

    def page_faults(environment: dict[str, str]) -> int:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, env={**os.environ, **environment})
        return int(done.stdout)

    if platform.libc_ver()[0] == "glibc":
        assert page_faults(KEEP_FREED_MEMORY) < page_faults({}) / 5


@pytest.mark.usefixtures("ray_cluster")
def test_workers_of_a_ray_of_our_own_keep_freed_memory_from_their_start(monkeypatch):
    import ray

    def told() -> str | None:
        return os.environ.get("MALLOC_MMAP_MAX_")

    assert ray.get(ray.remote(told).remote()) == "0"
    assert told() is None
    assert worker_environment(use_gpu=False) == {}
    monkeypatch.setattr(RAY, "is_private", False)
    assert worker_environment(use_gpu=False) == {"env_vars": KEEP_FREED_MEMORY}
    assert worker_environment(use_gpu=True) == {}


def run_script(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In an environment without what the sessions of other tests have set for their Ray."""
    without_ray = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**without_ray, **environment},
    )


def test_ray_starts_beside_the_block_and_ends_when_the_block_is_done_with_it():
    script = (
        "import sys, threading, time, psutil\n"
        "from lungopacity.runtime import done_with_ray, ray_ahead, ray_session\n"
        "def runs(name): return any(name in ' '.join(one.cmdline())\n"
        "                           for one in psutil.Process().children(recursive=True))\n"
        "with ray_ahead(['unheard_of', 'colorsys']):\n"
        "    print(runs('raylet'))\n"
        "    time.sleep(1)\n"
        "    print(*{'pandas', 'ray.data'} & set(sys.modules))\n"
        "    with ray_session(): print(*sorted({'pandas', 'ray.data'} & set(sys.modules)))\n"
        "    import os, ray._private.worker\n"
        "    folder = ray._private.worker._global_node.get_session_dir_path()\n"
        "    print(oct(os.stat(folder).st_mode))\n"
        "    for _ in range(2):\n"
        "        with ray_session():\n"
        "            import ray\n"
        "            print(ray.get(ray.remote(lambda: 'colorsys' in sys.modules).remote()))\n"
        "    print(*filter(runs, ('raylet', 'dashboard.py', 'monitor.py')))\n"
        "    done_with_ray()\n"
        "    with ray_session(): print(ray.get(ray.remote(lambda: 'again').remote()))\n"
        "print(ray.is_initialized(), threading.active_count() < 9)"
    )
    # A Ray of our own needs no home folder, where Ray keeps its token.
    done = run_script(script, RAY_ADDRESS="", HOME="/dev/null")
    # pandas is not imported while the block does other work.
    assert done.stdout.splitlines() == [
        "True", "", "pandas ray.data", "0o40700", "True", "True", "raylet", "again", "False True"
    ], done.stderr  # fmt: skip
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        assert done.stderr == ""  # where logs are JSON, each line is


def test_no_reference_is_left_to_be_dropped_while_ray_ends():
    """Ray ends the process, with 1, where one is ("The core worker has already been shutdown")."""
    script = (
        "import gc\n"
        "from lungopacity.runtime import done_with_ray, ray_ahead, ray_session\n"
        "gc.disable()\n"
        "with ray_ahead():\n"
        "    with ray_session():\n"
        "        import ray\n"
        "        worker = ray._private.worker.global_worker\n"
        "        def left(): return len(worker.core_worker.get_all_reference_counts())\n"
        "        circle = [ray.put(1)]\n"
        "        circle.append(circle)\n"
        "        del circle\n"
        "        print(left())\n"
        "    end = ray.shutdown\n"
        "    def shutdown(): print(left()); end()\n"
        "    ray.shutdown = shutdown\n"
        "    done_with_ray()\n"
    )
    done = run_script(script, RAY_ADDRESS="")
    assert done.stdout.split() == ["1", "0"], done.stderr


@pytest.mark.parametrize(
    ("why", "fix"),
    [
        ("The current node timed out during startup.", "try again"),
        ("AF_UNIX path length cannot exceed 107 bytes: /x", "set RAY_TMPDIR to a folder with a"),
    ],
)
def test_a_ray_that_does_not_come_up_is_no_defect(monkeypatch, why, fix):
    def too_late(**_: object) -> None:
        raise Exception(f"{why}\nMore of it.")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", too_late)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    session = RaySession()
    with pytest.raises(UserError, match=f"Ray cannot be started on this machine: {why}; {fix}"):
        session._start()
    assert not session.is_private


def test_a_cluster_of_other_versions_is_told_with_all_of_them(monkeypatch):
    from ray._private.utils import check_version_info

    def refused(**_: object) -> None:
        check_version_info({"ray_version": "2.59.0", "python_version": "3.12.1"}, "node 192.0.2.7")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refused)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    said = r"mismatch: .* Ray: 2\.59\.0 Python: 3\.12\.1 .* Ray: \S+ Python: \S+; check RAY_ADDRESS"
    with pytest.raises(UserError, match=said):
        RaySession()._start()


def test_who_needs_no_ray_hears_nothing_of_one_that_cannot_be_had():
    script = (
        "from lungopacity.errors import UserError\n"
        "from lungopacity.runtime import ray_ahead, ray_session\n"
        "with ray_ahead(): print('well')\n"
        "try:\n"
        "    with ray_ahead():\n"
        "        with ray_session(): print('never')\n"
        "except UserError as error: print(error)"
    )
    done = run_script(script, RAY_ADDRESS="127.0.0.1:notaport")
    first, second = done.stdout.splitlines()
    assert first == "well"
    assert "Ray at '127.0.0.1:notaport' cannot be joined" in second
    assert "check RAY_ADDRESS" in second
    _, second = run_script(script, RAY_ADDRESS="http://127.0.0.1:8265").stdout.splitlines()
    assert "an address for submitting jobs" in second


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_in_the_middle_of_an_import_waits_for_its_end(tmp_path, number, raised):
    told = f"os.kill(os.getpid(), {int(number)})"
    # It says itself that it is through: the signal may come right after it.
    (tmp_path / "slow.py").write_text(
        f"import os, time\n{told}\ntime.sleep(0.1)\nprint('imported', flush=True)\n"
    )
    script = (
        "import signal, time\n"
        "from lungopacity.runtime import end_on_signals\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "end_on_signals()\n"
        "try:\n"
        "    import slow\n"
        "    time.sleep(20)\n"
        f"except {raised.__name__}:\n"
        "    print('told')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(tmp_path)])}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["imported", "told"], done.stderr


@pytest.mark.parametrize("at", ["start", "end"])
def test_a_sigterm_while_ray_starts_waits_for_it_and_leaves_no_ray(at):
    script = (
        "import os, psutil, ray, signal\n"
        "from lungopacity.runtime import end_on_signals, ray_session\n"
        "end_on_signals()\n"
        "init = ray.init\n"
        "def told(**options):\n"
        f"    {at!r} == 'end' and init(**options)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        f"    {at!r} == 'start' and init(**options)\n"
        "    print(*[child.pid for child in psutil.Process().children()], flush=True)\n"
        "ray.init = told\n"
        "with ray_session():\n"
        "    print('entered')\n"
    )
    ended = run_script(script)
    assert ended.returncode == 143, ended.stderr
    started = [int(pid) for pid in ended.stdout.split()]
    assert started, "it was up"
    assert not any(map(psutil.pid_exists, started))


def test_a_sigterm_while_ray_runs_unused_ends_the_block_and_leaves_no_ray():
    script = (
        "import os, psutil, signal, sys, time\n"
        "from lungopacity.runtime import end_on_signals, ray_ahead\n"
        "end_on_signals()\n"
        "with ray_ahead():\n"
        "    while not sys.modules['ray'].is_initialized(): time.sleep(0.1)\n"
        "    time.sleep(0.5)\n"
        "    print(*[child.pid for child in psutil.Process().children()], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(20)\n"
    )
    ended = run_script(script, RAY_ADDRESS="")
    # Ray's own handler says so, with a stack of addresses, and may crash.
    assert "SIGTERM received" not in ended.stderr
    assert ended.returncode == 143, ended.stderr
    started = [int(pid) for pid in ended.stdout.split()]
    assert started
    assert not any(map(psutil.pid_exists, started))


def test_a_process_alone_runs_no_line_of_the_callers_script(tmp_path: Path):
    # A plain script, as in docs/results.md: without `if __name__ == "__main__"`.
    script = tmp_path / "script.py"
    script.write_text(
        "import operator, os, sys\n"
        "from lungopacity.runtime import alone\n"
        "print(alone(operator.add, 1, 2), flush=True)\n"
        "try:\n    alone(os._exit, 3)\n"
        "except ChildProcessError as error:\n    print(error)\n"
        "try:\n    alone(operator.truediv, 1, 0)\n"
        "except ZeroDivisionError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    told = ["3", "a process ended with exit code 3", "division by zero"]
    assert done.stdout.splitlines() == told, done.stderr


def test_screening_imports_only_what_it_needs_before_ray_starts():
    """One core is idle until then, and Ray's start takes the other's time for pandas anyway."""
    script = (
        "import sys, lungopacity.screening.nightly, lungopacity.screening.report\n"
        "print(sorted({'ray', 'torch', 'pandas', 'duckdb', 'scipy', 'boto3'} & set(sys.modules)))"
    )
    done = run_script(script)
    assert done.stdout.splitlines() == ["[]"], done.stderr
