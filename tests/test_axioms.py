"""The page of axioms is what is measured."""

import pytest
import torch

from tests import axioms

pytestmark = pytest.mark.filterwarnings("ignore::camfn.CamWarning")


def test_the_page_is_what_is_measured():
    assert axioms.PAGE.read_text() == axioms.page()


def test_the_rewritten_network_is_the_same_function():
    for seed in axioms.SEEDS:
        net, x = axioms.Net(seed), torch.randn(2, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(axioms.Rewritten(net)(x), net(x))


def test_the_saturated_score_is_flat_where_it_has_changed():
    one = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    net = axioms.Saturated()
    before = float(net(one)[0, 0].detach())
    one[0, 0, 2, 3] = 2
    one.requires_grad_()
    after = net(one)[0, 0]
    assert float(after.detach()) - before == pytest.approx(1)
    assert float(torch.autograd.grad(after, one)[0][0, 0, 2, 3]) == 0


def test_an_axiom_can_fail():
    """A map of ones, whatever is asked, violates what speaks of the score."""

    def ones(model, x, target):
        return torch.ones(len(x), 6, 6, dtype=torch.float64)

    net, x = axioms.Net(0), torch.randn(2, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    broken = {axiom.__name__ for axiom in axioms.AXIOMS if axiom(ones, net, x) >= axioms.CLOSE}
    assert broken == {"completeness", "completeness_on_a_linear_head", "linearity"}
