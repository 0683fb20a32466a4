"""A file that only grows, written by one process, whole block by whole block."""

import contextlib
import io
import os
from pathlib import Path

from prograde.replay._format import LogError


class GrowingFile:
    """A file that exists, opened to be written after its first `end` bytes."""

    def __init__(self, path: Path):
        self.path, self.end = path, 0
        try:
            self._file = io.FileIO(path, "r+")
        except OSError as error:
            raise not_readable(path, error) from None
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise LogError(
                    f"{path} is being written, by another process or by a ReplayLog that is still "
                    "open. Close that one first."
                ) from None
            except OSError:
                pass  # a file system without locks

    def continue_at(self, end: int) -> None:
        """Cuts off what is after the first `end` bytes."""
        self.end = end
        if self._file.seek(0, os.SEEK_END) > end:
            self._file.truncate(end)
            os.fsync(self._file.fileno())
        self._file.seek(end)

    def write(self, block: bytes) -> None:
        """Writes a block to its end and to the disk, or leaves the file as it was."""
        rest = memoryview(block)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self.end)
                self._file.seek(self.end)
            raise
        self.end += len(block)

    def close(self) -> None:
        """Closes the file, and lets others write."""
        self._file.close()


def write_new(path: Path, content: bytes) -> None:
    """Makes a file with this content, whole or not at all.

    **Errors:** `LogError` for a path that exists or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename this fails where there is a file
        except FileExistsError:
            raise LogError(
                f"{path} exists. Open it to continue it, or choose another path; nothing was "
                "changed."
            ) from None
    except OSError as error:
        raise LogError(f"{path} could not be created ({error}).") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def not_readable(path: Path, error: OSError) -> LogError:
    """Why a log cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return LogError(f"{path}: there is no replay log.")
    if isinstance(error, IsADirectoryError):
        return LogError(f"{path} is a directory. Give the file in it, such as {path}/replay.log.")
    return LogError(f"{path} cannot be opened ({error}).")
