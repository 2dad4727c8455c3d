"""Compile kernels to cubins, ahead of time and in parallel, on a machine with or without a GPU.

The compiler runs in child processes only (`worker`), because Triton may be interpreting the same kernels in this one.
"""

import hashlib
import os
import subprocess
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import msgspec

from wanforge.errors import ResourceError, WanforgeError
from wanforge.plugins.child_process import kill_group, start_module
from wanforge.plugins.launching.cubins import Cubin, CubinStore, source_hash
from wanforge.plugins.launching.launch import Launch, Specialisation
from wanforge.plugins.launching.worker import Compiled, Failed
from wanforge.progress import Progress, silent
from wanforge.requirements import install_package
from wanforge.whole_file import temporary_folder


class Origin(NamedTuple):
    """What a cubin is made from, besides its specialisation. If any of it differs, the cubin is out of date."""

    source_hash: str
    triton: str
    grid: tuple[str, ...]


def compile_kernels(
    launches: Iterable[Launch],
    folder: Path,
    jobs: int | None = None,
    progress: Progress = silent,
    *,
    ptx: bool = False,
) -> list[Cubin]:
    """Make sure that a folder holds the cubin of every launch.

    Each cubin is saved as soon as it is made, so a failure or an interruption loses only the ones being compiled.

    Args:
        launches: The launches to compile for, as `launch.recording` collects them. Launches with the same
            specialisation share one cubin.
        folder: Where the cubins and their manifest are written.
        jobs: The number of compilers that run at a time; by default the number of processors.
        ptx: Whether to keep the PTX that each cubin was assembled from beside it.

    Returns:
        One record per specialisation, in the order of the launches.

    Raises:
        WanforgeError: Some kernels do not compile. The others have been compiled and saved.
        ResourceError: Triton is not installed.
    """
    wanted = _distinct(launches)
    missing = _distinct(outdated(wanted.values(), folder, ptx=ptx))
    store, failures = CubinStore(folder), []
    with closing(_compiled(list(missing), jobs or os.cpu_count() or 1)) as answers:
        for done, (specialisation, answer) in enumerate(answers, 1):
            if isinstance(answer, Failed):
                failures.append(
                    f"{specialisation.kernel} does not compile for sm_{specialisation.sm}: {answer.message}"
                )
            else:
                launch = missing[specialisation]
                store.add(_record(specialisation, answer, _origin(launch)), answer.code, answer.ptx if ptx else None)
            progress("compile", done, len(missing))
    if failures:
        others = f"\n({len(failures) - 1} more did not compile)" if len(failures) > 1 else ""
        raise WanforgeError(failures[0] + others)
    cubins = store.cubins()
    return [cubins[specialisation.key] for specialisation in wanted]


def outdated(launches: Iterable[Launch], folder: Path, *, ptx: bool = False) -> list[Launch]:
    """Return the launches, one per specialisation, whose cubin in a folder is missing, damaged or out of date.

    Args:
        ptx: Whether those without their PTX count as well.
    """
    store = CubinStore(folder)
    cubins = store.cubins()

    def is_held(launch: Launch) -> bool:
        cubin = cubins.get(launch.specialisation.key)
        if cubin is None or not is_made_from(cubin, launch) or (ptx and not store.ptx_path(cubin).exists()):
            return False
        try:
            store.read(cubin)
        except ResourceError:
            return False
        return True

    return [launch for launch in _distinct(launches).values() if not is_held(launch)]


def is_made_from(cubin: Cubin, launch: Launch) -> bool:
    """Whether a cubin of a launch's specialisation is made from the sources that there are now, with this Triton."""
    return Origin(cubin.source_hash, cubin.triton, cubin.grid) == _origin(launch)


def _distinct(launches: Iterable[Launch]) -> dict[Specialisation, Launch]:
    return {launch.specialisation: launch for launch in launches}


def _origin(launch: Launch) -> Origin:
    try:
        return Origin(source_hash(launch.kernel.op), version("triton"), launch.kernel.grid)
    except PackageNotFoundError:
        raise ResourceError(
            f"compiling kernels needs triton, which is not installed; run: {install_package('triton')}"
        ) from None


def _record(specialisation: Specialisation, made: Compiled, origin: Origin) -> Cubin:
    digest = hashlib.sha256(made.code).hexdigest()
    return Cubin(
        key=specialisation.key,
        kernel=specialisation.kernel,
        sm=specialisation.sm,
        file=f"{specialisation.kernel}.sm_{specialisation.sm}.{specialisation.key}-{digest[:8]}.cubin",
        sha256=digest,
        bytes=len(made.code),
        entry=made.entry,
        parameters=tuple(made.parameters),
        constants=dict(specialisation.constants),
        grid=origin.grid,
        threads=made.threads,
        num_stages=specialisation.num_stages,
        shared_bytes=made.shared_bytes,
        tensor_memory=made.tensor_memory,
        registers=made.registers,
        spill_bytes=made.spill_bytes,
        mma=tuple(made.mma),
        source_hash=origin.source_hash,
        triton=origin.triton,
        warnings=tuple(made.warnings),
    )


class Worker:
    """A child process that compiles one kernel after another. It is started when it is first needed. With `line_info`,
    the PTX names the lines of the sources, as no cubin that is kept may."""

    def __init__(self, scratch: Path, *, line_info: bool = False) -> None:
        self.scratch, self.line_info = scratch, line_info
        self.errors = scratch / f"errors-{id(self)}"
        self.process: subprocess.Popen[bytes] | None = None

    def compile(self, specialisation: Specialisation) -> Compiled | Failed:
        """Compile one kernel. If the compiler crashes, only this kernel fails."""
        if self.process is None:
            self.process = self._start()
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(specialisation) + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if line:
            return msgspec.json.decode(line, type=Compiled | Failed)
        self.close()
        said = self.errors.read_text(errors="replace")[-2000:]
        return Failed(f"the compiler crashed ({process.returncode})\n{said}".strip())

    def _start(self) -> subprocess.Popen[bytes]:
        variables = {
            "TRITON_INTERPRET": "0",
            # Triton's own cache could return the output of an older compiler.
            "TRITON_CACHE_DIR": str(self.scratch),
            # Line numbers come with the paths of the sources, so the same kernel would be other bytes elsewhere.
            "TRITON_DISABLE_LINE_INFO": str(int(not self.line_info)),
            "TMPDIR": str(self.scratch),
        }
        with self.errors.open("wb") as errors:
            return start_module(Compiled.__module__, errors=errors, variables=variables)

    def kill(self) -> None:
        """End the child immediately, whatever it is doing."""
        process = self.process
        if process is not None:
            kill_group(process)

    def close(self) -> None:
        """End the child and close its pipes."""
        self.kill()
        if self.process is not None:
            self.process.communicate()
            self.process = None


def _compiled(
    specialisations: list[Specialisation], jobs: int
) -> Generator[tuple[Specialisation, Compiled | Failed], None, None]:
    """Yield each specialisation with its result, in the order in which they finish."""
    with temporary_folder() as scratch, ThreadPoolExecutor(jobs) as threads:
        workers = [Worker(scratch) for _ in range(jobs)]
        idle: SimpleQueue[Worker] = SimpleQueue()

        def compile_one(specialisation: Specialisation) -> tuple[Specialisation, Compiled | Failed]:
            worker = idle.get()
            try:
                return specialisation, worker.compile(specialisation)
            finally:
                idle.put(worker)

        for worker in workers:
            idle.put(worker)
        try:
            for future in as_completed([threads.submit(compile_one, each) for each in specialisations]):
                yield future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.kill()
            # Each thread sees its compiler end and closes its worker; wait, so that no worker is closed twice at once.
            threads.shutdown(wait=True)
            for worker in workers:
                worker.close()
