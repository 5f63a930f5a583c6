"""Images of five bands all the way: files, shards, a run with its probe and figures, a registered encoder, features."""

import mlflow.pyfunc
import numpy as np
import pytest
import tifffile

from maskray import bare
from maskray.config.schema import IngestConfig
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.data.shards import Dataset
from maskray.errors import DataError
from maskray.preparing import prepare

BANDS = 5


@pytest.fixture
def spectral(tmp_path):
    """Two classes that differ in one band; sixteen bits, and larger than they are kept."""
    rng = np.random.default_rng(0)
    for number in range(120):
        label = number % 2
        image_HWC = rng.integers(0, 30_000, (14, 16, BANDS), dtype=np.uint16)
        image_HWC[..., 3] += 30_000 * label
        path = tmp_path / "images" / ("dry", "wet")[label] / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, image_HWC, photometric="minisblack", planarconfig="contig")
    config = IngestConfig(
        source=str(tmp_path / "images"), destination=str(tmp_path / "shards"), resize_short=8, group_rows=16,
        held_out_fraction=0.3,
    )  # fmt: skip
    return ingest(config, thread_mapper(2))


@pytest.mark.filterwarnings("ignore::Warning:mlflow")
def test_five_bands_from_files_to_features(spectral, tiny, tmp_path, monkeypatch):
    assert spectral.channels == BANDS
    assert spectral.mean[3] - spectral.mean[0] == pytest.approx(15_000 / 65_535, rel=0.1)
    group = Dataset.open(str(tmp_path / "shards")).read_group(0)
    assert all(data.startswith(b"\x93NUMPY") for data in group.images)

    data = {"path": str(tmp_path / "shards"), "channels": BANDS, "normalize": "dataset"}
    summary = bare.run(prepare(tiny(data=data, optim={"global_batch": 32})))
    assert summary.last_loss < summary.first_loss
    assert summary.judgement.pixels.all_labels > 0.95, "raw pixels tell the classes by the fourth band"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", summary.tracking_uri)
    encoder = mlflow.pyfunc.load_model(f"models:/{summary.model_name}/{summary.model_version}")
    images = np.random.default_rng(1).integers(0, 256, (3, 10, 12, BANDS), dtype=np.uint8)
    assert encoder.predict(images).shape == (3, 16)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_another_number_of_channels_is_refused_before_anything_starts(spectral, tiny, tmp_path, channels):
    data = {"path": str(tmp_path / "shards"), "channels": channels}
    with pytest.raises(DataError, match=rf"data\.channels: .*Found: {channels}\. Allowed: 5"):
        prepare(tiny(data=data, optim={"global_batch": 32}))
