"""Compositions that average a method's maps over noisy inputs, a path of inputs, or flipped and scaled inputs."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from camfn._errors import CamError
from camfn._types import Maps
from camfn.compose._common import Clean, Question, composed, each_layer, joined, look_at, scaled
from camfn.formulas.noise import Units, deviation, noisy
from camfn.methods._common import check_noise, check_samples
from camfn.methods.registry import Made, Outcome, made

Part = tuple[Outcome, Maps]
"""A method's outcome for one input, and its maps as the mean uses them."""


def smooth(
    method: Callable[..., Maps],
    num_samples: int = 4,
    std: float = 0.05,
    seed: int | torch.Generator = 0,
    *,
    units: Units = "range",
) -> Callable[..., Maps]:
    """Return a method whose map is the mean of a method's maps of noisy inputs.

    `L = mean_i norm(L(x + e_i))` with `e_i ~ N(0, s^2)` for each value of the input, and `s = std (max x - min x)`.

    The mean is of **normalized** maps, so that no sample dominates. The cost is `num_samples` times that of the method, plus
    one forward pass.

    **Arguments**

    - `method`: a method of camfn, a `functools.partial` of one, or a composition.
    - `num_samples`: the number of noisy inputs.
    - `std`: the standard deviation of the noise, as a share of the range of each image. The paper takes 0.1 to 0.2, for
      gradients at the pixels. Maps of a layer lose their objects at as much.
    - `seed`: an int, or a `torch.Generator`, which is copied and not advanced. The images of a batch share their noise, each in
      its own range.
    - `units`: `"range"`, or `"input"` if `std` is in units of the input: `s = std`.

    **Returns** a method like any other. It takes the arguments that all methods share (see `camfn.score_cam`), and those of the
    given method. `masked=` selects the image among several inputs, and `axes=` names its axes. The target is resolved once, on
    the clean input: `None` means the class predicted there, for all samples.

    **Raises** `CamError` for invalid options, and for a function that is not a method.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> method = camfn.smooth(camfn.grad_cam, num_samples=2)
    >>> method(model, "1", torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 6, 6])

    Smilkov et al., SmoothGrad, 2017 (arXiv 1706.03825), whose mean is of gradients: this one is of maps.
    """
    check_noise("smooth", num_samples, std, seed, units)
    inner = made(method)

    def parts(clean: Clean) -> Iterator[Part]:
        for image in noisy(clean.image, num_samples, seed, deviation(clean.image, std, units)):
            outcome = clean.put_to(inner, image, normalize=True)
            yield outcome, outcome.maps

    return _mean_of("smooth", inner, parts)


def integrate(method: Callable[..., Maps], steps: int = 20, baseline: float | Tensor = 0.0) -> Callable[..., Maps]:
    """Return a method whose map is the mean of a method's maps along the straight path from a baseline to the input.

    `L = 1/N sum_i L(b + (x - b) i / N)` for i = 1..N with `N = steps`.

    The mean is of **raw** maps, and is normalized once. The cost is N times that of the method, plus one forward pass.

    With `camfn.grad_cam` and a baseline of zero, the map is Integrated Grad-CAM. As in its authors' code, the ReLU of each step
    comes before the sum, and A(b) is left out of `A - A(b)`. That code runs i over 0..N-1, which includes the baseline but not
    the input.

    **Arguments**

    - `method`: as in `camfn.smooth`.
    - `steps`: N.
    - `baseline`: a number, or a tensor that broadcasts to the input, in the input's own order of axes.

    **Returns** a method like any other, and **raises** `CamError`, both as `camfn.smooth`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> once = camfn.integrate(camfn.grad_cam, steps=1)
    >>> torch.equal(once(model, "1", x), camfn.grad_cam(model, "1", x))
    True

    Sattarzadeh et al., Integrated Grad-CAM, ICASSP 2021 (arXiv 2102.07805).
    """
    check_samples("integrate", steps)
    if not isinstance(baseline, (int, float, Tensor)):
        raise CamError(f"baseline must be a number or a tensor, found {type(baseline).__name__}")
    inner = made(method)

    def parts(clean: Clean) -> Iterator[Part]:
        image = clean.image
        start = _broadcast(baseline, clean) if isinstance(baseline, Tensor) else baseline
        for step in range(1, steps + 1):
            # Counted back from the input, so that the last step is exactly the input.
            outcome = clean.put_to(inner, image - (image - start) * (1 - step / steps), normalize=False)
            yield outcome, outcome.maps

    return _mean_of("integrate", inner, parts)


def _broadcast(baseline: Tensor, clean: Clean) -> Tensor:
    """Expand the baseline to the input, in the order of the input's own axes."""
    axes = clean.batch.pixels.axes
    image = axes.back(clean.image)
    try:
        return axes.first(baseline.to(image).expand_as(image))
    except RuntimeError as error:
        raise CamError(
            f"baseline has shape {tuple(baseline.shape)}, which cannot be broadcast to the input's {tuple(image.shape)}"
        ) from error


def augment(
    method: Callable[..., Maps], flips: Sequence[int] | None = None, factors: Sequence[float] = (0.9, 1.0, 1.1)
) -> Callable[..., Maps]:
    """Return a method whose map is the mean of a method's maps of flipped and scaled inputs, flipped back.

    The inputs are `f * flip(x)` for every subset of the axes `flips` and every factor f.

    The mean is of **normalized** maps. The default has six inputs for pictures, those of pytorch-grad-cam's `aug_smooth`. The
    cost is that of the method for each of these inputs, plus one forward pass.

    **Arguments**

    - `method`: as in `camfn.smooth`.
    - `flips`: the axes of the map to flip, as negative ints counted from the last: -1 flips left to right. `None` flips the
      width, if the input has one.
    - `factors`: the factors of the input's values.

    **Returns** a method like any other, and **raises** `CamError`, both as `camfn.smooth`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> method = camfn.augment(camfn.smooth(camfn.grad_cam))
    >>> method(model, "1", torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 6, 6])

    There is no paper. pytorch-grad-cam has it as `aug_smooth`.
    """
    asked, factors = None if flips is None else tuple(flips), tuple(factors)
    if asked and (not all(isinstance(axis, int) and axis < 0 for axis in asked) or len(set(asked)) < len(asked)):
        raise CamError(f"flips={asked} must be different negative axes: -1 flips left to right, -2 upside down")
    if not factors:
        raise CamError("factors is empty: (1.0,) leaves the input as it is")
    inner = made(method)

    def parts(clean: Clean) -> Iterator[Part]:
        letters = clean.batch.pixels.axes.spatial
        spatial, flips = len(letters), asked if asked is not None else (-1,) if letters.endswith("w") else ()
        subsets = [axes for count in range(len(flips) + 1) for axes in itertools.combinations(flips, count)]
        if any(-axis > spatial for axis in flips):
            raise CamError(f"flips={flips} of an input with {spatial} spatial axes")
        for axes, factor in itertools.product(subsets, factors):
            outcome = clean.put_to(inner, clean.image.flip(axes) * factor, normalize=True)

            def back(found: Tensor, axes: tuple[int, ...] = axes) -> Tensor:
                if axes and clean.axes_of(found) != spatial:
                    raise CamError(
                        f"the input has {spatial} spatial axes and its map {clean.axes_of(found)}: which of them is flipped is "
                        "not known; pass flips=() for no flips"
                    )
                return found.flip(axes)

            yield outcome, each_layer(back, outcome.maps)

    return _mean_of("augment", inner, parts)


def _mean_of(name: str, method: Made, parts: Callable[[Clean], Iterator[Part]]) -> Callable[..., Maps]:
    """Return the method whose map is the mean of the parts' maps."""

    def answer(question: Question) -> Outcome:
        clean = look_at(question)
        outcomes, found = zip(*parts(clean))

        def mean(*each: Tensor) -> Tensor:
            total = sum(each[1:], each[0]) / len(each)
            return scaled(total, clean.axes_of(total), question.normalize)

        return joined(each_layer(mean, *found), outcomes, clean.outcome)

    return composed(f"{name}({method.name})", answer, method.of_layer, method.needs)
