"""What is trained to judge an encoder."""

import pytest

from fine_tuning import RECIPE
from maskray.config.evaluation import FinetuneEvaluation
from maskray.config.load import parse
from maskray.data.shards import Dataset
from maskray.evaluation.finetune import Finetuning
from maskray.models.encoder import load_encoder


@pytest.fixture
def what(digits, digits_encoder):
    """what(**recipe) -> Finetuning, of the untrained encoder."""

    def build(max_rows=None, encoder=None, **recipe):
        evaluation = parse(FinetuneEvaluation, {"kind": "finetune"} | RECIPE | recipe)
        encoders = {"model": encoder or load_encoder(digits_encoder), "untrained": load_encoder(digits_encoder)}
        return Finetuning(evaluation, encoders, Dataset.open(str(digits)), max_rows, seed=3, threads=1)

    return build
