"""WebDataset's shards: tar files of samples, read where they stand, without unpacking.

    000017.json    one JSON object, as a line of a .jsonl file would be
    000017.jpg     its picture; more are 000017.1.jpg, 000017.2.jpg, ..; a clip is 000017.mp4
    000017.txt     or, without a conversation in the JSON, a caption of its pictures and clips; a
                   JSON beside it (img2dataset's: address, size) is a note, which nothing reads

A sample is what stands together and has one name up to the first dot. Its JSON names its pictures
and clips by their file names; where it names none, they fill the places that its texts have for
them, in the tar's order. Nothing is written anywhere: a medium is opened by its place in the tar,
"shard.tar@OFFSET+SIZE/000017.jpg", see open_media. So names lead nowhere; links are refused.
"""

import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common.forms import FORMS
from common.index import naming
from common.media import Part

NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # as WebDataset: up to the first dot
PICTURE = re.compile(r"(.*\.)?(jpe?g|png|webp|gif|bmp|tiff?|avif|jp2|p[gpn]m|ico)", re.IGNORECASE)
CLIP = re.compile(r"(.*\.)?(mp4|m4v|mov|mkv|webm|avi|flv|wmv|ts|mpe?g|3gp|ogv)", re.IGNORECASE)
SOURCES = ("image", "images", "video", "videos", "image_url", "video_url", "url", "path")
PADDING = 2**20  # ours: bytes behind a tar's end that are looked at; tar writes 10 kB of zeros


def members(file, whole: bool) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Each member of an open tar that is no folder, and where it ends.

    ValueError where the tar breaks; if it should be whole, also where its end is missing, which
    tarfile does not mind, or more follows it.
    """
    at = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members.clear()  # it would keep all of them
                if member.size < 0 or tar.offset <= at:  # an endless loop
                    raise tarfile.ReadError("a member of negative size")
                at = tar.offset
                if not member.isdir():
                    yield member, at
            at = tar.offset
    except (tarfile.TarError, EOFError, OverflowError, UnicodeError) as e:
        raise ValueError(f"the tar breaks behind byte {at:,}: {e}") from None
    if whole:
        file.seek(at)
        rest = file.read(PADDING)
        if len(rest) < tarfile.BLOCKSIZE:
            raise ValueError(f"the tar is cut off at byte {at + len(rest):,}: its end is missing")
        if rest.strip(b"\0"):
            raise ValueError(f"the tar breaks at byte {at:,}: neither a member nor its end")


def spans(path: Path) -> Iterator[tuple[int, int, int]]:
    """(offset, length, number from 1) of each sample; -number where an earlier one has its name.

    ValueError for a tar that is broken or cut off anywhere, or that the disk does not give.
    """
    seen = set()
    name, number, begin, end = None, 0, 0, 0
    with open(path, "rb") as file, naming(path):
        try:
            for member, after in members(file, whole=True):
                found, _ = split(member.name)
                if found != name and number:
                    yield begin, end - begin, -number if name in seen else number
                    seen.add(name)
                if found != name:
                    name, number, begin = found, number + 1, member.offset
                end = after
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
    if number:
        yield begin, end - begin, -number if name in seen else number


def split(name: str) -> tuple[str, str]:
    """A member's name -> its sample's name, and the rest: "a/17.1.jpg" -> ("a/17", "1.jpg")."""
    found = NAME.fullmatch(name)
    return found.groups() if found else (name, "")


def read_sample(
    path: Path, shard: str, offset: int, length: int, number: int
) -> tuple[bytes, dict]:
    """A sample's JSON, and {file name: place} of its media. ValueError saying what is wrong.

    shard: the tar's name in these places.
    """
    record, caption, media = None, None, {}
    with io.BufferedReader(Part(os.open(path, os.O_RDONLY), offset, length)) as part:
        found = [member for member, _ in members(part, whole=False)]
        names = Counter(member.name for member in found)
        sample = split(min(names, default=""))[0]
        if number < 0:
            raise ValueError(f"{sample}: another sample of this shard has the same name")
        for member in found:
            name, kind = member.name, split(member.name)[1]
            if names[name] > 1:
                raise ValueError(f"{name} is there {names[name]} times")
            if not member.isreg() or member.issparse():
                raise ValueError(f"{name} is no regular file: links are not followed")
            if kind.lower() == "json":
                part.seek(member.offset_data)
                record = part.read(member.size)
            elif kind.lower() == "txt":
                part.seek(member.offset_data)
                caption = part.read(member.size)
            elif PICTURE.fullmatch(kind) or CLIP.fullmatch(kind):
                base = name.rpartition("/")[2]
                begin = offset + member.offset_data
                media[base] = f"{shard}@{begin}+{member.size}/{base}"
            else:
                raise ValueError(
                    f"{name} is neither JSON, a caption (.txt), a picture nor a clip: nothing "
                    "reads it"
                )
    if caption is not None:
        record = captioned(f"{sample}.txt", caption, media, record)
    if record is None:
        raise ValueError(f"{sample}.json is missing beside {', '.join(names)}")
    return record, media


def captioned(name: str, caption: bytes, media: dict[str, str], note: bytes | None) -> bytes:
    """The JSON of a sample whose media have a caption: shown without a word, answered by it.

    note: the JSON beside it. ValueError where that has a conversation too, or one of both is none.
    """
    beside = json.loads(note) if note else {}
    if not isinstance(beside, dict) or beside.keys() & FORMS:
        raise ValueError(f"{name} stands beside a JSON that is more than a note: which counts?")
    text = caption.decode().strip()
    if not text or not media:
        raise ValueError(f"{name}: a caption without {'a picture or clip' if text else 'words'}")
    shown = [{"type": "image" if PICTURE.fullmatch(base) else "video"} for base in media]
    asked = {"role": "user", "content": shown}
    return json.dumps({"messages": [asked, {"role": "assistant", "content": text}]}).encode()


def with_places(record: dict, media: dict[str, str]) -> dict:
    """A sample's record, in any form, whose paths are places in the tar. media: see read_sample.

    ValueError where the record names some of its media, and leaves others out.
    """
    named = set()

    def placed(value, key=""):
        if isinstance(value, dict):
            return {k: placed(v, k if k in SOURCES else "") for k, v in value.items()}
        if isinstance(value, list):
            return [placed(v, key) for v in value]
        if not key or not value or not isinstance(value, str):
            return value
        base = value.rpartition("/")[2]
        named.add(base)
        return media.get(base, value)

    # at the top level a "url" is a note: where the picture once came from; so is all of "meta"
    ours = {
        k: v if k == "meta" else placed(v, k if k in SOURCES[:4] else "")
        for k, v in record.items()
    }
    if not named:
        for key, kind in (("image", PICTURE), ("video", CLIP)):
            places = [place for base, place in media.items() if kind.fullmatch(base)]
            if places:
                ours[key] = places
    elif media.keys() - named:
        raise ValueError(f"{min(media.keys() - named)} is there, but its JSON does not name it")
    return ours
