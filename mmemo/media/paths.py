"""Resolve the media paths of a manifest to files under ``media_root``, and nowhere else."""

from __future__ import annotations

import re
import stat
import unicodedata
from pathlib import Path, PurePosixPath

from mmemo.errors import MediaError

# URLs (http://...), drives (C:...), and FFmpeg protocols that need no slashes (concat:...). Other
# colons are allowed, because a file may be called S01:E02.mp4.
_ADDRESS = re.compile(
    r"[a-z][a-z0-9+.\-]*://|[a-z]:|(?:concat|concatf|crypto|data|fd|file|http|https|pipe|subfile):",
    re.IGNORECASE,
)
_KINDS = (
    (stat.S_ISDIR, "is a folder"),
    (stat.S_ISFIFO, "is a named pipe"),
    (stat.S_ISCHR, "is a device"),
    (stat.S_ISBLK, "is a device"),
    (stat.S_ISSOCK, "is a socket"),
)


def resolve(media_root: Path, name: str) -> Path:
    """Resolve ``name`` to a regular file under ``media_root``, without opening it.

    Symbolic links are followed if they end inside the root. A name is found in either form of
    Unicode: macOS writes the accent of ``é`` as a character of its own.

    Raises:
        MediaError: ``outside_root`` for absolute paths, URLs, drives, ``..`` and links that leave
            the root; ``missing`` if the file does not exist or its folder is not readable;
            ``not_media`` for folders, pipes, devices and sockets.
    """
    problem = _refusal(name)
    if problem:
        raise MediaError(
            name, "outside_root", f"{problem}; write it relative to the media root with '/'"
        )
    try:
        root = media_root.resolve(strict=True)
    except PermissionError as error:
        raise _forbidden(name) from error
    except (OSError, RuntimeError) as error:
        raise MediaError(
            name, "missing", f"the media root {media_root} cannot be found; check media_root"
        ) from error
    try:
        path = _spelt(root, name).resolve(strict=True)
        mode = path.stat().st_mode
    except PermissionError as error:
        raise _forbidden(name) from error
    except (OSError, RuntimeError, ValueError) as error:  # no such file, a loop of links, too long
        hint = "remove the blank at its end" if name != name.strip() else "check the name"
        raise MediaError(
            name, "missing", f"there is no such file under {media_root}; {hint}"
        ) from error
    # The name is harmless as text (see _refusal); where its links lead shows only now.
    if not path.is_relative_to(root):
        raise MediaError(
            name, "outside_root", f"is a link that leaves {media_root}; copy the file into it"
        )
    if not stat.S_ISREG(mode):
        what = next((text for test, text in _KINDS if test(mode)), "is not a regular file")
        raise MediaError(name, "not_media", f"{what}; name a media file")
    return path


def _spelt(root: Path, name: str) -> Path:
    """The path as the disk spells it: each part as given, or in Unicode's form C or D."""
    path = root
    for part in PurePosixPath(name).parts:
        # A form that equals the part is tried once more, which costs nothing where it exists.
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        path = next((one for form in forms if (one := path / form).exists()), path / part)
    return path


def _forbidden(name: str) -> MediaError:
    return MediaError(
        name, "missing", "its folder is not readable; change the folder's permissions"
    )


def _refusal(name: str) -> str | None:
    """Why ``name`` is refused for its spelling alone, or None."""
    if not name.strip() or "\0" in name:
        return "is not a file name"
    if _ADDRESS.match(name):
        return "is a URL or names a drive"
    if "\\" in name:
        return "has a backslash"
    path = PurePosixPath(name)
    if path.is_absolute():
        return "is an absolute path"
    if ".." in path.parts:
        return "leaves its folder with '..'"
    return None
