"""The mirror of a run, `run.mirror`: a copy of its files and checkpoints in a bucket or another folder.

    <run.mirror>/environment.json  config.yaml  dpo_metrics/ ...  run_state.json     as in the run directory
    <run.mirror>/checkpoints/step-000100/ ... manifest.json                          its manifest comes last

A thread of rank 0 uploads them after each commit. A folder without a manifest is no checkpoint. The state is
also the first file there: it says whose the mirror is.
"""

import contextlib
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from fsspec.callbacks import Callback
from fsspec.implementations.dirfs import DirFileSystem

from dpo_dist.config.identity import RunIdentity
from dpo_dist.config.load import read_saved
from dpo_dist.config.run_folder import (
    BEST_FILE,
    RunFolder,
    best_checkpoint,
    checkpoint_folders,
    checkpoint_name,
    checkpoint_step,
    is_checkpoint,
)
from dpo_dist.config.schema import Resume
from dpo_dist.distributed.checkpoint.saver import (
    LATEST,
    MANIFEST,
    damaged_checkpoint,
    find_faults,
)
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import CheckpointError, ConfigError, DpoDistError
from dpo_dist.foundation.files import commit_folder, is_temporary, temporary_folder
from dpo_dist.foundation.remote import open_file_system, remote_errors, shown_fault
from dpo_dist.foundation.text import pluralize
from dpo_dist.training.start.run_state import RunState, check_configuration, find_finished, read_state

_STOP_SECONDS = 30.0  # in which a run that was asked to stop waits for its last upload
_SILENT_SECONDS = 300.0  # without a byte more, after which the end of a run does not wait for an upload
_POLL_SECONDS = 0.2
_PART = ".part"


class Mirror:
    """The mirror at `url` of the run in `folder` with this identity; on rank 0.

    `upload` never raises: a failure is a warning, and the next commit tries again.

    Names of files there are relative to the mirror, as in the run directory; `_lock` guards what the thread
    of an upload shares with the saver: the thread itself, whether another upload is due, and its checkpoints.
    """

    def __init__(self, url: str, folder: RunFolder, identity: RunIdentity, keep_last: int, console: Console):
        self._url = url
        self._folder = folder
        self._keep_last = keep_last
        self._console = console
        self._identity = identity
        self._where = f"run.mirror={url}"
        self._checkpoints = folder.checkpoints.name
        # Written after the checkpoints that they name, the state as the last file.
        self._written_last = (folder.checkpoints / LATEST, folder.checkpoints / BEST_FILE, folder.state)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_due = False
        self._uploading: list[Path] = []
        self._uploaded_times: dict[str, int] = {}  # by names there, the files' times in nanoseconds
        self._failure = ""
        self._files_done = 0  # of this upload
        self._files_total = 0
        self._sent = Callback()  # its value counts bytes
        system, path = open_file_system(url, "run.mirror")
        # Other storage than folders, such as a bucket, shows whole files only.
        self._has_folders = not system.async_impl
        self._remote = DirFileSystem(path, system)
        with remote_errors(self._where, CheckpointError):
            if self._has_folders:
                self._remote.makedirs("", exist_ok=True)
            self._remote.pipe_file(_PART, b"may be deleted")
            with contextlib.suppress(FileNotFoundError):  # another run that starts has deleted it
                self._remote.rm_file(_PART)

    def restore(self, resume: Resume) -> None:
        """Download the run if the mirror is further than the run directory; an error if it has another."""
        step = self.newer_step(resume)
        if step is not None:
            self._console.say(f"restoring step {step:,} of the run from {self._url}")
            with remote_errors(self._where, CheckpointError):
                names = self._names()
                self._download(names, _steps(names))

    def newer_step(self, resume: Resume) -> int | None:
        """Return the step of a mirror that is further than the run directory; an error for another run."""
        with remote_errors(self._where, CheckpointError):
            names = self._names()
            state = self._state(names)
            if state is None:
                if names:
                    raise self._error("the mirror has files that no run has written", names[0])
                return None
            if resume is Resume.never:
                raise self._error("the mirror has a run, and run.resume=never")
            folders = filter(is_checkpoint, checkpoint_folders(self._folder.checkpoints))
            here = [checkpoint_step(folder.name) or 0 for folder in folders]
            finished = find_finished(self._identity, self._folder)
            if finished:
                here.append(finished.step)
            there = _steps(names)
            if state.is_finished:
                there.append(state.step)
            newest = max(there, default=-1)
            return newest if newest > max(here, default=-1) else None

    def claim(self) -> None:
        """Write the run's state to a mirror without one: the first file there. An error for another run's.

        Call it when the files of this start are written, before its first upload.
        """
        with remote_errors(self._where, CheckpointError):
            self._claim()

    def _claim(self) -> None:
        if self._state(self._names()) is not None:
            return
        state = self._folder.state.read_bytes()
        config = self._folder.config.read_bytes()
        try:
            self._remote.pipe_file(self._folder.state.name, state, mode="create")
        except FileExistsError:  # another run has started at the same moment
            self._state(self._names())
            return
        except Exception:  # storage that cannot refuse a second file of one name
            self._remote.pipe_file(self._folder.state.name, state)
        self._remote.pipe_file(self._folder.config.name, config)  # by which an error names this run

    def _state(self, names: Collection[str]) -> RunState | None:
        """Return the state of the run there, None without one; an error if it is that of another run."""
        with tempfile.TemporaryDirectory() as scratch:
            former = RunFolder(Path(scratch))
            for file in (former.state, former.config):
                if file.name in names:
                    self._remote.get_file(file.name, str(file))
            try:
                state = read_state(former)
            except CheckpointError as error:
                raise CheckpointError(
                    error.message,
                    where=f"{self._url}/{former.state.name}",
                    got=error.got,
                    remedy="restore this file; or copy the others but config.yaml to run.dir, and set "
                    "run.mirror to an empty folder: the run resumes from its last checkpoint",
                ) from None
            if state is None:
                return None
            try:
                check_configuration(state.identity, self._identity, former)
            except CheckpointError as error:
                name = ""
                with contextlib.suppress(ConfigError, KeyError, TypeError):
                    name = f", that of {read_saved(former.config)['run']['dir']}"
                what = f"the mirror has another run{name}"
                raise self._error(what, error.got, error.expected) from None
            return state

    def _names(self) -> list[str]:
        self._remote.invalidate_cache()  # of lists
        return [name for name in self._remote.find("") if not name.endswith(_PART)]

    def _error(self, fault: str, got: str = "", expected: str = "") -> CheckpointError:
        remedy = "set run.mirror to an empty folder, or leave it out"
        return CheckpointError(fault, where=self._where, got=got, expected=expected, remedy=remedy)

    def _download(self, names: Sequence[str], steps: Sequence[int]) -> None:
        """Download the files of the run, the best checkpoint, the newest intact one, and last the state."""
        run = self._folder
        written_last = [name for name in names if self._folder.path / name in self._written_last]
        # This start has opened its own logs.
        later = (f"{self._checkpoints}/", run.state.name, f"{run.logs.name}/")
        self._download_files([name for name in names if not name.startswith(later)], run.path)
        best = f"{self._checkpoints}/{BEST_FILE}"
        faults = list[str]()
        if best in names:
            best_step = checkpoint_step(self._remote.cat_file(best).decode().strip())
            if best_step is not None and best_step in steps[1:]:
                self._download_checkpoint(best_step, names)
        for step in steps:
            faults = self._download_checkpoint(step, names)
            if not faults:
                break
            self._console.warn(f"the mirror's {checkpoint_name(step)} is damaged and not used")
        if faults:
            raise damaged_checkpoint(Path(f"{self._url}/{self._checkpoints}"), faults)
        self._download_files(
            written_last, run.path
        )  # a killed download of a complete run must not look complete

    def _download_checkpoint(self, step: int, names: Sequence[str]) -> list[str]:
        """Download and commit a checkpoint; return its faults, with which it is not committed."""
        folder = self._folder.checkpoint(step)
        folder.parent.mkdir(exist_ok=True)
        prefix = f"{self._checkpoints}/{folder.name}/"
        with temporary_folder(folder) as temporary:
            self._download_files([name for name in names if name.startswith(prefix)], temporary, prefix)
            faults = find_faults(temporary, 0, 1)
            if not faults:
                commit_folder(temporary, folder)
        return faults

    def _download_files(self, names: Sequence[str], folder: Path, prefix: str = "") -> None:
        """Download files to `folder`, under their names without the `prefix`."""
        files = [folder / name.removeprefix(prefix) for name in names]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        self._remote.get([*names], [*map(str, files)])

    def in_use(self) -> Collection[Path]:
        """Return the checkpoints that are being uploaded."""
        with self._lock:
            return tuple(self._uploading)

    def upload(self) -> None:
        """Upload in the background what is new; if an upload is running, after it."""
        with self._lock:
            self._is_due = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        root = self._folder.checkpoints
        while True:
            with self._lock:  # the saver asks for those in use after it has committed or named others
                self._uploading = []
                if not self._is_due:
                    self._thread = None
                    return
                self._is_due = False
                folders = list(filter(is_checkpoint, checkpoint_folders(root)))
                best = best_checkpoint(root)
                self._uploading = [folder for folder in folders if folder in (folders[0], root / str(best))]
            try:
                self._upload()
            except Exception as error:
                fault = error.message if isinstance(error, DpoDistError) else shown_fault(error)
                if not self._failure:
                    later = "the next checkpoint tries again"
                    self._console.warn(f"the mirror {self._url} fails, {later}: {fault}")
                self._failure = fault
            else:
                if self._failure:
                    self._console.say(f"the mirror {self._url} is complete again")
                self._failure = ""

    def _upload(self) -> None:
        """Upload changed files of the run, checkpoints that are not there yet, and last the state."""
        self._files_done = self._files_total = 0
        self._claim()
        run = self._folder
        checkpoints = self._uploading
        state = read_state(run)
        names = self._names()
        is_finished = state is not None and state.is_finished
        # Without checkpoints and the state, which are last, and what other verbs write.
        parts = [run.environment, run.config, run.metrics, run.samples, run.logs, run.wandb_id, run.report]
        parts += [run.evaluation.path, run.tensorboard, run.trackers]
        if is_finished:
            parts.append(run.model)
        files = _files(parts)
        for folder in checkpoints:
            manifest = folder / MANIFEST
            name = self._remote_name(manifest)
            if name in names:
                if self._remote.cat_file(name) == manifest.read_bytes():
                    continue
                self._remote.rm_file(name)
            files += [*(file for file in _files([folder]) if file != manifest), manifest]
        files += self._written_last
        self._files_done = 0
        self._files_total = len(files)
        with tempfile.TemporaryDirectory() as scratch:
            for file in files:
                self._upload_file(file, Path(scratch) / "file")
                self._files_done += 1
        if checkpoints or (is_finished and not self._keep_last):
            newest = checkpoint_folders(run.checkpoints)[: self._keep_last]
            self._delete_all_but({folder.name for folder in (*newest, *checkpoints)})

    def _upload_file(self, file: Path, scratch: Path) -> None:
        """Upload a file if it has changed; one that may change meanwhile is first copied to `scratch`."""
        name = self._remote_name(file)
        source = file
        try:
            version = file.stat().st_mtime_ns
            if self._uploaded_times.get(name) == version:
                return
            if file.suffix != ".safetensors":
                source = Path(shutil.copyfile(file, scratch))
            if self._has_folders:  # where a reader would see a part of a file
                self._remote.makedirs(str(Path(name).parent), exist_ok=True)
                self._remote.put_file(str(source), name + _PART, callback=self._sent)
                self._remote.mv(name + _PART, name)
            else:
                self._remote.put_file(str(source), name, callback=self._sent)
            self._uploaded_times[name] = version
        except FileNotFoundError:  # deleted since it was listed, or there is no best checkpoint
            if file.exists():
                raise

    def _delete_all_but(self, names_to_keep: Collection[str]) -> None:
        """Delete all other checkpoints there."""
        names = self._names()
        there = {name.split("/")[1] for name in names if name.startswith(f"{self._checkpoints}/")}
        for name in there.difference(names_to_keep):
            if checkpoint_step(name) is None:
                continue
            folder = f"{self._checkpoints}/{name}"
            manifest = f"{self._checkpoints}/{name}/{MANIFEST}"
            with contextlib.suppress(FileNotFoundError):  # first: what is left is no checkpoint
                self._remote.rm_file(manifest)
            if self._has_folders:
                self._remote.rm(folder, recursive=True)
                continue
            # Some buckets answer with an error to the deletion of a folder, which is no object there.
            files = {each for each in names if each.startswith(f"{folder}/")} - {manifest}
            if files:
                self._remote.rm(sorted(files))

    def finish(self, is_stopping: Callable[[], bool]) -> None:
        """Upload the last files and wait for them, not long if the run is to stop or nothing is sent.

        Print what is missing.
        """
        self.upload()
        end = math.inf
        last_done = (-1, -1)
        last_change = time.monotonic()
        # A mounted disk reports no byte of a file before its end.
        silent = math.inf if self._has_folders else _SILENT_SECONDS
        with self._console.progress(f"uploading to {self._url}", "file") as show:
            while True:
                thread = self._thread
                if thread is None:
                    break
                thread.join(_POLL_SECONDS)
                now = time.monotonic()
                done = (self._files_done, self._sent.value)
                if done != last_done:
                    last_done = done
                    last_change = now
                if is_stopping():
                    end = min(end, now + _STOP_SECONDS)
                if now > min(end, last_change + silent):
                    break
                show(self._files_done, self._files_total)
        if self._thread is None and not self._failure:
            self._console.say(f"the mirror {self._url} has the whole run")
            return
        number = "nothing is sent"
        if self._files_total:
            number = f"{self._files_done:,} of {pluralize(self._files_total, 'file')} are there"
        why = ", ".join(filter(None, [self._failure, number]))
        again = "the same command uploads the others, or goes on from the run directory"
        self._console.warn(f"the mirror {self._url} is behind the run: {why}; {again}")

    def _remote_name(self, file: Path) -> str:
        return file.relative_to(self._folder.path).as_posix()


def _files(parts: Iterable[Path]) -> list[Path]:
    """Return the files that are, or are below, these paths, without unfinished ones."""
    files = []
    for part in parts:
        for file in (part, *part.rglob("*")):
            if file.is_file() and not is_temporary(file):
                files.append(file)
    return files


def _steps(names: Collection[str]) -> list[int]:
    """Return the steps of the checkpoints that have a manifest, the newest first."""
    steps = []
    for name in names:
        if Path(name).name == MANIFEST:
            step = checkpoint_step(Path(name).parent.name)
            if step is not None:
                steps.append(step)
    return sorted(steps, reverse=True)
