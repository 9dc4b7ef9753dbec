from __future__ import annotations

import os
import socket
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmemo.errors import MediaError
from mmemo.media.paths import resolve

_OPENED: list[str] = []
_LISTEN = [False]


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _LISTEN[0] and event in ("open", "os.listdir", "os.scandir", "socket.connect"):
        _OPENED.append(f"{event} {arguments[0]}")


sys.addaudithook(_hook)


@pytest.fixture
def opened():
    """What is opened while the test runs."""
    _OPENED.clear()
    _LISTEN[0] = True
    yield _OPENED
    _LISTEN[0] = False


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "clip.mp4").write_bytes(b"x")
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (tmp_path / "media-two").mkdir()
    (tmp_path / "media-two" / "clip.mp4").write_bytes(b"x")
    return root


@pytest.mark.parametrize("name", ["sub/clip.mp4", "./sub/clip.mp4", "sub//clip.mp4"])
def test_finds_files_under_the_root(root: Path, name: str) -> None:
    assert resolve(root, name) == (root / "sub" / "clip.mp4").resolve()


@pytest.mark.parametrize("name", ["S01:E02.mp4", "12:30.mp4", "sub/a:b.mp4", "MELD:dia0_utt1.mp4"])
def test_a_colon_makes_no_address(root: Path, name: str) -> None:
    (root / name).write_bytes(b"x")
    assert resolve(root, name) == (root / name).resolve()


@pytest.mark.parametrize("disk", ["NFC", "NFD"])
@pytest.mark.parametrize("named", ["NFC", "NFD"])
def test_both_forms_of_an_accent_are_one_name(root: Path, disk: str, named: str) -> None:
    """macOS writes the accent as a character of its own, and other programs do not."""
    name = "Zoë [a]/é ü 한국 1.mp4"
    made = root / unicodedata.normalize(disk, name)
    made.parent.mkdir()
    made.write_bytes(b"x")
    assert resolve(root, unicodedata.normalize(named, name)) == made.resolve()


def test_forms_may_differ_within_a_path(root: Path) -> None:
    made = root / unicodedata.normalize("NFC", "Zoë") / unicodedata.normalize("NFD", "é.mp4")
    made.parent.mkdir()
    made.write_bytes(b"x")
    assert resolve(root, unicodedata.normalize("NFD", "Zoë/é.mp4")) == made.resolve()


def test_the_given_form_wins_where_both_are_there(root: Path) -> None:
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "é.mp4")
        (root / name).write_bytes(b"x")
        assert resolve(root, name).name == name


def test_a_link_under_another_form_does_not_leave_the_root(root: Path) -> None:
    (root / unicodedata.normalize("NFD", "é.mp4")).symlink_to(root.parent / "secret.mp4")
    with pytest.raises(MediaError, match="leaves"):
        resolve(root, unicodedata.normalize("NFC", "é.mp4"))


def test_a_blank_at_the_end_of_a_name_is_named(root: Path) -> None:
    with pytest.raises(MediaError, match="remove the blank at its end"):
        resolve(root, "sub/clip.mp4 ")


def test_a_folder_that_may_not_be_entered_is_not_called_absent(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.path.realpath
    locked = root / "sub"

    def realpath(path: Any, **more: Any) -> str:
        if Path(path).is_relative_to(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path, **more)

    monkeypatch.setattr(os.path, "realpath", realpath)  # tests may run as root
    for where, name in ((root, "sub/clip.mp4"), (locked, "clip.mp4")):
        with pytest.raises(MediaError, match="change the folder's permissions") as caught:
            resolve(where, name)
        assert caught.value.kind == "missing"


def test_a_link_inside_the_root_may_be_followed(root: Path) -> None:
    (root / "link.mp4").symlink_to("sub/clip.mp4")
    assert resolve(root, "link.mp4") == (root / "sub" / "clip.mp4").resolve()


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    assert resolve(tmp_path / "alias", "sub/clip.mp4").name == "clip.mp4"


HOSTILE = [
    "../secret.mp4",
    "sub/../../secret.mp4",
    "sub/../sub/clip.mp4",
    "/etc/passwd",
    "//etc/passwd",
    "/dev/zero",
    "http://169.254.169.254/latest/meta-data",
    "https://example.org/a.mp4",
    "HTTPS://example.org/a.mp4",
    "file:///etc/passwd",
    "file:/etc/passwd",
    "ftp://example.org/a",
    "concat:a|b",
    "data:video/mp4;base64,AAAA",
    "C:\\clips\\a.mp4",
    "C:/clips/a.mp4",
    "Pipe:0",
    "rtmp://example.org/a",
    "fd:3",
    "\\\\server\\share\\a.mp4",
    "..\\secret.mp4",
    "sub\\clip.mp4",
    "",
    "   ",
    "sub/clip.mp4\0.txt",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_spellings_are_refused_and_nothing_is_opened(
    root: Path, name: str, opened: list[str]
) -> None:
    with pytest.raises(MediaError) as caught:
        resolve(root, name)
    assert caught.value.kind == "outside_root"
    assert caught.value.path == name
    assert opened == []


@pytest.mark.parametrize("target", ["../secret.mp4", "../media-two/clip.mp4", "/etc/passwd"])
def test_a_link_that_leaves_the_root_is_refused(root: Path, target: str, opened: list[str]) -> None:
    (root / "link.mp4").symlink_to(target)
    with pytest.raises(MediaError, match="link that leaves") as caught:
        resolve(root, "link.mp4")
    assert caught.value.kind == "outside_root"
    assert opened == []


def test_a_linked_folder_that_leaves_the_root_is_refused(root: Path, opened: list[str]) -> None:
    (root / "folder").symlink_to("..")
    with pytest.raises(MediaError) as caught:
        resolve(root, "folder/secret.mp4")
    assert caught.value.kind == "outside_root"
    assert opened == []


def test_folders_pipes_and_sockets_are_no_media(root: Path, opened: list[str]) -> None:
    os.mkfifo(root / "pipe.mp4")
    server = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(root)  # the name of a socket must be short
    try:
        server.bind("socket.mp4")
    finally:
        os.chdir(here)
        server.close()
    for name, what in (("sub", "folder"), ("pipe.mp4", "pipe"), ("socket.mp4", "socket")):
        with pytest.raises(MediaError, match=what) as caught:
            resolve(root, name)
        assert caught.value.kind == "not_media"
    assert opened == []


def test_a_link_to_a_device_is_refused(root: Path, opened: list[str]) -> None:
    (root / "zero.mp4").symlink_to("/dev/zero")
    with pytest.raises(MediaError) as caught:
        resolve(root, "zero.mp4")
    assert caught.value.kind == "outside_root"
    with pytest.raises(MediaError, match="device") as caught:
        resolve(Path("/dev"), "zero")
    assert caught.value.kind == "not_media"
    assert opened == []


def test_missing_files_loops_and_roots(root: Path) -> None:
    (root / "loop").symlink_to("loop")
    for name in ("none.mp4", "loop", "sub/clip.mp4/more", "x" * 5000):
        with pytest.raises(MediaError) as caught:
            resolve(root, name)
        assert caught.value.kind == "missing"
    with pytest.raises(MediaError, match="media root") as caught:
        resolve(root / "none", "a.mp4")
    assert caught.value.kind == "missing"


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.sampled_from(["..", ".", "/", "\\", "sub", "clip.mp4", "secret.mp4", "C:", "a", "\0"]),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(["", "/"]),
)
def test_whatever_the_name_the_result_is_under_the_root(
    root: Path, parts: list[str], joint: str
) -> None:
    try:
        path = resolve(root, joint.join(parts))
    except MediaError:
        return
    assert path.is_relative_to(root.resolve())
    assert path.is_file()
