"""What a sweep has on record: it comes back as it was, and what is none is named."""

import json

import pytest

from maskray.errors import CheckpointError
from maskray.sweeps.record import Result
from sweep_results import ended, trial

RESULT = ended(trial({"mask.ratio": 0.5, "data.crop": {"kind": "whole"}}, 3), value=0.5, metrics={"probe/knn": 0.5})


def test_a_result_comes_back_as_it_was():
    assert Result.load(RESULT.dump(), "") == RESULT


def test_a_result_of_an_older_version_is_named_with_what_to_do():
    raw = json.loads(RESULT.dump()) | {"schema_version": 1}
    del raw["trial"]["flops_per_image"]
    with pytest.raises(CheckpointError) as caught:
        Result.load(json.dumps(raw).encode(), "s3://sweeps/x/result.json")
    assert str(caught.value) == (
        "a trial's result cannot be read. Found: s3://sweeps/x/result.json (ValueError('schema version 1, where this "
        "version of maskray reads 2')). What to do: delete the file, and the trial is run again by --resume; or begin "
        "another sweep with --new."
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trial": {}}, "missing 8 required"),
        ({"trial": None}, "NoneType"),
        ({"others": 1}, "unexpected keyword argument 'others'"),
    ],
)
def test_a_result_that_is_none_is_named(change, words):
    raw = json.loads(RESULT.dump()) | change
    with pytest.raises(CheckpointError, match=rf"cannot be read\. Found: there \(.*{words}"):
        Result.load(json.dumps(raw).encode(), "there")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"{}", b"\xff"])
def test_a_file_that_is_no_result_is_named(content):
    with pytest.raises(CheckpointError, match=r"cannot be read\. Found: there \(.+\)\."):
        Result.load(content, "there")
