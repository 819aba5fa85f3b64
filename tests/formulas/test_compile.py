"""Every method's formula is one graph of torch.compile, and gives the same compiled as not."""

import pytest
import torch

import camfn
from camfn import _compat
from camfn.formulas.maps import Resized
from camfn.formulas.masks import Rule
from camfn.formulas.weights import with_draw
from tests.oracles.closeness import close

can_compile = pytest.mark.skipif(bool(_compat.can_compile()), reason=f"{_compat.can_compile()}")

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


A, G, S = drawn(2, 4, 6), drawn(2, 3, 4, 6), drawn(2, 4, 3)  # activations, gradients, scores
GRID, SIZE = (2, 3), (4, 6)
FLAT = torch.zeros(2, 4, dtype=torch.bool)
ATTENTION, PULLED = [drawn(2, 2, 5, 5).softmax(-1) for _ in range(2)], [drawn(2, 2, 5, 5) for _ in range(2)]
RULE = Rule(SIZE, torch.float64, noise="mask")
WEIGHTS = S.mT

ARGUMENTS = {
    "cam": (lambda matrix: matrix[None], drawn(3, 4)),
    "mean_cam": (A,),
    "fem": (A,),
    "random_cam": (drawn(4), A),
    "eigen_cam": (A,),
    "kpca_cam": (A,),
    "eigen_grad_cam": (G, A),
    "seg_eigen_cam": (G, A),
    "grad_cam": (G,),
    "grad_cam_pp": (G, A),
    "smooth_grad_cam_pp": (with_draw(None, G), 1, A),
    "xgrad_cam": (G, A),
    "shapley_cam": (G, drawn(2, 3, 4, 6)),
    "hires_cam": (G,),
    "layer_cam": (G,),
    "grad_cam_elementwise": (G, A),
    "full_grad": (drawn(2, 4, 2, 3), SIZE),
    "cameras": ([Resized(A, G, GRID), Resized(2 * A, G, GRID)], torch.full((2, 2), 0.5, dtype=torch.float64), SIZE),
    "ablation_cam": (S, drawn(2, 3)),
    "recipro_cam": (GRID, torch.tensor([0, 4]), torch.tensor([0.5, 0.25, 0.0])),
    "lift_cam": (G, A),
    "score_cam": (S,),
    "ss_cam": (RULE, drawn(*GRID), drawn(*SIZE)),
    "is_cam": (4, "linear"),
    "group_cam": (drawn(2, 3 * 2 + 1, 3), 2),
    "score_cam_pp": (WEIGHTS, A, GRID, SIZE),
    "poly_cam": (drawn(2, 8, 3), drawn(2, 3), FLAT),
    "opti_cam": (lambda u: torch.cos(u), drawn(2, 4), 3),
    "rise": (drawn(2, 5, 3), drawn(5, 2, 2).abs(), torch.tensor([[0, 1], [1, 0], [0, 0], [1, 1], [2, 2]]), SIZE, 0.5),
    "attention_rollout": (ATTENTION, drawn(2, 5).softmax(-1)),
    "gradient_attention": (ATTENTION, PULLED, drawn(2, 5).softmax(-1)),
    "legrad": (PULLED,),
    "ag_cam": (ATTENTION, PULLED),
}


def test_every_method_has_arguments():
    assert set(ARGUMENTS) == set(camfn.METHODS)


@can_compile
@pytest.mark.parametrize("name", camfn.METHODS)
def test_a_formula_is_one_graph(name):
    formula, arguments = camfn.METHODS[name].formula, ARGUMENTS[name]
    torch._dynamo.reset()
    found, expected = torch.compile(formula, backend="eager", fullgraph=True)(*arguments), formula(*arguments)
    pairs = list(zip(_tensors(found), _tensors(expected)))
    assert pairs or name == "is_cam"
    for one, other in pairs:
        close(one, other)
    if name == "is_cam":
        assert found == expected
    torch._dynamo.reset()


def _tensors(found) -> list[torch.Tensor]:
    parts = found if isinstance(found, tuple) else (found,)
    return [part for part in parts if isinstance(part, torch.Tensor)]
