"""Miniatures of the layouts in which evaluation sets are distributed; each returns (path or id, label) pairs."""

import csv
import io
import json
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import cv2
import h5py
import numpy as np
import scipy.io

from declip_cli.data.benchmarks.imagenet import wordnet_ids
from declip_cli.data.benchmarks.known import asset_lists


def put_image(path: Path) -> Path:
    """Write a small image; its suffix decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())
    return path


def put_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def put_classes(root: Path, names: Sequence[str], per_class: int, suffix: str = ".jpg") -> None:
    for name in names:
        for number in range(per_class):
            put_image(root / name / f"{name.replace('/', '_')}_{number}{suffix}")


def pets(root: Path) -> list[tuple[str, int]]:
    base = root / "oxford-iiit-pet"
    rows = [("Abyssinian_100", 1), ("yorkshire_terrier_9", 37), ("american_bulldog_2", 2)]
    for split in ("trainval", "test"):
        put_lines(base / "annotations" / f"{split}.txt", [f"{name} {label} 1 1" for name, label in rows])
        rows = rows[:2]
    for name in ("Abyssinian_100", "yorkshire_terrier_9", "american_bulldog_2"):
        put_image(base / "images" / f"{name}.jpg")
    return [("Abyssinian_100.jpg", 0), ("yorkshire_terrier_9.jpg", 36)]


def food101(root: Path) -> list[tuple[str, int]]:
    base = root / "food-101"
    classes = sorted(name.replace(" ", "_") for name in asset_lists("class_names.json")["food101"])
    table = {name: ([f"{name}/{n}" for n in (7, 3)] if n in (0, 16, 17, 100) else []) for n, name in enumerate(classes)}
    for split in ("train", "test"):
        put_lines(base / "meta" / f"{split}.json", [json.dumps(table)])
    for files in table.values():
        for file in files:
            put_image(base / "images" / f"{file}.jpg")
    return [(f"{file}.jpg", label) for label, files in enumerate(table.values()) for file in files]


def sun397(root: Path) -> list[tuple[str, int]]:
    base = root / "SUN397"
    classes = [f"/{chr(97 + n % 26)}/place_{n:03d}" for n in range(396)] + ["/a/abbey/indoor"]
    put_lines(base / "ClassName.txt", classes)
    chosen = [f"{classes[396]}/sun_aaa.jpg", f"{classes[1]}/sun_bbb.jpg"]
    put_lines(base / "Partitions" / "Testing_01.txt", chosen)
    put_lines(base / "Partitions" / "Training_01.txt", chosen[:1])
    for file in [*chosen, f"{classes[1]}/sun_not_in_the_split.jpg"]:
        put_image(base / file.lstrip("/"))
    return [(chosen[0].lstrip("/"), 396), (chosen[1].lstrip("/"), 1)]


def flowers102(root: Path) -> list[tuple[str, int]]:
    base = root / "flowers-102"
    base.mkdir(parents=True)
    labels = np.array([[77, 1, 102, 5]], dtype=np.uint8)
    scipy.io.savemat(base / "imagelabels.mat", {"labels": labels})
    ids = {"trnid": np.array([[1, 2]]), "valid": np.array([[2, 1]]), "tstid": np.array([[4, 3]], dtype=np.uint16)}
    scipy.io.savemat(base / "setid.mat", ids, do_compression=True)
    for number in range(1, 5):
        put_image(base / "jpg" / f"image_{number:05d}.jpg")
    return [("image_00004.jpg", 4), ("image_00003.jpg", 101)]


def cars(root: Path) -> list[tuple[str, int]]:
    base = root / "stanford_cars"
    names = np.array([f"Make Model-{n} Coupé 2012" for n in range(196)], dtype=object)[None]
    (base / "devkit").mkdir(parents=True)
    scipy.io.savemat(base / "devkit" / "cars_meta.mat", {"class_names": names}, do_compression=True)
    fields = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    rows = np.zeros((1, 3), dtype=fields)
    for number, label in enumerate((196, 1, 20)):
        rows[0, number] = (np.uint8(3), np.uint8(label), f"{number:05d}.jpg")
    scipy.io.savemat(base / "cars_test_annos_withlabels.mat", {"annotations": rows})
    scipy.io.savemat(base / "devkit" / "cars_train_annos.mat", {"annotations": rows[:, :2]})
    for split in ("train", "test"):
        for number in range(3):
            put_image(base / f"cars_{split}" / f"{number:05d}.jpg")
    return [("00000.jpg", 195), ("00001.jpg", 0), ("00002.jpg", 19)]


def caltech101(root: Path) -> list[tuple[str, int]]:
    folder = root / "caltech101" / "101_ObjectCategories"
    names = ["BACKGROUND_Google", "Faces", *(f"a{n:03d}" for n in range(100))]
    put_classes(folder, names[:3], 32)
    for name in names[3:]:
        (folder / name).mkdir()
    return []


def aircraft(root: Path) -> list[tuple[str, int]]:
    base = root / "fgvc-aircraft-2013b" / "data"
    variants = sorted(asset_lists("class_names.json")["aircraft"])
    put_lines(base / "variants.txt", variants)
    rows = [f"0034309 {variants[99]}", f"1034309 {variants[0]}"]
    for split in ("train", "val", "trainval", "test"):
        put_lines(base / f"images_variant_{split}.txt", rows)
    for row in rows:
        put_image(base / "images" / f"{row.split()[0]}.jpg")
    return [("0034309.jpg", 99), ("1034309.jpg", 0)]


def dtd(root: Path) -> list[tuple[str, int]]:
    base = root / "dtd" / "dtd"
    for name in asset_lists("class_names.json")["dtd"]:
        (base / "images" / name).mkdir(parents=True)
    classes = asset_lists("class_names.json")["dtd"]
    files = ["zigzagged/zigzagged_0001.jpg", *(f"{name}/{name}_0002.jpg" for name in classes)]
    for split in ("train", "val", "test"):
        put_lines(base / "labels" / f"{split}1.txt", files)
    for file in files:
        put_image(base / "images" / file)
    return [(files[0], 46), *((file, label) for label, file in enumerate(files[1:]))]


def gtsrb(root: Path) -> list[tuple[str, int]]:
    base = root / "gtsrb"
    rows = [("00000.ppm", 16), ("00001.ppm", 1)]
    for name, _ in rows:
        put_image(base / "GTSRB" / "Final_Test" / "Images" / name)
    with (base / "GT-final_test.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["Filename", "Width", "Height", "ClassId"])
        writer.writerows([name, 9, 8, label] for name, label in rows)
    put_classes(base / "GTSRB" / "Training", [f"{n:05d}" for n in range(43)], 1, ".ppm")
    return [("00000.ppm", 16), ("00001.ppm", 1)]


def country211(root: Path) -> list[tuple[str, int]]:
    codes = [f"{chr(65 + n // 26)}{chr(65 + n % 26)}" for n in range(211)]
    for split in ("train", "valid", "test"):
        for code in codes:
            (root / "country211" / split / code).mkdir(parents=True)
            put_image(root / "country211" / split / code / "1.jpg")
    return [(f"{code}/1.jpg", label) for label, code in enumerate(codes)]


def sst2(root: Path) -> list[tuple[str, int]]:
    for split in ("train", "valid", "test"):
        put_classes(root / "rendered-sst2" / split, ["positive", "negative"], 1, ".png")
    return [("negative/negative_0.png", 0), ("positive/positive_0.png", 1)]


def eurosat(root: Path) -> list[tuple[str, int]]:
    names = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
    for name in names.split():
        put_classes(root / "eurosat" / "2750", [name], 2)
    return []


def resisc45(root: Path) -> list[tuple[str, int]]:
    names = [name.replace(" ", "_") for name in asset_lists("class_names.json")["resisc45"]]
    put_classes(root / "NWPU-RESISC45", names[:2], 150)
    for name in names[2:]:
        (root / "NWPU-RESISC45" / name).mkdir()
    return []


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2 did, which CIFAR was packed with."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, data: bytes) -> None:
        short = len(data) < 256
        self.write((b"U" + bytes([len(data)]) if short else b"T" + struct.pack("<i", len(data))) + data)
        self.memoize(data)

    dispatch[bytes] = save_bytes


def cifar(folder: Path, files: Sequence[str], label_key: bytes, num_classes: int) -> None:
    folder.mkdir(parents=True)
    for seed, name in enumerate(files):
        generator = np.random.default_rng(seed)
        table = {
            b"data": generator.integers(0, 256, (3, 3072), dtype=np.uint8),
            label_key: [seed % num_classes, num_classes - 1, 0],
            b"filenames": [b"a.png", b"b.png", b"c.png"],
        }
        packed = io.BytesIO()
        Python2Pickler(packed, protocol=2).dump(table)
        (folder / name).write_bytes(packed.getvalue().replace(b"numpy._core", b"numpy.core"))


def cifar10(root: Path) -> list[tuple[str, int]]:
    files = ["test_batch", *(f"data_batch_{n}" for n in range(1, 6))]
    cifar(root / "cifar-10-batches-py", files, b"labels", 10)
    return [("test/0", 0), ("test/1", 9), ("test/2", 0)]


def cifar100(root: Path) -> list[tuple[str, int]]:
    cifar(root / "cifar-100-python", ["test", "train"], b"fine_labels", 100)
    return [("test/0", 0), ("test/1", 99), ("test/2", 0)]


def stl10(root: Path) -> list[tuple[str, int]]:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        np.random.default_rng(1).integers(0, 256, 2 * 3 * 96 * 96, dtype=np.uint8).tofile(folder / f"{split}_X.bin")
        np.array([10, 1], dtype=np.uint8).tofile(folder / f"{split}_y.bin")
    return [("test/0", 9), ("test/1", 0)]


def mnist(root: Path) -> list[tuple[str, int]]:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(2).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        header = struct.pack(">IIII", 0x803, 3, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = struct.pack(">II", 0x801, 3)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes([7, 0, 9]))
    return [("test/0", 7), ("test/1", 0), ("test/2", 9)]


def imagenet(root: Path) -> list[tuple[str, int]]:
    ids = wordnet_ids()
    for split in ("train", "val"):
        for name in ids:
            (root / "imagenet" / split / name).mkdir(parents=True)
        for label in (999, 0):
            put_image(root / "imagenet" / split / ids[label] / f"{ids[label]}_1.JPEG")
    return [(f"{ids[0]}_1.JPEG", 0), (f"{ids[999]}_1.JPEG", 999)]


def imagenetv2(root: Path) -> list[tuple[str, int]]:
    folder = root / "imagenetv2-matched-frequency-format-val"
    for label in range(1000):
        (folder / str(label)).mkdir(parents=True)
    put_image(folder / "10" / "b.jpeg")
    put_image(folder / "2" / "a.jpeg")
    return [("2/a.jpeg", 2), ("10/b.jpeg", 10)]


def sketch(root: Path) -> list[tuple[str, int]]:
    ids = wordnet_ids()
    for name in ids:
        (root / "sketch" / name).mkdir(parents=True)
    put_image(root / "sketch" / ids[5] / "sketch_1.JPEG")
    return [("sketch_1.JPEG", 5)]


def objectnet(root: Path) -> list[tuple[str, int]]:
    base = root / "objectnet-1.0"
    folders = {f"object_{n:03d}": f"Object {n:03d}" for n in range(313)}
    shared = {label: "one name; another" for number, label in enumerate(folders.values()) if number >= 200}
    put_lines(base / "mappings" / "folder_to_objectnet_label.json", [json.dumps(folders)])
    put_lines(base / "mappings" / "objectnet_to_imagenet_1k.json", [json.dumps(shared)])
    for folder in folders:
        (base / "images" / folder).mkdir(parents=True)
    put_image(base / "images" / "object_001" / "not_in_imagenet.png")
    put_image(base / "images" / "object_201" / "x.png")
    return [("object_201/x.png", 1)]


def pcam(root: Path) -> list[tuple[str, int]]:
    folder = root / "pcam"
    folder.mkdir(parents=True)
    for seed, split in enumerate(("train", "valid", "test")):
        pixels = np.random.default_rng(seed).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
        labels = np.array([1, 0], dtype=np.uint8).reshape(2, 1, 1, 1)
        for kind, data in (("x", pixels), ("y", labels)):
            with h5py.File(folder / f"camelyonpatch_level_2_split_{split}_{kind}.h5", "w") as file:
                file[kind] = data
    return [("test/0", 1), ("test/1", 0)]
