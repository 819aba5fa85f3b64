"""The laws, tested: small mistakes put into camfn, each caught by a law, and each law catching one.

A mutation that no law sees is a law that is missing; a law that sees no mutation says nothing.
"""

import importlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import camfn
from tests.laws.laws import LAWS, VARIANTS, fixed_cases
from tests.oracles.exceptions import EXCEPT

pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ of \d+ maps:camfn.CamWarning")


class Mutation(NamedTuple):
    place: str  # module:attribute, where the code that runs looks the function up
    make: Callable[[Any], Any]  # from the function to the mistaken one
    caught: dict[str, str]  # by these laws, each with the variant that shows it


MUTATIONS: dict[str, Mutation] = {}


def mutation(place: str, **caught: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    def register(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        MUTATIONS[make.__name__] = Mutation(place, make, caught)
        return make

    return register


# ---------------------------------------------------------------------------------------------- weights and the map


@mutation(
    "formulas.weights:score_cam", batch_independent="score_cam", between_the_channels="is_cam", zero_channel="score_cam, paper"
)
def softmax_over_the_images(softmax):
    return lambda scores, *weighting: torch.softmax(scores, 0).mT


@mutation("formulas.weights:score_cam", target_independent="score_cam", between_the_channels="score_cam")
def softmax_over_the_targets(softmax):
    return lambda scores, *weighting: torch.softmax(scores, 2).mT


@mutation("formulas.weights:score_cam", logit_shift="ss_cam", between_the_channels="ss_cam", zero_channel="score_cam")
def scores_in_place_of_their_softmax(softmax):
    return lambda scores, *weighting: scores.mT


@mutation("formulas.maps:combine", activation_moved="cam", between_the_channels="score_cam")
def relu_before_the_sum(combine):
    return lambda weights, activations: combine(weights, activations.relu())


@mutation("formulas.maps:combine", activation_moved="score_cam, authors", between_the_channels="score_cam")
def mean_over_the_channels_in_place_of_the_sum(combine):
    return lambda weights, activations: combine(weights, activations) / activations.shape[1]


@mutation("formulas.maps:normalize", range="cam", last_steps="score_cam")
def normalised_over_the_batch(normalize):
    return lambda maps, dim: normalize(maps, tuple(range(maps.ndim)))


@mutation("formulas.maps:normalize", range="score_cam", scale_of_the_map="cam")
def epsilon_in_the_last_min_max(normalize):
    def unit(maps, dim):
        low, high = maps.amin(dim, keepdim=True), maps.amax(dim, keepdim=True)
        return (maps - low) / (high - low + 1e-8)

    return unit


@mutation("formulas.maps:normalize", flat_map="score_cam")
def flat_map_divided_by_its_range(normalize):
    def unit(maps, dim):
        low, high = maps.amin(dim, keepdim=True), maps.amax(dim, keepdim=True)
        return (maps - low) / (high - low)

    return unit


@mutation("formulas.maps:resize", last_steps="score_cam", upsampled_layer="cam")
def map_upsampled_with_aligned_corners(resize):
    return lambda maps, size, align_corners=False: resize(maps, size, align_corners=True)


@mutation("formulas.maps:resize", same_size="is_cam")
def resized_in_single_precision(resize):
    return lambda maps, size, align_corners=False: resize(maps.float(), size, align_corners=align_corners).double()


@mutation("methods._common:_on_grid", shape="ss_cam", last_steps="cam")
def map_always_at_the_size_of_the_input(on_grid):
    return lambda maps, subject, axes, drawing: on_grid(maps, subject, axes, drawing._replace(size="input"))


@mutation("layouts:read", shape="cam", flip="score_cam")
def grid_transposed(read):
    def transposed(*args, **options):
        found = read(*args, **options)
        return found._replace(grid=found.grid[::-1])

    return transposed


# --------------------------------------------------------------------------------------------------------- the masks


@mutation("formulas.masks:min_max", activation_scaled="score_cam", activation_moved="is_cam")
def mask_not_normalised(unit):
    return lambda values, eps, dtype: values


@mutation("formulas.masks:is_flat", activation_scaled="score_cam")
def flat_by_an_absolute_bound(is_flat):
    return lambda low, high, dtype: high - low <= 1e-3


@mutation("formulas.masks:resize", upsampled_layer="score_cam, paper")
def mask_upsampled_with_aligned_corners(resize):
    return lambda maps, size, align_corners=False: resize(maps, size, align_corners=True)


@mutation("formulas.masks:mask_of", flip="is_cam")
def mask_shifted_by_a_pixel(mask_of):
    return lambda *args: mask_of(*args).roll(1, -1)


@mutation("sweep.scoring:_rows_from", batch_independent="score_cam", image_permutation="ss_cam")
def mask_of_the_neighbouring_image(rows_from):
    def rolled(subject, read, *args):
        return rows_from(subject, read._replace(values=read.values.roll(1, 0)), *args)

    return rolled


@mutation("sweep.scoring:_rows_from", channel_permutation="score_cam", zero_channel="is_cam")
def mask_of_the_neighbouring_channel(rows_from):
    def rolled(subject, read, *args):
        return rows_from(subject, read._replace(values=read.values.roll(1, 1)), *args)

    return rolled


# ----------------------------------------------------------------------------------------------------- the gradients


@mutation("formulas.weights:grad_cam", activation_rescaled="grad_cam", score_scaled="grad_cam", scores_added="grad_cam")
def sign_of_the_gradient(grad_cam):
    return lambda gradients: grad_cam(gradients.sign())


@mutation("formulas.weights:grad_cam", scores_added="grad_cam")
def only_positive_gradients(grad_cam):
    return lambda gradients: grad_cam(gradients.relu())


@mutation("formulas.weights:grad_cam", unread_channel="grad_cam", zero_channel="grad_cam")
def weights_less_their_mean(grad_cam):
    def centred(gradients):
        weights = grad_cam(gradients)
        return weights - weights.mean(-1, keepdim=True)

    return centred


@mutation("formulas.weights:shapley_cam", activation_rescaled="shapley_cam")
def hessian_without_the_activation(shapley_cam):
    return lambda gradients, bends: shapley_cam(gradients, bends / (bends.abs().amax(-1, keepdim=True) + 1e-9))


@mutation("methods._common:gradients_of", target_independent="hires_cam", score_scaled="layer_cam")
def gradients_scaled_to_one(slopes_at):
    return lambda *args: [slopes / slopes.abs().amax((1, 2, 3), keepdim=True) for slopes in slopes_at(*args)]


@mutation("formulas.noise:noisy", deterministic="smooth_grad_cam_pp")
def noisy_inputs_from_the_global_generator(noisy):
    return lambda image, draws, seed, deviation: (image + deviation * torch.randn(image.shape[1:]) for _ in range(draws))


@mutation("formulas.maps:full_grad", batch_independent="full_grad")
def saliency_over_the_batch(saliency):
    def whole(part, size, *, each=False, align_corners=True):
        high = part.abs().amax()
        return camfn.maps.resize(part.abs().sum(1) / high, size, align_corners=align_corners)

    return whole


# --------------------------------------------------------------------------------------------------------- the noise


@mutation("sweep.scoring:noise_stream", deterministic="ss_cam")
def noise_from_the_global_generator(noise_stream):
    return lambda variation, channels, shape, device: lambda pairs: torch.randn(len(pairs), *shape)


@mutation("sweep.scoring:noise_stream", chunk_independent="ss_cam")
def noise_drawn_by_the_chunk(noise_stream):
    def stream(variation, channels, shape, device):
        def take(pairs):
            generator = torch.Generator().manual_seed(variation.seed)
            return torch.randn(len(pairs), *shape, generator=generator)

        return take

    return stream


@mutation("sweep.scoring:noise_stream", batch_independent="ss_cam, activation", image_permutation="ss_cam")
def noise_of_its_own_for_each_image(noise_stream):
    def stream(variation, channels, shape, device):
        generator = torch.Generator().manual_seed(variation.seed)
        return lambda pairs: torch.randn(len(pairs), *shape, generator=generator)

    return stream


@mutation("sweep.scoring:noise_stream", layer_independent="ss_cam")
def noise_goes_on_at_the_next_layer(noise_stream):
    begun = []

    def stream(variation, *args):
        begun.append(variation)
        return noise_stream(variation._replace(seed=len(begun)), *args)

    return stream


@mutation("formulas.noise:rise", deterministic="rise")
def cells_from_the_global_generator(random_cells):
    return lambda seed, *args: random_cells(int(torch.randint(1 << 30, ())), *args)


# --------------------------------------------------------------------------------------------- the sweep, the target


@mutation("sweep.scoring:in_chunks", chunk_independent="score_cam")
def last_incomplete_chunk_dropped(in_chunks):
    def dropped(kernel, rows_of, index, room, tick):
        found = in_chunks(kernel, rows_of, index, room, tick)
        found[len(index) // room.chunk * room.chunk :] = 0
        return found

    return dropped


@mutation("sweep.scoring:gather", zero_channel="score_cam")
def flat_channel_without_its_share_of_the_softmax(gather):
    def skipped(found, todo, *args):
        return gather(found, todo, *args).masked_fill(todo.flat[..., None], -torch.inf)

    return skipped


@mutation("sweep.scoring:gather", kin="ss_cam", zero_channel="is_cam")
def scores_summed_over_the_draws(gather):
    return lambda found, todo, variation: gather(found, todo, variation) * len(variation.scales)


@mutation("sweep.scoring:gather", vmap_equals_loop="score_cam, authors")
def flat_channel_not_left_out_where_it_was_swept(gather):
    def kept(found, todo, variation):
        return gather(found, todo, variation._replace(recipe=variation.recipe._replace(flat="zero")))

    return kept


@mutation("sweep.scoring:_rows_from", path_of_inputs="is_cam")
def every_step_of_the_path_at_full_scale(rows_from):
    def unscaled(subject, read, variation, size):
        return rows_from(subject, read, variation._replace(scales=(1.0,) * len(variation.scales)), size)

    return unscaled


@mutation("formulas.masks:is_cam", path_of_inputs="is_cam", kin="is_cam, linear")
def path_that_starts_at_zero(path_scales):
    return lambda num_samples, path: (0.0, *path_scales(num_samples, path)[:-1])


@mutation("sweep.kernel:mapped", chunk_independent="score_cam")
def mapped_form_with_the_target_of_the_neighbour(mapped):
    def neighbour(scorer, rule, state, x, targets, rows):
        return mapped(scorer, rule, state, x, targets.roll(1, 0), rows)

    return neighbour


@mutation("methods.score_cam:sweep_all", vmap_equals_loop="score_cam")
def swept_with_the_tensors_of_the_model_whatever_the_state(sweep_all):
    def swept(scoring):
        return sweep_all(scoring._replace(runner=scoring.runner._replace(state=scoring.forward.task.private.tensors)))

    return swept


@mutation("methods._common:resolve", image_permutation="cam")
def target_of_the_neighbour(resolve):
    def rolled(*args):
        score = resolve(*args)
        return score._replace(rows=score.rows.roll(1, 0), classes=score.classes.roll(1, 0))

    return rolled


@mutation("methods._common:resolve", batch_independent="is_cam", image_permutation="score_cam")
def target_of_the_first_image(resolve):
    def first(*args):
        score = resolve(*args)
        return score._replace(rows=score.rows[:1].expand_as(score.rows))

    return first


@mutation("targets.classes:_of_classes", class_permutation="score_cam")
def score_of_the_next_class(of_classes):
    def off_by_one(*told):
        *told, sample, row = told
        return of_classes(*told, sample, (row + 1) % sample.shape[-1])

    return off_by_one


@mutation("methods._common:read_layer", layer_independent="score_cam")
def layers_the_other_way_round(read):
    def other(forward, name, activation, layout):
        return read(forward, name, forward.activations[::-1][forward.layers.index(name)], layout)

    return other


@mutation("methods._common:resolve", knows_the_class="score_cam", class_permutation="cam")
def target_of_the_first_class(resolve):
    def first(*args):
        score = resolve(*args)
        return score._replace(rows=torch.zeros_like(score.rows))

    return first


# --------------------------------------------------------------------------------------- the process, threads, transforms


@mutation("methods._common:resolve", pure="cam")
def a_number_drawn_on_the_way(resolve):
    def drawing(*args):
        torch.rand(())
        return resolve(*args)

    return drawing


@mutation("formulas.weights:grad_cam", thread_safe="grad_cam")
def set_up_in_the_first_thread_alone(grad_cam):
    return lambda gradients: grad_cam(gradients) * (threading.current_thread() is threading.main_thread())


@mutation("formulas.maps:combine", gradcheck="grad_cam")
def activation_held_constant(combine):
    return lambda weights, activations: combine(weights, activations.detach())


# -------------------------------------------------------------------------------------------------------- the capture


@mutation("model.ports:_apply", activation_moved="score_cam")
def the_tensor_that_was_seen_is_handed_on(through):
    def spoiled(port, out):
        port.seen = through(port, out)
        return port.seen  # and an in-place ReLU writes to it

    return spoiled


@mutation("sweep.scoring:kernel_of", batch_independent="score_cam", chunk_independent="is_cam")
def batch_norm_in_train_mode(kernel_of):
    def training(subject, runner, *args):
        for module in runner.private.module.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        return kernel_of(subject, runner, *args)

    return training


# --------------------------------------------------------------------------------------------------------- the matrix


def _violations(law: str, name: str) -> list[str]:
    found = []
    for case in fixed_cases(VARIANTS[name]):
        try:
            LAWS[law](VARIANTS[name], case)
        except AssertionError as error:
            found.append(str(error))
    return found


CAUGHT = sorted({pair for mutated in MUTATIONS.values() for pair in mutated.caught.items()})


@pytest.mark.parametrize(("law", "name"), CAUGHT)
def test_law_holds_for_the_fixed_cases_without_a_mutation(law, name):
    assert (law, name) not in EXCEPT
    assert _violations(law, name) == []


@pytest.mark.parametrize("what", MUTATIONS)
def test_mutation_is_caught(what, monkeypatch):
    place, make, caught = MUTATIONS[what]
    module, _, attribute = place.partition(":")
    module = importlib.import_module(f"camfn.{module}")
    mistaken, calls = make(getattr(module, attribute)), []

    def counted(*args, **kwargs):
        calls.append(1)
        return mistaken(*args, **kwargs)

    monkeypatch.setattr(module, attribute, counted)
    for law, name in caught.items():
        calls.clear()
        assert _violations(law, name), f"{law} does not see it in {name}"
        assert calls, f"{place} was never called by {name}"


def test_each_mutation_is_caught_by_a_law_and_each_law_catches_one():
    assert all(mutated.caught for mutated in MUTATIONS.values())
    seen = {law for mutated in MUTATIONS.values() for law in mutated.caught}
    assert seen == set(LAWS), f"laws that catch nothing: {set(LAWS) - seen}"
