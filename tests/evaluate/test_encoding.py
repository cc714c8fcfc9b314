"""Two ranks that share an evaluation end with what one process finds alone."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from declip_cli.evaluate.encoding import FeatureOptions, Part, encode_shares, take
from declip_cli.evaluate.features import image_features
from tests import set_layouts
from tests.evaluate.two_ranks import CASES, evaluated, images, run


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A folder of class folders and one with captions."""
    folder = tmp_path_factory.mktemp("sets")
    set_layouts.put_classes(folder / "photos.v1", ["cat", "dog", "bird"], 3)
    for name in "abc":
        set_layouts.put_image(folder / "pairs" / f"{name}.jpg")
    lines = [f'{{"file": "{name}.jpg", "caption": "an {name}"}}' for name in "abc"]
    set_layouts.put_lines(folder / "pairs" / "captions.jsonl", lines)
    return [str(folder / "photos.v1"), str(folder / "pairs")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, sets: list[str], quick_ranks: None) -> list[dict[str, object]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(run, (str(folder), sets), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def assert_equal(found: object, expected: object) -> None:
    """Compare results; floats may differ in their last bits, since batches are composed otherwise."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    else:
        assert found == expected


@pytest.mark.parametrize("case", CASES)
def test_each_of_two_ranks_ends_with_what_one_process_finds(ranks, case):
    expected = CASES[case]()
    for found in ranks:
        assert_equal(found[case], expected)


def test_the_cases_hold_what_they_are_meant_to(ranks):
    skipped = ranks[0]["classes"]["report"]["skipped"]
    assert [entry["count"] for entry in skipped.values()] == [3, 2]
    assert [entry["first"] for entry in skipped.values()] == ["1.jpg", "2.jpg"]
    assert ranks[0]["classes"]["report"]["num_truncated_prompts"] > 0
    assert ranks[0]["classes, all of a rank unreadable"]["keys"] == ["1.jpg"]
    assert ranks[0]["pairs"]["num_images"] == 6
    assert ranks[0]["none readable"].startswith("none of the 5 images can be read: missing file (2, first 0.jpg)")


def test_each_rank_encodes_its_share_only(ranks):
    assert [found["encoded"] for found in ranks] == [(3, 2), (2, 1)]


def test_progress_is_told_on_rank_0_for_all(ranks):
    assert ranks[0]["told of images"] == [(4, 7), (7, 7)]
    assert ranks[0]["told of texts"] == [(5, 5)]
    assert ranks[1]["told of images"] == ranks[1]["told of texts"] == []


def test_nothing_is_split_unless_asked_for(ranks, tiny_model):
    expected = image_features(tiny_model, images(3), options=FeatureOptions(precision="fp32", batch_size=2))
    torch.testing.assert_close(ranks[1]["alone"], expected.features)


def test_ranks_that_share_leave_the_cache_alone(ranks):
    assert [found["cache"] for found in ranks] == [[], []]


def test_both_ranks_get_the_scores_of_every_name(ranks, sets: list[str], tmp_path: Path):
    expected = evaluated(sets)
    assert list(expected) == sets
    for found in ranks:
        assert_equal(found["evaluated"], expected)


def test_a_process_alone_encodes_everything_as_it_is_told():
    options = FeatureOptions(split_over_ranks=True)
    seen = []

    def encode(own: range, given: FeatureOptions) -> Part:
        seen.append((own, given))
        return Part(torch.ones(len(own), 2), torch.tensor(own))

    part = encode_shares(4, encode, options)
    assert seen == [(range(4), options)]
    assert part.indices.tolist() == [0, 1, 2, 3]


def test_a_share_takes_every_nth_item():
    assert take("abcdefg", range(1, 7, 3)) == "be"
