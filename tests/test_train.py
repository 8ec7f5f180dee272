from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import tiny_config

from ucc_search.builtin.distillers import Logits
from ucc_search.compression import compress, shape_of
from ucc_search.config import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    TrainConfig,
    dump_config,
    load_config,
)
from ucc_search.data import TrainingBatches, load_data
from ucc_search.errors import ConfigError
from ucc_search.interfaces import DistillContext
from ucc_search.losses import CandidateLoss, TaskLoss
from ucc_search.models import build_model
from ucc_search.plan import CompressionPlan
from ucc_search.train import (
    TrainingError,
    Worker,
    deepspeed_config,
    fit,
    learning_rate_factor,
    parameter_groups,
)
from ucc_search.workbench import annealed_tokens


@functools.cache
def digits():
    return load_data(DataConfig(name="digits"))


def dense():
    """Without batch norm, whose statistics would differ between a batch and its parts."""
    options = {"embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 10}
    return VisionTransformer(img_size=8, in_chans=1, patch_size=2, **options)


def loss_module(seed=0):
    """A compressed model, so that gathers and merges are trained through."""
    torch.manual_seed(seed)
    model = dense()
    plan = CompressionPlan.identity(shape_of(model)).replace(tokens_out=[16, 9, 9], head_tokens_only=True)
    small = compress(model, plan)
    return TaskLoss(small, classes=10, label_smoothing=0.1, augment=AugmentConfig())


def config(**changes):
    settings = {"engine": "torch", "steps": 12, "batch_size": 32, "clip_grad": 1.0, "optimizer": {"lr": 3e-3}}
    return TrainConfig(**{**settings, **changes})


def losses(seed=0, worker=None, **changes):
    return fit(loss_module(seed), digits().train, config(**changes), seed=seed, worker=worker).losses


class Subset:
    """The first images of a data set."""

    def __init__(self, images, count):
        self.images, self.count = images, count

    def __len__(self):
        return self.count

    def batch(self, indices, *, train=False):
        return self.images.batch(indices, train=train)


# Engines


def in_new_process(code, tmp_path, *arguments):
    """DeepSpeed sets up process groups and settings of the whole process, so it gets one of its own."""
    extensions = tmp_path / "extensions"
    extensions.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, extensions


BOTH_ENGINES = """
import torch
from test_train import losses
torch.set_num_threads(1)
for options in ({}, {"gradient_accumulation": 2}, {"optimizer": {"type": "SGD", "lr": 0.05}}):
    plain, deep = (losses(engine=e, **options) for e in ("torch", "deepspeed"))
    print(max(abs(a - b) for a, b in zip(plain, deep, strict=True)), len(plain))
"""


def test_deepspeed_trains_as_plain_torch_does_and_compiles_nothing(tmp_path):
    printed, extensions = in_new_process(BOTH_ENGINES, tmp_path)
    rows = [line.split() for line in printed.splitlines()]
    assert len(rows) == 3, printed
    for difference, steps in rows:
        assert float(difference) < 1e-4
        assert int(steps) == 12
    assert list(extensions.iterdir()) == []


TWO_RANKS = """
import json, sys
import torch
from test_train import losses
from ucc_search.train import Worker
torch.set_num_threads(1)
worker = Worker(int(sys.argv[1]), 2, sys.argv[2])
print(json.dumps(losses(engine="deepspeed", workers=2, worker=worker)))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    rendezvous = str(tmp_path / "rendezvous")
    with ThreadPoolExecutor(2) as pool:
        printed = list(pool.map(lambda r: in_new_process(TWO_RANKS, tmp_path, r, rendezvous)[0], "01"))
    first, second = (json.loads(text.splitlines()[-1]) for text in printed)
    # Each rank reports the loss on its half of the batch.
    together = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert together == pytest.approx(losses(), abs=1e-4)


def test_several_processes_need_deepspeed():
    with pytest.raises(ConfigError, match=r"needs train\.engine: deepspeed"):
        losses(worker=Worker(0, 2))


def test_deepspeed_gets_the_batch_sizes_it_checks():
    changes = {"gradient_accumulation": 3, "workers": 2, "deepspeed": {"prescale_gradients": True}}
    resolved = deepspeed_config(config(engine="deepspeed", batch_size=96, **changes), 2)
    assert resolved["train_batch_size"] == 96
    assert resolved["train_micro_batch_size_per_gpu"] * resolved["gradient_accumulation_steps"] * 2 == 96
    assert resolved["prescale_gradients"] is True
    assert resolved["optimizer"]["params"]["torch_adam"] is True  # the other one compiles for minutes


# What training does


def test_training_leaves_the_processor_as_it_was():
    smallest, seen = sys.float_info.min, []
    fit(loss_module(), digits().train, config(), seed=0, before_step=lambda _: seen.append(smallest / 2))
    assert seen
    assert not any(seen), "numbers below the smallest normal one are slow in training"
    assert smallest / 2 > 0


def test_runs_repeat_by_seed():
    first = losses()
    assert first == losses()
    assert first != losses(seed=1)


def stopped_and_resumed(folder, **changes):
    """Losses and average of a training in one go, and of one that was stopped at step 5 of 12."""
    settings = config(augment={"crop_padding": 1, "mixup": 0.5}, ema={"decay": 0.9}, **changes)
    found = []
    for stop in (None, 5):
        module = mixing_module(settings)
        images = Subset(digits().train, 100)  # an epoch is three steps
        if stop:
            fit(module, images, settings, seed=3, stop=stop, save=folder / "state")
            torch.manual_seed(99)
            module = mixing_module(settings, seed=8)
        resume = folder / "state" if stop else None
        found.append(fit(module, images, settings, seed=3, resume=resume))
    return found


def mixing_module(settings, seed=0):
    return TaskLoss(loss_module(seed).model, classes=10, label_smoothing=0.1, augment=settings.augment)


@pytest.mark.parametrize("rounds", [1, 2])
def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(rounds, tmp_path):
    """Same images in the same order, same augmentation, optimiser, learning rates and average: bit for bit."""
    whole, resumed = stopped_and_resumed(tmp_path, gradient_accumulation=rounds)
    assert (whole.continued, resumed.continued) == (0, 5)
    assert resumed.losses == whole.losses
    assert resumed.parts == whole.parts
    pairs = zip(whole.averaged.parameters(), resumed.averaged.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_stopped_training_has_learnt_at_the_rates_of_the_whole(tmp_path):
    settings = config()
    short = fit(loss_module(), digits().train, settings, seed=0, stop=5).losses
    assert short == losses()[:5]


STOPPED_DEEPSPEED = """
import sys
from pathlib import Path
import torch
from test_train import stopped_and_resumed
torch.set_num_threads(1)
for stage in (0, 2):
    folder = Path(sys.argv[1]) / str(stage)
    folder.mkdir()
    whole, resumed = stopped_and_resumed(folder, engine="deepspeed", zero_stage=stage)
    print(resumed.continued, max(abs(a - b) for a, b in zip(whole.losses, resumed.losses, strict=True)))
"""


@pytest.mark.slow
def test_deepspeed_goes_on_where_it_was_stopped(tmp_path):
    out, _ = in_new_process(STOPPED_DEEPSPEED, tmp_path, str(tmp_path))
    found = [line.split() for line in out.splitlines() if line.startswith("5 ")]
    assert len(found) == 2
    assert all(float(difference) < 1e-6 for _, difference in found)


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    # The small batches of an epoch cut the same shuffled order, so they add up to the big ones.
    assert losses(gradient_accumulation=4) == pytest.approx(losses(), abs=1e-5)


def test_training_learns():
    curve = losses(seed=1, steps=120, optimizer={"lr": 1e-2})  # fast; other seeds may jump at this rate
    assert sum(curve[-10:]) < 0.9 * sum(curve[:10])


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step():
    module = loss_module()

    def spoil(progress):
        if progress >= 0.5:
            with torch.no_grad():
                module.model.head.weight.fill_(float("nan"))

    with pytest.raises(TrainingError, match="loss is nan at step 6 of 12"):
        fit(module, digits().train, config(), seed=0, before_step=spoil)


def test_the_average_follows_the_weights():
    module, decay, seen = loss_module(), 0.5, []
    weight = module.model.head.weight

    def remember(step, total, loss):
        seen.append(weight.detach().clone())

    result = fit(module, digits().train, config(ema=decay), seed=0, after_step=remember)
    expected = seen[0]
    for value in seen[1:]:
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(result.averaged.head.weight, expected)
    assert not torch.equal(result.averaged.head.weight, weight)
    assert set(result.averaged.state_dict()) == set(module.model.state_dict())
    assert fit(loss_module(), digits().train, config(steps=1), seed=0).averaged is None


@pytest.mark.parametrize("ramp", [False, True])
@pytest.mark.parametrize(
    ("every", "updates"),
    [("step", [1, 2, 3, 4, 5]), ("epoch", [2, 4, 5])],  # two steps to an epoch, and the run ends within one
)
def test_the_average_is_that_of_a_loop_written_out(ramp, every, updates):
    module, decay, seen = loss_module(), 0.3, {}  # reached by the ramp at its third update
    weight, images = module.model.head.weight, Subset(digits().train, 70)

    def remember(step, total, loss):
        seen[step] = weight.detach().clone()

    ema = {"decay": decay, "ramp": ramp, "every": every}
    result = fit(module, images, config(steps=5, ema=ema), seed=0, after_step=remember)
    expected = seen[updates[0]]
    for n, step in enumerate(updates[1:], start=2):
        d = min(decay, (1 + n) / (10 + n)) if ramp else decay
        expected = d * expected + (1 - d) * seen[step]
    torch.testing.assert_close(result.averaged.head.weight, expected)


@pytest.mark.parametrize(("steps", "updates"), [(1, 1), (4, 2), (5, 3)])
def test_the_average_is_complete_however_the_run_ends(steps, updates, monkeypatch):
    done = []
    monkeypatch.setattr(torch.optim.swa_utils.AveragedModel, "update_parameters", lambda *_: done.append(1))
    ema = {"decay": 0.9, "every": "epoch"}
    fit(loss_module(), Subset(digits().train, 70), config(steps=steps, ema=ema), seed=0)
    assert len(done) == updates  # an epoch's end that is the run's end counts once


def test_callbacks_see_every_step():
    progress, steps = [], []
    result = fit(
        loss_module(),
        digits().train,
        config(steps=4),
        seed=0,
        before_step=progress.append,
        after_step=lambda step, total, loss: steps.append((step, total, loss)),
    )
    assert progress == [0.0, 0.25, 0.5, 0.75]
    assert steps == [(i + 1, 4, loss) for i, loss in enumerate(result.losses)]
    assert [sum(p.values()) for p in result.parts] == pytest.approx(result.losses)


def test_frozen_parameters_stay():
    module = loss_module()
    module.model.patch_embed.requires_grad_(False)
    before = {k: v.clone() for k, v in module.model.state_dict().items()}
    fit(module, digits().train, config(steps=2), seed=0)
    changed = {k for k, v in module.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if not k.startswith("patch_embed")}


def test_bf16_trains_close_to_full_precision():
    assert losses(precision="bf16", steps=4) == pytest.approx(losses(steps=4), abs=0.05)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_reaches_the_loss(kind):
    module = loss_module()
    mixing = TaskLoss(module.model, classes=10, label_smoothing=0.0, augment=AugmentConfig(**{kind: 1.0}))
    images, labels = next(TrainingBatches(digits().train, 32, AugmentConfig(), seed=0))
    torch.manual_seed(0)
    mixed = mixing(images, labels, 0.0)["task"]
    assert bool(mixed.isfinite())
    assert mixed.item() != module(images, labels, 0.0)["task"].item()


@pytest.mark.parametrize("fold", [False, True])
def test_folded_cutmix_keeps_the_larger_share_of_every_image(fold):
    augment = AugmentConfig(cutmix=0.5, cutmix_fold=fold)
    mixing = TaskLoss(dense(), classes=4, label_smoothing=0.0, augment=augment)
    labels = torch.arange(4)
    images = labels[:, None, None, None].expand(4, 1, 32, 32).float()
    torch.manual_seed(0)
    own = []
    for _ in range(300):
        mixed, targets = mixing._mixed(images, labels)
        own.append(targets.diagonal().min().item())
        assert targets.sum(dim=1) == pytest.approx(1.0)
        # The label's weight is the share of the image's pixels that are its own.
        torch.testing.assert_close((mixed == images).float().mean(dim=(1, 2, 3)), targets.diagonal())
    assert max(own) == 1.0
    assert (min(own) >= 0.5) == fold
    assert min(own) < 0.6  # the fold is at a half, and large boxes do occur


def test_drop_path_reaches_the_student_and_spares_the_teacher():
    arguments = {"img_size": 8, "stem_channels": [4], "stem_strides": [2], "embed_dim": 24, "depth": 4}
    settings = ModelConfig(name="small_vit", args={**arguments, "num_heads": 3, "drop_path_rate": 0.1})
    teacher = build_model(settings, classes=10, channels=1).eval()
    plan = CompressionPlan.identity(shape_of(teacher)).replace(
        tokens_out=[16, 9, 4, 4], head_tokens_only=True
    )
    student = compress(teacher, plan)
    kinds = [type(block).__name__ for block in student.blocks]
    assert kinds == ["Block", "CompressedBlock", "CompressedBlock", "CompressedBlock"]
    for block, rate in zip(student.blocks, (0.0, 0.1 / 3, 0.2 / 3, 0.1), strict=True):
        for path in (block.drop_path1, block.drop_path2):
            assert getattr(path, "drop_prob", 0.0) == pytest.approx(rate)

    images, labels = digits().train.batch(torch.arange(64))
    rule = {"label_smoothing": 0.0, "augment": AugmentConfig()}
    module = CandidateLoss(student, teacher, Logits(), DistillContext(plan, shape_of(teacher)), **rule)
    module.train()
    first, second = (module(images, labels, 0.0)["task"] for _ in range(2))
    assert first != second
    assert torch.equal(module._teach(images).logits_BC, module._teach(images).logits_BC)
    module.eval()
    assert module(images, labels, 0.0)["task"] == module(images, labels, 0.0)["task"]


# Settings


def test_the_average_is_a_decay_or_more(tmp_path):
    assert config(ema=0.9).ema == config(ema={"decay": 0.9, "ramp": False, "every": "step"}).ema
    path = tmp_path / "space.yaml"
    for ema in (None, 0.999, {"decay": 0.999, "ramp": True, "every": "epoch"}):
        whole = tiny_config(train={"ema": ema, "augment": {"cutmix": 0.5, "cutmix_fold": True}})
        path.write_text(dump_config(whole), encoding="utf-8")
        assert load_config(path) == whole


def test_the_learning_rate_warms_up_and_falls_to_its_floor():
    settings = config(optimizer={"lr": 1e-3}, schedule={"warmup": 0.1, "min_lr": 1e-5})
    factor = learning_rate_factor(settings, 100)
    rates = [factor(step) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx((1 + 0.01) / 2)
    assert rates[100] == pytest.approx(0.01)
    constant = learning_rate_factor(config(schedule={"type": "constant", "warmup": 0.0}), 100)
    assert {constant(step) for step in range(100)} == {1.0}


@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_have_a_learning_rate_above_zero(total):
    factor = learning_rate_factor(config(schedule={"warmup": 0.9}), total)
    assert all(0 < factor(step) <= 1 for step in range(total))


def test_vectors_and_tokens_are_not_decayed():
    module = loss_module()
    groups = parameter_groups(module, 0.05)
    names = {id(p): n for n, p in module.named_parameters()}
    decayed, plain = ({names[id(p)] for p in g["params"]} for g in groups)
    assert [g["weight_decay"] for g in groups] == [0.05, 0.0]
    assert decayed | plain == set(names.values())
    assert {"model.blocks.0.attn.qkv.weight", "model.head.weight", "model.blocks.2.mlp.fc1.weight"} <= decayed
    assert {"model.cls_token", "model.pos_embed", "model.norm.weight", "model.head.bias"} <= plain
    assert not any(n.endswith(("bias", "_token", "pos_embed")) or ".norm" in n for n in decayed)


def test_steps_follow_from_epochs():
    assert config(steps=None, epochs=2.5, batch_size=10).total_steps(105) == 25
    assert config(steps=None, epochs=0.01, batch_size=10).total_steps(105) == 1
    assert config(steps=None, epochs=1, batch_size=512).total_steps(105) == 1


def test_annealed_tokens_fall_from_all_to_the_plan():
    shape = shape_of(dense())
    plan = CompressionPlan.identity(shape).replace(tokens_out=[14, 8, 2])
    schedule = [annealed_tokens(plan, step / 100, 0.1, 0.5) for step in range(101)]
    assert schedule[0] == schedule[10] == [16, 16, 16]
    assert schedule[30] == [15, 12, 9]
    assert all(s == [14, 8, 2] for s in schedule[50:])
    for before, after in itertools.pairwise(schedule):
        assert all(a >= b for a, b in zip(before, after, strict=True))
        assert after == sorted(after, reverse=True)
    assert annealed_tokens(plan, 0.0, 0.0, 0.0) == [14, 8, 2]
