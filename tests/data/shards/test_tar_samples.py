import io
import random
import tarfile

import pytest

from declip_cli.data.shards.tar_samples import read_groups, split_name

FILES = [("000.jpg", b"\xff\xd8" * 400), ("000.txt", "ein Bär".encode()), ("001.jpg", b""), ("001.txt", b"x" * 512)]


def write(files, *, format=tarfile.USTAR_FORMAT, types=None):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), (types or {}).get(name, tarfile.REGTYPE)
            info.linkname = "elsewhere" if info.type != tarfile.REGTYPE else ""
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def groups_in(data, *, with_images=True):
    return list(read_groups(io.BytesIO(data), "a.tar", with_images=with_images))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_contents_are_where_the_spans_say(format):
    deep = [
        (f"{'folder/' * 6 * number}{number}.{end}", bytes([number]) * 300 * number)
        for number in range(6)
        for end in ("jpg", "txt")
    ]
    for files in (FILES, deep if format != tarfile.USTAR_FORMAT else deep[:6]):
        data = write(files, format=format)
        found = groups_in(data)
        assert [(f"{g.key}.{end}", part) for g in found for end, part in g.parts.items()] == files
        spans = [span for group in found for span in group.spans.values()]
        assert [data[start : start + size] for start, size in spans] == [content for _, content in files]
        without = groups_in(data, with_images=False)
        assert [group.spans for group in without] == [group.spans for group in found]
        assert all(
            not group.parts["jpg"] and group.parts["txt"] == f.parts["txt"]
            for group, f in zip(without, found, strict=True)
        )


def test_an_archive_may_not_stop_before_its_end_mark():
    whole = write(FILES)
    assert [group.problem for group in groups_in(whole)] == ["", ""]
    for end in (512 * 8, 512 * 8 + 100, 512 * 7 + 300):  # behind the last member, in its end mark, in its content
        found = groups_in(whole[:end])
        assert (found[0].key, found[0].problem) == ("000", "")
        assert found[-1].problem == "truncated tar"
    assert [group.problem for group in groups_in(b"")] == ["truncated tar"]


def test_links_devices_and_folders_are_no_files():
    files = [("000.jpg", b"p"), ("000.png", b""), ("000.webp", b""), ("000.gif", b""), ("000.txt", b"t")]
    types = {"000.png": tarfile.SYMTYPE, "000.webp": tarfile.CHRTYPE, "000.gif": tarfile.LNKTYPE}
    (group,) = groups_in(write(files, types=types))
    assert group.parts == {"jpg": b"p", "txt": b"t"}


def test_a_name_of_gigabytes_is_damage_and_is_not_read():
    data = bytearray(write([("n" * 200 + ".jpg", b"p")], format=tarfile.GNU_FORMAT))
    size = slice(124, 136)
    data[size] = b"%011o\0" % (5 << 30)
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    assert [group.problem for group in groups_in(bytes(data))] == ["damaged tar"]


def test_a_size_that_leads_backwards_is_damage():
    info = tarfile.TarInfo("0.jpg")
    info.pax_headers = {"size": "-1536"}
    data = info.tobuf(tarfile.PAX_FORMAT) + bytes(1024)
    assert [group.problem for group in groups_in(data)] == ["damaged tar"]


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
    whole = write(FILES * 3)
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 0x31, 0x80, 0xFF))
        groups = groups_in(bytes(damaged[: rng.randrange(len(damaged))]))
        assert all(group.problem or (group.image_extension and group.has_captions) for group in groups)
