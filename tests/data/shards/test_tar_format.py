import hashlib
import io
import random
import tarfile

import pytest

from declip_cli.data.shards.tar_format import TarWriter, plain_members, read_members
from declip_cli.data.shards.tar_samples import group_of, read_groups, split_name
from declip_cli.errors import DataError

FILES = [("000.jpg", b"\xff\xd8" * 400), ("000.txt", "ein Bär".encode()), ("001.jpg", b""), ("001.txt", b"x" * 512)]


def write(files):
    file = io.BytesIO()
    writer = TarWriter(file)
    for name, data in files:
        writer.add(name, data)
    return file.getvalue(), writer.finish(), file.getvalue()


def test_the_standard_library_reads_what_is_written():
    _, digest, data = write(FILES)
    assert digest == hashlib.sha256(data).hexdigest()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(member.name, tar.extractfile(member).read()) for member in tar] == FILES
        assert {(m.mode, m.mtime, m.uid, m.uname) for m in tar.getmembers()} == {(0o644, 0, 0, "")}


def test_a_writer_goes_on_behind_what_is_there():
    _, digest, whole = write(FILES)
    file = io.BytesIO()
    first = TarWriter(file)
    for name, data in FILES[:2]:
        first.add(name, data)
    second = TarWriter(file)
    assert second.num_bytes == first.num_bytes
    for name, data in FILES[2:]:
        second.add(name, data)
    assert second.finish() == digest
    assert file.getvalue() == whole


def test_a_name_that_does_not_fit_is_a_programming_error():
    with pytest.raises(ValueError, match="more than 100 bytes"):
        TarWriter(io.BytesIO()).add("é" * 51, b"")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_are_those_of_the_standard_library(format):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for number in range(6):
            info = tarfile.TarInfo(f"{'folder/' * (6 * number)}{number}.jpg")
            info.size = 300 * number
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
        tar.addfile(tarfile.TarInfo("é.txt"))
    file.seek(0)
    found = list(read_members(file, "a.tar", wants=lambda member: True))
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        expected = [(m.name, m.offset, m.offset_data, m.size) for m in tar.getmembers()]
        contents = [tar.extractfile(m).read() for m in tar.getmembers()]
    assert [(m.name, m.start, m.data_start, m.num_bytes) for m, _ in found] == expected
    assert [data for _, data in found] == contents


def test_members_in_memory_are_cut_out_alike():
    data = write(FILES)[0]
    assert plain_members(data) == FILES
    assert plain_members(data[:-1]) == []
    assert plain_members(data + b"\0" * 512) == []


def test_an_archive_may_not_stop_before_its_end_mark():
    data, _, whole = write(FILES)
    with pytest.raises(DataError, match="a.tar is a truncated tar at byte") as caught:
        list(read_members(io.BytesIO(data), "a.tar", wants=lambda member: False))
    assert caught.value.cause == "truncated tar"
    assert len(list(read_members(io.BytesIO(whole), "a.tar", wants=lambda member: False))) == 4
    piece = io.BytesIO(data)
    assert len(list(read_members(piece, "a.tar", wants=lambda member: False, has_end_mark=False))) == 4


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("0001.jpg", "0001", "jpg"),
        ("./a/b/0001.seg.PNG", "a/b/0001", "seg.png"),
        ("a.b/0001", "a.b/0001", ""),
    ],
)
def test_keys_end_at_the_first_dot_of_the_last_part(name, key, extension):
    assert split_name(name) == (key, extension)


def test_damage_anywhere_is_reported_and_never_a_crash():
    whole = write(FILES * 3)[2]
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 0x31, 0x80, 0xFF))
        groups = list(read_groups(io.BytesIO(damaged[: rng.randrange(len(damaged))]), "a.tar", with_contents=True))
        assert all(group.problem or (group.picture_extension and group.has_caption) for group in groups)
        group_of(bytes(damaged), "a.tar")
