"""Images a second of a training step, against the MAE of other libraries: python tests/benchmarks/step.py

All in one process, on the same shapes and in the same precision, in turn:

* maskray: `TrainStep` as a run takes it, from uint8 images and masks on the host: normalised, per-patch targets, loss
  and gradient norm summed, updates skipped where they are not finite, fused AdamW; with --compile also compiled;
* lightly's MaskedVisionTransformerTIMM and MAEDecoderTIMM over timm's transformer, put together as its documentation
  does: raw pixels as targets, AdamW; on timm's blocks, as the authors' model is;
* transformers' ViTMAEForPreTraining with per-patch targets and the fused AdamW that its Trainer takes. Built from a
  config its position tables are zeros, which train to nothing: they are filled first.

On a CPU maskray keeps the memory that a step frees, as its runs do; the others run with glibc's own thresholds. They
get normalised fp32 images that lie on the device; they mask in their forward pass. Those that are not
installed are left out, by name. Needs torch, timm and maskray without Ray; on a machine with a GPU: --device cuda.

MFU is the share of the rate of a large matrix product in the same precision, measured in each turn; the operations of
an image are those of maskray's model for all of them. Peak memory is that of a process which takes three steps alone:
what it has on the GPU, or what it takes on the host beyond its libraries.

What must come out: bf16 on a CPU 3 times the fastest of the others in fp32; in the same precision 1.4 times on a CPU
and 1.5 times on a GPU, and there an MFU of 45 % with ViT-B and 55 % with ViT-L.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
from measure import Report, alternate, arguments, ratios
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "platform"))

from maskray import masking
from maskray.config.schema import RunConfig
from maskray.data.stream import Batch
from maskray.models.build import build_model
from maskray.models.cost import cost
from maskray.models.normalize import Normalize
from maskray.models.vit import position_table
from maskray.objective import Objective
from maskray.training.memory import keep_freed_memory
from maskray.training.optim import Schedule, build_optimizer
from maskray.training.step import TrainStep
from maskray.training.throughput import matmul_rate

ENCODERS = {"vit_s": (384, 12, 6), "vit_b": (768, 12, 12), "vit_l": (1024, 24, 16), "vit_h": (1280, 32, 16)}
"""Width, depth and heads."""
IMAGE, PATCH, RATIO, LR = 224, 16, 0.75, 1.5e-4
NUM_BATCHES = 4
"""Different ones, taken again and again."""
WARM_STEPS, MEMORY_STEPS = 2, 3
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of <malloc.h>."""
PEERS = {"lightly": "lightly", "transformers": "transformers ViTMAE"}
"""Package to side."""

Precision = Literal["fp32", "bf16"]
Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """What all sides have in common."""

    device: torch.device
    precision: Precision
    model: str
    decoder: tuple[int, int]
    batch: int
    threads: int

    @property
    def sizes(self) -> dict[str, object]:
        """Of maskray's model."""
        (width, depth, heads), (decoder_width, decoder_depth) = ENCODERS[self.model], self.decoder
        decoder = {"width": decoder_width, "depth": decoder_depth, "heads": decoder_width // 32}
        return {"patch": PATCH, "width": width, "depth": depth, "heads": heads, "decoder": decoder}

    def autocast(self) -> torch.autocast:
        """Of the precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def config(self, *, compiled: bool) -> RunConfig:
        """Of maskray's run."""
        return RunConfig.model_validate(
            {
                "name": "bench",
                "data": {"path": "unused", "image_size": IMAGE},
                "mask": {"ratio": RATIO},
                "model": self.sizes,
                "optim": {"global_batch": self.batch, "steps": 10**6, "warmup_steps": 0, "base_lr": LR},
                "training": {"precision": self.precision, "compile": compiled},
            }
        )


def main() -> None:
    """Print a table for each precision."""
    options = _options()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    if options.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    names = ["maskray"] + ["maskray, compiled"] * options.compile
    names += [side for package, side in PEERS.items() if find_spec(package)]
    missing = [package for package in PEERS if not find_spec(package)]
    fastest: dict[str, list[float]] = {}
    for precision in options.precision:
        setting = Setting(options.device, precision, options.model, options.decoder, options.batch, options.threads)
        report = Report(
            f"step: {setting.model}/{PATCH}, {IMAGE} px, decoder {setting.decoder[0]} × {setting.decoder[1]}, "
            f"batch {setting.batch}, {precision}, {setting.device}",
            options.json,
        )
        if missing:
            report.note(f"not installed, so left out: {', '.join(missing)}")
        memory = {name: peak_memory(name, setting) for name in names}
        values = rates(names, setting, options.steps, options.repeats)
        tell(report, setting, values, memory, fastest)
        report.show()


def _options() -> argparse.Namespace:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), help="default: fp32 bf16, on a GPU bf16")
    parser.add_argument("--model", choices=ENCODERS, help="default: vit_s, on a GPU vit_b")
    parser.add_argument("--decoder", type=_decoder, help="WIDTHxDEPTH (default: 256x4, on a GPU 512x8)")
    parser.add_argument("--batch", type=int, help="default: 16, on a GPU 256")
    parser.add_argument("--steps", type=int, help="in a repeat of a side (default: 5, on a GPU 20)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="maskray also compiled: a minute or more before it runs")
    options = parser.parse_args()
    of_cpu = {"precision": ["fp32", "bf16"], "model": "vit_s", "decoder": (256, 4), "batch": 16, "steps": 5}
    of_gpu = {"precision": ["bf16"], "model": "vit_b", "decoder": (512, 8), "batch": 256, "steps": 20}
    for name, default in (of_gpu if options.device.type == "cuda" else of_cpu).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


def _decoder(text: str) -> tuple[int, int]:
    width, depth = text.split("x")
    return int(width), int(depth)


def rates(names: list[str], setting: Setting, steps: int, repeats: int) -> dict[str, list[float]]:
    """Images a second of each side, and under "matmul" the FLOP/s of a matrix product; turn by turn."""
    sides = {name: _rate(name, setting, steps) for name in names}
    return alternate({"matmul": lambda: matmul_rate(setting.device, setting.precision)} | sides, repeats)


def _rate(name: str, setting: Setting, steps: int) -> Callable[[], float]:
    step = make_step(name, setting)

    def measure() -> float:
        set_allocator(name, setting)
        for _ in range(WARM_STEPS):
            step()
        _wait_for(setting.device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        _wait_for(setting.device)
        return steps * setting.batch / (time.perf_counter() - start)

    return measure


def tell(
    report: Report,
    setting: Setting,
    values: dict[str, list[float]],
    memory: dict[str, float],
    fastest: dict[str, list[float]],
) -> None:
    """Add the figures of a precision; `fastest` keeps each precision's fastest other library."""
    matmul = values.pop("matmul")
    flops = _training_flops(setting)
    for name, found in values.items():
        report.add(name, found, "images/s")
    on_gpu = setting.device.type == "cuda"
    needed = {"vit_b": 0.45, "vit_l": 0.55}.get(setting.model) if on_gpu else None
    for name, found in values.items():
        mfu = [flops * ratio for ratio in ratios(found, matmul)]
        report.add(f"{name}: MFU", mfu, "", at_least=needed if name == "maskray" else None)
    report.add("matrix product", [rate / 1e9 for rate in matmul], "GFLOP/s")
    for name, found in memory.items():
        report.add(f"{name}: peak memory", [found / 2**20], "MiB")
    peers = {name: values[name] for name in PEERS.values() if name in values}
    if not peers:
        return
    best = max(peers.values(), key=lambda found: sorted(found)[len(found) // 2])
    fastest[setting.precision] = best
    for name in values.keys() - peers.keys():
        report.add(f"{name} / fastest other", ratios(values[name], best), "×", at_least=1.5 if on_gpu else 1.4)
        if setting.precision == "bf16" and "fp32" in fastest:
            report.add(f"{name} / fastest other in fp32", ratios(values[name], fastest["fp32"]), "×", at_least=3)


def _training_flops(setting: Setting) -> float:
    """Of one image."""
    with torch.device("meta"):
        model = build_model(setting.config(compiled=False).model, (IMAGE, IMAGE), 3)
    (num_visible,) = masking.visible_counts(setting.config(compiled=False).mask, model.grid_HW)
    return cost(model, num_visible).training_flops


# --------------------------------------------------------------------------------------------------------------- sides


def set_allocator(name: str, setting: Setting) -> None:
    """On the host memory is handed out as in a run of maskray's, or as glibc does where nobody asks for more."""
    if setting.device.type != "cpu":
        return
    if name.startswith("maskray"):
        keep_freed_memory()
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # where its own adaptation ends; once set, it no longer adapts
    libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
    libc.malloc_trim(0)


def make_step(name: str, setting: Setting) -> Step:
    """One training step of a side."""
    torch.manual_seed(0)
    match name:
        case "lightly":
            return _theirs(LightlyMAE(setting), setting, fused=None)
        case "transformers ViTMAE":
            return _theirs(TransformersMAE(setting), setting, fused=True)
        case _:
            return _ours(setting.config(compiled=name == "maskray, compiled"), setting)


def _ours(config: RunConfig, setting: Setting) -> Step:
    model = build_model(config.model, (IMAGE, IMAGE), 3).place(setting.device)
    if config.training.compile:
        model.compile()
    step = TrainStep(
        model,
        Normalize.from_kind("imagenet", 3).to(setting.device),
        Objective(config.objective, config.cell),
        build_optimizer(model, config.optim),
        Schedule(LR, 0.0, 0, 10**6, 0.05, 0.05),
        config,
        setting.device,
    )
    batches = cycle([_batch(config, number) for number in range(NUM_BATCHES)])
    return lambda: step(1, [next(batches)])


def _batch(config: RunConfig, number: int) -> Batch:
    """As the stream hands it over: on the host."""
    size, (num_visible,) = config.optim.global_batch, masking.visible_counts(config.mask, config.grid)
    images = torch.randint(0, 256, (size, 3, IMAGE, IMAGE), dtype=torch.uint8)
    key = {"seed": 0, "pass_": number, "rows": torch.arange(size), "view": 0, "xp": torch}
    visible = masking.draw(config.mask, config.grid, num_visible, **key)
    num_target = visible[0].numel() - num_visible
    return Batch(images, visible, num_visible, ~visible, num_target, torch.ones(size), ["key"] * size)


def _theirs(model: nn.Module, setting: Setting, *, fused: bool | None) -> Step:
    """As their documentation trains: a model that gives a loss, AdamW, autocast."""
    model = model.to(setting.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=fused)
    images = [torch.randn(setting.batch, 3, IMAGE, IMAGE, device=setting.device) for _ in range(NUM_BATCHES)]
    batches = cycle(images)

    def step() -> None:
        with setting.autocast():
            loss = model(next(batches))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class LightlyMAE(nn.Module):
    """The example of lightly's documentation, with the decoder of the setting."""

    def __init__(self, setting: Setting) -> None:
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        width, depth, heads = ENCODERS[setting.model]
        vit = VisionTransformer(IMAGE, PATCH, embed_dim=width, depth=depth, num_heads=heads, num_classes=0)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.sequence_length = self.backbone.sequence_length
        self.decoder = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=PATCH,
            embed_dim=width,
            decoder_embed_dim=setting.decoder[0],
            decoder_depth=setting.decoder[1],
            decoder_num_heads=setting.decoder[0] // 32,
            mlp_ratio=4.0,
            proj_drop_rate=0.0,
            attn_drop_rate=0.0,
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        from lightly.models import utils

        size = (len(images_BCHW), self.sequence_length)
        idx_keep, idx_mask = utils.random_token_mask(size=size, mask_ratio=RATIO, device=images_BCHW.device)
        embedded = self.decoder.embed(self.backbone.encode(images=images_BCHW, idx_keep=idx_keep))
        masked = utils.repeat_token(self.decoder.mask_token, size)
        masked = utils.set_at_index(masked, idx_keep, embedded.type_as(masked))
        pred = self.decoder.predict(utils.get_at_index(self.decoder.decode(masked), idx_mask))
        target = utils.get_at_index(utils.patchify(images_BCHW, PATCH), idx_mask - 1)
        return nn.functional.mse_loss(pred, target)


class TransformersMAE(nn.Module):
    """transformers' model, with the positions that it means to have."""

    def __init__(self, setting: Setting) -> None:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        super().__init__()
        width, depth, heads = ENCODERS[setting.model]
        self.model = ViTMAEForPreTraining(
            ViTMAEConfig(
                hidden_size=width,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                decoder_hidden_size=setting.decoder[0],
                decoder_num_hidden_layers=setting.decoder[1],
                decoder_num_attention_heads=setting.decoder[0] // 32,
                decoder_intermediate_size=4 * setting.decoder[0],
                image_size=IMAGE,
                patch_size=PATCH,
                mask_ratio=RATIO,
                norm_pix_loss=True,
            )
        )
        grid = (IMAGE // PATCH, IMAGE // PATCH)
        self.model.vit.embeddings.position_embeddings.data.copy_(position_table(width, grid))
        self.model.decoder.decoder_pos_embed.data.copy_(position_table(setting.decoder[0], grid))
        nn.init.normal_(self.model.vit.embeddings.cls_token, std=0.02)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.model(pixel_values=images_BCHW).loss


# -------------------------------------------------------------------------------------------------------------- memory


def peak_memory(name: str, setting: Setting) -> float:
    """Bytes that a side takes, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_memory_here, name, setting).result()


def _peak_memory_here(name: str, setting: Setting) -> float:
    torch.set_num_threads(setting.threads)
    set_allocator(name, setting)
    if setting.device.type == "cuda":
        step = make_step(name, setting)
        torch.cuda.reset_peak_memory_stats()
    else:
        matmul_rate(setting.device, setting.precision)  # what libraries keep for themselves
        before = _host_bytes("VmRSS")
        step = make_step(name, setting)
    for _ in range(MEMORY_STEPS):
        step()
    if setting.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _host_bytes("VmHWM") - before


def _host_bytes(field: str) -> int:
    """Of this process, from Linux's record: `VmRSS` now, `VmHWM` the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
