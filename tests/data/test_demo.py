import pytest

from declip_cli.data.demo import demo_records, demo_samples
from declip_cli.data.stores import open_samples
from declip_cli.errors import DataError


def test_the_test_vendor_is_never_trained_on():
    trained = {record.vendor for record in demo_records("train")}
    assert trained == {"google", "emojione2", "openclipart"}
    assert {record.vendor for record in demo_records("test")} == {"twitter"}


def test_parts_have_the_published_sizes():
    assert [len(demo_records(part)) for part in ("", "train", "fit", "validation", "test")] == [
        3034,
        3034,
        1817,
        1217,
        1217,
    ]


def test_fit_and_validation_divide_the_training_part():
    keys = [{r.key for r in demo_records(part)} for part in ("fit", "validation", "train")]
    assert not keys[0] & keys[1]
    assert keys[0] | keys[1] == keys[2]


def test_the_test_part_has_one_picture_per_name():
    names = {record.name for record in demo_records("test")}
    assert len(names) == 1217
    assert names == {record.name for record in demo_records("validation")}


def test_the_store_reads_pairs_by_number():
    store = open_samples(["demo"], part="test")
    sample = store.read(5)
    record = demo_records("test")[5]
    assert sample.key == record.key
    assert sample.image == record.path.read_bytes()
    assert sample.captions == (record.caption,)
    with pytest.raises(IndexError):
        store.read(1217)


def test_fingerprints_tell_parts_apart_and_stay_the_same():
    assert demo_samples("test").fingerprint == demo_samples("test").fingerprint
    assert demo_samples("test").fingerprint != demo_samples("fit").fingerprint


def test_unknown_part_and_mixed_data_are_errors():
    with pytest.raises(DataError, match="no part 'dev'"):
        demo_samples("dev")
    with pytest.raises(DataError, match="cannot be joined"):
        open_samples(["demo", "shards"])
    with pytest.raises(DataError, match="no data given"):
        open_samples([])
