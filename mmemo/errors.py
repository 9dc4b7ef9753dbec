"""Every error a user can cause: one sentence that names the thing and says what to do."""

from __future__ import annotations


class MmemoError(Exception):
    """Base of all errors that the command line prints without a traceback."""


class ConfigError(MmemoError):
    """A config file or an override is wrong."""


class DataError(MmemoError):
    """A manifest row is wrong. The message names file, line and field."""

    def __init__(
        self, message: str, *, file: str = "", line: int | None = None, field: str = ""
    ) -> None:
        where = ":".join(str(part) for part in (file, line) if part not in ("", None))
        prefix = f"{where}: " if where else ""
        prefix += f"field '{field}': " if field else ""
        super().__init__(prefix + message)
        self.file, self.line, self.field = file, line, field


class MediaError(MmemoError):
    """A media file cannot be used.

    ``kind`` is one of the short names that reports count by: ``missing``, ``outside_root``,
    ``not_media``, ``empty``, ``truncated``, ``no_video``, ``no_audio``, ``no_frames``,
    ``bad_span``, ``too_long``, ``timeout``, ``out_of_memory``, ``crashed``, ``changed`` (while it
    was read), ``decode``.
    """

    def __init__(self, path: str, kind: str, detail: str) -> None:
        super().__init__(f"{path}: {kind}: {detail}")
        self.path, self.kind, self.detail = path, kind, detail


class StoreError(MmemoError):
    """The feature store cannot be used."""


class CheckpointError(MmemoError):
    """A checkpoint is damaged or does not fit. The message names the file."""


class TrainingError(MmemoError):
    """Training cannot go on."""


class EvaluationError(MmemoError):
    """An evaluation cannot go on."""


class RewardError(MmemoError):
    """A reward does not do what it promises. The message names the reward and the answer."""
