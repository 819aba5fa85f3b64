"""What does not hold of a method that holds of the others: what is asked, of which method, and why it does not hold.

`EXCEPT` has the rows of the laws, by variant, and `ROWS` those of all other tests, by method. A row is seen to be one: the test
of it must fail.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import camfn
from tests.laws.laws import COMPOSED, VARIANTS


class Row(NamedTuple):
    asked: str
    method: str
    why: str
    sure: bool = True
    """Whether it fails each time. What is rounding alone may hold by luck, and is not tried."""


_NO_ATTENTION = "a network of convolutions has no attention"
_POLE = "where a channel sums to less than zero its weights have a pole, and rounding goes over it"

ROWS = (
    Row("a target that is no sum of logits", "cam", "it weighs channels by a class's row of the linear layer"),
    Row(
        "the derivative with a flat channel",
        "opti_cam",
        "it divides a slope by its size, and that of a flat channel is rounding",
        False,
    ),
    Row("no gradient of a flat map", "rise", "its map is not of the layer, and is not flat"),
    *(
        Row("a network of convolutions", method, _NO_ATTENTION)
        for method in camfn.METHODS
        if "attention" in camfn.METHODS[method].needs
    ),
    *(
        Row("a narrow dtype before the ReLU", method, _POLE, False)
        for method in ("grad_cam_pp", "smooth_grad_cam_pp", "xgrad_cam")
    ),
    Row("gradients of 1e+60 in float32", "full_grad", "the model's gradient at the input has no number"),
    Row("gradients of 1e-60 in float32", "full_grad", "the model's gradient at the input has no number"),
    Row("gradients of 1e+60 in float32", "opti_cam", "the gradient through all steps has no number"),
    Row("NaN that the model goes on from", "lift_cam", "it has no rule for `nan_to_num`"),
    Row("a channel that the model goes on without", "cam", "its linear layer would want all channels"),
    Row("a list of images and no classes", "cam", "its target is of classes"),
    Row("a list of images and no classes", "smooth_grad_cam_pp", "it adds noise to all inputs at once"),
)


def why(asked: str, method: str) -> str | None:
    """The reason for which it does not hold of the method; `None` where it holds."""
    return next((row.why for row in ROWS if (row.asked, row.method) == (asked, method)), None)


@contextlib.contextmanager
def unless(asked: str, method: str, when: bool = True) -> Iterator[None]:
    """What is inside holds; where there is a row for it, and `when`, it must not."""
    row = next((row for row in ROWS if when and (row.asked, row.method) == (asked, method)), None)
    if row is None:
        yield
        return
    if not row.sure:
        pytest.skip(row.why)
    try:
        yield
    except (AssertionError, camfn.CamError, camfn.CamWarning):
        return
    pytest.fail(f"{asked} holds of {method} after all; the row says: {row.why}")


# ------------------------------------------------------------------------------------------------------------- laws

_NOISY = [name for name, variant in VARIANTS.items() if variant.method == "ss_cam"]
_ONE_LAYER = [name for name, variant in VARIANTS.items() if variant.method == "cam"]
_EIGEN = [name for name, variant in VARIANTS.items() if variant.options.get("combine") == "eigen"]
_KERNEL = [name for name, variant in VARIANTS.items() if variant.method == "kpca_cam"]
_FEM = [name for name, variant in VARIANTS.items() if variant.method == "fem"]
_OF_G = ["eigen_grad_cam", "seg_eigen_cam"]
_BY_POSITION = ("grad_cam_elementwise", "hires_cam", "hires_cam, eigen", "layer_cam")
_PRODUCTS = ("grad_cam_elementwise", "shapley_cam", "xgrad_cam")
_PLUSES = ("grad_cam_pp", "grad_cam_pp, authors", "smooth_grad_cam_pp")
_CHANNELS_NOISE = "the noise belongs to the number of a channel"
_CHANNELS_NOISE_AND_DRAWS = "the noise is counted over draws and channels: one channel more moves that of the second draw"
_PIXELS_NOISE = "the noise belongs to a pixel, and is not flipped"
_NOISE_NOT_A_PATH = "its scores are of inputs with noise, all of one scale"
_NOT_A_SOFTMAX = "its weights are the scores themselves, and do not sum to one"
_CENTERED = "what all positions of a channel share has no part in a principal component"
_NOT_ADDITIVE = "the components of two maps do not add up to one of their sum"
_OF_THE_GRID = "what goes with what is asked of the positions that there are, and upsampling makes others"
_GROUPED = [name for name, variant in VARIANTS.items() if variant.method == "group_cam"]
_POLY = [name for name, variant in VARIANTS.items() if variant.method == "poly_cam"]
_SCALE_MATTERS = "its masks are not min-max of the channels: their zero counts"
_NEXT_TO_EACH_OTHER = "its groups are of channels that are next to each other"
_MEAN_OF_MAPS = "it is a mean of maps that have gone through these steps"
_GAINS = "its gains are of probabilities"
_STEPS = "its steps are of one size, whatever the slope's, and its weights a softmax over the channels that there are"
_OF_SCALES = ("zero_channel", "unread_channel", "activation_rescaled", "score_scaled", "scores_added")
_FROM_ZERO = "it sets the activation to zero, and moved, zero is another value"
_NOT_LINEAR = "it takes positive gradients alone"
_ALPHAS = "alphas depend on the score's size, and the weights on both"
_READS_THE_ACTIVATION = "its weights depend on the activation itself"
_UNEVEN_GRADIENT = "the gradient varies over positions, and so does its product with what does not"
_SCALED_FIRST = "its masks are scaled before they are upsampled, and upsampling does not reach all extremes"

EXCEPT = {
    **{("channel_permutation", name): _CHANNELS_NOISE for name in _NOISY},
    **{("zero_channel", name): _CHANNELS_NOISE_AND_DRAWS for name in _NOISY},
    **{("flip", name): _PIXELS_NOISE for name in _NOISY},
    ("activation_scaled", "ss_cam, activation"): "noise on the activation is the less, the larger the activation",
    ("between_the_channels", "score_cam, authors"): _NOT_A_SOFTMAX,
    ("between_the_channels", "score_cam, scores"): _NOT_A_SOFTMAX,
    ("logit_shift", "score_cam, scores"): "its weights are the logits themselves, and move with them",
    ("upsampled_layer", "score_cam"): _SCALED_FIRST,
    ("upsampled_layer", "score_cam, scores"): _SCALED_FIRST,
    ("upsampled_layer", "ss_cam"): _SCALED_FIRST,
    ("upsampled_layer", "ss_cam, input"): _SCALED_FIRST,
    ("upsampled_layer", "is_cam"): _SCALED_FIRST,
    ("upsampled_layer", "score_cam, pytorch-grad-cam"): "its masks are upsampled with aligned corners, a map never is",
    **{("activation_moved", name): _CENTERED for name in (*_EIGEN, "eigen_cam, centered", *_KERNEL)},
    **{("activation_moved", name): "what moves with the activation is its product with the gradient" for name in _OF_G},
    ("activation_moved", "eigen_cam"): "its weights are of the activation as it is, and go where it goes",
    ("activation_moved", "fem"): "its weights are the means of the channels, and move with them",
    **{("upsampled_layer", name): _OF_THE_GRID for name in ("eigen_cam", "eigen_cam, centered", *_KERNEL, *_FEM)},
    **{("flat_map", name): "gradients that vary make of channels that do not a product that does" for name in _OF_G},
    ("channel_permutation", "random_cam"): "a weight belongs to the number of a channel",
    ("zero_channel", "mean_cam"): "a mean is over one channel more",
    ("zero_channel", "kpca_cam"): "its gamma is one over the number of channels",
    ("between_the_channels", "score_cam, eigen"): _CENTERED,
    ("flat_map", "score_cam, authors"): "flat channels are left out: where there is no other, the call is an error",
    **{("path_of_inputs", name): _NOISE_NOT_A_PATH for name in _NOISY},
    **{("activation_moved", name): _FROM_ZERO for name in ("ablation_cam", "recipro_cam", "lift_cam")},
    ("logit_shift", "ablation_cam"): "its weights are shares of the logit",
    ("logit_shift", "recipro_cam"): "its maps are the logits themselves, and move with them",
    ("flat_map", "recipro_cam"): "a head that reads every position by itself tells them apart, where their values do not",
    **{("upsampled_layer", name): _OF_THE_GRID for name in _EIGEN if "gradients" not in VARIANTS[name].has},
    **{("scores_added", name): _NOT_ADDITIVE for name in _EIGEN if "gradients" in VARIANTS[name].has},
    ("flip", "smooth_grad_cam_pp"): _PIXELS_NOISE,
    ("flip", "cameras"): "at other sizes a strided kernel does not cover the input symmetrically",
    ("activation_moved", "cameras"): "it has no weights that belong to one activation",
    **{("activation_moved", name): _READS_THE_ACTIVATION for name in (*_PRODUCTS, *_PLUSES)},
    **{("flat_map", name): _UNEVEN_GRADIENT for name in ("cameras", *_BY_POSITION)},
    **{("score_scaled", name): _ALPHAS for name in _PLUSES},
    **{("scores_added", name): _NOT_LINEAR for name in ("grad_cam_elementwise", "layer_cam", *_PLUSES)},
    **{("layer_independent", name): "CAM is of the one layer before the pooling: several are an error" for name in _ONE_LAYER},
    ("flip", "rise"): "its random masks are not flipped",
    ("last_steps", "score_cam_pp"): "its gates are upsampled before their tanh",
    ("activation_moved", "score_cam_pp"): _SCALE_MATTERS,
    **{("upsampled_layer", name): _SCALED_FIRST for name in _POLY},
    **{("layer_independent", name): "a layer's map is made of those after it too" for name in _POLY},
    **{("activation_moved", name): _SCALE_MATTERS for name in _GROUPED},
    ("channel_permutation", "group_cam, two groups"): _NEXT_TO_EACH_OTHER,
    ("zero_channel", "group_cam, two groups"): _NEXT_TO_EACH_OTHER,
    ("unread_channel", "group_cam, two groups"): _NEXT_TO_EACH_OTHER,
    **{(name, grouped): _GAINS for name in ("score_scaled", "scores_added") for grouped in _GROUPED},
    **{(name, "opti_cam"): _STEPS for name in _OF_SCALES},
    (
        "activation_rescaled",
        "lift_cam",
    ): "its weights are contributions, which no scale changes",
    **{("scores_added", name): _NOT_ADDITIVE for name in _OF_G},
    **{("upsampled_layer", name): _SCALED_FIRST for name in ("ensemble(grad_cam, score_cam)", "integrate(score_cam)")},
    **{("last_steps", name): _MEAN_OF_MAPS for name in COMPOSED},
    ("flip", "augment(smooth(grad_cam))"): _PIXELS_NOISE,
}
"""Why a law does not hold for a variant. The tests see to it that it indeed does not."""
