"""Errors that a user can cause. Each is one sentence that names the cause and says what to do."""

from __future__ import annotations


class MmemoError(Exception):
    """Base of the errors that the command line prints without a traceback."""


class ConfigError(MmemoError):
    """A config file or an override is wrong."""


class DataError(MmemoError):
    """A row of a manifest is wrong. The message names its file, line and field."""

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

    ``kind`` is the short name under which reports count it: ``missing``, ``outside_root``,
    ``not_media``, ``empty``, ``truncated``, ``no_video``, ``no_audio``, ``no_frames``,
    ``bad_span``, ``too_long``, ``timeout``, ``out_of_memory``, ``crashed``, ``changed`` (while it
    was read) or ``decode``.
    """

    def __init__(self, path: str, kind: str, detail: str) -> None:
        super().__init__(f"{path}: {kind}: {detail}")
        self.path, self.kind, self.detail = path, kind, detail


class StoreError(MmemoError):
    """The feature store cannot be used."""


class CheckpointError(MmemoError):
    """A checkpoint is damaged or does not match the run. The message names the file."""


class TrainingError(MmemoError):
    """Training cannot continue."""


class RolloutError(TrainingError):
    """Completions cannot be drawn from a server."""


class EvaluationError(MmemoError):
    """An evaluation cannot continue."""


class RewardError(MmemoError):
    """A reward does not score as it must. The message names the reward and the answer."""
