"""A model as it is trained."""

import numpy as np
import pytest
import torch

from maskray import masking
from maskray.evaluation.reconstruction import reconstruct
from maskray.models.build import initial_model
from maskray.models.normalize import Normalize
from maskray.objective import Objective
from maskray.pretrain import placed

IMAGES = 8


@pytest.mark.parametrize("ratios", [0.75, [0.25, 0.5, 0.75]])
def test_a_compiled_model_has_a_graph_of_static_shapes_for_each_ratio_whatever_was_drawn_before(tiny, ratios):
    torch._dynamo.reset()
    config = tiny(mask={"ratio": ratios}, training={"compile": True})
    graphs = []

    def backend(graph, inputs):
        graphs.append([each for each in inputs if not torch.is_tensor(each)])
        return graph.forward

    model = placed(initial_model(config), torch.device("cpu"), config.training, backend)
    pixels = torch.zeros(3, config.data.channels, *config.data.image_size, dtype=torch.uint8)
    normalize, objective = (
        Normalize.from_kind("symmetric", config.data.channels),
        Objective(config.objective, config.cell),
    )
    reconstruct(model, normalize, objective, pixels.numpy(), config.mask, seed=0)
    assert not graphs
    counts = masking.visible_counts(config.mask, config.grid)
    images = torch.randn(IMAGES, config.data.channels, *config.data.image_size)
    for num_visible in counts * 2:
        key = {"seed": 0, "pass_": 0, "rows": np.arange(IMAGES), "view": 0}
        visible = torch.from_numpy(masking.draw(config.mask, config.grid, num_visible, **key))
        num_target = visible[0].numel() - num_visible
        model(images, visible, num_visible, ~visible, num_target, torch.ones(IMAGES)).sum().backward()
    assert graphs == [[]] * len(counts)
