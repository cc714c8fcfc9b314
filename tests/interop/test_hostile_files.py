"""Files made to harm are refused with a message; nothing in them runs, and they take no more memory than they hold."""

import io
import os
import pickle
import random
import resource
import struct
import tracemalloc
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from declip_cli.errors import ModelError
from declip_cli.interop.inspect import inspect_model
from declip_cli.interop.read import load_model
from tests.interop import peers


@pytest.fixture(scope="module")
def weights():
    return peers.open_clip_model(peers.open_clip_config()).state_dict()


def refused(path, match):
    """Both doors refuse the file; neither says how to open it unsafely."""
    for door in (load_model, inspect_model):
        with pytest.raises(ModelError, match=match) as caught:
            door(path)
        assert caught.value.remedy
        assert "weights_only" not in caught.value.message + caught.value.remedy


class Runs:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def rewritten(source, target, change, *, compression=zipfile.ZIP_STORED):
    """Copy an archive, its entries changed: name and content → name and content, or nothing."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            changed = change(entry.filename, old.read(entry))
            if changed is not None:
                new.writestr(*changed)
    return target


@pytest.mark.parametrize("name", ["data.pkl of a state dict", "TorchScript"])
def test_a_pickle_that_runs_a_command_runs_nothing(tmp_path, weights, name):
    torch.save({"state_dict": weights}, tmp_path / "good.pt")
    attack = pickle.dumps(Runs(tmp_path / "ran"), protocol=2)

    def change(entry, content):
        return (entry, attack if entry.endswith("data.pkl") else content)

    path = rewritten(tmp_path / "good.pt", tmp_path / "bad.pt", change)
    if name == "TorchScript":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("good/constants.pkl", attack)
    refused(path, "holds Python objects besides tensors; it is not opened")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "function", ["builtins.eval", "os.system", "torch.load", "torch._utils.__builtins__", "numpy.x.y"]
)
def test_functions_are_refused_or_inert_by_whatever_name(tmp_path, function):
    module, _, name = function.rpartition(".")
    code = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X\x0a\x00\x00\x00__import__\x85R."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", code)
    refused(tmp_path / "x.pt", "holds Python objects|not parameters by name")


@pytest.mark.parametrize("name", ["/etc/data.pkl", "../../x/data.pkl", "x/../../data.pkl", "C:/x/data.pkl"])
def test_paths_out_of_the_archive_are_refused(tmp_path, weights, name):
    torch.save(weights, tmp_path / "good.pt")
    path = rewritten(tmp_path / "good.pt", tmp_path / "bad.pt", lambda entry, content: (entry, content))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"x")
    refused(path, "a path that leads out of the archive")


@pytest.mark.parametrize("length", [8 * 2**30, 2**63, 2**64 - 1])
def test_a_header_of_eight_gigabytes_is_not_read(tmp_path, weights, length):
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + content[8:])
    refused(tmp_path / "x.safetensors", f"its header would take {length:,} of the")
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(9 * 2**30)  # as long as it claims, without a byte on the disk
    refused(tmp_path / "x.safetensors", "its header would take")


def test_a_zip_bomb_is_not_unpacked(tmp_path, weights):
    torch.save(weights, tmp_path / "good.pt")

    def blank(entry, content):
        return (entry, bytes(len(content)) if "/data/" in entry else content)

    path = rewritten(tmp_path / "good.pt", tmp_path / "bad.pt", blank, compression=zipfile.ZIP_DEFLATED)
    refused(path, "compressed entries")


def test_a_zip_bomb_among_the_numbers_is_not_unpacked_whatever_its_name(tmp_path, weights):
    torch.save(weights, tmp_path / "good.pt")

    def hidden(entry, content):
        return (entry.replace("/data/0", "/data/code/0"), content)

    path = rewritten(tmp_path / "good.pt", tmp_path / "bad.pt", hidden, compression=zipfile.ZIP_DEFLATED)
    refused(path, "compressed entries")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "is not a file")


@pytest.mark.parametrize("name", ["x.pt", "config.json", "open_clip_config.json", "declip.json"])
def test_long_files_of_nothing_are_not_taken_into_memory(tmp_path, name):
    for weights in ("model.safetensors", "open_clip_model.safetensors"):
        (tmp_path / weights).write_bytes(b"x")
    with (tmp_path / name).open("wb") as file:
        file.write(b"c" if name == "x.pt" else b'{"a": "')
        file.truncate(2**33)
    tracemalloc.start()
    refused(tmp_path / name if name == "x.pt" else tmp_path, "not a model that declip can read|is longer than")
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()


def test_values_that_are_named_again_and_again_do_not_multiply(tmp_path):
    lists = modules = b""
    for number in range(38):
        before, after = b"h" + bytes([number]), b"q" + bytes([number + 1])
        lists += b"0](" + before + before + b"e" + after
        pair = b"}(X\x01\x00\x00\x00a" + before + b"X\x01\x00\x00\x00b" + before + b"ub"
        modules += b"0c__torch__\nA\n)\x81" + pair + after
    for name, content in {
        "lists": b"\x80\x02K\x01q\x00" + lists + b"0}X\x05\x00\x00\x00epochh\x26s.",
        "modules": b"\x80\x02}q\x00" + modules + b".",
    }.items():
        with zipfile.ZipFile(tmp_path / f"{name}.pt", "w") as archive:
            archive.writestr("x/data.pkl", content)
            if name == "modules":
                archive.writestr("x/constants.pkl", b"")
    refused(tmp_path / "lists.pt", "no CLIP text tower")
    refused(tmp_path / "modules.pt", "nested without end")


def test_entries_that_overlap_are_not_read_over_and_over(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/data/0", bytes(10**6))
        first = archive.getinfo("x/data/0")
        for number in range(1, 1000):
            copy = zipfile.ZipInfo(f"x/data/{number}")
            copy.file_size, copy.compress_size, copy.CRC = first.file_size, first.compress_size, first.CRC
            copy.header_offset = first.header_offset
            archive.filelist.append(copy)
            archive.NameToInfo[copy.filename] = copy
    refused(tmp_path / "x.pt", "entries that are longer than the file")


PICKLES = {
    "a byte array of 2^40": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "a text of 2^40": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b".",
    "a memo of 2^31": b"\x80\x02]r\xff\xff\xff\x7f.",
    "an extension": b"\x80\x02\x82\x01.",
    "a stack underflow": b"\x80\x02R.",
    "a persistent number": b"\x80\x02K\x01Q.",
    "an endless list in itself": b"\x80\x02]q\x00h\x00a.",
    "nothing": b"",
}


@pytest.mark.parametrize("what", PICKLES)
def test_pickles_that_take_memory_or_make_no_sense_are_refused_at_once(tmp_path, what):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", PICKLES[what])
    tracemalloc.start()
    refused(tmp_path / "x.pt", "not a model that declip can read|not parameters by name")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def tensor_pickle(size, stride, numel=4):
    """Return the data.pkl of one tensor with a size of our choice."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if value is STORAGE else None

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (STORAGE, 0, size, stride, False, {})

    STORAGE = object()
    file = io.BytesIO()
    Pickler(file, protocol=2).dump({"token_embedding.weight": Tensor()})
    return file.getvalue()


@pytest.mark.parametrize("around", ["torch\nSize", "collections\nOrderedDict", "a change of the tensor"])
def test_a_tensor_without_numbers_is_not_taken_apart_or_made_larger(tmp_path, around):
    content = tensor_pickle((2**40, 0), (1, 1), numel=0)
    start, end = content.index(b"ctorch._utils"), content.rindex(b"R") + 1
    tensor = content[start:end]
    call = b"c" + around.encode() + b"\n" + tensor + b"\x85R"
    if around not in ("torch\nSize", "collections\nOrderedDict"):
        call = tensor + b"(h\x00K\x00\x8a\x05" + (2**34).to_bytes(5, "little") + b"\x85K\x01\x85tb"
        call = tensor + b"q\xff0h\xff" + call.removeprefix(tensor).replace(b"h\x00", b"h\xff")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}X\x01\x00\x00\x00w" + call + b"s.")
        archive.writestr("x/data/0", b"")
    refused(tmp_path / "x.pt", "a size that is not a tuple|changed after it was made")


@pytest.mark.parametrize(
    ("size", "stride", "numel"),
    [((2**40,), (0,), 4), ((2, 3), (3, 1), 4), ((2**62, 2**62), (0, 0), 4), ((-1,), (1,), 4), ((4,), (1,), 2**40)],
    ids=["repeated", "beyond the end", "overflow", "negative", "storage beyond the file"],
)
def test_tensors_that_are_larger_than_their_storage_are_refused(tmp_path, size, stride, numel):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", tensor_pickle(size, stride, numel))
        archive.writestr("x/data/0", bytes(16))
    refused(tmp_path / "x.pt", "not a model that declip can read")


def test_many_tensors_made_of_one_storage_are_refused(tmp_path):
    storage = torch.zeros(1000)
    torch.save({f"visual.{number}": storage for number in range(1000)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "its tensors are larger than the file")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "torchscript"])
def test_a_file_that_is_cut_off_anywhere_is_an_error(tmp_path, weights, form):
    path = tmp_path / f"x.{form}"
    if form == "safetensors":
        save_file({k: v.contiguous() for k, v in weights.items()}, path)
    elif form == "torchscript":
        torch.save({"state_dict": weights}, tmp_path / "good")
        rewritten(tmp_path / "good", path, lambda entry, content: (entry, content))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("good/constants.pkl", b"\x80\x02).")
    else:
        torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=form == "zip")
    whole, rng = path.read_bytes(), random.Random(0)
    ends = [0, 1, 2, 7, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 1]
    for end in [*ends, *(rng.randrange(len(whole)) for _ in range(5))]:
        path.write_bytes(whole[:end])
        with pytest.raises(ModelError):
            load_model(path)


def test_bytes_that_flip_are_an_error_or_change_numbers_only(tmp_path, weights):
    small = {name: value for name, value in weights.items() if name != "token_embedding.weight"}
    torch.save(small, tmp_path / "x.pt")
    whole, rng = bytearray((tmp_path / "x.pt").read_bytes()), random.Random(1)
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 2**20  # KiB: a gigabyte more
    for _ in range(60):
        place = rng.randrange(len(whole))
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        (tmp_path / "x.pt").write_bytes(changed)
        with pytest.raises(ModelError):  # it has no words, whatever else is wrong with it
            load_model(tmp_path / "x.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < limit


def test_json_that_is_hostile_is_an_error(tmp_path, weights):
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "open_clip_model.safetensors")
    for content in (
        b"[" * 10**5,
        b"[]",
        b'{"model_cfg": 3}',
        b"{",
        b"\xff",
        b'{"model_cfg": {}, "preprocess_cfg": []}',
    ):
        (tmp_path / "open_clip_config.json").write_bytes(content)
        refused(tmp_path, "damaged")
    (tmp_path / "open_clip_config.json").write_bytes(b'{"model_cfg": {"vision_cfg": {"width": "a"}, "text_cfg": {}}}')
    refused(tmp_path, "model_cfg is damaged")
