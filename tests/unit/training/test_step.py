"""One step: what moves the weights, what must not, and that nothing moves them once a step was not finite."""

import json
from dataclasses import replace

import pytest
import torch

NAN, INF = float("nan"), float("inf")


def halves(batch, size):
    rows = [slice(at, at + size) for at in range(0, len(batch.keys), size)]
    return [
        replace(
            batch,
            images_BCHW=batch.images_BCHW[r],
            visible_BHW=batch.visible_BHW[r],
            target_BHW=batch.target_BHW[r],
            weights_B=batch.weights_B[r],
            keys=batch.keys[r],
        )
        for r in rows
    ]


def test_steps_lower_the_loss(rig):
    r = rig(optim={"steps": 200, "base_lr": 0.01})
    r.step(1, [r.batch()])
    first = r.step.report().loss
    for number in range(2, 40):
        r.step(number, [r.batch()])
    r.step.report()
    r.step(40, [r.batch()])
    assert r.step.report().loss < 0.9 * first


def test_the_report_is_the_mean_since_the_last(rig):
    r, alone = rig(), []
    for number in range(4):
        r.step(number, [r.batch(number)])
        alone.append(r.step.report())
    together = rig()
    for number in range(4):
        together.step(number, [together.batch(number)])
    report = together.step.report()
    assert report.loss == pytest.approx(sum(a.loss for a in alone) / 4, rel=1e-6)
    assert report.grad_norm == pytest.approx(sum(a.grad_norm for a in alone) / 4, rel=1e-6)
    assert (report.first_bad_step, report.views_without_image) == (None, 0)


def test_the_loss_and_norm_are_those_of_plain_torch(rig):
    r = rig()
    batch = r.batch()
    images = (batch.images_BCHW.float() / 255 - 0.5) / 0.5
    pred = r.model(images, batch.visible_BHW, batch.num_visible)
    cells = images.unfold(2, 2, 2).unfold(3, 2, 2).reshape(64, 16, 4)
    errors = (pred - cells).square().mean(dim=2)[~batch.visible_BHW.flatten(1)]
    loss = errors.mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in r.model.parameters() if p.grad is not None]).norm()
    r.step(0, [batch])
    report = r.step.report()
    assert report.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert report.grad_norm == pytest.approx(float(norm), rel=1e-5)


def test_the_update_is_that_of_plain_adamw(rig):
    r, plain = rig(optim={"warmup_steps": 0}), rig(optim={"warmup_steps": 0})
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in plain.model.parameters() if p.requires_grad and p.ndim > 1]},
            {"params": [p for p in plain.model.parameters() if p.requires_grad and p.ndim <= 1], "weight_decay": 0},
        ],
        lr=plain.schedule.lr(0),
        betas=(0.9, 0.95),
        weight_decay=0.05,
    )
    batch = r.batch()
    plain.step._backward(batch)
    optimizer.step()
    r.step(0, [batch])
    for mine, theirs in zip(r.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------- not finite


def poison_loss(r, batch):
    """The prediction is not finite, once."""
    handle = r.model.decoder_pred.register_forward_hook(lambda *call: (handle.remove(), call[-1] * NAN)[1])
    return batch


def poison_gradient(r, batch):
    """The loss stays finite; one gradient does not, once."""
    weight = r.model.decoder_pred.weight
    handle = weight.register_hook(lambda grad: (handle.remove(), torch.full_like(grad, INF))[1])
    return batch


@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("micro_batch", [64, 16])
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_from_the_first_step_that_is_not_finite_no_update_is_applied(rig, same, poison, clip_norm, micro_batch, name):
    r = rig(optim={"clip_norm": clip_norm, "name": name})
    for number in range(3):
        r.step(number, [r.batch(number)])
    assert r.step.report().first_bad_step is None
    weights, moments = r.weights(), r.moments()
    r.step(3, halves(poison(r, r.batch(3)), micro_batch))
    same(r.weights(), weights)
    for number in range(4, 8):  # good ones: they must not move anything either
        r.step(number, [r.batch(number)])
    same(r.weights(), weights)
    same(r.moments(), moments)
    assert r.step.report().first_bad_step == 3
    r.step(8, [poison(r, r.batch(8))])
    assert r.step.report().first_bad_step == 3


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_bad_first_step_leaves_the_initial_weights(rig, same, name):
    r = rig(optim={"warmup_steps": 0, "name": name})
    weights = r.weights()
    r.step(0, [poison_loss(r, r.batch())])
    same(r.weights(), weights)
    assert r.step.report().first_bad_step == 0


# -------------------------------------------------------------------------------------------------------------- spikes


def raised(r, batch, by):
    """The batch; the loss of the next step is so many times what it would be."""
    objective = r.step._objective

    def once(*arguments):
        r.step._objective = objective
        return by * objective(*arguments)

    r.step._objective = once
    return batch


def watching(rig, **spike):
    return rig(optim={"base_lr": 1e-4}, training={"spike": {"factor": 4.0, "window": 4, **spike}})


@pytest.mark.parametrize(("by", "is_bad"), [(3.5, False), (5.0, True), (INF, True), (NAN, True)])
def test_from_the_first_loss_that_leaps_no_update_is_applied(rig, same, by, is_bad):
    r = watching(rig)
    for number in range(5):
        r.step(number, [r.batch(number)])
    assert r.step.report().first_bad_step is None
    median, weights = sorted(r.step.recent_losses())[1], r.weights()
    r.step(5, [raised(r, r.batch(5), by)])
    assert all(torch.equal(a, b) for a, b in zip(r.weights().values(), weights.values(), strict=True)) == is_bad
    for number in range(6, 9):
        r.step(number, [r.batch(number)])
    report = r.step.report()
    if not is_bad:
        assert (report.first_bad_step, report.leap) == (None, None)
        return
    same(r.weights(), weights)
    assert report.first_bad_step == 5
    if by == 5.0:
        assert report.leap is not None
        loss, of = report.leap
        assert of == median
        assert loss > 4 * median
    else:  # what is not finite is said to be that
        assert report.leap is None


def test_no_loss_leaps_before_the_window_is_full(rig):
    r = watching(rig)
    for number, by in enumerate([1, 50, 1, 1]):
        r.step(number, [raised(r, r.batch(number), by)])
        assert r.step.report().first_bad_step is None
    r.step(4, [raised(r, r.batch(4), 50)])
    assert r.step.report().first_bad_step == 4


def test_nothing_leaps_where_nobody_looks(rig):
    r = rig()
    for number in range(9):
        r.step(number, [raised(r, r.batch(number), 1000 if number == 8 else 1)])
    report = r.step.report()
    assert (report.first_bad_step, report.leap, r.step.recent_losses()) == (None, None, [])


@pytest.mark.parametrize("num", [0, 1, 3, 4, 7, 8])
def test_what_is_recalled_decides_as_what_was_forgotten(rig, num):
    """Through JSON, as a checkpoint has it."""
    r, other = watching(rig), watching(rig)
    losses = []
    for number in range(num):
        r.step(number, [r.batch(number)])
        losses.append(r.step.report().loss)
    kept = r.step.recent_losses()
    assert kept == losses[-4:]
    other.step.recall(json.loads(json.dumps(kept)))
    for number in range(num, num + 6):
        for each in (r, other):
            each.step._watch.leaps(torch.tensor(1.0 + number))
        assert other.step.recent_losses() == r.step.recent_losses()
        one, two = (each.step._watch.leaps(torch.tensor(9.0)) for each in (r, other))
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("window", [2, 3, 9])
def test_losses_of_another_window_are_taken_as_far_as_they_go(rig, window):
    r = watching(rig, window=window)
    r.step.recall([1.0, 2.0, 3.0, 4.0])
    assert r.step.recent_losses() == [1.0, 2.0, 3.0, 4.0][-window:]
    r.step._watch.leaps(torch.tensor(5.0))
    assert r.step.recent_losses() == [1.0, 2.0, 3.0, 4.0, 5.0][-window:]


def test_an_interval_without_a_step_has_no_mean(rig):
    report = rig().step.report()
    assert str(report.loss) == str(report.grad_norm) == "nan"
    assert (report.first_bad_step, report.views_without_image) == (None, 0)


# ----------------------------------------------------------------------------------------------------- batches, weights


@pytest.mark.parametrize("size", [1, 16, 32, 48])
def test_micro_batches_give_the_update_of_the_whole(rig, size):
    # Plain numbers: Adam's first steps are lr · sign(gradient), where the last bit of a tiny gradient shows.
    whole, cut = rig(optim={"clip_norm": 0.5}), rig(optim={"clip_norm": 0.5})
    for r, parts in ((whole, [whole.batch()]), (cut, halves(cut.batch(), size))):
        r.step(0, parts)
    for mine, theirs in zip(cut.model.parameters(), whole.model.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    one, other = whole.step.report(), cut.step.report()
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)


def test_views_of_weight_0_do_not_count(rig):
    r, short = rig(), rig()
    batch = r.batch()
    weights = torch.ones(64)
    weights[[3, 40]] = 0
    black = batch.images_BCHW.clone()
    black[[3, 40]] = 0
    r.step(1, [replace(batch, images_BCHW=black, weights_B=weights)])
    kept = [i for i in range(64) if i not in (3, 40)]
    short.step(
        1,
        [
            replace(
                batch,
                images_BCHW=batch.images_BCHW[kept],
                visible_BHW=batch.visible_BHW[kept],
                target_BHW=batch.target_BHW[kept],
                weights_B=torch.ones(62),
                keys=batch.keys[:62],
            )
        ],
    )
    for mine, theirs in zip(r.model.parameters(), short.model.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    one, other = r.step.report(), short.step.report()
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert one.views_without_image == other.views_without_image == 2


def test_a_repeat_of_weight_0_changes_nothing(rig):
    r, plain = rig(), rig()
    batch = r.batch()
    r.step(1, [batch, replace(batch, weights_B=torch.zeros(64))])
    plain.step(1, [batch])
    for mine, theirs in zip(r.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert r.step.report() == plain.step.report()


def test_clip_norm_clips_what_is_applied_and_not_what_is_reported(rig):
    free, clipped, loose = rig(), rig(optim={"clip_norm": 1e-3}), rig(optim={"clip_norm": 1e3})
    for r in (free, clipped, loose):
        r.step(0, [r.batch()])
    norm = free.step.report().grad_norm
    assert clipped.step.report().grad_norm == loose.step.report().grad_norm == norm
    grads = [p.grad for p in clipped.model.parameters() if p.grad is not None]
    assert float(torch.nn.utils.get_total_norm(grads)) == pytest.approx(1e-3, rel=1e-3)
    for mine, theirs in zip(loose.model.parameters(), free.model.parameters(), strict=True):
        assert (mine.grad is None and theirs.grad is None) or torch.equal(mine.grad, theirs.grad)


def test_the_schedule_is_applied_to_the_step_it_is_for(rig, same):
    r = rig(optim={"warmup_steps": 2, "weight_decay_end": 0.5})
    weights = r.weights()
    r.step(0, [r.batch()])  # the warm-up starts at 0
    same(r.weights(), weights)
    r.step(5, [r.batch()])
    decayed, plain = r.optimizer.param_groups
    assert decayed["lr"] == plain["lr"] == r.schedule.lr(5)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (r.schedule.decay(5), 0.0)
    assert 0.05 < decayed["weight_decay"] < 0.5


def test_bf16_runs_and_keeps_weights_and_loss_wide(rig):
    r, wide = rig(training={"precision": "bf16"}), rig()
    for number in range(3):
        r.step(number, [r.batch(number)])
        wide.step(number, [wide.batch(number)])
    assert {p.dtype for p in r.model.parameters()} == {torch.float32}
    report, expected = r.step.report(), wide.step.report()
    assert report.first_bad_step is None
    assert report.loss == pytest.approx(expected.loss, rel=0.02)
    assert report.loss != expected.loss


def test_the_warm_up_leaves_no_trace(rig, same):
    r, plain = rig(), rig()
    r.step.warm_up(r.batch(9))
    same(r.weights(), plain.weights())
    assert r.moments() == []
    for number in range(3):
        r.step(number, [r.batch(number)])
        plain.step(number, [plain.batch(number)])
    same(r.weights(), plain.weights())
    assert r.step.report() == plain.step.report()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's compiler looks at it, in its own code
def test_a_compiled_step_learns_what_a_plain_one_does(rig):
    """With torch's own compiler, which takes its time."""
    plain, compiled = rig(), rig(training={"compile": True})
    compiled.model.compile(dynamic=False)
    for number in range(6):
        for each in (plain, compiled):
            each.step(number, [each.batch(number)])
        one, other = plain.step.report(), compiled.step.report()
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)
