"""What MLflow runs when a registered encoder is loaded: images in, features out. Logged as a file, never pickled."""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.pyfunc import PythonModel

from maskray.publish.export import Encoder, load_encoder

BATCH = 256
"""Images at once: what memory a call takes does not depend on how many it gets."""


class EncoderPredictor(PythonModel):
    """`predict(images)` of uint8 (B, H, W, C), of any height and width, gives float32 features (B, D).

    `mlflow.pyfunc.load_model(uri, model_config={"device": "cuda"})` computes on another device than the CPU.
    """

    encoder: Encoder

    def load_context(self, context: Any) -> None:
        """Build the encoder from its folder."""
        device = (context.model_config or {}).get("device", "cpu")
        self.encoder = load_encoder(context.artifacts["encoder"]).to(device)

    def predict(
        self,
        context: Any,  # noqa: ARG002  (MLflow gives it)
        model_input: np.ndarray,  # MLflow knows this very hint, and warns at any other
        params: dict[str, Any] | None = None,  # noqa: ARG002  (likewise)
    ) -> Any:
        """Features, in the order of the images."""
        device = next(self.encoder.parameters()).device
        bytes_BCHW = torch.from_numpy(np.ascontiguousarray(model_input)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            parts = [self.encoder(some.to(device)).cpu() for some in bytes_BCHW.split(BATCH)]
        return torch.cat(parts).numpy() if parts else np.empty((0, self.encoder.width), np.float32)


mlflow.models.set_model(EncoderPredictor())
