"""EfficientTrain as a callback; what every callback must do is checked in tests/callbacks/test_table.py."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn

from leaven.backbones import create
from leaven.callbacks import AttachError, NoEffectWarning, TrAct, attach
from leaven.curricula import ET, ET_PP, EfficientTrain, Schedule, Stage, fourier_crop, fourier_pad, resize
from leaven.curricula.resize import rescale_boxes
from leaven.pretext import Output, SparK

SCHEDULE = Schedule((Stage(0.5, 8, 4), Stage(0.75, 12, 2), Stage(1.0, 16)), "steps", (0.25, 0.5, 0.75, 1.0))


class Net(nn.Module):
    """Any size in, logits out; remembers the images that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


class Fixed(nn.Module):
    """Takes 16x16 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, 2)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return self.head(x.flatten(1))


def train(model: Any, optimizer: Any, images: Tensor) -> None:
    output = model(images)
    (output.loss if isinstance(output, Output) else output.square().mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_it_follows_the_schedule_update_by_update() -> None:
    model, images = Net(), torch.randn(2, 3, 16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    curriculum = EfficientTrain(SCHEDULE, image_size=16, batch_size=10)
    with attach(model, optimizer, curriculum, total_steps=8):
        model.seen.clear()  # what the model was tried on
        said = []
        for _ in range(8):
            said.append((curriculum.size, curriculum.strength, curriculum.batch_size))
            train(model, optimizer, images)
    sizes = [8, 8, 8, 8, 12, 12, 16, 16]
    assert [tuple(x.shape[-2:]) for x in model.seen] == [(s, s) for s in sizes]
    for x, side in zip(model.seen, sizes, strict=True):
        assert torch.equal(x, fourier_crop(images, side))
    assert said == [
        ((s, s), strength, batch)
        for s, strength, batch in zip(
            sizes, [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0], [40] * 4 + [20] * 2 + [10] * 2, strict=True
        )
    ]


def test_evaluation_sees_whole_images_and_small_ones_pass() -> None:
    model, images = Net(), torch.randn(2, 3, 16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, EfficientTrain(SCHEDULE, image_size=16), total_steps=8):
        model.eval()(images)
        assert model.seen[-1] is not None
        assert torch.equal(model.seen[-1], images)
        model.train()
        small = torch.randn(2, 3, 8, 8)
        model(small)
        assert torch.equal(model.seen[-1], small)
        with pytest.raises(
            ValueError, match=r"built for images of 16x16 and got 20x20: give it image_size=\(20, 20\)"
        ):
            model(torch.randn(2, 3, 20, 20))


def test_what_is_logged_is_what_the_update_saw() -> None:
    model, images = Net(), torch.randn(2, 3, 16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    curriculum = EfficientTrain(SCHEDULE, image_size=16)
    with attach(model, optimizer, curriculum, total_steps=8) as attached:
        logged = []
        for _ in range(8):
            model.eval()
            model(images)  # a validation that forgot no_grad
            model.train()
            train(model, optimizer, images)
            logged.append(attached.logs()["size"])
            assert logged[-1] == model.seen[-1].shape[-2]
    assert logged == [8, 8, 8, 8, 12, 12, 16, 16]


def test_training_in_eval_mode_is_told_and_not_logged_as_small() -> None:
    model, images = Net().eval(), torch.randn(2, 3, 16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, EfficientTrain(SCHEDULE, image_size=16), total_steps=8) as attached:
        with pytest.warns(
            NoEffectWarning, match="left images of 16x16 as they are at 8x8, .* call model.train"
        ):
            train(model, optimizer, images)
        assert attached.logs() == {"size": 16.0}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, optimizer, images)  # said once
            train(model, optimizer, torch.randn(2, 3, 8, 8))
        assert attached.logs() == {"size": 8.0}
    again = EfficientTrain(SCHEDULE, image_size=16)
    with attach(model, optimizer, again, total_steps=8), warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, torch.randn(2, 3, 8, 8))  # shrunk by the loader


@pytest.mark.parametrize(
    "op", ["lanczos", "bicubic", "bilinear", partial(fourier_crop, align="corner", nyquist="upstream")]
)
def test_the_op_is_what_was_asked_for(op: Any) -> None:
    model, images = Net(), torch.randn(2, 3, 16, 16)
    curriculum = EfficientTrain(SCHEDULE, op, image_size=16)
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), curriculum, total_steps=8):
        model(images)
    expected = resize(images, 8, op) if isinstance(op, str) else op(images, (8, 8))
    assert torch.equal(model.seen[-1], expected)


def test_rectangles_and_other_full_sizes() -> None:
    assert EfficientTrain(ET, image_size=(128, 192)).shapes() == [(96, 144), (112, 160), (128, 192)]
    assert EfficientTrain(ET, image_size=(128, 192), multiple=32).shapes() == [
        (96, 128),
        (96, 160),
        (128, 192),
    ]
    tall = EfficientTrain(ET_PP, image_size=(128, 192))
    assert {tall.size_at(t / 1000) for t in range(1001)} == set(tall.shapes())
    assert tall.speedup() == pytest.approx(
        1 / sum(h * w / (128 * 192) for h, w in (tall.size_at(t / 20000) for t in range(20000))) * 20000,
        rel=1e-3,
    )
    assert EfficientTrain(ET).speedup() == ET.speedup()
    assert EfficientTrain(ET).shapes() == [(160, 160), (192, 192), (224, 224)]
    assert EfficientTrain(ET, image_size=64, multiple=8).shapes() == [(48, 48), (56, 56), (64, 64)]


def test_the_learning_rate_follows_computation() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    curriculum = EfficientTrain(ET_PP, image_size=224, warmup=0.2)
    with attach(model, optimizer, curriculum, total_steps=400) as attached:
        factors = []
        for _ in range(400):
            factors.append(curriculum.lr_factor)
            attached.progress.step += 1
            curriculum.update()
    clocks = [ET_PP.clock(step / 400) for step in range(400)]
    peak = max(range(400), key=lambda step: factors[step])
    assert clocks[peak] == pytest.approx(0.2, abs=0.01)
    assert factors[0] == 0
    assert factors[-1] < 1e-3
    for factor, clock in zip(factors, clocks, strict=True):
        cosine = (1 + torch.cos(torch.tensor(torch.pi * (clock - 0.2) / 0.8))).item() / 2
        assert factor == pytest.approx(clock / 0.2 if clock < 0.2 else cosine, abs=1e-6)


def test_targets_go_along_as_a_plain_function() -> None:
    curriculum = EfficientTrain(SCHEDULE, image_size=16)
    images, boxes = torch.randn(2, 3, 16, 16), torch.tensor([[2.0, 4.0, 8.0, 16.0]])
    masks = torch.randint(0, 9, (2, 16, 16))
    assert torch.equal(curriculum(images), fourier_crop(images, 8))
    small, b, m = curriculum(images, boxes=boxes, masks=masks)
    assert small.shape == (2, 3, 8, 8)
    assert torch.equal(b, boxes / 2)
    assert m.shape == (2, 8, 8)
    assert curriculum(images, masks=masks)[1] is None


@pytest.mark.parametrize(
    "how", [{"align": "corner", "nyquist": "upstream"}, {"boundary": "reflect"}, {"align": "center"}]
)
def test_boxes_and_whole_images_go_by_the_alignment_of_the_crop(how: dict[str, Any]) -> None:
    op, images = partial(fourier_crop, **how), torch.randn(2, 3, 15, 15, dtype=torch.float64)
    schedule = Schedule((Stage(0.5, 7), Stage(1.0, 15)))
    boxes = torch.tensor([[2.0, 4.0, 8.0, 15.0]])
    _, small, _ = EfficientTrain(schedule, op, image_size=15)(images, boxes=boxes)
    align = how.get("align", "center")
    assert torch.equal(small, rescale_boxes(boxes, (15, 15), (7, 7), align))
    back = EfficientTrain(schedule, op, image_size=15, resize_back=True)
    once = back(images)
    torch.testing.assert_close(back(once), once)  # what has low frequencies alone stays, where it is


# --- backbones of one size ----------------------------------------------------------------------------------


class Auxiliary(nn.Module):
    """A classifier beside the trunk that runs in training alone and needs 9 pixels and more, as Inception's do."""

    def __init__(self, targets: bool = False) -> None:
        super().__init__()
        self.trunk, self.side, self.targets = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 7), targets

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        if not self.training:
            return y.mean((2, 3))
        if self.targets:
            raise ValueError("targets should not be None in training mode")
        return y.mean((2, 3)) + self.side(y).mean()


def test_sizes_are_tried_in_training_mode_too_where_it_runs_at_all() -> None:
    model = Auxiliary()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        AttachError, match=r"Auxiliary does not run on images of 8x8 \(Calculated padded input size"
    ):
        attach(model, optimizer, EfficientTrain(SCHEDULE, image_size=16, multiple=8), total_steps=2)
    detector = Auxiliary(targets=True)
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.1)
    attach(detector, optimizer, EfficientTrain(SCHEDULE, image_size=16, multiple=8), total_steps=2).remove()


def test_a_model_of_one_size_is_refused_before_anything_is_attached() -> None:
    model = Fixed()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AttachError, match="Fixed does not run on images of 8x8") as caught:
        attach(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            EfficientTrain(SCHEDULE, image_size=16),
            total_steps=8,
        )
    for part in ("dynamic_img_size=True", "strict_img_size=False", "resize_back=True"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not model._forward_pre_hooks
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_or_is_given_low_frequencies_at_its_size() -> None:
    model, images = Fixed(), torch.randn(2, 3, 16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, EfficientTrain(SCHEDULE, image_size=16, resize_back=True), total_steps=8):
        for _ in range(8):
            train(model, optimizer, images)
    assert all(x.shape == images.shape for x in model.seen)
    assert torch.equal(model.seen[4], fourier_pad(fourier_crop(images, 12), 16))
    spectrum = torch.fft.fft2(model.seen[0]).abs()
    assert spectrum[..., 5:12, :].max() < 1e-3  # nothing above half of 8
    assert torch.equal(model.seen[-1], images)


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow)]
)
def test_created_transformers_take_every_size(name: str) -> None:
    """`create` builds ViTs and Swins that take other sizes than their own; their parameters stay the same objects."""
    side = 224 if "swin" in name else 160
    model = create(name, image_size=side).train()
    parameters = list(model.parameters())
    keys = list(model.state_dict())
    curriculum = EfficientTrain(ET, image_size=side)
    with (
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), curriculum, total_steps=8),
        torch.no_grad(),
    ):
        model(torch.randn(1, 3, side, side))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    import timm

    plain = timm.create_model(name, num_classes=0, img_size=side)
    assert list(plain.state_dict()) == keys


def test_the_trial_leaves_no_trace() -> None:
    model = create("test_resnet").train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    with attach(
        model, torch.optim.SGD(model.parameters(), lr=0.1), EfficientTrain(image_size=64), total_steps=8
    ):
        assert torch.equal(before, torch.get_rng_state())
        assert model.training
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# --- resume, graphs, errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, 8))
def test_resume_in_every_stage_is_bit_equal(cut: int) -> None:
    """After any update; two of the eight fall on borders."""

    def start() -> tuple[Net, Any, Any]:
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return (
            model,
            optimizer,
            attach(model, optimizer, EfficientTrain(SCHEDULE, image_size=16), total_steps=8),
        )

    images = [torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    model, optimizer, attached = start()
    for i, batch in enumerate(images):
        if i == cut:
            saved = [
                {k: v.clone() for k, v in model.state_dict().items()},
                optimizer.state_dict(),
                attached.state_dict(),
            ]
            saved = torch.load(_written(saved), weights_only=True)
        train(model, optimizer, batch)
    again, optimizer_again, attached_again = start()
    for part, state in zip((again, optimizer_again, attached_again), saved, strict=True):
        part.load_state_dict(state)
    for batch in images[cut:]:
        train(again, optimizer_again, batch)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def _written(value: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


class Whole(nn.Module):
    """A network in a forward of its own: torch.compile knows PyTorch's containers by their file."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("container", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_no_more_graphs_than_shapes(in_place: bool, container: bool) -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    net: Any = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    if container and Version(torch.__version__) < Version("2.12"):
        pytest.skip("older PyTorch compiles no bare Sequential that has hooks")
    net = net if container else Whole(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model: Any = net
    if in_place:
        net.compile(backend=counter, dynamic=False)
    else:
        model = torch.compile(net, backend=counter, dynamic=False)
    with attach(model, optimizer, EfficientTrain(SCHEDULE, image_size=16), total_steps=40):
        for _ in range(40):
            train(model, optimizer, torch.randn(2, 3, 16, 16))
    assert counter.frame_count == 3
    torch.compiler.reset()


def test_another_schedule_cannot_be_resumed() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = attach(model, optimizer, EfficientTrain(SCHEDULE, image_size=16), total_steps=8).state_dict()
    other = attach(Net(), None, EfficientTrain(SCHEDULE, "bilinear", image_size=16), total_steps=8)
    state["progress"]["round"] = []
    with pytest.raises(ValueError, match="another curriculum"):
        other.load_state_dict(state)


def test_two_input_curricula_are_refused() -> None:
    model = Net()
    first, second = EfficientTrain(SCHEDULE, image_size=16), EfficientTrain(SCHEDULE, image_size=16)
    second.name = "second"
    with pytest.raises(AttachError, match="EfficientTrain and second both claim the slot 'input'"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), first, second, total_steps=8)
    assert not model._forward_pre_hooks


def test_bad_settings_are_one_line() -> None:
    with pytest.raises(ValueError, match="op must be one of"):
        EfficientTrain(op="nearest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warmup"):
        EfficientTrain(warmup=1.0)


# --- what a stranger tried ------------------------------------------------------------------------------------------


class Classifies(nn.Module):
    """An ordinary objective, which has no `.backbone` and cannot be called on images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.net(images), labels)


def test_an_objective_that_asks_for_labels_can_be_attached() -> None:
    model, labels = Classifies(), torch.tensor([0, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, EfficientTrain(SCHEDULE, image_size=16), total_steps=8):
        model(torch.randn(2, 3, 16, 16), labels).backward()
    assert model.net.seen[0].shape[-1] == 8


def test_spark_says_which_sizes_it_takes_when_it_is_attached() -> None:
    spark = SparK("resnet10t", decoder_width=32)
    optimizer = torch.optim.SGD(spark.parameters(), lr=0.1)
    for sizes, message in (
        (
            (64, 80, 96),
            r"SparK does not take images of 80x80 \(.*mask cell 32.*\): give it schedule.scaled\(96, 32\), or choose",
        ),
        (
            (32, 64, 96),
            r"SparK does not take images of 32x32 \(.*visible.*\): choose a schedule with other sizes",
        ),
    ):
        stages = tuple(Stage(end, size) for end, size in zip((0.5, 0.75, 1), sizes, strict=True))
        with pytest.raises(AttachError, match=message):
            attach(spark, optimizer, EfficientTrain(Schedule(stages), image_size=96), total_steps=4)
    for given, message in (
        ({"image_size": 128}, "give EfficientTrain multiple=32, or choose a schedule"),
        ({"image_size": 120, "multiple": 32}, "120x120.*give images whose sides are multiples of 32$"),
    ):
        with pytest.raises(AttachError, match=message):
            attach(spark, optimizer, EfficientTrain(ET, **given), total_steps=4)
    assert not spark._forward_pre_hooks
    with attach(spark, optimizer, EfficientTrain(ET, image_size=128, multiple=32), total_steps=4):
        assert torch.isfinite(spark(torch.randn(2, 3, 128, 128)).loss)


def test_a_function_as_op_is_known_again_in_another_process() -> None:
    op = partial(fourier_crop, align="corner", nyquist="upstream")
    state = EfficientTrain(ET, op, image_size=64).state_dict()
    assert "fourier_crop(align='corner', nyquist='upstream')" in state["schedule"]
    assert "0x" not in state["schedule"]
    EfficientTrain(
        ET, partial(fourier_crop, nyquist="upstream", align="corner"), image_size=64
    ).load_state_dict(state)


def test_a_second_curriculum_is_refused_in_a_second_attach_too() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = attach(model, optimizer, EfficientTrain(SCHEDULE, image_size=16), total_steps=8)
    with pytest.raises(AttachError, match=r"attached to this Net already.*both claim the slot 'input'"):
        attach(model, optimizer, EfficientTrain(SCHEDULE, image_size=16), total_steps=8)
    assert len(model._forward_pre_hooks) == 1
    first.remove()
    attach(model, optimizer, EfficientTrain(SCHEDULE, image_size=16), total_steps=8).remove()
    twice = [EfficientTrain(SCHEDULE, image_size=16) for _ in range(2)]
    with pytest.raises(AttachError, match="both claim the slot 'input'"):
        attach(model, optimizer, *twice, total_steps=8)


def test_images_that_never_have_the_size_of_the_stage_are_reported() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, EfficientTrain(SCHEDULE, image_size=16), total_steps=8):
        for _ in range(2):
            train(model, optimizer, torch.randn(2, 3, 12, 12))
        with pytest.warns(NoEffectWarning, match="leaves images of 12x12 as they are while it stands at 8x8"):
            model(torch.randn(2, 3, 12, 12))


def test_numbers_and_things_that_make_no_sense_are_named() -> None:
    for how, kind, message in (
        ({"schedule": "et"}, TypeError, "schedule must be a Schedule, such as leaven.curricula.ET, not 'et'"),
        ({"image_size": 64.0}, TypeError, "a whole number of pixels or two of them"),
        ({"image_size": None}, TypeError, "a whole number of pixels or two of them"),
        ({"multiple": 0}, ValueError, "multiple must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ):
        with pytest.raises(kind, match=message):
            EfficientTrain(**how)  # type: ignore[arg-type]
    idle = EfficientTrain(SCHEDULE, lambda x, size: x, image_size=16)
    with pytest.raises(ValueError, match="gave images of 16x16 for the size 8x8"):
        idle(torch.randn(1, 3, 16, 16))
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        attach(model, optimizer, EfficientTrain(SCHEDULE, image_size=16), total_steps=8),
        pytest.raises(TypeError, match=r"images of torch.uint8: normalise them"),
    ):
        model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_targets_may_be_lists_with_one_for_each_image() -> None:
    curriculum, images = EfficientTrain(SCHEDULE, image_size=16), torch.randn(2, 3, 16, 16)
    boxes = [torch.tensor([[0.0, 2.0, 8.0, 16.0]]), torch.zeros(0, 4)]
    small, fewer, none = curriculum(images, boxes=boxes)
    assert small.shape[-1] == 8
    assert fewer[0].tolist() == [[0.0, 1.0, 4.0, 8.0]]
    assert fewer[1].shape == (0, 4)
    assert none is None
    with pytest.raises(ValueError, match=r"boxes are \(..., 4\)"):
        curriculum(images, boxes=torch.zeros(2, 5))


def test_the_pass_by_which_another_callback_looks_at_the_model_is_not_training() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        net, curriculum = create("resnet10t", num_classes=3), EfficientTrain(ET, image_size=64)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with attach(net, optimizer, curriculum, TrAct(), total_steps=8) as attached:
            attached.load_state_dict(attached.state_dict())
            train(net, optimizer, torch.randn(2, 3, 64, 64))
            assert attached.progress.step == 1
            assert curriculum.logs()["size"] < 64
