"""How a run is trained and probed: the recipe, its steps, and how often it looks up from them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from maskray.config.section import PositiveInt, Section, operational

FOR_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Variables of a process whose kernels may have to be deterministic: cuBLAS reads them before its first product."""


class OptimConfig(Section):
    """The published recipe: linear warm-up and half a cosine, both per step."""

    name: Literal["adamw", "lamb"] = "adamw"
    """`adamw` as for vision transformers (He et al. 2022), `lamb` (You et al. 2020) as for SparK's convolutions."""
    global_batch: PositiveInt = 4096
    """Images (views) in one step, over all workers."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length of the run in passes over the data; give this or `steps`."""
    steps: PositiveInt | None = None
    """Length of the run in steps; give this or `epochs`."""
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    """Length of the warm-up in passes; give this or `warmup_steps`. Neither: 5 % of the run."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4
    """The learning rate is base_lr × global_batch / 256."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Where the cosine ends."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Not applied to biases and norms."""
    weight_decay_end: Annotated[float, Field(ge=0)] | None = None
    """Where a cosine takes the weight decay to; None keeps it."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient over all parameters; None does not clip."""

    @property
    def final_weight_decay(self) -> float:
        """Weight decay at the end of the run."""
        return self.weight_decay if self.weight_decay_end is None else self.weight_decay_end

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps (set the other to null)")
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("give at most one of warmup_epochs and warmup_steps (set the other to null)")
        return self


class SpikeConfig(Section):
    """What counts as a leap of the loss."""

    factor: Annotated[float, Field(gt=1)] = operational(4.0)
    """Times the median of the steps before: the loss of a step above that has leapt."""
    window: Annotated[int, Field(ge=2, le=4096)] = operational(64)
    """Steps that the median is taken over; until there are so many, no loss leaps."""


Steps = Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(lambda steps: tuple(sorted(set(steps))))]
"""Numbers of steps of the plan, from 0, ascending and each once, in whatever order they are given."""


class TrainingConfig(Section):
    """How the steps are computed and how often the run looks up from them."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast; the target and the loss are fp32 in both."""
    micro_batch: PositiveInt | None = operational(None)
    """Views in one forward and backward pass of a worker (gradient accumulation); None takes a worker's whole share."""
    compile: bool = operational(default=False)
    """torch.compile of model, normalisation and loss, in place: half a minute or more before the first step, then a
    step that is a few per cent faster on a CPU."""
    shard: bool = operational(default=False)
    """Weights, gradients and the optimiser's state divided among the workers (FSDP2): for models that one accelerator
    cannot hold. For transformers under AdamW. Checkpoints are the same as without."""
    recompute_activations: bool = operational(default=False)
    """Keep of a transformer's blocks their inputs alone and compute them again in the backward pass: a third more work
    in much less memory."""
    deterministic: bool = operational(default=False)
    """Bit-equal resume (fp32 on CPU at the same workers, threads and versions); see the README for what is promised."""
    threads: PositiveInt | None = operational(None)
    """Torch's threads in a worker; None takes `cluster.cpus_per_worker`, rounded down, at least 1."""
    log_steps: PositiveInt = operational(10)
    """Steps between two log lines: the only ones at which the host waits for the device."""
    checkpoint_steps: PositiveInt = operational(200)
    """Steps between two checkpoints: a multiple of `log_steps`."""
    probe_steps: PositiveInt | None = operational(None)
    """Steps between two probes of the encoder: a multiple of `checkpoint_steps`. None: at the end only."""
    probe_at: tuple[PositiveInt, ...] = operational(())
    """Further steps after which the encoder is probed, whatever they are multiples of: logged and checkpointed too."""
    rewinds: Annotated[int, Field(ge=0)] = operational(3)
    """Times in its life that a run goes back to its newest checkpoint, and on without the step that was not finite, or
    whose loss leapt. At the next one it stops; 0: at the first."""
    spike: SpikeConfig | None = operational(None)
    """When a loss that is finite has leapt so far that the run goes back all the same; null: never."""
    skip_steps: Steps = operational(())
    """Steps of the plan that are left out: read, and not trained on. All others stay what they are. A launch adds those
    that the run went back over."""
    ledger: str | None = operational(None)
    """Folder on the workers' disks for a record of the positions and keys of each step; None keeps none."""

    def skipped_before(self, step: int) -> list[int]:
        """Those of `skip_steps` that lie before a step."""
        return [each for each in self.skip_steps if each < step]

    @property
    def probes(self) -> bool:
        """Whether any checkpoint on the way is to be judged."""
        return self.probe_steps is not None or bool(self.probe_at)

    def probes_after(self, step: int) -> bool:
        """Whether the checkpoint after so many steps is to be judged."""
        return step in self.probe_at or (self.probe_steps is not None and step % self.probe_steps == 0)

    @property
    def first_probe(self) -> int | None:
        """The first step after which one is; None: on the way none is."""
        steps = [*self.probe_at, *([] if self.probe_steps is None else [self.probe_steps])]
        return min(steps, default=None)

    @model_validator(mode="after")
    def _multiples(self) -> Self:
        if self.checkpoint_steps % self.log_steps:
            raise ValueError(
                f"checkpoint_steps {self.checkpoint_steps} must be a multiple of log_steps {self.log_steps}, "
                "so that a resumed run logs the same values"
            )
        if self.probe_steps is not None and self.probe_steps % self.checkpoint_steps:
            raise ValueError(
                f"probe_steps {self.probe_steps} must be a multiple of checkpoint_steps {self.checkpoint_steps}: "
                "a probe step is a checkpoint step"
            )
        return self


class ProbeConfig(Section):
    """What the encoder is worth before training, at probe steps and at the end.

    Logistic regression and nearest neighbours on frozen, mean-pooled features; and a figure of what the model paints.
    On Ray, training does not wait for a probe, and one that fails, hangs or is killed is noted in MLflow and no more.
    """

    enabled: bool = operational(default=True)
    """Scores are left out where the dataset has no labels."""
    cpus: Annotated[float, Field(ge=0)] = operational(1.0)
    """Set aside for probes while the workers train. 0: they share the workers'."""
    gpus: Annotated[float, Field(ge=0)] = operational(0.0)
    """Set aside too; a probe computes on it."""
    limit_seconds: Annotated[float, Field(gt=0)] = operational(1800.0)
    """A probe that takes longer is ended, and noted; the one at the end of the run too."""
    waiting: Annotated[int, Field(ge=0)] = operational(4)
    """Newer checkpoints that may wait to be judged; with more, a probe is left out and noted. Each that waits is kept,
    and the run ends when all are judged."""
    best_by: Literal["few_labels", "all_labels", "knn"] = operational("few_labels")
    """Score by which `storage.keep_checkpoints` checkpoints are kept, beside the newest. Not to be changed under way:
    the scores of two kinds would be compared."""
    labels_per_class: PositiveInt = operational(5)
    draws: PositiveInt = operational(10)
    """Stratified draws of `labels_per_class` labels whose accuracies are averaged."""
    k: PositiveInt = operational(20)
    """Neighbours, weighted by exp(cosine / `temperature`)."""
    temperature: Annotated[float, Field(gt=0)] = operational(0.07)
    max_rows: PositiveInt = operational(5000)
    """Rows at most of each of the training and the held-out split."""
    figure_images: Annotated[int, Field(ge=1, le=16)] = operational(6)
    """Fixed held-out images, with fixed masks, in the reconstruction figure."""
