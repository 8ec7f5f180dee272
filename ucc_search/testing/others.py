"""The contract of cascades, distillers, importance criteria, samplers, metrics and observers, line by line."""

from __future__ import annotations

import copy
import itertools
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ucc_search.compression import compress, refusals, shape_of
from ucc_search.config import AugmentConfig
from ucc_search.costs import cost
from ucc_search.errors import PluginError
from ucc_search.importance import unit_scores
from ucc_search.interfaces import (
    Cascade,
    Components,
    Dataset,
    Dimension,
    DistillContext,
    Distiller,
    Family,
    ImageData,
    Importance,
    Measured,
    Metric,
    Observer,
    Sampler,
    SamplerRequest,
    ScheduleRequest,
)
from ucc_search.losses import CandidateLoss
from ucc_search.plan import CompressionPlan
from ucc_search.testing.core import Broken, Check
from ucc_search.testing.models import (
    TOKENS_OUT,
    counted_macs,
    tiny_compressed,
    tiny_images,
    tiny_model,
    tiny_plan,
)

_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


# Cascades


def _schedules(cascade: Cascade, min_keep: float = 0.0) -> tuple[list[list[float]], int]:
    shape = tiny_plan(tiny_model()).shape
    request = ScheduleRequest(
        shape,
        keep_ratios=(0.8, 0.5, 0.7) if cascade.searched else None,
        min_keep=min_keep,
        evaluate=(lambda tokens: sum(tokens) / (shape.tokens * shape.depth)) if cascade.needs_model else None,
    )
    family = cascade.profile(request)
    return [list(map(float, family(s))) for s in _STRENGTHS], shape.tokens


def schedules_are_counts(cascade: Cascade) -> None:
    schedules, tokens = _schedules(cascade)
    for strength, schedule in zip(_STRENGTHS, schedules, strict=True):
        if len(schedule) != 3:
            raise Broken(
                f"gave {len(schedule)} numbers for a model of 3 blocks",
                "return the patch tokens after each block",
                method="profile",
            )
        if not all(math.isfinite(n) and 0 < n <= tokens + 1e-6 for n in schedule):
            raise Broken(
                f"gave {schedule} at strength {strength} for {tokens} patch tokens",
                f"every number lies above 0 and up to {tokens}",
                method="profile",
            )


def schedules_fall(cascade: Cascade) -> None:
    schedules, _ = _schedules(cascade)
    for strength, schedule in zip(_STRENGTHS, schedules, strict=True):
        if any(b > a + 1e-6 for a, b in itertools.pairwise(schedule)):
            raise Broken(
                f"tokens come back: {schedule} at strength {strength}",
                "non-increasing over the blocks",
                method="profile",
            )
    for (s, weak), (t, strong) in itertools.pairwise(zip(_STRENGTHS, schedules, strict=True)):
        if any(b > a + 1e-6 for a, b in zip(weak, strong, strict=True)):
            raise Broken(
                f"strength {t} keeps more than {s}: {strong} and {weak}",
                "every number is non-increasing in the strength: the projection onto the budget bisects it",
                method="profile",
            )


def strength_zero_keeps_all(cascade: Cascade) -> None:
    schedules, tokens = _schedules(cascade)
    if not all(math.isclose(n, tokens) for n in schedules[0]):
        raise Broken(
            f"strength 0 gives {schedules[0]} of {tokens} tokens",
            "at strength 0 nothing is pruned",
            method="profile",
        )


def schedules_repeat(cascade: Cascade) -> None:
    if _schedules(cascade)[0] != _schedules(cascade)[0]:
        raise Broken("gave another schedule for the same request", "no random numbers", method="profile")


def accumulates(cascade: Cascade) -> None:
    for scores in (torch.rand(2, 5), torch.zeros(2, 5), torch.randn(2, 5)):
        total = cascade.accumulate(cascade.accumulate(None, scores), scores)
        if tuple(total.shape) != (2, 5) or not bool(total.isfinite().all()):
            raise Broken(
                f"accumulated scores have shape {tuple(total.shape)}, finite: {bool(total.isfinite().all())}",
                "one finite number per token, for all-zero and negative scores too",
                method="accumulate",
            )


# Distillers


def _training(distiller: Distiller) -> tuple[CandidateLoss, nn.Module, nn.Module]:
    from ucc_search.builtin import default_components

    teacher = tiny_model()
    student, plan = tiny_compressed(default_components(), teacher, TOKENS_OUT)
    torch.manual_seed(3)
    for parameter in student.parameters():  # as after some training, or there is nothing to distil
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    loss = CandidateLoss(
        student.requires_grad_(True),
        teacher if distiller.needs_teacher else None,
        distiller,
        DistillContext(plan, plan.shape),
        label_smoothing=0.0,
        augment=AugmentConfig(),
    )
    return loss.train(), student, teacher


def _terms(loss: CandidateLoss, progress: float, batch: int = 4) -> dict[str, Tensor]:
    labels = torch.arange(batch) % 3
    return {k: v for k, v in loss(tiny_images(batch), labels, progress).items() if k != "task"}


def losses_are_scalars(distiller: Distiller) -> None:
    loss, _, _ = _training(distiller)
    for progress, batch in itertools.product((0.0, 0.5, 1.0), (1, 4)):
        for name, term in _terms(loss, progress, batch).items():
            if not isinstance(term, Tensor) or term.dim() or not bool(term.isfinite()):
                what = f"shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
                raise Broken(
                    f"losses gave {name}: {what} at progress {progress}, a batch of {batch}",
                    "return finite scalars (take the mean over the batch)",
                    method="losses",
                )


def losses_reach_the_student(distiller: Distiller) -> None:
    loss, student, teacher = _training(distiller)
    terms = _terms(loss, 0.5)
    if not terms:
        return
    total = sum(terms.values())
    if isinstance(total, Tensor) and total.requires_grad:
        total.backward()
    if not any(p.grad is not None and p.grad.any() for p in student.parameters()):
        raise Broken(
            "no term has a gradient for the student",
            "compute them from student.logits_BC or student.blocks, not detached",
            method="losses",
        )
    if any(p.grad is not None for p in teacher.parameters()):
        raise Broken("a term trains the teacher", "leave the teacher's tensors alone", method="losses")


def losses_repeat(distiller: Distiller) -> None:
    first, second = (_values(distiller) for _ in range(2))
    if first != second:
        raise Broken(
            "gave other losses for the same outputs", "draw no random numbers in losses", method="losses"
        )


def _values(distiller: Distiller) -> dict[str, float]:
    torch.manual_seed(0)
    return {k: float(v.detach()) for k, v in _terms(_training(distiller)[0], 0.5).items()}


def losses_in_half_precision(distiller: Distiller) -> None:
    loss, _, _ = _training(distiller)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bad = [k for k, v in _terms(loss, 0.5).items() if not bool(v.isfinite())]
    if bad:
        raise Broken(
            f"{bad[0]} is not finite under bfloat16 autocast", "compute it in .float()", method="losses"
        )


def blocks_exist(distiller: Distiller) -> None:
    plan = tiny_plan(tiny_model())
    for whose, wanted in zip(
        ("student", "teacher"), distiller.blocks(DistillContext(plan, plan.shape)), strict=True
    ):
        if any(not 0 <= b < 3 for b in wanted):
            raise Broken(
                f"asks for the {whose}'s blocks {list(wanted)} of 3",
                "indices from 0 to context.student.shape.depth - 1; raise ValueError for models that cannot be served",
                method="blocks",
            )


# Importance criteria


def _importance(criterion: Importance) -> Mapping[tuple[str, int], Tensor]:
    model = tiny_model()
    images = [tiny_images(6), tiny_images(2)] if criterion.needs_images else []
    return unit_scores(model, tiny_plan(model).shape, criterion, images)


def units_are_scored(criterion: Importance) -> None:
    try:
        _importance(criterion)
    except PluginError as error:
        raise Broken(
            str(error), "return scores_U, finite, one per unit of the group", method="score"
        ) from None


def unit_scores_repeat(criterion: Importance) -> None:
    first, second = _importance(criterion), _importance(criterion)
    if any(not torch.equal(first[k], second[k]) for k in first):
        raise Broken(
            "gave other scores for the same model and images",
            "draw random numbers from a generator of a fixed seed",
            method="score",
        )


def the_model_is_left_alone(criterion: Importance) -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    unit_scores(model, tiny_plan(model).shape, criterion, [tiny_images(4)] if criterion.needs_images else [])
    if any(not torch.equal(before[k], v) for k, v in model.state_dict().items()) or model.training:
        raise Broken("changed the model", "use probe.masked, and put everything back", method="score")


# Samplers

_DIMENSIONS = (
    Dimension("keep.0", 0.3, 1.0),
    Dimension("scorer.x.weight", 1e-3, 1.0, log=True),
    Dimension("scorer.x.count", 1, 9, step=1),
    Dimension("aggregator", choices=(0, 1, 2)),
)
_START = {"keep.0": 0.8, "aggregator": 1}


def _request(seed: int = 0, starts: Sequence[Mapping[str, Any]] = (_START,)) -> SamplerRequest:
    return SamplerRequest(_DIMENSIONS, (False,), seed, 12, starts, lambda point: dict(point))


def _searched(sampler: Sampler, request: SamplerRequest, count: int = 12) -> list[dict[str, Any]]:
    sampler = copy.deepcopy(sampler)  # an instance serves one study
    sampler.start(request)
    points: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    for index in range(count):
        point = dict(sampler.propose())
        points.append(point)
        waiting.append(point)
        if index % 3 == 0:
            continue  # several are asked for before the first is told
        while waiting:
            told = waiting.pop(0)
            value = None if len(points) % 5 == 0 else (told["keep.0"] - 0.6) ** 2
            sampler.tell(Measured(told, None if value is None else (value,), {"macs": -0.1}))
    return points


def proposals_are_points(sampler: Sampler) -> None:
    for point in (*_searched(sampler, _request()), *_searched(sampler, _request(starts=()))):
        for dimension in _DIMENSIONS:
            value = point.get(dimension.name)
            inside = (
                value in dimension.choices
                if dimension.choices is not None
                else isinstance(value, int | float) and dimension.low <= value <= dimension.high
            )
            whole = dimension.step != 1 or isinstance(value, int)
            if not inside or not whole:
                raise Broken(
                    f"proposed {dimension.name} = {value!r}, allowed is {dimension}",
                    "give every dimension a value within its bounds, on its step, or one of its choices",
                    method="propose",
                )


def the_seed_decides(sampler: Sampler) -> None:
    first, second, third = (_searched(sampler, _request(seed)) for seed in (0, 0, 1))
    if first != second:
        raise Broken("other proposals for the same seed", "draw from request.seed alone", method="start")
    if first == third and len({json.dumps(p, sort_keys=True) for p in first}) > 1:
        raise Broken("the same proposals for another seed", "draw from request.seed", method="start")


# Metrics


def _metric_plans() -> list[CompressionPlan]:
    whole = tiny_plan(tiny_model(), (16, 16, 16))
    return [
        whole,
        whole.replace(tokens_out=[10, 10, 10]),
        whole.replace(tokens_out=[10, 6, 6]),
        whole.replace(tokens_out=[10, 6, 6], mlp_hidden=32),
        whole.replace(tokens_out=[10, 6, 6], mlp_hidden=32, heads=1),
    ]


def prices_are_numbers(metric: Metric) -> None:
    parts = _components()
    for plan in _metric_plans():
        value = metric.value(plan, parts)
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise Broken(f"gave {value!r}", "return a finite number, 0 or more", method="value")
        if metric.value(plan, parts) != value:
            raise Broken(
                "gave another price for the same plan", "no measuring, no random numbers", method="value"
            )


def prices_fall_with_the_plan(metric: Metric) -> None:
    values = [metric.value(plan, _components()) for plan in _metric_plans()]
    for larger, smaller in itertools.pairwise(values):
        if smaller > larger + 1e-9 * abs(larger):
            raise Broken(
                f"a plan with fewer tokens or narrower layers costs more: {smaller} after {larger}",
                "the price must not fall when an integer of the plan grows; budgets are met by bisection",
                method="value",
            )


def _components() -> Components:
    from ucc_search.builtin import default_components

    return default_components()


# Observers

_ROW: Mapping[str, Any] = {
    "id": 0,
    "state": "ok",
    "method": "search",
    "rung": "train",
    "macs": 10,
    "accuracy": 0.5,
}
_FAILED: Mapping[str, Any] = {**_ROW, "id": 1, "state": "failed", "accuracy": None, "error": "out of memory"}


def events_are_taken(observer: Observer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        for _ in range(2):  # a run that is resumed starts again
            observer.run_started(path, {"name": "conformance", "search": {"trials": 2}})
            for row in (_ROW, _FAILED):
                given = dict(row)
                observer.trial_finished(given)
                if given != row:
                    raise Broken("changed the row", "copy it: dict(row)", method="trial_finished")
            observer.run_finished(path)


# Data sets and model families


def images_are_as_said(dataset: Dataset) -> None:
    from ucc_search.data import checked_images
    from ucc_search.errors import DataError

    try:
        checked_images(dataset.load(), type(dataset).__name__)
    except DataError as error:
        raise Broken(str(error), "see ucc_search.interfaces.ImageData", method="load") from None


def images_repeat(dataset: Dataset) -> None:
    for name, a, b in zip(ImageData._fields, dataset.load(), dataset.load(), strict=True):
        if not (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b):
            raise Broken(
                f"{name} differs between two calls of load()",
                "draw from a generator of a fixed seed, and sort what is read from folders",
                method="load",
            )


def images_of_the_test_are_new(dataset: Dataset) -> None:
    found = dataset.load()
    train, test = (
        {image.numpy().tobytes() for image in images}
        for images in (found.train_images_BCHW, found.test_images_BCHW)
    )
    if shared := len(train & test):
        raise Broken(
            f"{shared} test images are among the training images",
            "leave them out of one of the two: what is reported would not be what was not seen",
            method="load",
        )


def models_are_readable(family: Family) -> None:
    model = family.build(classes=7, channels=3, pretrained=False)
    if reasons := refusals(model):
        raise Broken(
            f"the model cannot be compressed: {reasons[0]}",
            "build timm's VisionTransformer or PyramidVisionTransformerV2 with timm's own blocks",
            method="build",
        )
    shape = shape_of(model)
    if (shape.classes, shape.channels) != (7, 3):
        raise Broken(
            f"the model has {shape.classes} classes and {shape.channels} channels, 7 and 3 were asked for",
            "pass classes and channels on (num_classes=classes, in_chans=channels)",
            method="build",
        )


def models_take_no_memory_on_meta(family: Family) -> None:
    with torch.device("meta"):
        model = family.build(classes=7, channels=3, pretrained=False)
    real = [name for name, p in model.named_parameters() if p.device.type != "meta"]
    if real:
        raise Broken(
            f"{real[0]} is made on {dict(model.named_parameters())[real[0]].device} although the meta device is asked for",
            "name no device in build; load weights only if pretrained",
            method="build",
        )


def identity_plans_change_nothing(family: Family) -> None:
    torch.manual_seed(0)
    model = family.build(classes=7, channels=3, pretrained=False).eval()
    shape = shape_of(model)
    images = torch.randn(2, 3, *shape.image_size)
    with torch.no_grad():
        if not torch.equal(compress(model, CompressionPlan.identity(shape))(images), model(images)):
            raise Broken(
                "the model that keeps everything gives other outputs",
                "no random numbers in eval mode",
                method="build",
            )
        if not shape.stages:
            half = [max(1, shape.tokens // 2)] * shape.depth
            small = compress(model, CompressionPlan.identity(shape).replace(tokens_out=half))
            if tuple(small(images).shape) != (2, 7):
                raise Broken("a model of half the tokens has other outputs", "return logits [B, classes]")


def costs_are_what_is_counted(family: Family) -> None:
    model = family.build(classes=7, channels=3, pretrained=False).eval()
    price = cost(CompressionPlan.identity(shape_of(model)))
    params = sum(p.numel() for p in model.parameters())
    counted, _ = counted_macs(model, torch.zeros(1, 3, *shape_of(model).image_size))
    if price.params != params or price.macs != counted:
        raise Broken(
            f"read are {price.macs} MACs and {price.params} parameters, torch counts {counted:.0f} and {params}",
            "something in the model is not timm's own: a layer beside the stem, the blocks and the head",
            method="build",
        )


CASCADE_CHECKS = (
    Check("shape", "a number of patch tokens after each block, above 0", schedules_are_counts),
    Check("monotone", "numbers fall over the blocks and with the strength", schedules_fall),
    Check("strength", "strength 0 prunes nothing", strength_zero_keeps_all),
    Check("determinism", "equal requests give equal schedules", schedules_repeat),
    Check("scores", "accumulated scores are finite, one per token", accumulates),
)
DISTILLER_CHECKS = (
    Check("blocks", "the blocks it asks for exist", blocks_exist),
    Check("shape", "losses are finite scalars, for a batch of 1 too", losses_are_scalars),
    Check("gradient", "losses train the student and not the teacher", losses_reach_the_student),
    Check("determinism", "equal outputs give equal losses", losses_repeat),
    Check("dtype", "losses are finite under bfloat16 autocast", losses_in_half_precision),
)
IMPORTANCE_CHECKS = (
    Check("shape", "finite scores, one for each unit", units_are_scored),
    Check("determinism", "equal models and images give equal scores", unit_scores_repeat),
    Check("model", "the model is left as it was", the_model_is_left_alone),
)
SAMPLER_CHECKS = (
    Check("points", "proposals have a value for every dimension, within bounds", proposals_are_points),
    Check("seed", "the seed, and nothing else, decides", the_seed_decides),
)
METRIC_CHECKS = (
    Check("number", "a finite price, 0 or more, the same when asked again", prices_are_numbers),
    Check("monotone", "fewer tokens and narrower layers never cost more", prices_fall_with_the_plan),
)
OBSERVER_CHECKS = (Check("events", "takes every event, and changes no row", events_are_taken),)
DATASET_CHECKS = (
    Check("shape", "uint8 images [B, C, H, H] with int64 labels from 0 to classes - 1", images_are_as_said),
    Check("determinism", "load() gives the same images each time", images_repeat),
    Check("test", "no test image is among the training images", images_of_the_test_are_new),
)
FAMILY_CHECKS = (
    Check(
        "readable",
        "the model is built of what can be compressed, for any classes and channels",
        models_are_readable,
    ),
    Check("meta", "the model can be built on the meta device", models_take_no_memory_on_meta),
    Check(
        "identity", "keeping everything changes nothing, and tokens can be cut", identity_plans_change_nothing
    ),
    Check("cost", "what is read of the model costs what torch counts", costs_are_what_is_counted),
)
