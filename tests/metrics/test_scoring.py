"""The score function, against plain forwards of the model."""

import pytest
import torch
from torch import Tensor, nn

import camfn
from camfn import CamError, metrics, targets
from camfn.testing.threads import at_once
from tests.oracles.closeness import close
from tests.oracles.foldable import Net, images, pair, seeded
from tests.oracles.networks import inputs
from tests.oracles.networks import small_net as training_net


def small_net(**options):
    return training_net(**options).eval()


def rows_of(x: Tensor, k: int = 3, seed: int = 5) -> Tensor:
    """The images k times over, each with other pixels set to zero."""
    keep = torch.rand(k * len(x), 1, *x.shape[2:], generator=torch.Generator().manual_seed(seed)) > 0.4
    return x.repeat(k, *(1,) * (x.ndim - 1)) * keep.to(x.dtype)


TARGETS = {
    "predicted": None,
    "number": 3,
    "each": [1, 4],
    "table": torch.tensor([[1, 0], [2, 4]]),
    "all": "all",
    "top": targets.top(2),
    "probability": targets.probability(),
    "contrast": targets.logit(1) - 0.5 * targets.probability([0, 3]),
    "function": lambda y: y[1] - y[2],
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_scores_are_those_of_the_target_on_plain_forwards(target, dims):
    model, x = small_net(dims=dims), inputs(dims=dims)
    score, made = metrics.score_function(model, x, target), rows_of(x)
    settled = targets.resolve(target, model(x), 2, x.device)
    wanted = [targets.score_rows(settled.of, model(part), settled.rows) for part in made.split(2)]
    close(score(made), torch.cat(wanted).detach())
    close(score.clean, score(x))
    assert score.single == settled.single
    assert (score.classes is None) == (settled.classes is None)
    assert score.classes is None or torch.equal(score.classes, settled.classes)


def test_the_class_is_the_one_predicted_on_x():
    x = inputs()
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 5, bias=False, dtype=x.dtype))
    score = metrics.score_function(model, x)
    assert not (model(-x).argmax(1) == model(x).argmax(1)).any()
    close(score(-x)[:, 0], -model(x).amax(1).detach())


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100, "auto"])
def test_chunks_and_neighbors_change_nothing(chunk):
    model, x = small_net(), inputs(3)
    made = rows_of(x, 5)
    found = metrics.score_function(model, x, 2, chunk_size=chunk)(made)
    close(found, model(made).detach()[:, 2:3])
    for image in range(3):
        close(found[image::3], metrics.score_function(model, x[image : image + 1], 2)(made[image::3]))


def test_a_state_is_swapped_in_and_the_models_is_left():
    model, x = small_net(), inputs()
    other = {name: tensor.clone() for name, tensor in small_net(seed=7).state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = rows_of(x)
    close(metrics.score_function(model, x, 1, state=other)(made), small_net(seed=7)(made).detach()[:, 1:2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_rewritten_model_gives_the_same_scores_in_every_call(monkeypatch):
    monkeypatch.setattr(camfn.sweep.runner, "_REUSED", 0)
    model, x = seeded(Net(pair(padding=1))).eval(), images(3)
    score, made = metrics.score_function(model, x, "all"), rows_of(x, 12)
    first = score(made)
    assert score._runner.merged
    assert score._runner.channels_last
    close(first, model(made).detach())
    assert torch.equal(score(made), first)
    assert torch.equal(metrics.score_function(model, x, "all")(made), first)


class Two(nn.Module):
    """An image and a vector for each image, or one for all."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, image, by):
        return self.net(image) * by


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("as_mapping", [False, True])
def test_companion_inputs_go_with_their_images(as_mapping, shared):
    model, image = Two(), inputs(3)
    by = torch.rand(1 if shared else 3, 5, generator=torch.Generator().manual_seed(1), dtype=image.dtype)
    x = {"by": by, "image": image} if as_mapping else (image, by)
    score, made = metrics.score_function(model, x, "all"), rows_of(image)
    assert score.x.shape == image.shape
    close(score(made), model(made, by if shared else by.repeat(3, 1)).detach())


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        return self.net(x.movedim(-1, 1))


def test_inputs_have_the_channels_first_whatever_the_model_takes():
    model, x = ChannelsLast(), inputs()
    score = metrics.score_function(model, x.movedim(1, -1), 2, axes="nhwc")
    assert torch.equal(score.x, x)
    made = rows_of(x)
    close(score(made), model(made.movedim(1, -1)).detach()[:, 2:3])


class Centered(nn.Module):
    """Subtracts the mean of its batch: its samples are not independent."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        y = self.net(x)
        return y - y.mean(0)


def test_a_model_whose_samples_depend_on_their_batch_is_run_on_one_input_at_a_time():
    model, x = Centered(), inputs(1)
    score = metrics.score_function(model, x, "all")
    with pytest.warns(camfn.CamWarning, match="depends on the others of its batch"):
        found = score(rows_of(x))
    assert not found.any()


def test_threads_share_a_score_function():
    model, x = small_net(), inputs()
    score, made = metrics.score_function(model, x, "all"), rows_of(x)
    alone = metrics.score_function(model, x, "all")(made)
    assert all(torch.equal(found, alone) for found in at_once([lambda: score(made)] * 6))


def test_scores_have_no_graph_and_take_inputs_of_every_kind():
    model, x = small_net(), inputs()
    score = metrics.score_function(model, x.clone().requires_grad_(), 1)
    made = rows_of(x)
    assert not score(made.requires_grad_()).requires_grad
    with torch.inference_mode():
        close(score(rows_of(x)), score(made))
    close(score(made.float()), score(made), units=2**32)


def test_the_caller_may_train_the_model_in_train_mode():
    model, x = small_net().train(), inputs()
    found = metrics.score_function(model, x, "all")(x)
    assert model.training
    close(found, model.eval()(x).detach())


def test_what_a_score_function_does_not_take():
    model, x = small_net(), inputs()
    score = metrics.score_function(model, x)
    for wrong in (x[:1], x[:, :1], torch.cat([x, x[:1]]), x[:0], x[..., :4]):
        with pytest.raises(
            CamError, match=r"inputs have shape \(.*\): the score function of x=\(2, 3, 8, 8\) takes \(k \* 2, "
        ):
            score(wrong)
    for chunk in (0, -1, 2.0, True, "all"):
        with pytest.raises(CamError, match="chunk_size="):
            metrics.score_function(model, x, chunk_size=chunk)


class Logarithm(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        return self.net(x) + torch.log(x.flatten(1).abs().amax(1, keepdim=True))


def test_a_score_that_is_not_finite_is_named():
    x = inputs()
    score = metrics.score_function(Logarithm(), x, 0)
    with pytest.raises(CamError, match="the score of input 3 is not finite; no layer's output shows it"):
        score(torch.cat([x, x[:1], 0 * x[1:]]))
