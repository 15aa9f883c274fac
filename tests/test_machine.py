"""What the machine has and what is free comes from the system's own files, and of GPUs from their driver."""

import resource
from pathlib import Path

import pytest

from archsearch import machine
from archsearch.machine import free_memory, main_memory


def write(path: Path, **files: object) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(f"{text}\n")


def test_free_memory_is_the_least_of_machine_container_and_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc, meminfo="MemTotal: 100 kB\nMemAvailable:   80 kB\nSwapFree: 9999 kB")
    assert free_memory(proc, cgroups) == 80 << 10
    write(proc / "self", cgroup="0::/a/b")
    write(cgroups / "a", memory__max=70_000, memory__current=30_000, memory__stat="anon 1\ninactive_file 10000")
    write(cgroups / "a" / "b", memory__max="max", memory__current=20_000, memory__stat="inactive_file 0")
    assert free_memory(proc, cgroups) == 50_000  # a group above counts; cache can be dropped
    write(cgroups / "a" / "b", memory__max=10_000)
    assert free_memory(proc, cgroups) == 0
    write(proc / "self", cgroup="5:cpuset:/x\n4:memory:/x")
    old = cgroups / "memory"
    write(old, memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=5, memory__stat="total_inactive_file 5")
    assert free_memory(proc, cgroups) == 80 << 10  # the group that the file names is the host's; its root is ours
    write(old, memory__limit_in_bytes=60_005)
    assert free_memory(proc, cgroups) == 60_005
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1234, 1234))
    assert free_memory(proc, cgroups) == 1234


def test_where_nobody_tells_it_is_all_that_the_machine_has(tmp_path: Path) -> None:
    found = free_memory(tmp_path, tmp_path)
    assert found is not None
    assert found > free_memory() * 0.9  # type: ignore[operator]


def test_memory_is_that_of_the_machine_or_of_its_container(tmp_path: Path) -> None:
    whole = main_memory(tmp_path, tmp_path)
    assert whole is not None
    assert 2**28 < whole < 2**50
    assert machine.memory() == main_memory() <= whole
    write(tmp_path / "self", cgroup="0::/a")
    write(tmp_path / "a", memory__max="max")
    assert main_memory(tmp_path, tmp_path) == whole
    write(tmp_path, memory__max=123456789)
    assert main_memory(tmp_path, tmp_path) == 123456789
    write(tmp_path / "self", cgroup="4:memory:/a")
    write(tmp_path / "memory" / "a", memory__limit_in_bytes=23456789)
    assert main_memory(tmp_path, tmp_path) == 23456789


def test_memory_of_the_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 40960\necho 81559\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.has_gpu()
    assert machine.memory(of_gpu=True) == 81559 * 2**20
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not machine.has_gpu()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert machine.memory(of_gpu=True) is None
