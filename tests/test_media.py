"""common/media.py: errors that can be read, and files that are opened below their root."""

import base64
import errno
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from common import media
from common.clips import Clip
from common.media import MediaError, open_media
from common.pictures import load_picture


def noise(width=56, height=56, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def reason(call, *args, **keys):
    """Why a call fails; a clip is also decoded."""
    with pytest.raises(MediaError) as caught:
        result = call(*args, **keys)
        if isinstance(result, Clip):
            with result:
                list(result.frames([0.0, 0.5, 1.0, 1.5]))
    assert str(caught.value) and caught.value.path
    return caught.value.reason


def pixels(*args, **keys):
    return np.asarray(load_picture(*args, **keys))


def test_an_error_survives_the_way_to_another_process():
    error = pickle.loads(pickle.dumps(MediaError("a.png", "truncated", "here")))
    assert str(error) == "a.png: truncated (here)" and error.reason == "truncated"
    assert str(MediaError("a.png", "empty")) == "a.png: empty"


def test_messages_are_short_lines_that_can_be_printed(tmp_path):
    payload = base64.b64encode(bytes(range(256)) * 4000).decode()
    names = [payload, payload[:4000], "x" * 300, "a" + "/b" * 9000]
    names += ["two\nlines\x1b.png", "bad\ud800.png"]
    for source in [*names, names, {"image": payload}, b"bytes", 3]:
        for call in (load_picture, Clip):
            with pytest.raises(MediaError) as caught:
                call(source, tmp_path)
            message = str(caught.value)
            assert len(message) <= 200 and message.isprintable()
            message.encode()
            assert str(pickle.loads(pickle.dumps(caught.value))) == message
    with pytest.raises(MediaError, match="of 1,365,336 characters; base64 stands behind data:"):
        load_picture(payload, tmp_path)


def test_paths_stay_in_their_folder(tmp_path):
    root = tmp_path / "set"
    (root / "deep").mkdir(parents=True)
    noise().save(tmp_path / "secret.png")
    noise().save(root / "deep/ok.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "inner.png").symlink_to(root / "deep/ok.png")
    refused = [
        "../secret.png",
        str(tmp_path / "secret.png"),
        str(root / "deep/ok.png"),
        "link.png",
        "up/secret.png",
        "deep/../../secret.png",
        "http://localhost/x.png",
        "file:///etc/passwd",
        "concat:deep/ok.png",
        "rtmp://localhost/x.flv",
    ]
    for path in refused:
        assert reason(load_picture, path, root) == "outside", path
        assert reason(Clip, path, root) == "outside", path
    for path in ("deep/ok.png", "inner.png", "up/set/deep/ok.png"):
        assert load_picture(path, root).size == (56, 56)
    outside = str(tmp_path / "secret.png")
    assert load_picture(outside, root, allow_outside=True).size == (56, 56)
    with open_media("deep/ok.png", root) as file:
        assert file.read(4) == b"\x89PNG"


def test_a_folder_that_becomes_a_link_just_now_is_not_followed(tmp_path, monkeypatch):
    for folder in ("set/deep", "secret/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text(folder)
    opening = media._open_below

    def swap(base, real):  # what another process does between the check and the opening
        (tmp_path / "set/deep").rename(tmp_path / "gone")
        (tmp_path / "set/deep").symlink_to(tmp_path / "secret/deep")
        return opening(base, real)

    monkeypatch.setattr(media, "_open_below", swap)
    assert reason(open_media, "deep/a.txt", tmp_path / "set") == "missing"


def test_a_file_that_a_server_has_lost_is_missing(tmp_path, monkeypatch):
    """On NFS one may be opened, and then not be there."""
    noise().save(tmp_path / "a.png")

    def fstat(fd):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:  # pytest calls it too
        patch.setattr(os, "fstat", fstat)
        why = reason(load_picture, "a.png", tmp_path)
    assert why == "missing"
